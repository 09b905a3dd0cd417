"""Pixels outside what the recipe says real data lies in: left out as no data, counted and told of."""

# C band, H row, W column

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geodeploy.raster import Raster, Stripe
from geodeploy.train.recipe import Recipe

_MARGIN = 1e-3
"""Of the range, at either end: a saturated 255 times 0.003922 is a little more than 1."""
_KEPT = 64
"""Values that are counted on from one stripe to the next."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What real data lies in, for every band of every date, in units."""

    low: NDArray[np.float32]
    """(C, 1, 1)"""
    high: NDArray[np.float32]

    def hold(self, pixels_CHW: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which pixels lie within in all bands, (H, W)."""
        return np.logical_not(self.outside(pixels_CHW).any(axis=0))

    def outside(self, pixels_CHW: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which values do not, (C, H, W)."""
        return (pixels_CHW < self.low) | (pixels_CHW > self.high)

    def leave_out(self, stripe: Stripe, raster: Raster) -> Stripe:
        """The ``stripe`` of ``raster`` without what lies outside."""
        valid = stripe.valid & self.hold(raster.to_units(stripe.stored))
        return replace(stripe, valid=valid)


def limits_of(recipe: Recipe) -> Limits:
    """Those of ``data.valid_range``."""
    low, high = np.array(recipe.data.valid_ranges * recipe.model.timesteps).T[
        ..., np.newaxis, np.newaxis
    ]
    margin = _MARGIN * (high - low)
    return Limits((low - margin).astype(np.float32), (high + margin).astype(np.float32))


class Outside:
    """The sum, growing stripe by stripe, of an image's valid pixels outside its limits."""

    def __init__(self) -> None:
        self.pixels = 0
        self._valid = 0
        self._values = 0
        self._stored: Counter[float] = Counter()

    def add(self, stripe: Stripe, raster: Raster, limits: Limits) -> NDArray[np.bool_]:
        """Count those of ``stripe``; which pixels of it are valid and within, (rows, width)."""
        odd = limits.outside(raster.to_units(stripe.stored)) & stripe.valid
        outside = odd.any(axis=0)
        self._valid += int(stripe.valid.sum())
        if outside.any():
            self.pixels += int(outside.sum())
            values, counts = np.unique(stripe.stored[odd], return_counts=True)
            self._values += int(counts.sum())
            self._stored.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            self._stored = Counter(dict(self._stored.most_common(_KEPT)))
        return stripe.valid & ~outside

    def __str__(self) -> str:
        told = (
            f"{self.pixels:,} of {self._valid:,} pixels lie outside data.valid_range, and are left out "
            "as if they held no data."
        )
        value, count = self._stored.most_common(1)[0]
        if 2 * count > self._values:
            return (
                f"{told} Stored is mostly {value:g}, probably nodata that is not marked: mark it with "
                f"gdal_edit.py -a_nodata {value:g}, or widen data.valid_range if it is real."
            )
        return (
            f"{told} Check the scale, mark what is nodata, or widen data.valid_range if they are real."
        )


def tell_of_outside(counted: Sequence[tuple[str, Outside]]) -> str | None:
    """One line about the first of the images, by name, that has such pixels; None if none has."""
    found = [f"{name}: {outside}" for name, outside in counted if outside.pixels]
    if not found:
        return None
    more = f" (And so in {len(found) - 1} more images.)" if len(found) > 1 else ""
    return found[0] + more
