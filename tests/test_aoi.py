import json
import sqlite3
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from numpy.lib.stride_tricks import sliding_window_view
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from shapely import Polygon, distance, points, within
from shapely.geometry import mapping

from geodeploy.aoi import Area, find_area, places_over
from geodeploy.errors import AreaError
from geodeploy.tiles import TileGrid

UTM33 = CRS.from_epsg(32633)
GRID: dict[str, Any] = {
    "crs": UTM33,
    "transform": Affine(10, 0, 400000, 0, -10, 5800000),
    "height": 300,
    "width": 400,
    "scene": "scene.tif",
}
# An L and a square, the square with a hole.
SHAPES: list[list[list[tuple[float, float]]]] = [
    [[(400500, 5799500), (401500, 5799500), (401500, 5799000), (401000, 5799000), (401000, 5798000),
      (400500, 5798000), (400500, 5799500)]],
    [[(402000, 5799000), (403000, 5799000), (403000, 5798000), (402000, 5798000), (402000, 5799000)],
     [(402300, 5798700), (402600, 5798700), (402600, 5798400), (402300, 5798400), (402300, 5798700)]],
]  # fmt: skip


def area(text: object, **more: Any) -> Area:
    return find_area(str(text), **(GRID | more))


def expected() -> np.ndarray:
    mask = np.zeros((300, 400), bool)
    mask[50:100, 50:150] = mask[100:200, 50:100] = True
    mask[100:200, 200:300] = True
    mask[130:160, 230:260] = False
    return mask


def everything(found: Area, height: int = 300, width: int = 400) -> np.ndarray:
    return found.inside(Window(0, 0, width, height))


def write_geojson(path: Path, kind: str, crs: str | None) -> Path:
    polygons = [{"type": "Polygon", "coordinates": shape} for shape in SHAPES]
    document: dict[str, Any] = {
        "Feature": {"type": "Feature", "properties": {}, "geometry": polygons[0]},
        "MultiPolygon": {"type": "MultiPolygon", "coordinates": SHAPES},
        "GeometryCollection": {"type": "GeometryCollection", "geometries": polygons},
        "FeatureCollection": {
            "type": "FeatureCollection",
            "features": [
                *({"type": "Feature", "properties": None, "geometry": shape} for shape in polygons),
                {"type": "Feature", "properties": None, "geometry": None},
                {"type": "Feature", "geometry": {"type": "Point", "coordinates": [0, 0]}},
            ],
        },
    }[kind]
    if crs:
        document["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(document))
    return path


def wkb(shape: Sequence[Sequence[Sequence[float]]], order: str = "<", z: bool = False) -> bytes:
    content = struct.pack(f"{order}BII", order == "<", 1003 if z else 3, len(shape))
    for ring in shape:
        content += struct.pack(f"{order}I", len(ring))
        for point in ring:
            content += struct.pack(f"{order}{3 if z else 2}d", *point, *([7.0] if z else []))
    return content


def write_geopackage(path: Path, layers: dict[str, list[bytes]], srs: int = 32633) -> Path:
    """A GeoPackage as the standard has it, as far as reading polygons goes."""
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT, srs_id INTEGER PRIMARY KEY, "
            "organization TEXT, organization_coordsys_id INTEGER, definition TEXT, description TEXT)"
        )
        database.execute(
            "INSERT INTO gpkg_spatial_ref_sys VALUES ('', 32633, 'EPSG', 32633, 'undefined', NULL), "
            "('', 9, 'NONE', 9, ?, NULL), ('', -1, 'NONE', -1, 'undefined', NULL)",
            (UTM33.to_wkt(),),
        )
        database.execute(
            "CREATE TABLE gpkg_geometry_columns (table_name TEXT, column_name TEXT, geometry_type_name "
            "TEXT, srs_id INTEGER, z TINYINT, m TINYINT)"
        )
        for name, blobs in layers.items():
            column = (name, "geom", "GEOMETRY", srs, 2, 0)
            database.execute("INSERT INTO gpkg_geometry_columns VALUES (?, ?, ?, ?, ?, ?)", column)
            database.execute(f'CREATE TABLE "{name}" (fid INTEGER PRIMARY KEY, geom BLOB)')
            for blob in blobs:
                database.execute(f'INSERT INTO "{name}" (geom) VALUES (?)', (blob,))
    database.close()
    return path


def in_package(geometry: bytes, envelope: int = 0) -> bytes:
    length = {0: 0, 1: 32, 2: 48, 4: 64}[envelope]
    return b"GP" + bytes([0, envelope << 1 | 1]) + struct.pack("<i", 32633) + bytes(length) + geometry


@pytest.mark.parametrize("kind", ["MultiPolygon", "GeometryCollection", "FeatureCollection"])
@pytest.mark.parametrize("crs", ["urn:ogc:def:crs:EPSG::32633", "EPSG:32633"])
def test_pixels_whose_centres_lie_in_the_polygons_of_a_geojson_belong_to_the_area(
    tmp_path: Path, kind: str, crs: str
) -> None:
    found = area(write_geojson(tmp_path / "a.geojson", kind, crs))
    np.testing.assert_array_equal(everything(found), expected())
    assert found.window == Window(50, 50, 250, 150)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("envelope", [0, 1, 2, 4])
@pytest.mark.parametrize("srs", [32633, 9])
def test_so_do_those_of_a_geopackage(tmp_path: Path, order: str, envelope: int, srs: int) -> None:
    one, two = wkb(SHAPES[0], order), wkb(SHAPES[1], order, z=True)
    both = struct.pack(f"{order}BII", order == "<", 6, 2) + one + two
    mixed = struct.pack("<BII", 1, 7, 3) + struct.pack("<BIdd", 1, 1, 0, 0) + one + two
    line = struct.pack("<BIIdddd", 1, 2, 2, 0, 0, 1, 1)
    for number, blobs in enumerate(([one, two], [both], [mixed, line])):
        packed = [in_package(blob, envelope) for blob in blobs]
        path = write_geopackage(
            tmp_path / f"{number}.gpkg", {'the "areas"'.replace('"', ""): packed, "none": []}, srs
        )
        np.testing.assert_array_equal(everything(area(path)), expected())


def test_an_area_is_the_same_in_whatever_windows_it_is_looked_at(tmp_path: Path) -> None:
    found = area(write_geojson(tmp_path / "a.geojson", "MultiPolygon", "EPSG:32633"))
    parts = [
        [found.inside(Window(col, row, 57, min(41, 300 - row))) for col in range(0, 399, 57)]
        for row in range(0, 300, 41)
    ]
    np.testing.assert_array_equal(np.block(parts)[:, :400][:, :399], everything(found)[:, :399])


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:25833", "EPSG:4326", "EPSG:3857", "EPSG:3035"])
def test_a_box_may_be_in_any_crs(crs: str) -> None:
    box = transform_bounds(UTM33, CRS.from_user_input(crs), 401000, 5798000, 402000, 5799000)
    text = ",".join(map(repr, box)) + ("" if crs == "EPSG:4326" else f"@{crs}")
    found = area(text)
    mask = everything(found)
    # A box in another CRS is turned a little and is as large as to hold the one in UTM.
    assert mask[101:199, 101:199].all()
    assert mask.sum() <= 1.25 * 100 * 100
    if crs in ("EPSG:32633", "EPSG:25833"):
        assert found.window == Window(100, 100, 100, 100)
        assert mask.sum() == 100 * 100


def test_the_sides_of_a_box_bend_as_its_crs_does() -> None:
    # A parallel of 15 degrees' length is lowest at the middle meridian of a UTM zone, by 17 km here.
    found = area(
        "7.5,60,22.5,61", transform=Affine(1000, 0, 0, 0, -1000, 6900000), height=400, width=1000
    )
    mask = everything(found, 400, 1000)
    for top in (mask.argmax(axis=0), mask[::-1].argmax(axis=0) * -1):
        assert 14 < top[500] - top[150] < 20


@pytest.mark.parametrize(
    ("left", "crs"), [(179.0, "EPSG:4326"), (-181.0, "EPSG:4326"), (179.0, "EPSG:4269")]
)
def test_an_area_across_the_antimeridian_is_found_however_the_scene_counts_its_degrees(
    tmp_path: Path, left: float, crs: str
) -> None:
    grid: dict[str, Any] = {
        "crs": CRS.from_user_input(crs),
        "transform": Affine(0.01, 0, left, 0, -0.01, -16),
        "height": 100,
        "width": 200,
    }
    wanted = np.zeros((100, 200), bool)
    wanted[20:60, 50:150] = True
    # RFC 7946: a box whose west is greater than its east, and polygons cut at the antimeridian.
    halves = [
        [[[179.5, -16.6], [180, -16.6], [180, -16.2], [179.5, -16.2], [179.5, -16.6]]],
        [[[-180, -16.6], [-179.5, -16.6], [-179.5, -16.2], [-180, -16.2], [-180, -16.6]]],
    ]
    path = tmp_path / "fiji.geojson"
    path.write_text(json.dumps({"type": "MultiPolygon", "coordinates": halves}))
    for text in ("179.5,-16.6,-179.5,-16.2", "179.5,-16.6,180.5,-16.2", path):
        np.testing.assert_array_equal(everything(area(text, **grid), 100, 200), wanted)


def test_an_area_across_the_antimeridian_lies_on_a_scene_in_utm() -> None:
    grid = {"crs": CRS.from_epsg(32760), "transform": Affine(1000, 0, 780000, 0, -1000, 8200000)}
    found = area("179.8,-17,-179.8,-16.8", **grid, height=400, width=200)
    xs = [780000 + 1000 * column for column in (found.window.col_off, found.window.col_off + 42)]
    west, _, east, _ = transform_bounds(
        CRS.from_epsg(32760), CRS.from_epsg(4326), xs[0], 8.13e6, xs[1], 8.131e6
    )
    assert west == pytest.approx(179.8, abs=0.05)
    assert east == pytest.approx(-179.8, abs=0.05)
    assert 40 <= found.window.width <= 45


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (32601, Affine(20_000, 0, 20_000, 0, -20_000, 300_000)),
        (32616, Affine(30, 0, 454_155, 0, -30, 3_406_845)),
        (3857, Affine(30_000, 0, 19.5e6, 0, -30_000, 7e6)),
        (3857, Affine(954_160, 0, -20037508.34, 0, -954_160, 17e6)),
        (4326, Affine(0.01, 0, 179.83, 0, -0.01, -16)),
        (4326, Affine(0.01, 0, -180.33, 0, -0.01, -16)),
        (4326, Affine(360 / 42, 0, -180, 0, -5, 90)),
        (4326, Affine(360 / 42, 0, 0, 0, -5, 90)),
        (4269, Affine(360 / 42, 0, 120, 0, -5, 90)),
        (4087, Affine(20037508.342789244 / 21, 0, -20037508.342789244, 0, -556597.45, 10018754.1)),
        (3031, Affine(25_000, 0, -525_000, 0, -25_000, 450_000)),
        (3031, Affine(25_000, 0, -537_500, 0, -25_000, 462_500)),  # the pole in a pixel's centre
        (3413, Affine(30_000, 0, -617_000, 0, -30_000, 1_111_000)),
        (3995, Affine(30_000, 0, 200_000, 0, -30_000, -200_000)),
    ],
)
@pytest.mark.parametrize(
    "box",
    [
        (-180, -90, 180, 90),
        (0, -90, 360, 90),
        (-200, -90, 200, 90),
        (170, -80, -170, 80),
        (-10, -10, 10, 10),
        (179.9, -89, 179.97, 89.3),
        (-87.42, 30.65, -87.36, 30.75),
        (30, -88, 200, 88),
    ],
)
def test_no_pixel_of_a_box_is_lost_over_180_degrees_and_poles(
    crs: int, transform: Affine, box: tuple[float, ...], tmp_path: Path
) -> None:
    west, south, east, north = box
    rows, cols = np.mgrid[:36, :42] + 0.5
    place = Transformer.from_crs(crs, 4326, always_xy=True).transform
    longitudes, latitudes = place(*(transform @ (cols, rows)))
    width = (east - west) % 360 if east - west < 360 else 360
    wanted = ((longitudes - west) % 360 <= width) | (width == 360)
    wanted &= (south <= latitudes) & (latitudes <= north)
    # Where the box's sides are, centres may lie on either one.
    around = sliding_window_view(np.pad(wanted, 1, "edge"), (3, 3))
    near = around.any(axis=(2, 3)) != around.all(axis=(2, 3))
    grid: dict[str, Any] = {
        "crs": CRS.from_epsg(crs), "transform": transform, "height": 36, "width": 42,
    }  # fmt: skip
    text = ",".join(map(str, box))
    if not (wanted & ~near).any():
        try:
            found = everything(area(text, **grid), 36, 42)
        except AreaError as error:
            assert "does not lie on scene.tif, which shows" in str(error)  # noqa: PT017
            found = np.zeros_like(wanted)
    else:
        found = everything(area(text, **grid), 36, 42)
    np.testing.assert_array_equal(found[~near], wanted[~near])
    if width == 360:
        assert found.all()


@pytest.mark.parametrize("left", [-180, 0, 77])
def test_an_area_around_a_pole_lies_on_a_grid_in_degrees(left: float, tmp_path: Path) -> None:
    outer = Polygon([(-2e6, -1e6), (1.5e6, -1.6e6), (2e6, 1e6), (-1e6, 1.7e6)])
    hole = outer.representative_point().buffer(9e5)
    for holes in ([], [list(hole.exterior.coords)]):
        polygon = Polygon(outer.exterior.coords, holes)
        document = mapping(polygon) | {"crs": {"properties": {"name": "EPSG:3031"}}}
        (tmp_path / "a.geojson").write_text(json.dumps(document))
        transform = Affine(2, 0, left, 0, -0.5, -60)
        mask = everything(
            area(
                tmp_path / "a.geojson",
                crs=CRS.from_epsg(4326),
                transform=transform,
                height=60,
                width=180,
            ),
            60,
            180,
        )
        rows, cols = np.mgrid[:60, :180] + 0.5
        place = Transformer.from_crs(4326, 3031, always_xy=True).transform
        centres = points(*place(*(transform @ (cols, rows))))
        clear = distance(centres, polygon.boundary) > 5_000
        np.testing.assert_array_equal(mask[clear], within(centres, polygon)[clear])


def test_polygons_cut_at_180_degrees_are_whole_again_in_other_crss(tmp_path: Path) -> None:
    halves = [
        [[[179, -17], [180, -17], [180, -16.2], [179, -16.2], [179, -17]]],
        [[[-180, -16.9], [-179.5, -16.9], [-179.5, -16.1], [-180, -16.1], [-180, -16.9]]],
    ]
    (tmp_path / "fiji.geojson").write_text(json.dumps({"type": "MultiPolygon", "coordinates": halves}))
    for crs, transform in (
        (32760, Affine(400, 0, 700_000, 0, -400, 8_250_000)),
        (3832, Affine(400, 0, 3_190_000, 0, -400, -1_780_000)),
    ):
        grid = {"crs": CRS.from_epsg(crs), "transform": transform, "height": 400, "width": 500}
        mask = everything(area(tmp_path / "fiji.geojson", **grid), 400, 500)
        rows, cols = np.mgrid[:400, :500] + 0.5
        place = Transformer.from_crs(crs, 4326, always_xy=True).transform
        longitudes, latitudes = place(*(transform @ (cols, rows)))
        whole = Polygon(
            [(179, -17), (180, -17), (180, -16.9), (180.5, -16.9), (180.5, -16.1), (180, -16.1),
             (180, -16.2), (179, -16.2)]
        )  # fmt: skip
        centres = points(longitudes % 360, latitudes)
        clear = distance(centres, whole.boundary) > 1e-4
        np.testing.assert_array_equal(mask[clear], within(centres, whole)[clear])
        assert mask.sum() > 10_000


def test_sides_bend_right_however_large_the_box_is() -> None:
    grid = {"crs": CRS.from_epsg(32616), "transform": Affine(30, 0, 454_155, 0, -30, 3_406_845)}
    one = everything(area("-88,30.7,-87,31", **grid, height=509, width=531), 509, 531)
    large = everything(area("-180,30.7,180,90", **grid, height=509, width=531), 509, 531)
    np.testing.assert_array_equal(large, one)


@pytest.mark.parametrize(
    "transform",
    [
        Affine(10, 0, 400000, 0, 10, 5797000),
        Affine(10, 0, 400000, 0, -10, 5800000) @ Affine.rotation(20),
    ],
)
def test_areas_lie_right_on_south_up_and_rotated_rasters(transform: Affine, tmp_path: Path) -> None:
    found = area(
        write_geojson(tmp_path / "a.geojson", "MultiPolygon", "EPSG:32633"), transform=transform
    )
    rows, cols = np.mgrid[:300, :400] + 0.5
    xs = transform.a * cols + transform.b * rows + transform.c
    ys = transform.d * cols + transform.e * rows + transform.f

    def within(west: float, south: float, east: float, north: float) -> np.ndarray:
        return (xs > west) & (xs < east) & (ys > south) & (ys < north)

    judge = within(400500, 5799000, 401500, 5799500) | within(400500, 5798000, 401000, 5799000.001)
    judge |= within(402000, 5798000, 403000, 5799000) & ~within(402300, 5798400, 402600, 5798700)
    mask = everything(found)
    assert (mask != judge).mean() < 1e-3  # centres that lie on an edge to the last digit
    window = found.window.toslices()
    assert mask[window].sum() == mask.sum()


def test_what_reaches_over_the_scene_is_cut_to_it() -> None:
    assert area("390000,5790000,400103,5900000@EPSG:32633").window == Window(0, 0, 10, 300)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0,0,1,1", r"0,0,1,1 does not lie on scene\.tif, which shows 13\.\d+,52\.\d+,.*@EPSG:4326"),
        (
            "0,0,1,1@EPSG:32633",
            r"does not lie on scene\.tif, which shows 400000,5797000,404000,5800000@",
        ),
        ("400001,5799991,400002,5799992@EPSG:32633", "does not lie on scene"),
        ("5,0,1,1@EPSG:32633", "is an empty box"),
        ("0,1,1,1", "is an empty box"),
        ("0,0,1,1@EPSG:99999999", "EPSG:99999999 is no CRS"),
        ("0,0,1-,1", "is not a box"),
        ("0,0,1", "neither a file nor a box"),
        (
            "401000,5798000,402000,5799000",
            r"is taken as degrees, which 401000,5798000 are not\. Name another CRS after an @: "
            r"401000,5798000,402000,5799000@EPSG:32633\.",
        ),
        ("-1.8e7,8e6,1.8e7,8.9e6@ESRI:54009", r"The area has points that do not exist in ESRI:54009\."),
        ("gone.geojson", "neither a file nor a box"),
    ],
)
def test_a_box_that_is_none_is_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(AreaError, match=complaint) as caught:
        area(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not valid GeoJSON"),
        (b'{"type": "Polygon"}', "is not valid GeoJSON"),
        (b'{"type": "FeatureCollection", "features": []}', "holds no polygon"),
        (b'{"type": "Point", "coordinates": [1, 2]}', "holds no polygon"),
        (b'{"type": "Polygon", "coordinates": [[[1, 2], ["x", 3]]]}', "is not valid GeoJSON"),
        (b'{"type": "Polygon", "coordinates": []}', "holds no polygon"),
        (b'{"type": "Polygon", "coordinates": [[]]}', "a ring of 0 corners; 3 are needed"),
        (b'{"type": "Polygon", "coordinates": [[[1, 2], [2, 2]]]}', "a ring of 2 corners"),
        (b'{"type": "Polygon", "coordinates": [[[1, 2], [2, 2], [1, 2]]]}', "a ring of 2 corners"),
        (
            b'{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 3], [4, 5]]]}',
            r"is not valid GeoJSON \(NaN is no number\)",
        ),
        (b'{"type": "Polygon", "coordinates": [[[1e999, 1], [2, 3], [4, 5]]]}', "that is no number"),
        (
            b'{"type": "Polygon", "crs": "EPSG:32633", "coordinates": [[[1, 2], [2, 2], [1, 3]]]}',
            r'has "crs": "EPSG:32633"\. GeoJSON names another CRS as \{"type"',
        ),
        (
            b'{"type": "Polygon", "coordinates": [[[-200, 2], [200, 2], [1, 3]]]}',
            "has a polygon 400 degrees wide; the earth has 360",
        ),
        (
            b'{"type": "Polygon", "coordinates": [[[401000, 5798000], [401000, 58], [401100, 57]]]}',
            "is taken as degrees, which 401000,5798000 are not. Write it in degrees: ogr2ogr",
        ),
        (b"SQLite format 3\0", "is not a valid GeoPackage"),
        (b"\x00\x00\x27\x0a shape", r"neither GeoJSON nor GeoPackage\. Convert it: ogr2ogr area\.gpkg"),
    ],
)
def test_a_file_without_polygons_is_refused_in_one_line(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "area"
    path.write_bytes(content)
    with pytest.raises(AreaError, match=complaint) as caught:
        area(path)
    assert "\n" not in str(caught.value)


def test_a_geopackage_that_leaves_a_question_open_is_refused(tmp_path: Path) -> None:
    one = in_package(wkb(SHAPES[0]))
    path = write_geopackage(tmp_path / "two.gpkg", {"a": [one], "b": [one]})
    with pytest.raises(AreaError, match=r"has polygons in 2 layers \(a, b\)"):
        area(path)
    with pytest.raises(AreaError, match="has no CRS"):
        area(write_geopackage(tmp_path / "bare.gpkg", {"a": [one]}, srs=-1))
    with pytest.raises(AreaError, match="is not a valid GeoPackage"):
        area(write_geopackage(tmp_path / "broken.gpkg", {"a": [one[:-20]]}))


def test_a_scene_without_crs_takes_no_area() -> None:
    with pytest.raises(AreaError, match=r"scene\.tif has no CRS"):
        area("0,0,1,1", crs=None)


def test_the_tiles_over_a_range_are_those_that_settle_its_pixels() -> None:
    rows = TileGrid(height=300, width=300, tile=64, overlap=16).rows
    for start, stop in ((0, 1), (47, 49), (100, 300), (290, 300), (0, 300)):
        places = places_over(rows, start, stop)
        settled = [span for span in rows if span.begin < stop and start < span.settled]
        assert [rows[place] for place in places] == settled
        assert settled[0].begin <= start
        assert settled[-1].settled >= stop
