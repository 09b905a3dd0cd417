"""Count how much of a scene lies outside what its model saw in training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.batches import CutTile
from geodeploy.raster import Raster
from geodeploy.report import UnseenShare
from geodeploy.spec import Band
from geodeploy.tiles import Region, Span

_STEP = 7
"""Rows and columns from one pixel that counts to the next: no divisor of the 8 of JPEG's blocks, nor of
the 16 or 10 detectors of a scanner, so that each of those is met alike."""
_SMALL = 2**20
"""Rasters of up to so many pixels are counted whole: in a few milliseconds, without chance."""
_MARGIN = 1e-5
"""Of the range, at either end: sensors saturate, and scaling rounds, so that many pixels of a scene may
miss the very number that as many had in training by its last bits."""


class UnseenCount:
    """The sums, growing tile by tile, of the pixels outside what the model saw in training.

    Each pixel belongs to the tile that settles it, and which pixels count depends on their row and
    column in the raster alone: however the raster is read and cut, the sums are the same.

    Args:
        raster: Where the tiles come from.
        bands: Those of the model, in order.
        region: What is mapped; what lies outside is not counted.
    """

    def __init__(self, raster: Raster, bands: Sequence[Band], region: Region) -> None:
        self._to_units = raster.to_units
        self._step = _STEP if raster.height * raster.width > _SMALL else 1
        seen = [band.seen for band in bands]
        self._known = any(seen)
        self._low = _column([-np.inf if pair is None else _widened(pair)[0] for pair in seen])
        self._high = _column([np.inf if pair is None else _widened(pair)[1] for pair in seen])
        self._region = region
        self._sums: dict[int, NDArray[np.int64]] = {}

    def add(self, cut: CutTile) -> CutTile:
        """Count what the tile settles, and hand it on."""
        tile, stored, valid = cut
        rows, cols = tile.rows, tile.cols
        inside = rows.begin >= self._region.first_row and cols.begin >= self._region.first_col
        if self._known and inside:
            here = _every(rows, self._step), _every(cols, self._step)
            counted = valid[here]
            with np.errstate(over="ignore"):  # what lies under nodata may be any float64
                values = self._to_units(stored[:, *here])
            below, above = (values < self._low) & counted, (values > self._high) & counted
            sums = [np.count_nonzero(counted), *below.sum(axis=(1, 2)), *above.sum(axis=(1, 2))]
            self._sums[rows.begin] = self._sums.get(rows.begin, 0) + np.array(sums, np.int64)
        return cut

    def take(self, window: Window) -> list[int] | None:
        """Valid pixels, and those below and above in each band, in rows of ``window``; forget them."""
        rows = range(window.row_off, window.row_off + window.height)
        taken = [self._sums.pop(row) for row in list(self._sums) if row in rows]
        return np.sum(taken, axis=0).tolist() if taken else None


def sum_unseen(
    bands: Sequence[Band], taken: Sequence[Sequence[int] | None]
) -> tuple[UnseenShare, ...] | None:
    """The shares that follow from what `UnseenCount` gave for each part; None if no range is known."""
    if not any(band.seen for band in bands):
        return None
    sums = np.array([part for part in taken if part is not None], np.int64).sum(axis=0)
    valid, count = max(int(sums[0]), 1), len(bands)
    return tuple(
        UnseenShare(
            band=band.name,
            seen=band.seen,
            below=float(sums[1 + place] / valid),
            above=float(sums[1 + count + place] / valid),
        )
        for place, band in enumerate(bands)
        if band.seen is not None
    )


def _every(span: Span, step: int) -> slice:
    """Which of a tile's pixels it settles and lie at a multiple of ``step`` in the raster."""
    first = -(-span.begin // step) * step
    return slice(first - span.start, span.settled - span.start, step)


def _widened(seen: tuple[float, float]) -> tuple[float, float]:
    margin = _MARGIN * (seen[1] - seen[0])
    return seen[0] - margin, seen[1] + margin


def _column(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, 1, 1)
