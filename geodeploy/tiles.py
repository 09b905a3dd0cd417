"""Cut a raster into overlapping tiles that cover every pixel. No I/O; sizes in pixels."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rasterio.windows import Window

from geodeploy.errors import GridError

_LONGEST = 2**25
"""Pixels along a side: the equator in pixels of 1.2 m."""


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis: what it reads, what it adds to the map, and what it settles.

    The grid is regular: tile ``i`` stands at ``i * stride``. A last tile that would leave the raster
    slides back inside to read (real pixels serve the model better than padding), but it adds to
    the map only what it would have added where it stood: so every seam is exactly ``overlap`` wide.
    """

    start: int
    """First pixel read."""
    stop: int
    """One past the last pixel read; the reader pads where this is less than a tile."""
    begin: int
    """First pixel added to the map: the tile's place in the regular grid."""
    settled: int
    """One past the last pixel that no later tile adds to; from ``begin`` on they are final."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One square of the grid, by its two spans."""

    rows: Span
    cols: Span

    @property
    def window(self) -> Window:
        """What is read, in raster coordinates."""
        return Window(
            self.cols.start,
            self.rows.start,
            self.cols.stop - self.cols.start,
            self.rows.stop - self.rows.start,
        )


@lru_cache(maxsize=64)
def _regular_spans(length: int, tile: int, stride: int) -> Sequence[Span]:
    # Asked for with every part of a map, of which a large raster has thousands.
    last = max(length - tile, 0)
    count = -(-last // stride) + 1
    return tuple(
        Span(
            start=min(place * stride, last),
            stop=min(min(place * stride, last) + tile, length),
            begin=place * stride,
            settled=length if place == count - 1 else (place + 1) * stride,
        )
        for place in range(count)
    )


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles of one size, row by row from the raster's corner.

    The grid hangs on the raster's upper left corner and on nothing else, so that a pixel's tile does
    not depend on what part of the raster is asked for.
    """

    height: int
    width: int
    tile: int
    overlap: int
    """What neighbouring tiles share."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise GridError(f"A raster of {self.height} x {self.width} pixels has nothing to map.")
        if max(self.height, self.width) > _LONGEST:
            raise GridError(
                f"A raster of {self.height} x {self.width} pixels: more than {_LONGEST} a side are not "
                "mapped. Is its size true? Cut it first: gdal_translate -projwin."
            )
        if not 0 <= self.overlap < self.tile:
            raise GridError(
                f"overlap={self.overlap} px does not fit tile={self.tile} px: "
                f"choose an overlap from 0 to {self.tile - 1}."
            )

    @property
    def stride(self) -> int:
        """From one tile to the next."""
        return self.tile - self.overlap

    @property
    def cell(self) -> int:
        """Pixels of the raster along a side of one of the map."""
        return 1

    @property
    def reach(self) -> int:
        """How many tiles further on a tile still adds to the map."""
        return -(-self.tile // self.stride) - 1

    @property
    def rows(self) -> Sequence[Span]:
        """The rows of tiles, from the top."""
        return self._spans(self.height)

    @property
    def cols(self) -> Sequence[Span]:
        """The columns of tiles, from the left."""
        return self._spans(self.width)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    def __iter__(self) -> Iterator[Tile]:
        cols = self.cols
        for rows in self.rows:
            for col in cols:
                yield Tile(rows, col)

    def part(self, rows: range, cols: range) -> "Region":
        """The tiles at these places of the grid, and those before them that reach into theirs."""
        down, across = self.rows, self.cols
        return Region(
            rows=tuple(down[max(rows.start - self.reach, 0) : rows.stop]),
            cols=tuple(across[max(cols.start - self.reach, 0) : cols.stop]),
            first_row=down[rows.start].begin,
            first_col=across[cols.start].begin,
        )

    @property
    def whole(self) -> "Region":
        """All of it."""
        return self.part(range(len(self.rows)), range(len(self.cols)))

    def _spans(self, length: int) -> Sequence[Span]:
        return _regular_spans(length, self.tile, self.stride)


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of the map, and the tiles it takes to make it as it is in the whole map.

    Tiles that stand before the rectangle but reach into it are among them: what they add must be there.
    What they settle outside of it is nobody's, and is dropped.
    """

    rows: tuple[Span, ...]
    cols: tuple[Span, ...]
    first_row: int
    """Of the rectangle, in the raster."""
    first_col: int

    @property
    def window(self) -> Window:
        """The rectangle."""
        height = self.rows[-1].settled - self.first_row
        return Window(self.first_col, self.first_row, self.cols[-1].settled - self.first_col, height)

    @property
    def source(self) -> Window:
        """What its tiles read."""
        row = min(span.start for span in self.rows)
        col = min(span.start for span in self.cols)
        height = max(span.stop for span in self.rows) - row
        return Window(col, row, max(span.stop for span in self.cols) - col, height)

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    def __iter__(self) -> Iterator[Tile]:
        for rows, cols in itertools.product(self.rows, self.cols):
            yield Tile(rows, cols)
