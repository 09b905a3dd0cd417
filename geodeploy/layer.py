"""Read bands of one file as they lie on the raster's grid."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.windows import Window

from geodeploy.blockrows import BlockRows, Loss, Pixels
from geodeploy.dataset import check_is_of_the_file, reason
from geodeploy.resample import Axis, resample

_PIECE_ROWS = 128
"""Rows of a file that is resampled are read about so many at a time, in whole blocks."""
_MIXED_ROWS = 128
"""Rows, of the file or of the raster, resampled at a time: as floats, a few times over."""
_VRT_TURN = threading.Lock()
"""Where two threads read VRTs at once and a file behind them cannot be opened, GDAL tells but one of
the two; the other gets zeros."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the pixels of a raster lie."""

    crs: CRS | None
    transform: Affine
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Those of the model's bands that lie in one file."""

    path: str
    """What GDAL opens."""
    indexes: list[int]
    """1-based numbers of the bands in the file."""
    places: list[int]
    """Of the same bands among the model's, from 0."""
    dtype: np.dtype[Any]
    one_type: bool
    """Whether all are stored as ``dtype``, the alpha too."""
    nodata: list[float | None]
    alpha: list[int]
    """1-based numbers of the bands that are 0 where there is no data; GDAL's own mask heeds those of
    bytes and uint16 alone."""
    masked: bool
    """Whether a mask says which pixels hold data."""
    bands_masked: bool
    """Whether bands have masks of their own, as in a VRT."""
    grid: Grid
    """The file's own."""
    block_rows: int
    """Rows of the file's blocks."""
    block_bytes: int
    """What a block takes when it is decoded, of all bands where they are stored pixel by pixel."""
    is_vrt: bool
    """Whether one thread at a time reads it."""
    axes: tuple[Axis, Axis] | None = None
    """The raster's rows and columns among the file's; None where the grids are one."""
    held: BlockRows | None = None
    """What was read for ``axes``, as the raster's stripes do not end where the file's blocks do."""

    def onto(self, rows: Axis, cols: Axis, stripe_rows: int) -> "Layer":
        """The same on another grid, whose pixels lie at ``rows`` and ``cols`` of the file.

        That grid is read in stripes of ``stripe_rows``, up to three of them at the same time.
        """
        piece = self.block_rows * max(1, round(_PIECE_ROWS / self.block_rows))
        keep = math.ceil(3 * stripe_rows * rows.step / piece) + 1
        return replace(self, axes=(rows, cols), held=BlockRows(piece, keep))

    @property
    def held_bytes(self) -> float:
        """What is kept of the file for each column of the raster."""
        if self.axes is None or self.held is None:
            return 0
        rows = min(self.held.keep * self.held.rows, self.grid.height)
        return rows * (len(self.indexes) * self.dtype.itemsize + 1) * self.axes[1].step

    def read(self, dataset: Any, window: Window, *, skip: bool = False) -> Pixels:
        """Stored values (bands, h, w) and valid pixels (h, w) of ``window`` of the raster.

        With ``skip`` the pixels of blocks that cannot be read are not valid, and listed.

        Raises:
            RasterioError: the file breaks off or cannot be decoded there.
            MemoryError: with ``skip``, as a block is no hole for want of memory.
        """
        if self.axes is None or self.held is None:
            return self._source(dataset, window, skip)
        return self._resampled(dataset, window, *self.axes, self.held, skip)

    def _source(self, dataset: Any, window: Window, skip: bool) -> Pixels:
        turn: AbstractContextManager[Any] = _VRT_TURN if self.is_vrt else nullcontext()
        with turn:
            return self._decoded(dataset, window, skip)

    def _decoded(self, dataset: Any, window: Window, skip: bool) -> Pixels:
        try:
            return *self._as_stored(dataset, window), []
        except RasterioError as error:
            if not skip:
                raise
            check_is_of_the_file(error)
        shape = (int(window.height), int(window.width))
        stored, valid = np.zeros((len(self.indexes), *shape), self.dtype), np.zeros(shape, bool)
        losses = []
        for piece in _blocks(dataset, window):
            row, col = piece.row_off - window.row_off, piece.col_off - window.col_off
            part = np.s_[row : row + piece.height, col : col + piece.width]
            try:
                stored[:, *part], valid[part] = self._as_stored(dataset, piece)
            except RasterioError as error:
                check_is_of_the_file(error)
                # GDAL counts scanlines and bytes: without them a hundred blocks have one cause.
                why = re.sub(r"\d+", "N", reason(error))
                losses.append(Loss(piece, f"{Path(self.path).name} cannot be read ({why})"))
        return stored, valid, losses

    def _as_stored(self, dataset: Any, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        if self.one_type:  # the alpha in the same breath: blocks may hold all bands
            read = np.asarray(dataset.read([*self.indexes, *self.alpha], window=window))
            stored, alpha = np.split(read, [len(self.indexes)])
        else:
            # rasterio reads bands of several types, as a VRT may stack them, only one by one.
            stored, alpha = (
                np.array([dataset.read(i, window=window, out_dtype=kind) for i in indexes])
                for indexes, kind in ((self.indexes, self.dtype), (self.alpha, None))
            )
        valid = self._valid(dataset, stored, window)
        for opacity in alpha:
            valid &= opacity > 0
        return stored, valid

    def _valid(self, dataset: Any, stored: NDArray[Any], window: Window) -> NDArray[np.bool_]:
        valid = np.ones(stored.shape[1:], bool)
        for values, nodata in zip(stored, self.nodata, strict=True):
            if stored.dtype.kind == "f":
                valid &= np.isfinite(values)
            if nodata is not None and not np.isnan(nodata):
                valid &= values != nodata
        if self.masked:
            valid &= dataset.dataset_mask(window=window) > 0
        if self.bands_masked:
            valid &= (dataset.read_masks(self.indexes, window=window) > 0).all(axis=0)
        return valid

    def _resampled(
        self, dataset: Any, window: Window, rows: Axis, cols: Axis, held: BlockRows, skip: bool
    ) -> Pixels:
        stored = np.zeros((len(self.indexes), window.height, window.width), self.dtype)
        valid = np.zeros((window.height, window.width), bool)
        losses: list[Loss] = []
        left, right = cols.covered(window.col_off, window.col_off + window.width)
        top, bottom = rows.covered(window.row_off, window.row_off + window.height)
        if left == right:
            return stored, valid, losses
        first, last = cols.needed(left, right)
        step = max(1, int(_MIXED_ROWS / max(rows.step, 1)))
        for begin in range(top, bottom, step):
            end = min(begin + step, bottom)
            above, below = rows.needed(begin, end)
            source, present, lost = held.read(
                Window(first, above, last - first, below - above),
                self.grid.height,
                lambda piece: self._source(dataset, piece, skip),
            )
            for loss in lost:
                row, end_row = rows.within(loss.window.row_off, loss.window.height, begin, end)
                col, end_col = cols.within(loss.window.col_off, loss.window.width, left, right)
                if row < end_row and col < end_col:
                    losses.append(Loss(Window(col, row, end_col - col, end_row - row), loss.cause))
            part = np.s_[
                begin - window.row_off : end - window.row_off,
                left - window.col_off : right - window.col_off,
            ]
            for place, values in enumerate(source):
                stored[place][part], valid[part] = resample(
                    values,
                    present,
                    rows,
                    cols,
                    corner=(above, first),
                    window=(slice(begin, end), slice(left, right)),
                )
        return stored, valid, losses


def _blocks(dataset: Any, window: Window) -> Iterator[Window]:
    """``window`` in pieces, none of which lies in two of the file's blocks."""
    height, width = map(max, zip(*dataset.block_shapes, strict=True))
    tops = _cuts(window.row_off, window.height, height)
    lefts = _cuts(window.col_off, window.width, width)
    for (top, bottom), (left, right) in product(tops, lefts):
        yield Window(left, top, right - left, bottom - top)


def _cuts(start: int, length: int, block: int) -> list[tuple[int, int]]:
    edges = [start, *range((start // block + 1) * block, start + length, block), start + length]
    return list(pairwise(edges))
