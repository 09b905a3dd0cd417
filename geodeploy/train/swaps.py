"""Which bands of a scene look swapped. A suspicion, from how bright and how alike the bands are."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from geodeploy.bands import WAVELENGTH_UM

_GAIN = 0.1
"""By how much a swap raises the correlations of neighbours, summed. Of six real scenes in their right
order no swap reached 0.04."""
_RATIO = 0.6
"""What a swap leaves of the distance to other scenes. Of six real scenes no swap left less than 0.9."""


def profile(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """How bright each band is against the others, whatever the light."""
    logs = np.log(mean)
    return np.asarray(logs - logs.mean())


def correlation_of(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The correlation of each two bands, (C, C)."""
    deviation = np.sqrt(covariance.diagonal())
    return np.asarray(covariance / np.outer(deviation, deviation))


def swap_by_wavelength(
    correlation: NDArray[np.float64], bands: Sequence[str]
) -> tuple[int, int] | None:
    """The two bands whose swap makes neighbours in wavelength more alike, of sets that reach into SWIR.

    Among infrared bands alone nothing is told: bare ground, plants and water differ too much in them.
    """
    known = sorted(
        (number for number, band in enumerate(bands) if band in WAVELENGTH_UM),
        key=lambda number: WAVELENGTH_UM[bands[number]],
    )
    if not known or WAVELENGTH_UM[bands[known[-1]]] < 1.5:
        return None

    def likeness(order: Sequence[int]) -> float:
        return float(correlation[order[:-1], order[1:]].sum())

    visible = [number for number in known if WAVELENGTH_UM[bands[number]] < 0.7]
    gains = {
        (one, other): likeness(_swapped(known, one, other)) - likeness(known)
        for one, other in combinations(known, 2)
        if one in visible
    }
    best = max(gains, key=lambda pair: gains[pair], default=None)
    return best if best is not None and gains[best] > _GAIN else None


def swap_by_others(
    profile: NDArray[np.float64],
    correlation: NDArray[np.float64],
    usual_profile: NDArray[np.float64],
    usual_correlation: NDArray[np.float64],
) -> tuple[int, int] | None:
    """The two bands whose swap brings a scene much nearer to the usual one."""
    upper = np.triu_indices(len(profile), 1)

    def distance(order: Sequence[int]) -> float:
        of_correlation = (correlation[np.ix_(order, order)] - usual_correlation)[upper]
        of_profile = profile[order] - usual_profile
        return float(np.square(of_correlation).sum() + np.square(of_profile).sum())

    plain = list(range(len(profile)))
    found = {pair: distance(_swapped(plain, *pair)) for pair in combinations(plain, 2)}
    best = min(found, key=lambda pair: found[pair], default=None)
    return best if best is not None and found[best] < _RATIO * distance(plain) else None


def _swapped(order: Sequence[int], one: int, other: int) -> list[int]:
    exchanged = {one: other, other: one}
    return [exchanged.get(number, number) for number in order]
