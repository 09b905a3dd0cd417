"""The part of a raster that the user asks for with `--aoi`."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import geometry_mask
from rasterio.warp import transform as transform_points
from rasterio.windows import Window, intersect

from geodeploy.batches import CutTile
from geodeploy.blend import Block
from geodeploy.boundaries import Polygon, Ring, read_polygons
from geodeploy.dataset import WARNINGS
from geodeploy.errors import AreaError
from geodeploy.tiles import Span

_PIECES = 50
"""A side longer than a fiftieth of its polygon is cut: what is straight in one CRS bends in another."""


@dataclass(frozen=True, slots=True)
class Area:
    """Polygons on a raster: a pixel belongs to them where its centre lies in one."""

    window: Window
    """The pixels around them, in raster coordinates: what the map will show."""
    transform: Affine
    """Of the raster."""
    polygons: list[Polygon]
    """In the raster's CRS."""

    @property
    def digest(self) -> str:
        """A short text that another area would not have."""
        return sha256(repr((self.window, self.polygons)).encode()).hexdigest()[:16]

    def cut(self, block: Block) -> Block | None:
        """What of ``block`` lies in the window, without data outside the polygons; None for nothing."""
        height, width = block.valid.shape
        whole = Window(block.col, block.row, width, height)
        if not intersect(whole, self.window):
            return None
        window = whole.intersection(self.window)
        row, col = window.row_off - block.row, window.col_off - block.col
        part = np.s_[row : row + window.height, col : col + window.width]
        valid = block.valid[part] & self.inside(window)
        disagreement = None if block.disagreement is None else block.disagreement[:, *part]
        return Block(window.row_off, window.col_off, block.mean[:, *part], valid, disagreement)

    def needed(self, tiles: Iterable[CutTile]) -> Iterator[CutTile]:
        """``tiles``, without data those that no pixel of the area lies in: they need not be run."""
        for tile, stored, valid in tiles:
            touched = self.inside(tile.window).any()
            yield tile, stored, valid if touched else np.zeros_like(valid)

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """Which pixels of ``window`` of the raster belong to the area, (h, w)."""
        corner = Affine.translation(window.col_off, window.row_off)
        with WARNINGS:  # rasterio hides one of its own here, while readers hide others
            mask: NDArray[np.bool_] = geometry_mask(
                [{"type": "Polygon", "coordinates": polygon} for polygon in self.polygons],
                out_shape=(int(window.height), int(window.width)),
                transform=self.transform @ corner,
                invert=True,
            )
        return mask


def find_area(
    text: str, *, crs: CRS | None, transform: Affine, height: int, width: int, scene: str
) -> Area:
    """The area that ``text`` names (see `read_polygons`), on the raster of this size and place.

    Raises:
        AreaError: it cannot be read, or no pixel of the raster lies in it.
    """
    found = read_polygons(text)
    if crs is None:
        raise AreaError(f"{scene} has no CRS: where {text} lies on it is not known. Map all of it.")
    corners = [transform @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))]
    left, right = min(x for x, _ in corners), max(x for x, _ in corners)
    polygons = []
    for polygon in found.polygons:
        rings = [_to_crs(ring, found.crs, crs) for ring in polygon]
        if crs.is_geographic:
            rings = _turned(rings, (left + right) / 2)
        polygons.append(rings)
    points = [~transform @ point for rings in polygons for point in rings[0]]
    if not all(math.isfinite(number) for point in points for number in point):
        raise AreaError(f"{text} has points that do not exist in the scene's CRS, {crs}.")
    # Centres lie half a pixel from the edges.
    first_col, first_row = (math.ceil(min(values) - 0.5) for values in zip(*points, strict=True))
    last_col, last_row = (math.floor(max(values) + 0.5) for values in zip(*points, strict=True))
    first_col, last_col = max(first_col, 0), min(last_col, width)
    first_row, last_row = max(first_row, 0), min(last_row, height)
    if first_col >= last_col or first_row >= last_row:
        raise AreaError(
            f"{text} does not lie on {scene}, which shows {_extent(corners, crs, found.crs)}."
        )
    window = Window(first_col, first_row, last_col - first_col, last_row - first_row)
    return Area(window, transform, polygons)


def _to_crs(ring: Ring, source: CRS, target: CRS) -> Ring:
    if source == target:
        return ring
    xs, ys = zip(*_densified(ring), strict=True)
    moved: Any = transform_points(source, target, xs, ys)
    # PROJ gives longitudes from -180 to 180: a ring across the antimeridian would be torn.
    moved_xs = np.unwrap(moved[0], period=360) if target.is_geographic else moved[0]
    return [(float(x), float(y)) for x, y in zip(moved_xs, moved[1], strict=True)]


def _densified(ring: Ring) -> Ring:
    """``ring`` with points along its long sides."""
    xs, ys = zip(*ring, strict=True)
    longest = max(max(xs) - min(xs), max(ys) - min(ys)) / _PIECES
    dense = [ring[0]]
    for (x1, y1), (x2, y2) in itertools.pairwise(ring):
        pieces = max(1, math.ceil(math.hypot(x2 - x1, y2 - y1) / longest)) if longest else 1
        dense += [
            (x1 + (x2 - x1) * piece / pieces, y1 + (y2 - y1) * piece / pieces)
            for piece in range(1, pieces + 1)
        ]
    return dense


def _turned(rings: Polygon, middle: float) -> Polygon:
    """``rings`` turned about the earth to where the raster has them: 181 degrees east is 179 west."""
    xs = [x for x, _ in rings[0]]
    turns = 360 * round((middle - (min(xs) + max(xs)) / 2) / 360)
    return [[(x + turns, y) for x, y in ring] for ring in rings]


def _extent(corners: Ring, crs: CRS, asked: CRS) -> str:
    """The box around the ``corners``, in the CRS that the user asked in."""
    xs, ys = zip(*_to_crs([*corners], crs, asked), strict=True)
    return f"{min(xs):.8g},{min(ys):.8g},{max(xs):.8g},{max(ys):.8g}@{asked}"


def places_over(spans: Sequence[Span], start: int, stop: int) -> range:
    """The places of the ``spans`` that settle a pixel from ``start`` to ``stop``."""
    places = [place for place, span in enumerate(spans) if span.begin < stop and span.settled > start]
    return range(places[0], places[-1] + 1)
