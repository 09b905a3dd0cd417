"""Labels that are polygons or points with a class: read in any CRS, drawn onto the grid of a scene."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyogrio
import shapely
from numpy.typing import NDArray
from pyarrow.parquet import ParquetFile
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.warp import transform as warp
from rasterio.warp import transform_bounds
from shapely import GeometryType, GEOSException

from geodeploy.dataset import WARNINGS
from geodeploy.errors import LabelError, SourceError, first_line
from geodeploy.labels import IGNORED
from geodeploy.raster import Raster
from geodeploy.train.recipe import Recipe, Vectors

log = logging.getLogger(__name__)

_STEP = 128
"""Pixels between the corners of a side on its way to the scene's CRS, where a straight line is none."""
_CORNERS = 128
"""Of the polygon that stands for a circle: its sides lie within 0.03 % of the radius."""
_SHOWN = 5
_LONGEST = 60
"""Characters of a text that are shown."""
_WGS84 = CRS.from_epsg(4326)
Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""
_AXIS_M, _ECCENTRICITY2 = 6_378_137.0, 0.00669437999014
"""Of WGS 84."""


@dataclass(frozen=True, slots=True)
class Features:
    """Points and polygons, each with what the column of classes says of it."""

    geometries: NDArray[np.object_]
    texts: NDArray[np.object_]
    """None where the column says nothing."""
    crs: CRS


def draw_codes(path: Path, raster: Raster, recipe: Recipe) -> NDArray[np.uint8]:
    """The labels in ``path`` as positions in the recipe's classes, (H, W); `IGNORED` where none lies.

    A pixel belongs to a polygon, or to the circle around a point, in which its centre lies. Memory:
    three bytes a pixel, and the features near the scene; of GeoParquet all in the file.

    Raises:
        SourceError: the file cannot be read.
        LabelError: the column, a class or a CRS is missing, or no feature lies on ``raster``.
    """
    vectors = recipe.data.vectors
    assert vectors is not None  # the recipe sees to it
    if raster.crs is None:
        raise LabelError(f"{raster.name} has no CRS: where {path.name} lies on it is not known.")
    if not path.exists():
        raise SourceError(f"{path} does not exist. Check the path of the labels.")
    read = _read_parquet if path.suffix.lower() in (".parquet", ".geoparquet") else _read_by_gdal
    features = _singly(read(path, vectors, raster), path)
    positions = _positions(features.texts, path, recipe)
    shapes = _in_pixels(features, raster, vectors.point_radius_m)
    codes = _draw(shapes, positions, raster, recipe)
    if codes is None:
        raise _none_drawn(path, shapes, raster)
    return codes


def _read_by_gdal(path: Path, vectors: Vectors, raster: Raster) -> Features:
    try:
        layer = vectors.layer or _only_layer(path)
        about = pyogrio.read_info(path, layer=layer)
        _check_column(path, vectors.class_column, about["fields"].tolist())
        crs = _crs(about["crs"], path)
        _, _, wkb, (column,) = pyogrio.raw.read(
            path,
            layer=layer,
            columns=[vectors.class_column],
            force_2d=True,
            bbox=_bounds(raster, crs, vectors.point_radius_m),
        )
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise SourceError(
            f"{path} cannot be read as polygons or points ({first_line(error)}). Is the file whole, "
            "and data.vectors.layer one of its layers?"
        ) from error
    if not len(wkb) and not about["features"]:
        raise LabelError(f"{path.name} holds no feature: there is nothing to learn from.")
    return Features(_geometries(wkb, path), _texts(column), crs)


def _read_parquet(path: Path, vectors: Vectors, raster: Raster) -> Features:
    try:
        with ParquetFile(path) as file:
            about = json.loads((file.schema_arrow.metadata or {})[b"geo"])
            name = about["primary_column"]
            described = about["columns"][name]
            if described["encoding"] != "WKB":
                raise LabelError(
                    f"{path.name} holds geometries as {described['encoding']}; WKB is needed. "
                    f"Convert it: ogr2ogr labels.gpkg {path.name}."
                )
            fields = [field for field in file.schema_arrow.names if field != name]
            _check_column(path, vectors.class_column, fields)
            table = file.read([name, vectors.class_column])
    except (OSError, pa.ArrowException, json.JSONDecodeError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} is no whole GeoParquet file ({first_line(error)}). Write it again, or convert "
            "it to GeoPackage."
        ) from error
    if not len(table):
        raise LabelError(f"{path.name} holds no feature: there is nothing to learn from.")
    # Longitude and latitude where the key is absent; null says that nobody knows (GeoParquet 1.1).
    named = described.get("crs", "OGC:CRS84")
    crs = _crs(json.dumps(named) if isinstance(named, dict) else named, path)
    geometries = shapely.force_2d(_geometries(table[name].to_numpy(), path))
    bounds, near = _bounds(raster, crs, vectors.point_radius_m), ~shapely.is_missing(geometries)
    if bounds is not None:
        boxes = shapely.bounds(geometries)
        near = (boxes[:, :2] <= bounds[2:]).all(axis=1) & (boxes[:, 2:] >= bounds[:2]).all(axis=1)
    column = table[vectors.class_column].to_numpy()
    return Features(geometries[near], _texts(column[near]), crs)


def _geometries(wkb: NDArray[np.object_], path: Path) -> NDArray[np.object_]:
    try:
        geometries: NDArray[np.object_] = shapely.from_wkb(wkb)
    except (GEOSException, TypeError) as error:
        raise LabelError(
            f"{path.name} holds a geometry that is none ({first_line(error)}). Mend it: ogr2ogr "
            f"-makevalid labels.gpkg {path.name}."
        ) from error
    return geometries


def _only_layer(path: Path) -> str:
    layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
    if len(layers) != 1:
        raise LabelError(
            f"{path.name} has {len(layers)} layers with geometries ({', '.join(layers) or 'none'}). "
            "Name one: data.vectors.layer."
        )
    return layers[0]


def _check_column(path: Path, column: str, fields: Sequence[str]) -> None:
    if column not in fields:
        raise LabelError(
            f"{path.name} has no column {column}; it has {', '.join(fields) or 'none'}. Name the one "
            "with the classes: data.vectors.class_column."
        )


def _crs(definition: str | None, path: Path) -> CRS:
    if not definition:
        raise LabelError(
            f"{path.name} has no CRS: where it lies is not known. Set it: ogr2ogr -a_srs EPSG:... "
            f"labels.gpkg {path.name}."
        )
    try:
        return CRS.from_user_input(definition)
    except CRSError as error:
        raise LabelError(f"{path.name}: its CRS is not known to PROJ ({first_line(error)}).") from error


def _bounds(raster: Raster, crs: CRS, radius_m: float | None) -> Box | None:
    """A box in ``crs`` around the scene and the points whose circles of ``radius_m`` reach into it.

    None where there is none, as across 180 degrees.
    """
    box, source = raster.bounds, raster.crs
    if radius_m is not None:
        degrees = _moved(box, source, _WGS84)
        if degrees is None:
            return None
        left, bottom, right, top = degrees
        around = shapely.points([left, left, right, right], [bottom, top, bottom, top])
        box, source = shapely.total_bounds(_circles(around, _WGS84, radius_m)).tolist(), _WGS84
    moved = _moved(box, source, crs)
    if moved is None:
        return None
    left, bottom, right, top = moved
    if crs.is_geographic and (left < -180 or right > 180):
        return None
    aside = 0.1 * max(right - left, top - bottom)
    return left - aside, bottom - aside, right + aside, top + aside


def _moved(box: Box, source: CRS, target: CRS) -> Box | None:
    left, bottom, right, top = transform_bounds(source, target, *box, densify_pts=50)
    if left <= right and bottom <= top and np.isfinite([left, bottom, right, top]).all():
        return left, bottom, right, top
    return None


def _texts(column: NDArray[Any]) -> NDArray[np.object_]:
    """The values as text, 3.0 as 3: whole numbers with gaps come as floats; None for the gaps."""
    texts = np.empty(len(column), object)
    for place, value in enumerate(column.tolist()):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        whole = isinstance(value, float | Decimal) and value % 1 == 0
        texts[place] = str(int(value) if whole else value).strip()
    return texts


def _singly(features: Features, path: Path) -> Features:
    """The same as points and polygons alone, each part of a collection by itself."""
    geometries, owners = features.geometries, np.arange(len(features.geometries))
    while (shapely.get_type_id(geometries) > GeometryType.POLYGON).any():
        geometries, parents = shapely.get_parts(geometries, return_index=True)
        owners = owners[parents]
    present = ~(shapely.is_missing(geometries) | shapely.is_empty(geometries))
    geometries, owners = geometries[present], owners[present]
    if not np.isin(shapely.get_type_id(geometries), (GeometryType.POINT, GeometryType.POLYGON)).all():
        raise LabelError(
            f"{path.name} holds lines; polygons or points are needed. Buffer them, or leave them out."
        )
    return Features(geometries, features.texts[owners], features.crs)


def _positions(texts: NDArray[np.object_], path: Path, recipe: Recipe) -> NDArray[np.int64]:
    """The position of the class of each feature; `IGNORED` where nobody knows, -1 for no class."""
    vectors = recipe.data.vectors
    assert vectors is not None
    by_name = {item.name: position for position, item in enumerate(recipe.classes)}
    if vectors.classes is None:
        by_value = {str(item.value): position for position, item in enumerate(recipe.classes)}
        known = by_value | by_name
    else:
        known = {text: by_name[name] for text, name in vectors.classes.items()}
    known |= dict.fromkeys(vectors.ignore, IGNORED)
    found = sorted({text for text in texts.tolist() if text is not None} - set(known))
    if found:
        raise LabelError(
            f"{path.name}: {vectors.class_column} says {_several(found)}, which "
            f"{'is none' if len(found) == 1 else 'are none'} of {_several(list(known))}. Say in "
            "data.vectors.classes which class that is, or name it in data.vectors.ignore."
        )
    without = sum(text is None for text in texts.tolist())
    if without:
        rest = "" if vectors.background is None else f", and what they cover is no {vectors.background}"
        log.warning(
            "%s: %d features have no %s: left out%s.", path.name, without, vectors.class_column, rest
        )
    return np.array([-1 if text is None else known[text] for text in texts.tolist()], np.int64)


def _several(texts: Sequence[str]) -> str:
    shown = ", ".join(" ".join(text.split())[:_LONGEST] for text in texts[:_SHOWN])
    return shown if len(texts) <= _SHOWN else f"{shown} and {len(texts) - _SHOWN} more"


def _in_pixels(features: Features, raster: Raster, radius_m: float | None) -> NDArray[np.object_]:
    """The geometries with x in columns and y in rows of ``raster``; points as circles if asked."""
    if radius_m is None:
        return _placed(features.geometries, features.crs, raster)
    shapes = features.geometries.copy()
    points = shapely.get_type_id(shapes) == GeometryType.POINT
    shapes[~points] = _placed(shapes[~points], features.crs, raster)
    shapes[points] = _placed(_circles(shapes[points], features.crs, radius_m), _WGS84, raster)
    return shapes


def _placed(geometries: NDArray[np.object_], crs: CRS, raster: Raster) -> NDArray[np.object_]:
    to_pixels = ~raster.transform
    left, right = sorted(raster.transform @ (col, 0) for col in (0, raster.width))
    assert raster.crs is not None
    beyond = raster.crs.is_geographic and (left[0] < -180 or right[0] > 180)

    def place(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        xs, ys = corners.T if crs == raster.crs else np.array(warp(crs, raster.crs, *corners.T))
        if beyond:  # to the side of 180 degrees on which the scene has them
            middle = (left[0] + right[0]) / 2
            xs = middle + (xs - middle + 180) % 360 - 180
        return np.stack(
            [
                to_pixels.a * xs + to_pixels.b * ys + to_pixels.c,
                to_pixels.d * xs + to_pixels.e * ys + to_pixels.f,
            ],
            axis=1,
        )

    if not len(geometries):
        return geometries
    absent = (
        f"The labels of {raster.name} have points that do not exist in its CRS, {raster.crs}. "
        "Clip them to the surroundings of the scene."
    )
    if crs != raster.crs:
        geometries = shapely.segmentize(geometries, _STEP * _pixel_size(raster, crs))
    try:
        placed: NDArray[np.object_] = shapely.transform(geometries, place)
    except CPLE_BaseError as error:
        raise LabelError(absent) from error
    if not np.isfinite(shapely.get_coordinates(placed)).all():
        raise LabelError(absent)
    return placed


def _pixel_size(raster: Raster, crs: CRS) -> float:
    """How long the side of a pixel in the middle of the scene is in ``crs``."""
    row, col = raster.height / 2, raster.width / 2
    xs, ys = zip(raster.transform @ (col, row), raster.transform @ (col + 1, row), strict=True)
    xs, ys = warp(raster.crs, crs, xs, ys)
    across = abs(xs[1] - xs[0])
    return float(
        np.hypot(min(across, abs(360 - across)) if crs.is_geographic else across, ys[1] - ys[0])
    )


def _circles(points: NDArray[np.object_], crs: CRS, radius_m: float) -> NDArray[np.object_]:
    """Polygons in degrees of WGS 84 around ``points``: metres on the ground, whatever the CRS."""
    longitudes, latitudes = np.array(
        warp(crs, _WGS84, shapely.get_x(points), shapely.get_y(points))
    ).reshape(2, -1, 1)
    # Radii of curvature: Snyder, Map Projections: A Working Manual (USGS PP 1395), 4-18 and 4-20.
    bent = 1 - _ECCENTRICITY2 * np.sin(np.radians(latitudes)) ** 2
    along_meridian = _AXIS_M * (1 - _ECCENTRICITY2) / bent**1.5
    along_parallel = _AXIS_M / np.sqrt(bent) * np.cos(np.radians(latitudes))
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    corners = np.stack(
        [
            longitudes + np.degrees(radius_m * np.cos(angles) / along_parallel),
            latitudes + np.degrees(radius_m * np.sin(angles) / along_meridian),
        ],
        axis=-1,
    )
    circles: NDArray[np.object_] = shapely.polygons(corners)
    return circles


def _draw(
    shapes: NDArray[np.object_], positions: NDArray[np.int64], raster: Raster, recipe: Recipe
) -> NDArray[np.uint8] | None:
    """The codes; None where no shape holds a pixel, unless there is a class for all the rest."""
    vectors = recipe.data.vectors
    assert vectors is not None
    names = [item.name for item in recipe.classes]
    ranked = [names.index(name) for name in reversed(vectors.priority)]
    codes = np.full((raster.height, raster.width), IGNORED, np.uint8)
    claimed = np.zeros(codes.shape, bool)
    contested = 0
    for position in sorted(set(range(len(names))) - set(ranked)):
        covered = _covered(shapes[positions == position], codes.shape)
        contested += int((covered & claimed).sum())
        codes[covered] = np.where(claimed[covered], np.uint8(IGNORED), np.uint8(position))
        claimed |= covered
    for position in [*ranked, IGNORED]:
        covered = _covered(shapes[positions == position], codes.shape)
        codes[covered] = position
        claimed |= covered
    if contested:
        log.warning(
            "%s: classes overlap on %d pixels, which have no label unless data.vectors.priority says "
            "which class lies above.",
            raster.name,
            contested,
        )
    if vectors.background is not None:
        claimed |= _covered(shapes[positions == -1], codes.shape)  # something nobody has named
        codes[~claimed] = names.index(vectors.background)
        return codes
    return codes if claimed.any() else None


def _covered(shapes: NDArray[np.object_], size: tuple[int, ...]) -> NDArray[np.bool_]:
    if not len(shapes):
        return np.zeros(size, bool)
    with WARNINGS:  # rasterio hides one of its own here, while readers hide others
        drawn: NDArray[np.uint8] = rasterize(shapes, out_shape=size, dtype=np.uint8)
    return drawn.view(bool)


def _none_drawn(path: Path, shapes: NDArray[np.object_], raster: Raster) -> LabelError:
    scene = shapely.box(0, 0, raster.width, raster.height)
    if not shapely.intersects(scene, shapely.box(*shapely.bounds(shapes).T)).any():
        return LabelError(
            f"{path.name} does not lie on {raster.name}: no feature is near the scene. Do both show "
            "the same place, with the right CRS?"
        )
    return LabelError(
        f"{path.name}: no pixel of {raster.name} has its centre in a feature with a class. Are the "
        "features smaller than pixels? Points may have a radius: data.vectors.point_radius_m."
    )
