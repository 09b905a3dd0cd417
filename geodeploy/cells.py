"""A coarse map, each of whose cells has the answer for one whole tile. No I/O.

Cells are squares of the raster, ``tile - overlap`` pixels a side, from its upper left corner on; the
last ones of a row or column may stick out of it. A cell's tile lies around the cell's middle. One that
would leave the raster slides back inside: real pixels serve the model better than padding. So with no
overlap a cell is its tile, but for the last, whose tile also shows ground of the cell before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.aoi import Area
from geodeploy.blend import Block
from geodeploy.tiles import Span, Tile, TileGrid


@dataclass(frozen=True, slots=True)
class CellGrid(TileGrid):
    """The tiles of the cells, row by row."""

    @property
    def cell(self) -> int:
        """Pixels of the raster along a side of one of the map."""
        return self.stride

    @property
    def reach(self) -> int:
        """No tile adds to another's cell."""
        return 0

    def _spans(self, length: int) -> Sequence[Span]:
        return _cell_spans(length, self.tile, self.overlap)


@lru_cache(maxsize=64)
def _cell_spans(length: int, tile: int, overlap: int) -> Sequence[Span]:
    last, stride = max(length - tile, 0), tile - overlap
    spans = []
    for begin in range(0, length, stride):
        start = min(max(begin - overlap // 2, 0), last)
        stop, settled = min(start + tile, length), min(begin + stride, length)
        spans.append(Span(start=start, stop=stop, begin=begin, settled=settled))
    return tuple(spans)


class Cells:
    """The coarse map as it grows: each tile settles its own cell at once.

    Args:
        grid: Where cells and tiles lie.
        outputs: The number K of the model's outputs.
        area: What is mapped of the raster; None for all of it.
    """

    def __init__(self, grid: TileGrid, outputs: int, area: Area | None) -> None:
        self._side = grid.cell
        self._outputs = outputs
        self._area = area

    def add(
        self,
        tile: Tile,
        answer: NDArray[np.float32] | None,
        valid: NDArray[np.bool_],
        *,
        failed: bool = False,
    ) -> Block:
        """The cell of ``tile``, in cells of the map; as `geodeploy.blend.Mosaic.add`.

        ``answer`` is (K,). The cell has data where a pixel of it does, in the area: pixels of its tile
        beyond it do not count.
        """
        rows, cols = tile.rows, tile.cols
        known = valid[
            rows.begin - rows.start : rows.settled - rows.start,
            cols.begin - cols.start : cols.settled - cols.start,
        ]
        if self._area and known.any():
            height, width = known.shape
            known = known & self._area.inside(Window(cols.begin, rows.begin, width, height))
        mean = np.zeros(self._outputs, np.float32) if answer is None else answer
        return Block(
            rows.begin // self._side,
            cols.begin // self._side,
            mean.reshape(-1, 1, 1),
            np.full((1, 1), bool(known.any()) and answer is not None),
        )


def coarse(window: Window, cell: int) -> Window:
    """The cells, of so many pixels a side, that ``window`` touches; itself where a cell is a pixel."""
    row, col = window.row_off // cell, window.col_off // cell
    below = -(-(window.row_off + window.height) // cell)
    right = -(-(window.col_off + window.width) // cell)
    return Window(col, row, right - col, below - row)
