"""STAC items: valid by STAC's own schema, and read by pystac as what the map is."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine
from pyproj import Transformer
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from rasterio.crs import CRS
from shapely import intersects, points
from shapely.geometry import box, shape

from geodeploy.clean import CleanOptions, clean_map
from geodeploy.errors import OutputError
from geodeploy.item import ItemOptions, acquisition, write_item
from geodeploy.predict import predict

MakeRaster = Callable[..., Path]
DAY = ItemOptions(acquired=date(2020, 6, 1))


NUMBER = {"type": "number"}
TEXT = {"type": "string"}
CLASS = {
    "type": "object",
    "required": ["value", "name"],
    "properties": {
        "value": {"type": "integer"},
        "name": {"type": "string", "pattern": "^[0-9A-Za-z-_]+$"},
        "title": TEXT,
        "description": TEXT,
        "color_hint": {"type": "string", "pattern": "^[0-9A-F]{6}$"},
        "nodata": {"type": "boolean"},
        "percentage": NUMBER,
        "count": {"type": "integer"},
    },
    "additionalProperties": False,
}
FIELDS = {
    "projection/v2.0.0": {
        "proj:code": {"type": ["string", "null"], "pattern": "^[^:]+:[^:]+$"},
        "proj:wkt2": {"type": ["string", "null"], "pattern": "^[A-Z]+CRS\\["},
        "proj:bbox": {"type": "array", "items": NUMBER, "minItems": 4, "maxItems": 4},
        "proj:shape": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "proj:transform": {"type": "array", "items": NUMBER, "minItems": 6, "maxItems": 6},
    },
    "raster/v2.0.0": {
        "raster:sampling": {"enum": ["area", "point"]},
        "raster:bits_per_sample": {"type": "integer"},
        "raster:spatial_resolution": NUMBER,
        "raster:scale": NUMBER,
        "raster:offset": NUMBER,
    },
    "classification/v2.0.0": {
        "classification:classes": {
            "type": "array", "items": CLASS, "minItems": 1, "uniqueItems": True,
        },
    },
    "processing/v1.2.0": {
        "processing:software": {"type": "object", "additionalProperties": TEXT},
        "processing:lineage": TEXT,
    },
}  # fmt: skip
"""What the extensions' own documents say of the fields that we write; their schemas are on the web."""


def extension_fields(document: dict[str, Any]) -> set[str]:
    """The extensions whose fields an item has; each field is one of theirs, and as they say."""
    used = set()
    assets = document["assets"].values()
    bands = [band for asset in assets for band in asset.get("bands", [])]
    known = {field: (name, fields[field]) for name, fields in FIELDS.items() for field in fields}
    for place in (document["properties"], *assets, *bands):
        for field in place:
            if ":" in field:
                name, schema = known[field]
                jsonschema.validate(place[field], schema)
                used.add(name)
    return used


def read(path: Path) -> dict[str, Any]:
    """An item that is valid by STAC's own schema and names the extensions that it makes use of."""
    document: dict[str, Any] = json.loads(path.read_text())
    JsonSchemaSTACValidator().validate_core(document, pystac.STACObjectType.ITEM, "1.1.0", str(path))
    pystac.Item.from_dict(document)
    named = {
        extension.removeprefix("https://stac-extensions.github.io/").removesuffix("/schema.json")
        for extension in document["stac_extensions"]
    }
    assert extension_fields(document) == named
    return document


@pytest.fixture(scope="module")
def real_map(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Path:
    path = tmp_path_factory.mktemp("real") / "map.tif"
    predict(real_scene, output=path)
    return path


def test_pystac_reads_what_the_map_is(real_map: Path) -> None:
    options = ItemOptions(acquired=datetime(2020, 6, 1, 10, 20, 30, tzinfo=UTC))
    path = write_item(real_map, options=options)
    assert path == real_map.with_name("map.stac.json")
    item = pystac.Item.from_dict(read(path))
    assert item.datetime == options.acquired
    projection = ProjectionExtension.ext(item)
    with rasterio.open(real_map) as dataset:
        assert projection.code == f"EPSG:{dataset.crs.to_epsg()}"
        assert projection.shape == list(dataset.shape)
        assert projection.transform == list(dataset.transform)[:6]
        assert projection.bbox == list(dataset.bounds)
        nodata, tags = dataset.nodata, dataset.tags()
    asset = item.assets["map"]
    found = ClassificationExtension.ext(asset).classes
    assert found is not None
    assert {one.name for one in found} == {"land", "water", "cloud-shadow", "cloud", "no-data"}
    assert found[-1].value == asset.extra_fields["nodata"] == nodata
    assert asset.extra_fields["raster:spatial_resolution"] == pytest.approx(30)
    assert item.properties["processing:software"] == {"geodeploy": tags["GEODEPLOY_VERSION"]}
    assert tags["GEODEPLOY_MODEL_SHA256"] in item.properties["processing:lineage"]
    assert (path.parent / asset.href).samefile(real_map)
    assert (path.parent / item.assets["map.tif.aux.xml"].href).exists()


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        ("properties", "proj:code", "32616"),
        ("properties", "proj:shape", [509]),
        ("map", "raster:sampling", "pixel"),
        ("map", "classification:classes", [{"value": 1, "name": "open water"}]),
        ("properties", "processing:software", {"geodeploy": 1}),
    ],
)
def test_a_field_that_is_not_as_its_extension_says_would_be_found(
    real_map: Path, tmp_path: Path, place: str, field: str, value: object
) -> None:
    document = read(write_item(real_map, tmp_path / "item.json", options=DAY))
    assert extension_fields(document) == set(FIELDS)
    (document["properties"] if place == "properties" else document["assets"][place])[field] = value
    with pytest.raises(jsonschema.ValidationError):
        extension_fields(document)


def test_the_outline_is_where_the_map_is(real_map: Path, tmp_path: Path) -> None:
    document = read(write_item(real_map, tmp_path / "item.json", options=DAY))
    outline = shape(document["geometry"])
    with rasterio.open(real_map) as dataset:
        bounds = rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
    assert outline.is_valid
    assert outline.exterior.is_ccw
    assert outline.bounds == pytest.approx(bounds, abs=1e-5)
    assert document["bbox"] == pytest.approx(list(outline.bounds))
    assert outline.area > 0.9 * box(*bounds).area


def test_a_day_is_a_day(real_map: Path, tmp_path: Path) -> None:
    properties = read(write_item(real_map, tmp_path / "item.json", options=DAY))["properties"]
    assert properties["datetime"] is None
    assert properties["start_datetime"] == "2020-06-01T00:00:00Z"
    assert properties["end_datetime"] == "2020-06-01T23:59:59Z"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "S2A_MSIL2A_20170725T142751_N9999_R053_T19GBQ_20240410T040247_map.tif",
            datetime(2017, 7, 25, 14, 27, 51, tzinfo=UTC),
        ),
        ("T19GBQ_20170725T142751_B02.tif", datetime(2017, 7, 25, 14, 27, 51, tzinfo=UTC)),
        ("LC08_L2SP_021030_20200601_20200825_02_T1_map.tif", date(2020, 6, 1)),
        ("S2A_MSIL2A_20171725T142751_map.tif", None),
        ("map_20200601.tif", None),
    ],
)
def test_names_of_products_tell_when(name: str, expected: datetime | date | None) -> None:
    assert acquisition(name) == expected


def test_options_take_days_and_times_as_they_are_written() -> None:
    assert ItemOptions(acquired="2020-06-01").acquired == date(2020, 6, 1)
    found = ItemOptions(acquired="2020-06-01T10:20:30+02:00").acquired
    assert found == datetime(2020, 6, 1, 8, 20, 30, tzinfo=UTC)


def test_a_map_that_nobody_dates_is_an_error(real_map: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"map\.tif does not tell when .* say --acquired"):
        write_item(real_map, tmp_path / "item.json")
    assert not list(tmp_path.iterdir())


def test_the_model_and_other_files_are_linked_from_where_the_item_lies(
    real_map: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "cloud.stac.json").write_text("{}")
    (tmp_path / "out").mkdir()
    options = ItemOptions(
        acquired=date(2020, 6, 1),
        model=tmp_path / "models" / "cloud.onnx",
        others=(tmp_path / "out" / "preview.png", tmp_path / "out" / "polygons.gpkg"),
    )
    document = read(write_item(real_map, tmp_path / "out" / "item.json", options=options))
    (link,) = document["links"]
    assert (link["rel"], link["href"]) == ("derived_from", "../models/cloud.stac.json")
    assert document["assets"]["preview.png"]["href"] == "./preview.png"
    assert document["assets"]["polygons.gpkg"]["type"] == "application/geopackage+sqlite3"
    assert (tmp_path / "out" / document["assets"]["map"]["href"]).samefile(real_map)


def test_over_the_date_line_the_outline_is_cut(tmp_path: Path, make_raster: MakeRaster) -> None:
    path = make_raster(
        tmp_path / "map.tif",
        np.full((1, 40, 300), 3, np.uint8),
        crs=CRS.from_epsg(32601),
        transform=Affine(1000, 0, 20_000, 0, -1000, 1e6),
    )
    document = read(write_item(path, options=DAY))
    outline = shape(document["geometry"])
    assert outline.geom_type == "MultiPolygon"
    assert outline.is_valid
    assert (outline.bounds[0], outline.bounds[2]) == (-180, 180)
    assert outline.area < 4
    west, _, east, _ = document["bbox"]
    assert 170 < west < 180
    assert -180 < east < -170


@pytest.mark.parametrize(
    ("crs", "transform", "around"),
    [
        (32601, Affine(20_000, 0, 20_000, 0, -20_000, 300_000), False),
        (3857, Affine(30_000, 0, 19.5e6, 0, -30_000, 7e6), False),
        (4326, Affine(0.01, 0, 179.83, 0, -0.01, -16), False),
        (4326, Affine(0.01, 0, -180.33, 0, -0.01, -16), False),
        (4326, Affine(1, 0, 340, 0, -1, 40), False),
        (4326, Affine(360 / 42, 0, -180, 0, -5, 90), True),
        (4326, Affine(360 / 42, 0, 0, 0, -5, 90), True),
        (4326, Affine(360 / 42, 0, 3, 0, -5.1, 91.8), True),
        (3031, Affine(25_000, 0, -525_000, 0, -25_000, 450_000), True),
        (3031, Affine(25_000, 0, -800_000, 0, -25_000, -1_000_000), False),
        (3413, Affine(30, 0, -600, 0, -30, 615), True),
        (3413, Affine(30, 0, -617, 0, -30, 1080), False),  # a pole on the edge
    ],
)
def test_the_outline_holds_the_map_and_no_more_over_180_degrees_and_poles(
    tmp_path: Path, make_raster: MakeRaster, crs: int, transform: Affine, around: bool
) -> None:
    path = make_raster(
        tmp_path / "map.tif",
        np.full((1, 36, 42), 3, np.uint8),
        crs=CRS.from_epsg(crs),
        transform=transform,
    )
    document = read(write_item(path, options=DAY))
    outline = shape(document["geometry"])
    assert outline.is_valid
    assert (outline.geom_type == "Polygon") == (around or transform.c == 340)
    west, south, east, north = document["bbox"]
    assert (south, north) == (outline.bounds[1], outline.bounds[3])
    if around:
        assert (west, east) == (-180, 180)
    place = Transformer.from_crs(crs, 4326, always_xy=True).transform

    def held(cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
        longitudes, latitudes = place(*(transform @ (cols, rows)))
        longitudes = (longitudes + 180) % 360 - 180
        within = (west <= longitudes) & (longitudes <= east)
        if west > east:
            within = (west <= longitudes) | (longitudes <= east)
        in_box = within & (south <= latitudes) & (latitudes <= north)
        found = intersects(outline, points(longitudes, latitudes))
        assert not (found & ~in_box).any()
        return np.asarray(found)

    cols, rows = (side.ravel() for side in np.meshgrid(np.arange(42) + 0.5, np.arange(2, 35) + 0.5))
    assert held(cols, rows).all()
    if crs != 4326 or not around:
        side = np.linspace(-2, 44, 30)
        assert not held(np.tile(side, 2), np.repeat([-1.5, 37.5], 30)).any()


def test_the_outline_of_a_map_of_the_whole_earth_is_a_box_where_its_corners_are_not_on_it(
    tmp_path: Path, make_raster: MakeRaster
) -> None:
    path = make_raster(
        tmp_path / "map.tif",
        np.full((1, 18, 36), 3, np.uint8),
        crs=CRS.from_string("+proj=moll +datum=WGS84"),
        transform=Affine(1e6, 0, -1.8e7, 0, -1e6, 9e6),
    )
    document = read(write_item(path, options=DAY))
    west, south, east, north = document["bbox"]
    assert -180 <= west < -170
    assert 170 < east <= 180
    assert north == -south > 85
    assert shape(document["geometry"]).bounds == (west, south, east, north)


@pytest.mark.parametrize("crs", [None, CRS.from_string("+proj=laea +lat_0=50 +lon_0=9")])
def test_a_crs_without_a_code_or_none_at_all_is_told(
    tmp_path: Path, make_raster: MakeRaster, crs: CRS | None
) -> None:
    transform = Affine.identity() if crs is None else Affine(30, 0, 0, 0, -30, 0)
    path = make_raster(
        tmp_path / "map.tif", np.full((1, 4, 5), 3, np.uint8), crs=crs, transform=transform
    )
    document = read(write_item(path, options=DAY))
    if crs is None:
        assert document["geometry"] is None
        assert "bbox" not in document
    else:
        assert document["properties"]["proj:code"] is None
        assert CRS.from_wkt(document["properties"]["proj:wkt2"]) == crs
    assert not any("processing" in extension for extension in document["stac_extensions"])


def test_cleaning_is_part_of_the_lineage(real_map: Path, tmp_path: Path) -> None:
    clean_map(real_map, tmp_path / "clean.tif", options=CleanOptions(smooth=3, sieve=7))
    document = read(write_item(tmp_path / "clean.tif", options=DAY))
    assert "smoothed by 3 pixels, sieved by 7 pixels" in document["properties"]["processing:lineage"]
