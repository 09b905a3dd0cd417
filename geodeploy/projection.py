"""Bring polygons into the CRS of a raster, whole: no CRS can hold all of the earth, and all tear it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from geodeploy.boundaries import Polygon, Polygons
from geodeploy.degrees import WGS84, Corners, densified, extent, moved, near, turns, unrolled
from geodeploy.errors import AreaError

_PIECES = 50
"""Sides longer than a fiftieth of it all are cut: what is straight in one CRS bends in another."""
_MARGIN = 0.1
"""Of the raster's size: how far around it polygons are looked at. Their cut sides lie out there."""
_MARGIN_DEGREES = 0.01
"""Besides: more than two datums are apart."""
_ODD = 0.0123456789
_CYLINDERS = {"merc", "webmerc", "eqc", "cea", "mill"}
"""PROJ's names of projections whose x grows with longitude alone."""


def projected(found: Polygons, crs: CRS, outline: Corners) -> list[Polygon]:
    """What of the polygons lies on and around the raster with this closed ``outline``, in its ``crs``.

    Every ring comes at all its turns about the earth that meet the raster: what lies in an even number
    of a polygon's rings is outside.

    Raises:
        AreaError: a corner does not exist, in the polygons' CRS or in that of the raster.
    """
    if found.crs == crs and not crs.is_geographic:
        return found.polygons
    degrees = next((each for each in (found.crs, crs) if each.is_geographic), WGS84)
    around = unrolled(outline, crs, degrees)
    cylinder = None if crs.is_geographic else _cylinder(crs, degrees, outline, around)
    frame = _frame(around, open_ended=crs.is_geographic or cylinder is not None)
    polygons = []
    for polygon in found.polygons:
        rings = [np.array(ring, float) for ring in polygon]
        if not found.crs.is_geographic:
            rings = [
                _existing(
                    unrolled(densified(ring, extent(ring) / _PIECES), found.crs, degrees), found.crs
                )
                for ring in rings
            ]
        polygons.append([part for ring in rings for part in _turned(ring, frame)])
    if degrees != crs:
        # One step for all: sides that neighbours share stay the same.
        step = max((extent(ring) for rings in polygons for ring in rings), default=0) / _PIECES
        polygons = [
            [_existing(_placed(densified(ring, step), degrees, crs, cylinder), crs) for ring in rings]
            for rings in polygons
        ]
    return [[[(x, y) for x, y in ring.tolist()] for ring in rings] for rings in polygons if rings]


def _existing(ring: Corners, crs: CRS) -> Corners:
    if np.isnan(ring).any():
        raise AreaError(
            f"The area has points that do not exist in {crs}. Cut it to the surroundings of the scene."
        )
    return ring


def _frame(outline: Corners, *, open_ended: bool) -> tuple[float, float, float, float]:
    """A box in degrees around the raster's ``outline``: west, south, east, north.

    ``open_ended`` says that the raster's CRS goes on where longitudes have gone around the earth.
    """
    if np.isnan(outline).any():
        return -180, -90, 180, 90
    (west, south), (east, north) = outline.min(axis=0).tolist(), outline.max(axis=0).tolist()
    beyond, above = (_MARGIN * size + _MARGIN_DEGREES for size in (east - west, north - south))
    # No projection has a place beyond the poles, where grids in degrees may reach by half a pixel.
    south, north = max(south - above, min(south, -90)), min(north + above, max(north, 90))
    if not open_ended and east - west >= 360:
        # Both ends of the box are one line on the raster: one that no centre of a pixel lies on.
        return west + _ODD, south, west + _ODD + 360, north
    return west - beyond, south, east + beyond, north


def _turned(ring: Corners, frame: tuple[float, float, float, float]) -> Iterator[Corners]:
    """What of ``ring`` lies in ``frame``, at each turn about the earth: 181 degrees is -179."""
    west, south, east, north = frame
    for turn in turns(ring[:, 0].min(), ring[:, 0].max(), west, east):
        part = ring + np.array([360 * turn, 0])
        for axis, bound, side in ((0, west, 1), (0, east, -1), (1, south, 1), (1, north, -1)):
            part = _cut(part, axis, bound, side)
        if len(part):
            yield part


def _cut(ring: Corners, axis: int, bound: float, side: int) -> Corners:
    """What of ``ring`` lies above ``bound`` along ``axis``, or with ``side`` -1 below it.

    After Sutherland and Hodgman (1974): several pieces hang together by lines along the bound, each
    drawn to and fro, which hold nothing.
    """
    away = side * (ring[:, axis] - bound)
    here, there = away[:-1], away[1:]
    if not len(ring) or (away >= 0).all():
        return ring
    crosses = here * there < 0
    share = np.divide(here, here - there, out=np.zeros(len(here)), where=crosses)
    met = ring[:-1] + np.diff(ring, axis=0) * share[:, np.newaxis]
    met[:, axis] = bound
    kept = np.stack([ring[:-1], met], axis=1)[np.stack([here >= 0, crosses], axis=1)]
    return np.concatenate([kept, kept[:1]]) if len(kept) > 2 else kept[:0]


@dataclass(frozen=True, slots=True)
class _Cylinder:
    """Where a CRS that rolls the earth onto a cylinder has a longitude, however far around."""

    x: float
    longitude: float
    """At ``x``."""
    degree: float
    """Of longitude, in units of the CRS."""

    def place(self, longitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.x + self.degree * (longitudes - self.longitude)


def _cylinder(crs: CRS, degrees: CRS, outline: Corners, around: Corners) -> _Cylinder | None:
    """For a raster with this ``outline`` in ``crs``, ``around`` in degrees; None for other CRSs."""
    described = crs.to_dict()
    if described.get("proj") not in _CYLINDERS:
        return None
    middle = float(described.get("lon_0", 0))
    (one, _), (two, _) = moved(np.array([(middle - 1, 0), (middle + 1, 0)], float), degrees, crs)
    return _Cylinder(float(outline[:, 0].min()), float(around[:, 0].min()), float(two - one) / 2)


def _placed(ring: Corners, degrees: CRS, crs: CRS, cylinder: _Cylinder | None) -> Corners:
    placed = moved(ring, degrees, crs)
    if crs.is_geographic:
        return near(placed, ring[:, 0], 360)
    if cylinder is not None:
        return near(placed, cylinder.place(ring[:, 0]), 360 * cylinder.degree)
    return placed
