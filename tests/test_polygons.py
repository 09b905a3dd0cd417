"""Polygons by bands against GDAL's of the whole array, and files read by others than their writer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.features import geometry_mask, shapes
from shapely.geometry import shape

from geodeploy.area import class_extents
from geodeploy.cog import aux_path
from geodeploy.errors import OutputError
from geodeploy.outlines import simplified, trace
from geodeploy.polygons import SUFFIXES, PolygonOptions, write_polygons
from geodeploy.predict import predict
from geodeploy.vectors import in_degrees

MakeRaster = Callable[..., Path]


def cut(values: NDArray[np.uint8], rows: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    return ((row, values[row : row + rows]) for row in range(0, len(values), rows))


@st.composite
def class_maps(draw: st.DrawFn) -> NDArray[np.uint8]:
    """Of single pixels or of larger patches, so that regions have holes and span several bands."""
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    values = draw(st.lists(st.sampled_from([0, 1, 7, 255]), min_size=1, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = random.choice(np.array(values, np.uint8), (height, width))
    return np.kron(chosen, np.ones((draw(st.integers(1, 4)), draw(st.integers(1, 4))), np.uint8))


def by_gdal(values: NDArray[np.uint8], nodata: int | None) -> list[tuple[int, bytes]]:
    mask = None if nodata is None else values != nodata
    if mask is not None and not mask.any():
        return []
    found = shapes(values, mask=mask, connectivity=4)
    return sorted((int(value), shapely.normalize(shape(outline)).wkb) for outline, value in found)


@given(class_maps(), st.integers(1, 9), st.sampled_from([255, None]), st.booleans())
def test_bands_give_the_polygons_of_the_whole(
    values: NDArray[np.uint8], rows: int, nodata: int | None, through_simplify: bool
) -> None:
    height = len(values)
    edges = np.cumsum(np.concatenate([[0.0], np.random.default_rng(1).uniform(1, 2, height)]))
    nothing_goes = (
        (lambda polygons, _: simplified(polygons, tolerance=0, ratio=1.7)) if through_simplify else None
    )
    found = list(
        trace(cut(values, rows), height=height, nodata=nodata, areas=edges, simplify=nothing_goes)
    )
    polygons = [
        (value, shapely.normalize(polygon).wkb)
        for features in found
        for polygon, value in zip(features.geometries, features.values.tolist(), strict=True)
    ]
    assert sorted(polygons) == by_gdal(values, nodata)
    for features in found:
        for polygon, area in zip(features.geometries, features.areas_m2, strict=True):
            inside = geometry_mask([polygon], values.shape, Affine.identity(), invert=True)
            assert area == pytest.approx(inside.sum(axis=1) @ np.diff(edges))


@given(class_maps(), st.integers(2, 9), st.floats(0.5, 6))
def test_simple_outlines_leave_no_gaps_and_no_overlaps(
    values: NDArray[np.uint8], rows: int, tolerance: float
) -> None:
    found = list(
        trace(
            cut(values, rows),
            height=len(values),
            nodata=None,
            areas=None,
            simplify=lambda polygons, _: simplified(polygons, tolerance=tolerance, ratio=0.8),
        )
    )
    polygons = np.concatenate([features.geometries for features in found])
    assert len(polygons) == len(by_gdal(values, None))
    assert shapely.is_valid(polygons).all()
    assert shapely.area(polygons).sum() == pytest.approx(values.size)
    assert shapely.union_all(polygons).area == pytest.approx(values.size)


def test_outlines_stay_valid_where_pixels_are_not_square() -> None:
    """There a side that was made straight may run through another corner, by what float64 rounds."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        values = np.kron(random.integers(0, 3, (15, 17)), np.ones((2, 2))).astype(np.uint8)
        found = list(
            trace(
                [(0, values)],
                height=len(values),
                nodata=None,
                areas=None,
                simplify=lambda polygons, _: simplified(polygons, tolerance=4.5, ratio=0.8),
            )
        )
        polygons = np.concatenate([features.geometries for features in found])
        assert shapely.is_valid(polygons).all(), f"seed {seed}"
        assert len(polygons) == len(by_gdal(values, None))
        assert shapely.area(polygons).sum() == pytest.approx(values.size)


def test_a_staircase_becomes_a_line() -> None:
    values = (np.add.outer(np.arange(40), np.arange(40)) < 40).astype(np.uint8)
    fewer = [
        features.geometries
        for features in trace(
            cut(values, 64),
            height=40,
            nodata=None,
            areas=None,
            simplify=lambda polygons, _: simplified(polygons, tolerance=2, ratio=1),
        )
    ]
    assert shapely.get_num_coordinates(np.concatenate(fewer)).max() < 10


def test_a_spiral_through_many_bands_is_one_polygon() -> None:
    values = np.zeros((41, 41), np.uint8)
    for ring in range(0, 20, 2):
        values[ring, ring : 41 - ring] = values[40 - ring, ring : 41 - ring] = 1
        values[ring : 41 - ring, ring] = values[ring : 41 - ring, 40 - ring] = 1
        values[ring + 1, ring] = 0
        values[ring + 2, ring + 1] = 1
    (one,) = [
        polygon
        for features in trace(cut(values, 3), height=41, nodata=0, areas=None)
        for polygon in features.geometries
    ]
    assert one.area == values.sum()


@pytest.fixture(scope="module")
def real_map(
    tmp_path_factory: pytest.TempPathFactory, real_scene: Path, make_raster: MakeRaster
) -> Path:
    """Four named classes with nodata around, each pixel as four: 1018 rows in two bands."""
    folder = tmp_path_factory.mktemp("real")
    predict(real_scene, output=folder / "small.tif")
    with rasterio.open(folder / "small.tif") as dataset:
        values = dataset.read().repeat(2, axis=1).repeat(2, axis=2)
        transform = dataset.transform @ Affine.scale(0.5)
        make_raster(folder / "map.tif", values, crs=dataset.crs, transform=transform, nodata=255)
    aux_path(folder / "small.tif").rename(aux_path(folder / "map.tif"))
    return folder / "map.tif"


def read(path: Path) -> tuple[NDArray[np.object_], dict[str, NDArray[Any]]]:
    """Polygons and fields, by GDAL or pyarrow."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        fields = {name: table[name].to_numpy() for name in ("value", "name", "area_m2")}
        return shapely.from_wkb(table["geometry"].to_numpy()), fields
    meta, _, polygons, fields = pyogrio.raw.read(path)
    return shapely.from_wkb(polygons), dict(zip(meta["fields"], fields, strict=True))


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet", ".geojson"])
def test_a_real_map_is_written_whole(real_map: Path, tmp_path: Path, suffix: str) -> None:
    report = write_polygons(real_map, tmp_path / f"polygons{suffix}")
    polygons, fields = read(report.output)
    with rasterio.open(real_map) as dataset:
        values, nodata = dataset.read(1), dataset.nodata
        judged = [
            (shapely.normalize(shape(outline)), int(value))
            for outline, value in shapes(
                values, mask=values != nodata, connectivity=4, transform=dataset.transform
            )
        ]
    assert report.polygons == len(polygons) == len(judged)
    if suffix != ".geojson":  # which is in degrees
        mine = [shapely.normalize(polygon).wkb for polygon in polygons]
        found = zip(mine, fields["value"].tolist(), strict=True)
        assert sorted(found) == sorted((polygon.wkb, value) for polygon, value in judged)
    for item in class_extents(real_map):
        of_class = fields["value"] == item.value
        assert set(fields["name"][of_class]) <= {item.name}
        assert fields["area_m2"][of_class].sum() == pytest.approx(item.area_m2)
    assert [path.name for path in tmp_path.iterdir()] == [report.output.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_map_gives_the_same_bytes(real_map: Path, tmp_path: Path, suffix: str) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(tmp_path / name / f"polygons{suffix}")
        write_polygons(real_map, written[-1])
    assert written[0].read_bytes() == written[1].read_bytes()


def test_geojson_is_in_degrees_and_right_handed(real_map: Path, tmp_path: Path) -> None:
    write_polygons(real_map, tmp_path / "polygons.geojson")
    document = json.loads((tmp_path / "polygons.geojson").read_text())
    assert set(document) == {"type", "features"}
    with rasterio.open(real_map) as dataset:
        west, south, east, north = rasterio.warp.transform_bounds(
            dataset.crs, "EPSG:4326", *dataset.bounds
        )
    for feature in document["features"]:
        polygon = shape(feature["geometry"])
        assert polygon.exterior.is_ccw
        assert not any(hole.is_ccw for hole in polygon.interiors)
        left, low, right, high = polygon.bounds
        assert west - 1e-3 < left < right < east + 1e-3
        assert south - 1e-3 < low < high < north + 1e-3


def test_outlines_that_touch_themselves_stay_valid_in_degrees() -> None:
    source = SimpleNamespace(
        crs=CRS.from_epsg(32616), transform=Affine(30, 0, 454_155, 0, -30, 3_406_845)
    )
    corners = [([(0, 0), (3 * n, 0), (0, 6)], [(2 * n, 2), (1, 1), (1, 2)]) for n in range(2, 60)]
    polygons = np.array([shapely.Polygon(outer, [hole]) for outer, hole in corners])
    assert shapely.is_valid(polygons).all()
    placed = in_degrees(polygons, source)
    assert shapely.is_valid(placed).all()
    found = shapely.get_coordinates(placed)
    np.testing.assert_array_equal(found, found.round(7))
    np.testing.assert_allclose(shapely.area(placed) / shapely.area(polygons), 8.47e-8, rtol=0.02)


def test_geopackage_and_geoparquet_say_their_crs(real_map: Path, tmp_path: Path) -> None:
    with rasterio.open(real_map) as dataset:
        epsg = dataset.crs.to_epsg()
    write_polygons(real_map, tmp_path / "polygons.gpkg")
    assert pyogrio.read_info(tmp_path / "polygons.gpkg")["crs"] == f"EPSG:{epsg}"
    write_polygons(real_map, tmp_path / "polygons.parquet")
    geo = json.loads(pyarrow.parquet.read_schema(tmp_path / "polygons.parquet").metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert column["encoding"] == "WKB"
    assert CRS.from_dict(column["crs"]).to_epsg() == epsg


def test_a_polygon_over_the_date_line_is_cut_there(tmp_path: Path, make_raster: MakeRaster) -> None:
    # UTM 1N begins at 180 degrees: its western margin lies beyond.
    values = np.full((1, 40, 300), 3, np.uint8)
    path = make_raster(
        tmp_path / "map.tif",
        values,
        crs=CRS.from_epsg(32601),
        transform=Affine(1000, 0, 20_000, 0, -1000, 1e6),
    )
    write_polygons(path, tmp_path / "polygons.geojson")
    (polygon,), _ = read(tmp_path / "polygons.geojson")
    assert polygon.geom_type == "MultiPolygon"
    assert polygon.bounds[0] == -180
    assert polygon.bounds[2] == 180
    assert polygon.area < 4


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (32601, Affine(20_000, 0, 20_000, 0, -20_000, 300_000)),
        (3857, Affine(30_000, 0, 19.5e6, 0, -30_000, 7e6)),
        (4326, Affine(0.01, 0, 179.83, 0, -0.01, -16)),
        (4326, Affine(0.01, 0, -180.33, 0, -0.01, -16)),
        (4326, Affine(360 / 42, 0, -180, 0, -5, 90)),
        (4326, Affine(360 / 42, 0, 0, 0, -5, 90)),
        (4326, Affine(360 / 42, 0, 120, 0, -5, 90)),
        (4087, Affine(20037508.342789244 / 21, 0, -20037508.342789244, 0, -556597.45, 10018754.1)),
        (3031, Affine(25_000, 0, -525_000, 0, -25_000, 450_000)),  # a pole on a corner
        (3031, Affine(25_000, 0, -533_000, 0, -25_000, 471_000)),
        (3413, Affine(30, 0, -600, 0, -30, 615)),  # on a side
        (3413, Affine(30, 0, -617, 0, -30, 1111)),
    ],
)
def test_over_180_degrees_and_the_poles_each_pixel_lies_in_one_polygon_of_its_class(
    crs: int, transform: Affine, tmp_path: Path, make_raster: MakeRaster
) -> None:
    random = np.random.default_rng(crs)
    for number, side in enumerate((1, 3, 36)):  # regions with many holes, patches, one region
        fine = random.choice(np.array([1, 1, 1, 2], np.uint8), (36 // side, 42 // side))
        values = np.kron(fine, np.ones((side, side), np.uint8))
        values = np.pad(values, ((0, 36 - len(values)), (0, 42 - values.shape[1])), "edge")
        path = make_raster(
            tmp_path / f"{number}.tif", values[np.newaxis], crs=CRS.from_epsg(crs), transform=transform
        )
        write_polygons(path, tmp_path / f"{number}.geojson")
        polygons, fields = read(tmp_path / f"{number}.geojson")
        assert shapely.is_valid(polygons).all()
        bounds = shapely.bounds(polygons)
        assert (np.abs(bounds[:, [0, 2]]) <= 180).all()
        assert (np.abs(bounds[:, [1, 3]]) <= 90).all()
        rows, cols = np.indices(values.shape).reshape(2, -1)
        xs, ys = rasterio.transform.xy(transform, rows, cols)
        place = Transformer.from_crs(crs, 4326, always_xy=True).transform
        longitudes, latitudes = place(xs, ys)
        centres = shapely.points((np.array(longitudes) + 180) % 360 - 180, latitudes)
        pixels, found = shapely.STRtree(polygons).query(centres, predicate="within")
        assert sorted(pixels.tolist()) == list(range(values.size))
        np.testing.assert_array_equal(fields["value"][found], values.ravel()[pixels])


def test_polygons_beyond_the_earth_of_their_crs_are_no_geojson(
    tmp_path: Path, make_raster: MakeRaster
) -> None:
    path = make_raster(
        tmp_path / "map.tif",
        np.ones((1, 20, 40), np.uint8),
        crs=CRS.from_string("+proj=moll +datum=WGS84"),
        transform=Affine(1e6, 0, -2e7, 0, -1e6, 1e7),
    )
    with pytest.raises(OutputError, match=r"map\.tif has polygons that reach beyond the earth"):
        write_polygons(path, tmp_path / "polygons.geojson")
    assert write_polygons(path, tmp_path / "polygons.gpkg").polygons == 1


def test_areas_in_degrees_are_those_of_the_ellipsoid(tmp_path: Path, make_raster: MakeRaster) -> None:
    values = np.kron(np.array([[1, 2, 1], [2, 2, 255], [0, 1, 1]], np.uint8), np.ones((9, 7), np.uint8))
    path = make_raster(
        tmp_path / "map.tif",
        values[np.newaxis],
        crs=CRS.from_epsg(4326),
        transform=Affine(0.1, 0, 10, 0, -0.1, 70),
        nodata=255,
    )
    write_polygons(path, tmp_path / "polygons.parquet")
    _, fields = read(tmp_path / "polygons.parquet")
    for item in class_extents(path):
        total = fields["area_m2"][fields["value"] == item.value].sum()
        assert total == pytest.approx(item.area_m2)


def test_small_polygons_are_left_out_and_counted(real_map: Path, tmp_path: Path) -> None:
    whole = write_polygons(real_map, tmp_path / "all.parquet")
    _, fields = read(whole.output)
    limit = float(np.median(fields["area_m2"])) + 1
    options = PolygonOptions(min_area_m2=limit)
    report = write_polygons(real_map, tmp_path / "large.parquet", options=options)
    assert report.polygons == (fields["area_m2"] >= limit).sum()
    assert report.left_out == whole.polygons - report.polygons > 0


def test_fewer_corners_leave_areas_and_numbers_alone(real_map: Path, tmp_path: Path) -> None:
    whole = write_polygons(real_map, tmp_path / "all.parquet")
    simple = write_polygons(
        real_map, tmp_path / "simple.parquet", options=PolygonOptions(simplify_m=60)
    )
    before, fields_before = read(whole.output)
    after, fields_after = read(simple.output)
    assert shapely.get_num_coordinates(after).sum() < 0.8 * shapely.get_num_coordinates(before).sum()
    assert fields_after["area_m2"].sum() == pytest.approx(fields_before["area_m2"].sum())
    assert len(after) == len(before)


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_a_map_without_a_crs_has_polygons_without_areas(
    tmp_path: Path, make_raster: MakeRaster, suffix: str
) -> None:
    values = np.array([[[1, 1], [2, 255]]], np.uint8)
    path = make_raster(tmp_path / "map.tif", values, crs=None, transform=Affine.identity(), nodata=255)
    report = write_polygons(path, tmp_path / f"polygons{suffix}")
    polygons, fields = read(report.output)
    assert len(polygons) == 2
    assert np.isnan(fields["area_m2"].astype(float)).all()
    with pytest.raises(OutputError, match="no CRS that tells metres"):
        write_polygons(path, tmp_path / f"other{suffix}", options=PolygonOptions(min_area_m2=1))
    with pytest.raises(OutputError, match="GeoJSON is in degrees"):
        write_polygons(path, tmp_path / "polygons.geojson")
    assert {file.name for file in tmp_path.iterdir()} == {"map.tif", report.output.name}


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet", ".geojson"])
def test_a_map_of_nodata_gives_a_file_without_polygons(
    tmp_path: Path, make_raster: MakeRaster, suffix: str
) -> None:
    path = make_raster(tmp_path / "map.tif", np.full((1, 5, 4), 255, np.uint8), nodata=255)
    assert write_polygons(path, tmp_path / f"polygons{suffix}").polygons == 0
    polygons, _ = read(tmp_path / f"polygons{suffix}")
    assert len(polygons) == 0


def test_a_format_that_is_not_written_is_refused(real_map: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"polygons\.shp: polygons go to \.gpkg, "):
        write_polygons(real_map, tmp_path / "polygons.shp")


def test_every_suffix_has_its_writer() -> None:
    from geodeploy.vectors import FORMATS

    assert tuple(FORMATS) == SUFFIXES


def test_a_map_that_breaks_off_leaves_nothing(real_map: Path, tmp_path: Path) -> None:
    whole = real_map.read_bytes()
    (tmp_path / "map.tif").write_bytes(whole[: len(whole) - len(whole) // 8])
    with pytest.raises(OSError, match="damaged or truncated"):
        write_polygons(tmp_path / "map.tif", tmp_path / "polygons.gpkg")
    assert [file.name for file in tmp_path.iterdir()] == ["map.tif"]
