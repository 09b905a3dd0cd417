"""Read polygons: a bounding box, GeoJSON or GeoPackage, without another package."""

import json
import math
import re
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasterio.crs import CRS
from rasterio.errors import CRSError

from geodeploy.errors import AreaError, first_line

Ring = list[tuple[float, float]]
Polygon = list[Ring]
"""The outer ring, then those of its holes, each closed."""

_LONGITUDE_LATITUDE = CRS.from_epsg(4326)
_BOX = re.compile(r"\s*(-?[\d.eE+-]+)" + r"\s*,\s*(-?[\d.eE+-]+)" * 3 + r"\s*(?:@(.+))?")


@dataclass(frozen=True, slots=True)
class Polygons:
    """Polygons in one CRS."""

    polygons: list[Polygon]
    crs: CRS


def read_polygons(text: str) -> Polygons:
    """What ``text`` stands for.

    Args:
        text: ``xmin,ymin,xmax,ymax`` in longitude and latitude, or in a CRS named after an ``@``
            (``...@EPSG:32633``); or a file, GeoJSON or GeoPackage. A box whose west is greater than
            its east crosses the antimeridian.

    Raises:
        AreaError: it is neither, or holds no polygon.
    """
    if match := _BOX.fullmatch(text):
        return _box(text, match)
    path = Path(text)
    if not path.is_file():
        raise AreaError(
            f"{text} is neither a file nor a box. Give a GeoJSON or GeoPackage file, or "
            "xmin,ymin,xmax,ymax in degrees, or in another CRS: xmin,ymin,xmax,ymax@EPSG:32633."
        )
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"SQLite format 3"):
        found = _geopackage(path)
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        found = _geojson(path)
    else:
        raise AreaError(
            f"{path.name} is neither GeoJSON nor GeoPackage. Convert it: ogr2ogr area.gpkg {path.name}."
        )
    if not found.polygons:
        raise AreaError(f"{path.name} holds no polygon: there is nothing to map.")
    return Polygons([_checked(polygon, path.name, found.crs) for polygon in found.polygons], found.crs)


def is_box(text: str) -> bool:
    """Whether ``text`` is meant as a box, and not as a file."""
    return _BOX.fullmatch(text) is not None


def _checked(polygon: Polygon, name: str, crs: CRS) -> Polygon:
    """``polygon`` with rings that are closed."""
    for ring in polygon:
        if not all(math.isfinite(number) for point in ring for number in point):
            raise AreaError(f"{name} has a corner that is no number. Mend it: ogr2ogr -makevalid.")
        if len({*ring}) < 3:
            raise AreaError(
                f"{name} has a polygon with a ring of {len({*ring})} corners; 3 are needed."
            )
        width = max(x for x, _ in ring) - min(x for x, _ in ring)
        if crs.is_geographic and width > 360:
            raise AreaError(f"{name} has a polygon {width:.8g} degrees wide; the earth has 360.")
    return [ring if ring[0] == ring[-1] else [*ring, ring[0]] for ring in polygon]


def _box(text: str, match: re.Match[str]) -> Polygons:
    crs = _crs(match[5].strip(), text) if match[5] else _LONGITUDE_LATITUDE
    try:
        west, south, east, north = (float(match[place]) for place in range(1, 5))
    except ValueError as error:
        raise AreaError(
            f"{text} is not a box: four numbers are needed, xmin,ymin,xmax,ymax."
        ) from error
    if crs.is_geographic and west > east:
        east += 360
    if crs.is_geographic and 360 < east - west <= 720:
        west, east = -180.0, 180.0  # all around the earth
    if not (west < east and south < north):
        raise AreaError(f"{text} is an empty box: xmin,ymin,xmax,ymax are needed, in this order.")
    ring = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    return Polygons([[ring]], crs)


def _crs(name: str, source: str) -> CRS:
    try:
        return CRS.from_user_input(name)
    except CRSError as error:
        raise AreaError(f"{source}: {name} is no CRS that PROJ knows.") from error


def _geojson(path: Path) -> Polygons:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse)
        polygons = [
            [[(float(x), float(y)) for x, y, *_ in ring] for ring in polygon]
            for geometry in _geometries(document)
            for polygon in _polygons_of(geometry)
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AreaError(f"{path.name} is not valid GeoJSON ({first_line(error)}).") from error
    # RFC 7946 knows longitude and latitude alone; files from before it name another CRS like this.
    try:
        named = (document.get("crs") or {}).get("properties", {}).get("name")
    except AttributeError as error:
        raise AreaError(
            f'{path.name} has "crs": {json.dumps(document["crs"])[:80]}. GeoJSON names another CRS '
            'as {"type": "name", "properties": {"name": "EPSG:32633"}}.'
        ) from error
    return Polygons(polygons, _crs(named, path.name) if named else _LONGITUDE_LATITUDE)


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python's JSON takes and the standard does not."""
    raise ValueError(f"{constant} is no number")


def _geometries(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = document["type"]
    if kind == "FeatureCollection":
        for feature in document["features"]:
            yield from _geometries(feature)
    elif kind == "Feature":
        if document["geometry"] is not None:
            yield from _geometries(document["geometry"])
    elif kind == "GeometryCollection":
        for geometry in document["geometries"]:
            yield from _geometries(geometry)
    else:
        yield document


def _polygons_of(geometry: dict[str, Any]) -> Sequence[Any]:
    if geometry["type"] == "Polygon":
        return [geometry["coordinates"]] if geometry["coordinates"] else []  # RFC 7946, 3.1: null
    return geometry["coordinates"] if geometry["type"] == "MultiPolygon" else []


def _geopackage(path: Path) -> Polygons:
    """The polygons of the only layer that has any (OGC 12-128r18)."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            layers = {}
            columns = database.execute(
                "SELECT table_name, column_name, srs_id FROM gpkg_geometry_columns"
            )
            for table, column, srs in columns.fetchall():
                quoted = [f'"{name.replace(chr(34), chr(34) * 2)}"' for name in (column, table)]
                rows = database.execute(f"SELECT {quoted[0]} FROM {quoted[1]}")
                polygons = [polygon for (blob,) in rows if blob for polygon in _from_blob(blob)]
                if polygons:
                    layers[table] = polygons, srs
            if len(layers) > 1:
                raise AreaError(
                    f"{path.name} has polygons in {len(layers)} layers ({', '.join(layers)}). Keep "
                    f"one: ogr2ogr area.gpkg {path.name} {next(iter(layers))}."
                )
            if not layers:
                return Polygons([], _LONGITUDE_LATITUDE)
            ((polygons, srs),) = layers.values()
            definition = database.execute(
                "SELECT organization, organization_coordsys_id, definition FROM gpkg_spatial_ref_sys "
                "WHERE srs_id = ?",
                (srs,),
            ).fetchone()
    except (sqlite3.Error, struct.error, IndexError) as error:
        raise AreaError(f"{path.name} is not a valid GeoPackage ({first_line(error)}).") from error
    if definition is None or srs in (-1, 0):
        raise AreaError(
            f"{path.name} has no CRS. Set it: ogr2ogr -a_srs EPSG:... area.gpkg {path.name}."
        )
    authority, code, wkt = definition
    name = f"{authority}:{code}" if str(authority).upper() == "EPSG" else wkt
    return Polygons(polygons, _crs(name, path.name))


def _from_blob(blob: bytes) -> Iterator[Polygon]:
    """The polygons in a GeoPackage geometry: a header, whose flags tell its length, then WKB."""
    if blob[:2] != b"GP":
        raise IndexError("a geometry does not begin with GP")
    envelope = (0, 32, 48, 48, 64)[blob[3] >> 1 & 7]
    polygons: list[Polygon] = []
    if not blob[3] >> 4 & 1:  # not empty
        _read_wkb(blob, 8 + envelope, polygons)
    yield from polygons


def _read_wkb(blob: bytes, place: int, polygons: list[Polygon]) -> int:
    """Add the polygons of the geometry at ``place`` to ``polygons``; return where it ends."""
    order = "<" if blob[place] else ">"
    kind: int
    count: int
    kind, count = struct.unpack_from(f"{order}II", blob, place + 1)
    place += 9
    # ISO codes: 1003 is a polygon with z, 2003 with m, 3003 with both.
    dimensions = (2, 3, 3, 4)[kind // 1000]
    if kind % 1000 in (4, 5, 6, 7):  # several geometries, each with a header of its own
        for _ in range(count):
            place = _read_wkb(blob, place, polygons)
        return place
    if kind % 1000 == 3:
        rings: Polygon = []
        for _ in range(count):
            (points,) = struct.unpack_from(f"{order}I", blob, place)
            numbers = struct.unpack_from(f"{order}{points * dimensions}d", blob, place + 4)
            place += 4 + 8 * len(numbers)
            rings.append(list(_pairs(numbers, dimensions)))
        polygons.append(rings)
        return place
    if kind % 1000 == 2:
        return place + 8 * dimensions * count
    if kind % 1000 == 1:
        return place - 4 + 8 * dimensions  # a point has no count
    raise IndexError(f"geometries of type {kind} are not known; polygons are needed")


def _pairs(numbers: Sequence[float], dimensions: int) -> Iterable[tuple[float, float]]:
    return zip(numbers[::dimensions], numbers[1::dimensions], strict=True)
