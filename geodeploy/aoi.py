"""The part of a raster that the user asks for with `--aoi`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import geometry_mask
from rasterio.windows import Window, intersect

from geodeploy.batches import CutTile
from geodeploy.blend import Block
from geodeploy.boundaries import Polygon, Polygons, is_box, read_polygons
from geodeploy.dataset import WARNINGS
from geodeploy.degrees import Corners, densified, extent, moved, unrolled
from geodeploy.errors import AreaError
from geodeploy.projection import projected
from geodeploy.tiles import Span

_SAMPLES = 20
"""Pieces along the longer side of a raster, when its place in degrees is looked for."""
_COARSE = 256
"""Pixels of the mask that tells whether an area is near."""
_MOST_LATITUDE = 91
"""Global grids may reach half a pixel beyond the poles."""
_MOST_LONGITUDE = 720


@dataclass(frozen=True, slots=True)
class Area:
    """Polygons on a raster: a pixel belongs to them where its centre lies in one."""

    window: Window
    """The pixels around them, in raster coordinates: what the map will show."""
    transform: Affine
    """Of the raster."""
    polygons: list[Polygon]
    """In the raster's CRS. What lies in an even number of a polygon's rings is outside."""
    margin: int = 0
    """How many pixels around the polygons, and maybe more, belong to it too: then all of the window."""

    def with_margin(self, margin: int, height: int, width: int) -> "Area":
        """With so many pixels around it of a raster of this size."""
        window = _grown(self.window, margin).intersection(Window(0, 0, width, height))
        return replace(self, window=window, margin=margin)

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
            touched = self._is_near(tile.window) if self.margin else self.inside(tile.window).any()
            yield tile, stored, valid if touched else np.zeros_like(valid)

    def inside(self, window: Window) -> NDArray[np.bool_]:
        """Which pixels of ``window`` of the raster belong to the area, (h, w)."""
        if self.margin:
            return np.ones((int(window.height), int(window.width)), bool)
        return self._mask(window, scale=1)

    def _is_near(self, window: Window) -> bool:
        """False only if no pixel of the polygons lies within the margin of ``window``."""
        around = _grown(window, self.margin)
        scale = math.ceil(max(around.height, around.width) / _COARSE)
        return bool(self._mask(around, scale=scale, all_touched=True).any())

    def _mask(self, window: Window, *, scale: int, all_touched: bool = False) -> NDArray[np.bool_]:
        """Which squares of ``scale`` pixels of ``window`` lie in the polygons."""
        corner = Affine.translation(window.col_off, window.row_off) @ Affine.scale(scale)
        with WARNINGS:  # rasterio hides one of its own here, while readers hide others
            mask: NDArray[np.bool_] = geometry_mask(
                [{"type": "Polygon", "coordinates": polygon} for polygon in self.polygons],
                out_shape=(math.ceil(window.height / scale), math.ceil(window.width / scale)),
                transform=self.transform @ corner,
                all_touched=all_touched,
                invert=True,
            )
        return mask


def _grown(window: Window, margin: int) -> Window:
    height, width = window.height + 2 * margin, window.width + 2 * margin
    return Window(window.col_off - margin, window.row_off - margin, width, height)


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
    if found.crs.is_geographic:
        _check_degrees(found, text, crs)
    corners = [(0, 0), (0, height), (width, height), (width, 0), (0, 0)]
    outline = np.array([transform @ corner for corner in corners], float)
    polygons = projected(found, crs, densified(outline, extent(outline) / _SAMPLES))
    points = [~transform @ point for rings in polygons for ring in rings for point in ring]
    first_col = first_row = last_col = last_row = 0
    if points:
        # Centres lie half a pixel from the edges.
        first_col, first_row = (math.ceil(min(values) - 0.5) for values in zip(*points, strict=True))
        last_col, last_row = (math.floor(max(values) + 0.5) for values in zip(*points, strict=True))
    first_col, last_col = max(first_col, 0), min(last_col, width)
    first_row, last_row = max(first_row, 0), min(last_row, height)
    if first_col >= last_col or first_row >= last_row:
        raise AreaError(
            f"{text} does not lie on {scene}, which shows {_extent(outline, crs, found.crs)}."
        )
    window = Window(first_col, first_row, last_col - first_col, last_row - first_row)
    return Area(window, transform, polygons)


def _check_degrees(found: Polygons, text: str, crs: CRS) -> None:
    """Refuse metres that are taken for degrees."""
    for x, y in (point for polygon in found.polygons for ring in polygon for point in ring):
        if abs(x) > _MOST_LONGITUDE or abs(y) > _MOST_LATITUDE:
            advice = "Write it in degrees: ogr2ogr -s_srs EPSG:... -t_srs EPSG:4326 area.gpkg FILE."
            if is_box(text):
                name = f"EPSG:{epsg}" if (epsg := crs.to_epsg()) else "EPSG:..."
                advice = f"Name another CRS after an @: {text.partition('@')[0].strip()}@{name}."
            raise AreaError(f"{text} is taken as degrees, which {x:.10g},{y:.10g} are not. {advice}")


def _extent(outline: Corners, crs: CRS, asked: CRS) -> str:
    """The box around the ``outline``, in the CRS that the user asked in if it has one there."""
    there = unrolled(outline, crs, asked) if asked.is_geographic else moved(outline, crs, asked)
    if np.isnan(there).any():
        there, asked = outline, crs
    (left, bottom), (right, top) = there.min(axis=0), there.max(axis=0)
    return f"{left:.8g},{bottom:.8g},{right:.8g},{top:.8g}@{asked}"


def places_over(spans: Sequence[Span], start: int, stop: int) -> range:
    """The places of the ``spans`` that settle a pixel from ``start`` to ``stop``."""
    places = [place for place, span in enumerate(spans) if span.begin < stop and span.settled > start]
    return range(places[0], places[-1] + 1)
