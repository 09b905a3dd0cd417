"""The range of the training pixels: exact quantiles of any number of them, in little memory."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geodeploy.train.data import LabelledScene, training_pixels

_HALVES = 2**16
"""What half the bits of a float32 can be."""
_RISING = np.arange(_HALVES)
_NEGATIVE, _POSITIVE = _RISING[_HALVES // 2 :], _RISING[: _HALVES // 2]
# Read as whole numbers, the bits of IEEE 754 numbers sort as the numbers do, but for the sign in the
# highest bit: what has it comes first, and in falling order.
_UPPER_ORDER = np.concatenate([_NEGATIVE[::-1], _POSITIVE])
"""The upper halves, from that of the lowest number to that of the highest."""


def compute_seen(scenes: Sequence[LabelledScene], bands: int) -> tuple[tuple[float, float] | None, ...]:
    """What all but a thousandth of the valid training pixels lie in at either end, for each band.

    None where the two ends are one number. Exact, however far off single pixels are: the upper 16 bits
    of all numbers are counted in one reading, in a second the lower 16 of those that share the upper
    ones with an end. Memory: a stripe, and 1.5 MiB a band.
    """
    upper = np.zeros((bands, _HALVES), np.int64)
    for pixels in training_pixels(scenes, bands):
        for band, bits in enumerate(pixels.view(np.uint32)):
            upper[band] += np.bincount(bits >> 16, minlength=_HALVES)
    count = int(upper[0].sum())
    if count == 0:
        return (None,) * bands
    ranks = (count // 1000, count - 1 - count // 1000)
    ends = [[_find(row, _UPPER_ORDER, rank) for rank in ranks] for row in upper]
    lower = np.zeros((bands, 2, _HALVES), np.int64)
    for pixels in training_pixels(scenes, bands):
        for band, bits in enumerate(pixels.view(np.uint32)):
            for end, (half, _) in enumerate(ends[band]):
                inside = bits[bits >> 16 == half]
                lower[band, end] += np.bincount(inside & (_HALVES - 1), minlength=_HALVES)
    found = np.zeros((bands, 2), np.uint32)
    for band, pair in enumerate(ends):
        for end, (half, rank) in enumerate(pair):
            order = _RISING[::-1] if half in _NEGATIVE else _RISING
            found[band, end] = half * _HALVES + _find(lower[band, end], order, rank)[0]
    # By way of text: the shortest number that float32 takes for the same. Plus 0: never -0.
    values = [[float(str(value)) + 0.0 for value in pair] for pair in found.view(np.float32)]
    return tuple((low, high) if low < high else None for low, high in values)


def _find(counts: NDArray[np.int64], order: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The one of ``order`` in which the thing of ``rank``, from 0, is counted, and the rank within."""
    sums = counts[order].cumsum()
    place = int(np.searchsorted(sums, rank, side="right"))
    found = int(order[place])
    return found, rank - int(sums[place] - counts[found])
