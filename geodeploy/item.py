"""Describe a map as a STAC item: where it lies, what its values mean, what made it.

STAC 1.1 with the extensions projection 2.0, raster 2.0, classification 2.0 and processing 1.2.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from geodeploy.area import column_areas
from geodeploy.classmap import open_class_map
from geodeploy.cog import aux_path
from geodeploy.dataset import open_dataset
from geodeploy.degrees import WGS84, Corners, moved, turns, unrolled
from geodeploy.errors import OutputError
from geodeploy.spec import SegmentationClass
from geodeploy.writer import Told, check_output, followed, replacing

_EXTENSIONS = {
    name: f"https://stac-extensions.github.io/{name}/v{version}/schema.json"
    for name, version in (
        ("projection", "2.0.0"),
        ("raster", "2.0.0"),
        ("classification", "2.0.0"),
        ("processing", "1.2.0"),
    )
}
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_KINDS = {
    ".tif": (_COG, "data"),
    ".csv": ("text/csv", "data"),
    ".geojson": ("application/geo+json", "data"),
    ".json": ("application/geo+json", "data"),
    ".gpkg": ("application/geopackage+sqlite3", "data"),
    ".parquet": ("application/vnd.apache.parquet", "data"),
    ".geoparquet": ("application/vnd.apache.parquet", "data"),
    ".png": ("image/png", "overview"),
    ".xml": ("application/xml", "metadata"),
}
_STEPS = 16
"""Along each side of the outline, which is no straight line in degrees."""
_DIGITS = 7

# Sentinel-2's products and granules, Landsat's products: their names hold the time, or the day.
_SECOND = re.compile(r"(?:^|_)(\d{8}T\d{6})(?:_|$)")
_DAY = re.compile(r"^L[COTEM]0\d_L\d\w{2}_\d{6}_(\d{8})_")

Point = tuple[float, float]


class ItemOptions(BaseModel):
    """What a STAC item says beyond the map itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    acquired: date | datetime | None = None
    """When the scene was taken, in UTC unless it says otherwise; or the day. None takes it from the
    name of a Sentinel-2 or Landsat product, in the map's name."""
    model: Path | None = None
    """Linked where a STAC item lies beside it (``MODEL.stac.json``)."""
    others: tuple[Path, ...] = ()
    """Files made with the map or of it, such as its confidence, polygons, area table and preview."""
    overwrite: bool = False
    """Replace an item that exists."""


def write_item(
    source: Path | str,
    output: Path | str | None = None,
    *,
    options: ItemOptions | None = None,
    told: Told | None = None,
) -> Path:
    """Write a STAC item of the map at ``source``.

    Args:
        source: A map as `predict` writes it, of classes, quantities or what whole tiles show.
        output: None for ``<stem>.stac.json`` beside the map. Links in the item are relative to it.
        options: What the map does not say of itself; None for the defaults.
        told: Hears of the item before it is moved there.

    Returns:
        Where the item is.

    Raises:
        OutputError: ``output`` cannot or must not be written, or nobody says when the scene was taken.
        SourceError: the map is missing, or holds neither.
    """
    options = options or ItemOptions()
    source = Path(source)
    output = followed(item_path(source) if output is None else Path(output))
    acquired = options.acquired or acquisition(source.name)
    check_output(output, [source], overwrite=options.overwrite, flag="--stac")
    if acquired is None:
        raise OutputError(
            f"{source.name} does not tell when its scene was taken, which a STAC item must: "
            "say --acquired 2024-05-31 or 2024-05-31T10:20:30Z."
        )
    with open_dataset(source) as dataset:
        item = _item(source, dataset, output, acquired, options)
    text = json.dumps(item, indent=2, ensure_ascii=False) + "\n"
    try:
        with replacing(output, told) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror}).") from error
    return output


def item_path(source: Path) -> Path:
    """Where the STAC item of a map or a model lies unless something else is said."""
    return source.with_suffix(".stac.json")


def acquisition(name: str) -> datetime | date | None:
    """When a scene of this ``name`` was taken, if it is that of a Sentinel-2 or Landsat product."""
    second, day = _SECOND.search(name), _DAY.match(name)
    try:
        if second:
            return datetime.strptime(second[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
        if day:
            return datetime.strptime(day[1], "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:  # digits that are no date
        pass
    return None


def class_objects(classes: Iterable[SegmentationClass]) -> list[dict[str, Any]]:
    """The ``classes`` as STAC's extension for classifications has them."""
    return [
        {
            "value": item.value,
            "name": re.sub(r"[^0-9A-Za-z]+", "-", item.name).strip("-").lower()
            or f"class-{item.value}",
            "title": item.name,
            "description": item.name,
            "color_hint": item.color[1:].upper(),
        }
        for item in classes
    ]


def _item(
    path: Path, dataset: Any, output: Path, acquired: datetime | date, options: ItemOptions
) -> dict[str, Any]:
    if "GEODEPLOY_LABELS" in dataset.tags():
        raster = _shares(path) | {"title": "Probabilities of classes"}
    elif set(dataset.dtypes) == {"float32"}:
        raster = _quantities(dataset)
    else:
        raster = _classes(path)
    properties: dict[str, Any] = {
        **_time(acquired),
        "title": f"{raster['title']} {path.stem}",
        **_projection(dataset),
        **_processing(dataset.tags()),
    }
    beside = [path, *options.others]
    if aux_path(path).exists():
        beside.append(aux_path(path))
    assets = dict(_assets(beside, output))
    assets["map"] |= raster | _sampling(dataset)
    for other in options.others:
        if other.suffix.lower() == ".tif":
            assets[other.name] |= _shares(other)
    extensions = dict(_EXTENSIONS)
    if not any(name.startswith("processing:") for name in properties):
        del extensions["processing"]
    if "classification:classes" not in assets["map"]:
        del extensions["classification"]
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(extensions.values()),
        "id": path.stem,
        **_footprint(dataset),
        "properties": properties,
        "links": list(_links(output, options.model)),
        "assets": assets,
    }


def _time(acquired: datetime | date) -> dict[str, Any]:
    if isinstance(acquired, datetime):
        in_utc = acquired.astimezone(UTC) if acquired.tzinfo else acquired.replace(tzinfo=UTC)
        return {"datetime": in_utc.isoformat().replace("+00:00", "Z")}
    return {
        "datetime": None,
        "start_datetime": f"{acquired.isoformat()}T00:00:00Z",
        "end_datetime": f"{acquired.isoformat()}T23:59:59Z",
    }


def _projection(source: Any) -> dict[str, Any]:
    grid = source.transform
    found: dict[str, Any] = {
        "proj:shape": [source.height, source.width],
        "proj:transform": [grid.a, grid.b, grid.c, grid.d, grid.e, grid.f],
    }
    if source.crs is not None:
        epsg = source.crs.to_epsg()
        found["proj:code"] = None if epsg is None else f"EPSG:{epsg}"
        if epsg is None:
            found["proj:wkt2"] = source.crs.to_wkt(version="WKT2_2019")
        xs, ys = zip(*(grid @ corner for corner in _outline(source, 1)), strict=True)
        found["proj:bbox"] = [min(xs), min(ys), max(xs), max(ys)]
    return found


def _processing(tags: dict[str, str]) -> dict[str, Any]:
    if "GEODEPLOY_VERSION" not in tags:
        return {}
    cleaned = [
        f"{verb} by {tags[key]} pixels"
        for verb, key in (("smoothed", "GEODEPLOY_SMOOTH"), ("sieved", "GEODEPLOY_SIEVE"))
        if tags.get(key, "None") != "None"
    ]
    verbs = {"GEODEPLOY_TARGETS": "Predicted", "GEODEPLOY_LABELS": "Classified tile by tile"}
    verb = next((verb for tag, verb in verbs.items() if tag in tags), "Segmented")
    lineage = (
        f"{verb} by the model {tags.get('GEODEPLOY_MODEL')} in {tags.get('GEODEPLOY_PRECISION')} "
        f"(sha256 {tags.get('GEODEPLOY_MODEL_SHA256')})"
    )
    return {
        "processing:software": {"geodeploy": tags["GEODEPLOY_VERSION"]},
        "processing:lineage": ", ".join([lineage, *cleaned]) + ".",
    }


def _classes(path: Path) -> dict[str, Any]:
    """What a class map holds."""
    found: dict[str, Any] = {
        "title": "Class map",
        "bands": [{"name": "class", "description": "The class of each pixel"}],
        "data_type": "uint8",
        "raster:bits_per_sample": 8,
    }
    with open_class_map(path) as source:
        named, nodata = source.named, source.nodata
    classes = class_objects(named)
    if nodata is not None:
        found["nodata"] = nodata
        if classes:
            no_data = {"name": "no-data", "title": "no data", "description": "The scene holds no data"}
            classes.append({"value": nodata, **no_data, "nodata": True})
    if classes:
        found["classification:classes"] = classes
    return found


def _quantities(dataset: Any) -> dict[str, Any]:
    """What a map of quantities holds, with what its own statistics say."""
    bands = []
    for index, name, unit in zip(dataset.indexes, dataset.descriptions, dataset.units, strict=True):
        tags = dataset.tags(index)
        statistics = {
            key: float(tags[f"STATISTICS_{tag}"])
            for key, tag in (
                ("minimum", "MINIMUM"), ("maximum", "MAXIMUM"), ("mean", "MEAN"), ("stddev", "STDDEV"),
            )
            if f"STATISTICS_{tag}" in tags
        }  # fmt: skip
        band = {"name": name or f"band {index}", "unit": unit, "statistics": statistics}
        bands.append({key: value for key, value in band.items() if value})
    return {
        "title": f"Map of {', '.join(band['name'] for band in bands)}",
        "bands": bands,
        "data_type": "float32",
        "raster:bits_per_sample": 32,
        **_nodata(dataset),
    }


def _sampling(dataset: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"raster:sampling": "area"}
    areas = column_areas(dataset.crs, dataset.transform, dataset.height)
    if areas is not None:
        found["raster:spatial_resolution"] = math.sqrt(areas[-1] / dataset.height)
    return found


def _nodata(dataset: Any) -> dict[str, Any]:
    """As STAC has it: NaN, which JSON has no number for, as text."""
    if dataset.nodata is None:
        return {}
    return {"nodata": "nan" if math.isnan(dataset.nodata) else int(dataset.nodata)}


def _shares(path: Path) -> dict[str, Any]:
    """What a raster beside the map says of its bands."""
    with open_dataset(path) as dataset:
        if dataset.dtypes[0] == "float32":
            return _quantities(dataset) | {"title": path.stem, "raster:sampling": "area"}
        return {
            "title": path.stem,
            "bands": [{"name": name} for name in dataset.descriptions],
            "data_type": dataset.dtypes[0],
            **_nodata(dataset),
            "raster:scale": dataset.scales[0],
            "raster:sampling": "area",
        }


def _assets(files: Sequence[Path], output: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    names = ["map", *(path.name for path in files[1:])]
    for name, path in zip(names, files, strict=True):
        kind, role = _KINDS.get(path.suffix.lower(), ("application/octet-stream", "data"))
        yield name, {"href": _relative(path, output), "type": kind, "roles": [role]}


def _links(output: Path, model: Path | None) -> Iterator[dict[str, str]]:
    if model is not None and item_path(model).exists():
        yield {
            "rel": "derived_from",
            "href": _relative(item_path(model), output),
            "type": "application/geo+json",
            "title": f"The model {model.stem}",
        }


def _relative(path: Path, output: Path) -> str:
    away = os.path.relpath(path.absolute(), output.absolute().parent)
    return Path(away).as_posix() if away.startswith("..") else f"./{Path(away).as_posix()}"


def _footprint(source: Any) -> dict[str, Any]:
    """Geometry and bbox in degrees of WGS 84, as RFC 7946 has them."""
    if source.crs is None:
        return {"geometry": None}
    outline = [source.transform @ corner for corner in _outline(source, _STEPS)]
    ring = unrolled(np.array([*outline, outline[0]]), source.crs).round(_DIGITS)
    ring[:, 1] = ring[:, 1].clip(-90, 90)  # pixels around a pole may reach beyond it
    if np.isnan(ring).any():
        found = _box_within(source)
        if found is None:
            return {"geometry": None}
        ring = found
    (west, south), (east, north) = ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
    if east - west >= 360 and (west, east) != (-180, 180):  # all around the earth, from elsewhere
        west, east = -180.0, 180.0
        ring = _box(west, south, east, north)
    parts: list[list[Point]] = []
    points = [(x, y) for x, y in ring[:-1].tolist()]
    for turn in turns(west, east, -180, 180):
        turned = [(x + 360 * turn, y) for x, y in points]
        cut = _cut(_cut(turned, left=-180, side=1), left=180, side=-1)
        if cut:
            parts.append([(round(x, _DIGITS), round(y, _DIGITS)) for x, y in cut])
    rings = [_against_the_clock([*part, part[0]]) for part in parts]
    # Across 180 degrees a box begins in the east and ends in the west: the last turn is the western.
    first, last = parts[-1], parts[0]
    geometry: dict[str, Any] = {"type": "Polygon", "coordinates": [rings[0]]}
    if len(rings) > 1:
        geometry = {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    bbox = [min(x for x, _ in first), south, max(x for x, _ in last), north]
    return {"geometry": geometry, "bbox": bbox}


def _box_within(source: Any) -> Corners | None:
    """Around those of a few points of a map that lie on the earth, where its outline does not.

    None where there are none.
    """
    cols, rows = np.meshgrid(
        np.linspace(0, source.width, 4 * _STEPS + 1), np.linspace(0, source.height, 4 * _STEPS + 1)
    )
    inside = np.stack(source.transform @ (cols.ravel(), rows.ravel()), axis=1)
    found = moved(inside, source.crs, WGS84)
    if np.isnan(found).all():
        return None
    (west, south), (east, north) = np.nanmin(found, axis=0), np.nanmax(found, axis=0)
    return _box(west, south, east, north).round(_DIGITS)


def _box(west: float, south: float, east: float, north: float) -> Corners:
    return np.array([(west, south), (east, south), (east, north), (west, north), (west, south)])


def _outline(source: Any, steps: int) -> Iterator[Point]:
    """The map's edge in pixels, with ``steps`` pieces a side, its first corner not again."""
    corners = [(0, 0), (0, source.height), (source.width, source.height), (source.width, 0), (0, 0)]
    for (col, row), (next_col, next_row) in pairwise(corners):
        for step in range(steps):
            share = step / steps
            yield col + (next_col - col) * share, row + (next_row - row) * share


def _cut(ring: Sequence[Point], *, left: float, side: int) -> list[Point]:
    """What of an open ring lies to the right of ``left``, or with ``side`` -1 to the left of it.

    After Sutherland and Hodgman (1974).
    """
    kept: list[Point] = []
    for (x, y), (next_x, next_y) in pairwise([*ring, *ring[:1]]):
        here, there = side * (x - left), side * (next_x - left)
        if here >= 0:
            kept.append((x, y))
        if here * there < 0:
            share = here / (here - there)
            kept.append((left, y + (next_y - y) * share))
    return kept if len({x for x, _ in kept}) > 1 else []


def _against_the_clock(ring: list[Point]) -> list[Point]:
    twice = sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in pairwise(ring))
    return ring if twice > 0 else ring[::-1]
