"""Count how much of a scene lies outside what its model saw in training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geodeploy.raster import Raster, Stripe
from geodeploy.report import UnseenShare
from geodeploy.spec import Band

_STEP = 7
"""Rows and columns from one pixel that counts to the next: no divisor of the 8 of JPEG's blocks, nor of
the 16 or 10 detectors of a scanner, so that each of those is met alike."""
_SMALL = 2**20
"""Rasters of up to so many pixels are counted whole: in a few milliseconds, without chance."""
_MARGIN = 1e-5
"""Of the range, at either end: sensors saturate, and scaling rounds, so that many pixels of a scene may
miss the very number that as many had in training by its last bits."""


class UnseenCount:
    """The sum, growing stripe by stripe, of the pixels outside what the model saw in training.

    Which pixels count depends on their row and column in the raster alone: however it is read and
    tiled, the sum is the same.

    Args:
        raster: Where the stripes come from.
        bands: Those of the model, in order.
    """

    def __init__(self, raster: Raster, bands: Sequence[Band]) -> None:
        self._to_units = raster.to_units
        self._step = _STEP if raster.height * raster.width > _SMALL else 1
        self._names = [band.name for band in bands]
        self._seen = [band.seen for band in bands]
        self._low = _column([-np.inf if pair is None else _widened(pair)[0] for pair in self._seen])
        self._high = _column([np.inf if pair is None else _widened(pair)[1] for pair in self._seen])
        self._valid = 0
        self._below = np.zeros(len(bands), np.int64)
        self._above = np.zeros(len(bands), np.int64)

    def add(self, stripe: Stripe) -> Stripe:
        """Count ``stripe``, and hand it on."""
        if any(self._seen):
            rows, cols = np.s_[-stripe.row % self._step :: self._step, :: self._step]
            valid = stripe.valid[rows, cols]
            with np.errstate(over="ignore"):  # what lies under nodata may be any float64
                values = self._to_units(stripe.stored[:, rows, cols])
            self._valid += int(np.count_nonzero(valid))
            # Band by band: numpy counts a whole array much faster than along an axis.
            self._below += [np.count_nonzero(band) for band in (values < self._low) & valid]
            self._above += [np.count_nonzero(band) for band in (values > self._high) & valid]
        return stripe

    def shares(self) -> tuple[UnseenShare, ...] | None:
        """What was counted, for the bands whose range is known; None if none is."""
        if not any(self._seen):
            return None
        below, above = self._below / max(self._valid, 1), self._above / max(self._valid, 1)
        return tuple(
            UnseenShare(band=name, seen=seen, below=float(below[place]), above=float(above[place]))
            for place, (name, seen) in enumerate(zip(self._names, self._seen, strict=True))
            if seen is not None
        )


def _widened(seen: tuple[float, float]) -> tuple[float, float]:
    margin = _MARGIN * (seen[1] - seen[0])
    return seen[0] - margin, seen[1] + margin


def _column(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, 1, 1)
