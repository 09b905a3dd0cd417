"""Trace the regions of a class map, band by band of rows, and join them across the bands.

All in pixel corners (col, row), which are whole numbers: nothing is lost until a writer puts them on
the ground.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import shapes

Simplify = Callable[[NDArray[np.object_], int], NDArray[np.object_]]
"""Given the polygons of a band, which fill it, and its first row."""


@dataclass(frozen=True, slots=True)
class Features:
    """Polygons with what is known of them, one entry each."""

    geometries: NDArray[np.object_]
    """Polygons of shapely's."""
    values: NDArray[np.uint8]
    areas_m2: NDArray[np.float64]
    """NaN where it is not known."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, which: NDArray[np.bool_]) -> "Features":
        return Features(self.geometries[which], self.values[which], self.areas_m2[which])


def trace(
    bands: Iterable[tuple[int, NDArray[np.uint8]]],
    *,
    height: int,
    nodata: int | None,
    areas: NDArray[np.float64] | None,
    simplify: Simplify | None = None,
) -> Iterator[Features]:
    """The regions of one class that share sides, each once and whole.

    Args:
        bands: The map from the top: each band's first row, and its values (rows, width).
        height: Of the map.
        nodata: The value that has no polygons.
        areas: Of `column_areas`; None where areas are not known.
        simplify: Takes corners from the polygons of a band, but none that lie on the band's edge.
    """
    waiting = _Waiting()
    for row, values in bands:
        features = _trace_band(values, row, nodata if simplify is None else None, areas)
        if simplify is not None:
            geometries = without_idle_corners(simplify(features.geometries, row))
            features = Features(geometries, features.values, features.areas_m2)
            features = features[features.values != (-1 if nodata is None else nodata)]
        bottom = row + len(values)
        bounds = shapely.bounds(features.geometries)
        touches = (bounds[:, 1] == row) & (row > 0) | (bounds[:, 3] == bottom) & (bottom < height)
        yield features[~touches]
        yield waiting.add(features[touches], row, bottom, values.shape[1])
    yield waiting.rest()


class _Waiting:
    """Regions that touch the lower edge of the band above, in pieces."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[shapely.Polygon]] = {}
        self._values: dict[int, int] = {}
        self._areas: dict[int, float] = {}
        self._parents: dict[int, int] = {}
        self._above: NDArray[np.int64] | None = None
        self._next = 0

    def add(self, features: Features, top: int, bottom: int, width: int) -> Features:
        """Take the pieces of the next band; regions that no later band can add to."""
        numbers = np.arange(self._next, self._next + len(features))
        self._next += len(features)
        for place, number in enumerate(numbers.tolist()):
            self._pieces[number] = [features.geometries[place]]
            self._values[number] = int(features.values[place])
            self._areas[number] = float(features.areas_m2[place])
            self._parents[number] = number
        if self._above is not None:
            below = _on_row(features.geometries, numbers, top, width)
            both = (self._above >= 0) & (below >= 0)
            for pair in np.unique(np.stack([self._above[both], below[both]], axis=1), axis=0).tolist():
                self._join(*pair)
        self._above = _on_row(features.geometries, numbers, bottom, width)
        going_on = {self._root(number) for number in np.unique(self._above).tolist() if number >= 0}
        return self._take([number for number in self._pieces if number not in going_on])

    def rest(self) -> Features:
        """The regions that are left when there is no further band."""
        return self._take(list(self._pieces))

    def _join(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        if first == second or self._values[first] != self._values[second]:
            return
        self._parents[second] = first
        self._pieces[first] += self._pieces.pop(second)
        self._areas[first] += self._areas.pop(second)
        del self._values[second]

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number

    def _take(self, numbers: list[int]) -> Features:
        pieces = [self._pieces.pop(number) for number in numbers]
        joined = np.array([each[0] if len(each) == 1 else shapely.union_all(each) for each in pieces])
        features = Features(
            without_idle_corners(joined.astype(object)),
            np.array([self._values.pop(number) for number in numbers], np.uint8),
            np.array([self._areas.pop(number) for number in numbers], np.float64),
        )
        # Of what waits, only the numbers on the lower edge are still asked for.
        above = [] if self._above is None else np.unique(self._above).tolist()
        roots = {number: self._root(number) for number in above if number >= 0}
        self._parents = {root: root for root in self._pieces} | roots
        return features


def _trace_band(
    values: NDArray[np.uint8], row: int, nodata: int | None, areas: NDArray[np.float64] | None
) -> Features:
    mask = None if nodata is None else values != nodata
    corners: list[tuple[float, float]] = []
    rings, polygons, classes = [0], [0], []
    if mask is None or mask.any():
        for outline, value in shapes(
            values, mask=mask, connectivity=4, transform=Affine.translation(0, row)
        ):
            for ring in outline["coordinates"]:
                corners.extend(ring)
                rings.append(len(corners))
            polygons.append(len(rings) - 1)
            classes.append(int(value))
    coordinates = np.array(corners, np.float64).reshape(-1, 2)
    offsets = np.array(rings), np.array(polygons)
    known = np.full(len(classes), np.nan)
    if areas is not None and classes:
        known = _areas(coordinates, *offsets, areas)
    return Features(_polygons(coordinates, *offsets), np.array(classes, np.uint8), known)


def _polygons(
    coordinates: NDArray[np.float64], rings: NDArray[np.int64], polygons: NDArray[np.int64]
) -> NDArray[np.object_]:
    if len(polygons) == 1:
        return np.array([], object)
    kind = shapely.GeometryType.POLYGON
    made: NDArray[np.object_] = shapely.from_ragged_array(kind, coordinates, (rings, polygons))
    return made


def _areas(
    coordinates: NDArray[np.float64],
    rings: NDArray[np.int64],
    polygons: NDArray[np.int64],
    areas: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Square metres of each polygon: below each of its horizontal sides lies what `areas` says."""
    cols, rows = coordinates[:, 0], coordinates[:, 1].astype(np.int64)
    below = areas[rows] - areas[rows.min()]
    terms = np.append(np.diff(cols), 0.0) * below
    terms[rings[1:] - 1] = 0.0
    of_rings = np.abs(np.add.reduceat(terms, rings[:-1]))
    of_rings[np.isin(np.arange(len(of_rings)), polygons[:-1], invert=True)] *= -1  # holes
    return np.asarray(np.add.reduceat(of_rings, polygons[:-1]))


def _on_row(
    geometries: NDArray[np.object_], numbers: NDArray[np.int64], row: int, width: int
) -> NDArray[np.int64]:
    """For each column the number of the polygon with a side on ``row``; -1 for none."""
    found = np.full(width, -1, np.int64)
    rings = shapely.get_exterior_ring(geometries)
    corners, place = shapely.get_coordinates(rings, return_index=True)
    on = (corners[:-1, 1] == row) & (corners[1:, 1] == row) & (place[:-1] == place[1:])
    ends = np.sort(np.stack([corners[:-1, 0][on], corners[1:, 0][on]], axis=1), axis=1).astype(int)
    for (left, right), number in zip(ends.tolist(), numbers[place[:-1][on]].tolist(), strict=True):
        found[left:right] = number
    return found


class _Corners:
    """The corners of polygons, one after the other; a ring does not end with its first once more."""

    def __init__(self, polygons: NDArray[np.object_]) -> None:
        _, coordinates, (rings, self._polygons) = shapely.to_ragged_array(polygons)
        self.places: NDArray[np.float64] = np.delete(coordinates, rings[1:] - 1, axis=0)
        self.rings = rings - np.arange(len(rings))
        """Where each ring begins in ``places``, and their end."""
        sizes = np.diff(self.rings)
        self.ring = np.repeat(np.arange(len(sizes)), sizes)
        """Of each corner."""
        self.polygon = np.searchsorted(self._polygons, self.ring, side="right") - 1
        """Of each corner."""

    def begins(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Where each ring begins among the corners that are ``kept``, and their end."""
        counts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(kept)])[self.rings]
        return counts

    def polygons(self, kept: NDArray[np.bool_]) -> NDArray[np.object_]:
        """Those of the corners that are ``kept``."""
        chosen, begins = np.flatnonzero(kept), self.begins(kept)
        closed = np.insert(chosen, begins[1:], chosen[begins[:-1]])
        return _polygons(self.places[closed], begins + np.arange(len(begins)), self._polygons)


def _next(begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each corner of rings that begin there, the number of the one that follows on the ring."""
    following = np.arange(1, begins[-1] + 1)
    following[begins[1:] - 1] = begins[:-1]
    return following


def without_idle_corners(geometries: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons without the corners that lie on a straight line between their neighbours."""
    if not len(geometries):
        return geometries
    corners = _Corners(geometries)
    after = _next(corners.rings)
    ahead = corners.places[after] - corners.places
    behind = np.empty_like(ahead)
    behind[after] = ahead
    return corners.polygons(ahead[:, 0] * behind[:, 1] != ahead[:, 1] * behind[:, 0])


def simplified(
    geometries: NDArray[np.object_], *, tolerance: float, ratio: float
) -> NDArray[np.object_]:
    """Polygons that fill a rectangle, with fewer corners, valid, without gaps and overlaps.

    Args:
        geometries: With corners in whole numbers.
        tolerance: In widths of a pixel: the root of the area of the triangles that may go.
        ratio: Of a pixel's height to its width, on the ground.
    """
    # Neighbours must share their corners, those too where a third one begins on a straight side.
    dense = shapely.transform(shapely.segmentize(geometries, 1.0), np.rint)
    on_ground = shapely.transform(dense, lambda corners: corners * (1.0, ratio))
    fewer = shapely.coverage_simplify(on_ground, tolerance, simplify_boundary=False)
    kept = np.rint(shapely.get_coordinates(fewer) / (1.0, ratio)).astype(np.int64)
    return _valid(_Corners(dense), kept)


def _valid(corners: _Corners, kept: NDArray[np.int64]) -> NDArray[np.object_]:
    """The polygons with corners at the places ``kept`` (n, 2), and at as few more as make them valid.

    A side that was made straight may run through another corner, which can cut a polygon in two or
    leave nothing of it. In such a polygon the corners of those sides come back; where there are none,
    all of its corners do. A place is kept by all polygons that have a corner there or by none, so that
    neighbours go on sharing their sides.
    """
    places = corners.places.astype(np.int64)
    origin = places.min(axis=0)
    stays = np.zeros(np.ptp(places, axis=0) + 1, bool)
    stays[tuple((kept - origin).T)] = True
    at = tuple((places - origin).T)
    while True:
        chosen = stays[at]
        polygons = corners.polygons(chosen)
        bad = ~shapely.is_valid(polygons)
        if not bad.any():
            return polygons
        begins = corners.begins(chosen)
        start, owner = places[chosen], corners.polygon[chosen]
        way = start[_next(begins)] - start
        # The places with whole numbers between the ends of each side of a polygon that is not valid.
        steps = np.gcd(*way.T)
        between = np.where(bad[owner], steps - 1, 0)
        side = np.repeat(np.arange(len(start)), between)
        step = np.arange(1, len(side) + 1) - (np.cumsum(between) - between)[side]
        met = start[side] + way[side] // steps[side, None] * step[:, None]
        through = np.zeros(len(start), bool)
        through[side[stays[tuple((met - origin).T)]]] = True
        helpless = bad.copy()
        helpless[owner[through]] = False
        # Corners before the first that is kept are of the side that closes the ring.
        of_side = np.cumsum(chosen) - 1
        first, last = begins[:-1][corners.ring], begins[1:][corners.ring] - 1
        of_side = np.where(of_side < first, last, of_side)
        back = through[of_side] | helpless[corners.polygon]
        stays[tuple((places[back] - origin).T)] = True
