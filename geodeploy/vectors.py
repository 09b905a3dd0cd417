"""Write polygons as they come: GeoPackage, GeoJSON, GeoParquet; whole files or none."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyogrio
import shapely
from numpy.typing import NDArray
from pyarrow.parquet import ParquetWriter
from rasterio.crs import CRS

from geodeploy.classmap import ClassMap
from geodeploy.degrees import AT_POLE, STEP, WGS84, Corners, moved, turns, unrolled
from geodeploy.errors import OutputError, first_line
from geodeploy.outlines import Features
from geodeploy.writer import Told, replacing

_BATCH = 20_000
"""Polygons written at once."""
_STEP = 128
"""Pixels between the corners of a side on its way to degrees, where a straight line is none."""
_LAST_CHANGE = "1970-01-01T00:00:00.000Z"
"""The format wants a time; that of the day would give the same map other bytes on another."""
_DIGITS = 7
"""Of degrees: a centimetre (RFC 7946, 11.2)."""


class Vectors(Protocol):
    """A file of polygons that is being written."""

    def add(self, features: Features) -> None:
        """Write ``features``, their corners in pixels of the map."""
        ...

    def close(self) -> None:
        """Write what is still to be written."""
        ...


@contextmanager
def open_vectors(output: Path, source: ClassMap, told: Told | None = None) -> Iterator[Vectors]:
    """A file of the polygons of ``source``, at ``output`` when the context is left without an error.

    ``told`` hears of it before it is moved there.

    Raises:
        OutputError: it cannot be written, or GeoJSON is asked of a map without a CRS.
    """
    try:
        with replacing(output, told) as draft:
            vectors = FORMATS[output.suffix.lower()](draft, source)
            try:
                yield vectors
            finally:
                vectors.close()
    except (OSError, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{output} cannot be written ({first_line(error)}). Is the disk full? "
            "Nothing was left behind."
        ) from error


class GeoPackage:
    """One layer, ``polygons``, in the map's CRS, with a spatial index."""

    def __init__(self, path: Path, source: ClassMap) -> None:
        self._path, self._source = path, source
        self._waiting: list[Features] = []
        self._begun = False

    def add(self, features: Features) -> None:  # noqa: D102
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= _BATCH:
            self._write()

    def close(self) -> None:  # noqa: D102
        if self._waiting or not self._begun:
            self._write()

    def _write(self) -> None:
        features = _joined(self._waiting)
        with _dated(_LAST_CHANGE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'crs' was not provided")
            pyogrio.raw.write(
                self._path,
                shapely.to_wkb(on_ground(features.geometries, self._source)),
                [features.values.astype(np.int16), _names(features, self._source), features.areas_m2],
                ["value", "name", "area_m2"],
                layer="polygons",
                driver="GPKG",
                geometry_type="Polygon",
                crs=None if self._source.crs is None else self._source.crs.to_wkt(),
                append=self._begun,
            )
        self._waiting, self._begun = [], True


@contextmanager
def _dated(time: str) -> Iterator[None]:
    """Make GDAL write this ``time`` where a GeoPackage says when it was changed."""
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": time})
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})


class GeoParquet:
    """GeoParquet 1.1 in the map's CRS, a row group for some ten thousand polygons."""

    def __init__(self, path: Path, source: ClassMap) -> None:
        self._source = source
        crs = None if source.crs is None else source.crs.to_dict(projjson=True)
        column = {
            "encoding": "WKB",
            "geometry_types": ["Polygon"],
            "crs": crs,
            "orientation": "counterclockwise",
        }
        description = {
            "version": "1.1.0",
            "primary_column": "geometry",
            "columns": {"geometry": column},
        }
        self._schema = pa.schema(
            [
                pa.field("value", pa.uint8()),
                pa.field("name", pa.string()),
                pa.field("area_m2", pa.float64()),
                pa.field("geometry", pa.binary()),
            ],
            metadata={"geo": json.dumps(description)},
        )
        self._waiting: list[Features] = []
        self._file = ParquetWriter(path, self._schema, compression="zstd")

    def add(self, features: Features) -> None:  # noqa: D102
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= _BATCH:
            self._write()

    def close(self) -> None:  # noqa: D102
        try:
            if self._waiting:
                self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        features = _joined(self._waiting)
        columns = [
            pa.array(features.values),
            pa.array(_names(features, self._source), pa.string()),
            pa.array(features.areas_m2, from_pandas=True),  # NaN is null
            pa.array(shapely.to_wkb(on_ground(features.geometries, self._source)), pa.binary()),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=self._schema))
        self._waiting = []


class GeoJson:
    """RFC 7946: degrees of WGS 84, outer rings against the clock, nothing across 180 degrees."""

    def __init__(self, path: Path, source: ClassMap) -> None:
        self._source = source
        self._file = path.open("w", encoding="utf-8")
        self._file.write('{"type": "FeatureCollection", "features": [')
        self._separator = "\n"

    def add(self, features: Features) -> None:  # noqa: D102
        texts = shapely.to_geojson(in_degrees(features.geometries, self._source))
        areas = [None if np.isnan(area) else round(area, 2) for area in features.areas_m2.tolist()]
        names = _names(features, self._source).tolist()
        for text, value, name, area in zip(texts, features.values.tolist(), names, areas, strict=True):
            properties = json.dumps({"value": value, "name": name, "area_m2": area}, ensure_ascii=False)
            feature = f'{{"type": "Feature", "properties": {properties}, "geometry": {text}}}'
            self._file.write(self._separator + feature)
            self._separator = ",\n"

    def close(self) -> None:  # noqa: D102
        with self._file:
            self._file.write("\n]}\n")


FORMATS: dict[str, Callable[[Path, ClassMap], Vectors]] = {
    ".gpkg": GeoPackage,
    ".geojson": GeoJson,
    ".json": GeoJson,
    ".parquet": GeoParquet,
    ".geoparquet": GeoParquet,
}


def on_ground(geometries: NDArray[np.object_], source: ClassMap) -> NDArray[np.object_]:
    """Polygons in the map's CRS, outer rings against the clock, of polygons in pixels."""
    grid = source.transform

    def place(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        cols, rows = corners.T
        return np.stack(
            [grid.c + cols * grid.a + rows * grid.b, grid.f + cols * grid.d + rows * grid.e], axis=1
        )

    return _oriented(shapely.transform(geometries, place))


def in_degrees(geometries: NDArray[np.object_], source: ClassMap) -> NDArray[np.object_]:
    """(Multi)polygons in longitudes and latitudes of WGS 84, of polygons in pixels.

    Raises:
        OutputError: a polygon reaches beyond the earth as the map's CRS has it.
    """
    crs = source.crs
    assert crs is not None

    def place(corners: Corners) -> Corners:
        placed = moved(corners, crs, WGS84)
        if np.isnan(placed).any():
            raise OutputError(
                f"{source.path.name} has polygons that reach beyond the earth, where its CRS has no "
                "degrees, and GeoJSON is in degrees: take .gpkg or .parquet."
            )
        return placed

    dense = on_ground(shapely.segmentize(geometries, _STEP), source)
    placed = shapely.transform(dense, place) if len(dense) else dense
    for number in np.flatnonzero(_leave_the_globe(placed, geographic=crs.is_geographic)):
        placed[number] = _cut_at_180(dense[number], crs)
    rounded: NDArray[np.object_] = shapely.transform(placed, lambda corners: corners.round(_DIGITS))
    # A corner on another line of its outline may come to lie beyond it: degrees bend what was straight.
    broken = ~shapely.is_valid(rounded)
    whole = shapely.make_valid(rounded[broken], method="structure", keep_collapsed=False)
    rounded[broken] = shapely.set_precision(whole, 10.0**-_DIGITS)
    return _oriented(rounded)


def _leave_the_globe(geometries: NDArray[np.object_], *, geographic: bool) -> NDArray[np.bool_]:
    """Which reach beyond 180 degrees or a pole, or jump from there to the other side."""
    corners, place = shapely.get_coordinates(geometries, return_index=True)
    # Between meridians that are far apart no line is straight, but for those drawn in degrees.
    widest = 180 if geographic else STEP
    jumps = (np.abs(np.diff(corners[:, 0])) > widest) & (place[:-1] == place[1:])
    highest = 90 if geographic else AT_POLE
    found = np.zeros(len(geometries), bool)
    found[place[:-1][jumps]] = True
    found[place[(np.abs(corners[:, 0]) > 180) | (np.abs(corners[:, 1]) > highest)]] = True
    return found


def _cut_at_180(polygon: shapely.Polygon, crs: CRS) -> Any:
    """A polygon in ``crs`` in degrees. Each ring for itself: PROJ may turn them by different turns."""
    outer, *holes = (
        _between_180(unrolled(shapely.get_coordinates(ring), crs).round(_DIGITS))
        for ring in (polygon.exterior, *polygon.interiors)
    )
    return shapely.difference(outer, shapely.union_all(holes)) if holes else outer


def _between_180(ring: Corners) -> Any:
    """What lies in a ring whose longitudes go on beyond 180 degrees."""
    region = shapely.make_valid(shapely.Polygon(ring), method="structure", keep_collapsed=False)
    west, _, east, _ = region.bounds
    parts = [
        shapely.transform(
            shapely.intersection(region, shapely.box(-180 - 360 * turn, -90, 180 - 360 * turn, 90)),
            lambda corners, turn=turn: corners + np.array([360 * turn, 0]),
        )
        for turn in turns(west, east, -180, 180)
    ]
    return shapely.union_all([part for part in shapely.get_parts(parts) if part.area])


def _oriented(geometries: NDArray[np.object_]) -> NDArray[np.object_]:
    turned: NDArray[np.object_] = shapely.orient_polygons(geometries, exterior_cw=False)
    return turned


def _joined(waiting: list[Features]) -> Features:
    return Features(
        np.concatenate([np.array([], object), *(each.geometries for each in waiting)]),
        np.concatenate([np.array([], np.uint8), *(each.values for each in waiting)]),
        np.concatenate([np.array([], np.float64), *(each.areas_m2 for each in waiting)]),
    )


def _names(features: Features, source: ClassMap) -> NDArray[np.object_]:
    names = {value: source.item(value).name for value in np.unique(features.values).tolist()}
    return np.array([names[value] for value in features.values.tolist()], object)
