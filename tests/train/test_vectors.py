"""Labels drawn from polygons and points, against a test of every pixel's centre."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pyogrio
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio.crs import CRS

from geodeploy.errors import GeodeployError, LabelError, RecipeError, SourceError
from geodeploy.labels import IGNORED
from geodeploy.train.data import open_scenes
from geodeploy.train.recipe import load_recipe, recipe_text

WGS84 = CRS.from_epsg(4326)
COLUMN = "data.vectors.class_column=kind"


def write(
    path: Path, shapes: Sequence[Any], kinds: Sequence[Any], crs: CRS | None, **options: Any
) -> Path:
    """A file of ``shapes`` whose column ``kind`` holds ``kinds``."""
    if path.suffix == ".parquet":
        about = {"encoding": "WKB", "geometry_types": []}
        if crs != WGS84:
            about["crs"] = crs.to_dict(projjson=True) if crs else None
        geo = {"version": "1.1.0", "primary_column": "shape", "columns": {"shape": about}}
        table = pa.table({"kind": kinds, "shape": shapely.to_wkb(np.array(shapes, object)).tolist()})
        table = table.replace_schema_metadata({"geo": json.dumps(geo)})
        pyarrow.parquet.write_table(table, path)
        return path
    types = {shape.geom_type for shape in shapes} or {"Polygon"}
    pyogrio.raw.write(
        path,
        shapely.to_wkb(np.array(shapes, object)),
        [np.array(kinds)],
        ["kind"],
        geometry_type=types.pop() if len(types) == 1 else "Unknown",
        crs=crs.to_wkt() if crs else None,
        **options,
    )
    return path


def codes_of(recipe: Path, labels: Path, *overrides: str) -> np.ndarray:
    names = [f"data.scene.0.labels={labels}", COLUMN, "data.scene.0.split=train", *overrides]
    with open_scenes(load_recipe(recipe, names)) as (scene,):
        return scene.codes


def centres(image: Path) -> tuple[np.ndarray, np.ndarray, CRS]:
    """Of all pixels: x, y (H, W) and their CRS."""
    with rasterio.open(image) as file:
        cols, rows = np.meshgrid(np.arange(file.width) + 0.5, np.arange(file.height) + 0.5)
        a, b, c, d, e, f = file.transform[:6]
        return a * cols + b * rows + c, d * cols + e * rows + f, file.crs


def in_crs(shape: Any, source: CRS, target: CRS) -> Any:
    """``shape`` by pyproj, with corners so dense that its sides bend as they should."""
    move = pyproj.Transformer.from_crs(source.to_wkt(), target.to_wkt(), always_xy=True).transform
    x0, y0, x1, y1 = shape.bounds
    dense = shapely.segmentize(shape, max(x1 - x0, y1 - y0, 1) / 2000)
    return shapely.transform(dense, lambda corners: np.stack(move(*corners.T), axis=1))


@pytest.fixture
def blots(recipe_file: Path) -> list[Any]:
    """Three polygons on the scene that do not touch, one with a hole and one over the edge."""
    xs, ys, _ = centres(recipe_file.parent / "image.tif")

    def at(row: float, col: float) -> tuple[float, float]:
        return xs[0, 0] + 30.0 * col, ys[0, 0] - 30.0 * row

    ring = shapely.Point(at(30.3, 35.2)).buffer(700).difference(shapely.Point(at(33, 36)).buffer(211))
    wedge = shapely.Polygon([at(60.2, 3.1), at(111.7, 40.9), at(70.4, 66.6)])
    outside = shapely.box(*at(90.21, 90.4), *at(20.3, 170.7))
    return [ring, wedge, outside]


@pytest.mark.parametrize("turn", [0.0, 17.0])
@pytest.mark.parametrize(
    ("name", "epsg"), [("a.gpkg", 3857), ("a.geojson", 4326), ("a.shp", 3035), ("a.parquet", 4326)]
)
def test_a_pixel_has_the_class_of_the_polygon_that_its_centre_lies_in(
    recipe_file: Path, tmp_path: Path, blots: list[Any], name: str, epsg: int, turn: float
) -> None:
    image = recipe_file.parent / "image.tif"
    if turn:
        with rasterio.open(image) as file:
            grid = file.transform @ Affine.rotation(turn, (65, 58))
            image = tmp_path / "turned.tif"
            with rasterio.open(image, "w", **file.profile | {"transform": grid}) as turned:
                turned.write(file.read())
                turned.descriptions, turned.scales = file.descriptions, file.scales
                turned.offsets = file.offsets
    xs, ys, utm = centres(image)
    crs = CRS.from_epsg(epsg)
    shapes = [in_crs(blot, utm, crs) for blot in blots]
    labels = write(tmp_path / name, shapes, ["cloud", "cirrus", "clear"], crs)
    found = codes_of(recipe_file, labels, f"data.scene.0.image={image}")
    needed = np.full(xs.shape, IGNORED)
    for blot, position in zip(blots, (1, 2, 0), strict=True):
        needed[shapely.contains_xy(blot, xs, ys)] = position
    # What the sides of the polygon are off by, once to the other CRS and back, is centimetres.
    edges = shapely.union_all([blot.boundary for blot in blots])
    clear = shapely.distance(shapely.points(xs, ys), edges) > 0.05
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], needed[clear])
    assert {0, 1, 2, IGNORED} == set(np.unique(found))


def test_sides_are_as_straight_as_in_the_crs_of_the_file(recipe_file: Path, tmp_path: Path) -> None:
    """Between two corners a thousand kilometres apart a parallel is no straight line in UTM."""
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    move = pyproj.Transformer.from_crs(utm.to_wkt(), 4326, always_xy=True).transform
    longitudes, latitudes = move(xs, ys)
    middle = (longitudes.mean(), latitudes.mean())
    south = shapely.box(middle[0] - 6, middle[1] - 2, middle[0] + 6, middle[1])
    found = codes_of(recipe_file, write(tmp_path / "a.gpkg", [south], ["cloud"], WGS84))
    clear = np.abs(latitudes - middle[1]) > 1e-7
    np.testing.assert_array_equal((found == 1)[clear], (latitudes < middle[1])[clear])


def test_a_point_is_the_pixel_that_it_lies_in(recipe_file: Path, tmp_path: Path) -> None:
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    places = np.random.default_rng(3).permutation(xs.size)[:50]
    shapes = [in_crs(shapely.Point(xs.ravel()[n] + 14, ys.ravel()[n] - 14), utm, WGS84) for n in places]
    kinds = ["cloud"] * 25 + ["cirrus"] * 25
    shapes[1] = shapely.MultiPoint([shapes[1], shapes[0]])
    found = codes_of(recipe_file, write(tmp_path / "a.gpkg", shapes, kinds, WGS84))
    needed = np.full(xs.size, IGNORED)
    needed[places] = np.repeat([1, 2], 25)
    np.testing.assert_array_equal(found.ravel(), needed)


def test_the_radius_of_points_is_in_metres_on_the_ground(recipe_file: Path, tmp_path: Path) -> None:
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    move = pyproj.Transformer.from_crs(utm.to_wkt(), 4326, always_xy=True).transform
    longitudes, latitudes = move(xs, ys)
    point = shapely.Point(longitudes[50, 60] + 1e-4, latitudes[50, 60])
    labels = write(tmp_path / "a.gpkg", [point], ["cloud"], WGS84)
    found = codes_of(recipe_file, labels, "data.vectors.point_radius_m=745")
    spread = np.full_like(xs, point.x), np.full_like(ys, point.y)
    _, _, metres = pyproj.Geod(ellps="WGS84").inv(*spread, longitudes, latitudes)
    clear = np.abs(metres - 745) > 0.5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal((found == 1)[clear], (metres < 745)[clear])


@pytest.fixture
def strips(recipe_file: Path, tmp_path: Path) -> Path:
    """Each class covers three quarters of a square of 40 x 40 pixels, ``unknown`` its first row."""
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    left, top = xs[0, 0] - 15, ys[0, 0] + 15

    def block(row: int, col: int, height: int, width: int) -> Any:
        x, y = left + 30 * col, top - 30 * row
        return shapely.box(x, y - 30 * height, x + 30 * width, y)

    shapes = [block(0, 0, 30, 40), block(10, 0, 30, 40), block(0, 0, 40, 30), block(0, 0, 1, 40)]
    kinds = ["cloud", "cirrus", "clear", "unknown"]
    return write(tmp_path / "strips.gpkg", shapes, kinds, utm)


@pytest.mark.parametrize(
    ("priority", "needed"),
    [
        # Rows 5, 20 and 35 in column 5, then in column 35.
        ([], [IGNORED, IGNORED, IGNORED, 1, IGNORED, 2]),
        (["cirrus"], [IGNORED, 2, 2, 1, 2, 2]),
        (["cloud", "clear"], [1, 1, 0, 1, 1, 2]),
        (["clear", "cirrus", "cloud"], [0, 0, 0, 1, 2, 2]),
    ],
)
def test_the_first_in_the_priority_lies_above_and_what_is_not_ranked_has_no_label(
    recipe_file: Path,
    strips: Path,
    caplog: pytest.LogCaptureFixture,
    priority: list[str],
    needed: list[int],
) -> None:
    overrides = [f"data.vectors.priority={priority}", "data.vectors.ignore=['unknown']"]
    with caplog.at_level(logging.WARNING):
        found = codes_of(recipe_file, strips, *overrides)
    assert [found[row, col] for col in (5, 35) for row in (5, 20, 35)] == needed
    assert (found[0, :40] == IGNORED).all()
    assert (found[:, 40:] == IGNORED).all()
    assert ("data.vectors.priority" in caplog.text) == (len(priority) < 2)


def test_what_no_feature_covers_may_be_a_class(recipe_file: Path, strips: Path, tmp_path: Path) -> None:
    overrides = ["data.vectors.ignore=['unknown']", "data.vectors.priority=['cloud', 'cirrus']"]
    without = codes_of(recipe_file, strips, *overrides)
    found = codes_of(recipe_file, strips, *overrides, "data.vectors.background=cirrus")
    outside = np.ones(found.shape, bool)
    outside[:30, :40] = outside[10:40, :40] = outside[:40, :30] = False
    np.testing.assert_array_equal(found, np.where(outside, 2, without))
    # Where nothing lies on the scene, all of it is that class.
    _, _, utm = centres(recipe_file.parent / "image.tif")
    far = elsewhere(tmp_path, utm)
    assert (codes_of(recipe_file, far, "data.vectors.background=clear") == 0).all()


def test_a_feature_that_nobody_has_named_is_no_background(
    recipe_file: Path, tmp_path: Path, blots: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, _, utm = centres(recipe_file.parent / "image.tif")
    named = write(tmp_path / "a.gpkg", blots, ["cloud", "cirrus", "cirrus"], utm)
    gaps = write(tmp_path / "b.gpkg", blots, ["cloud", None, None], utm)
    plain = codes_of(recipe_file, named, "data.vectors.priority=['cloud', 'cirrus']")
    found = codes_of(recipe_file, gaps, "data.vectors.background=clear")
    covered = {0: IGNORED, 1: 1, 2: IGNORED, IGNORED: 0}
    np.testing.assert_array_equal(found, np.vectorize(covered.get)(plain))
    assert "what they cover is no clear" in caplog.text


def test_the_column_may_hold_values_with_gaps(
    recipe_file: Path, tmp_path: Path, blots: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, _, utm = centres(recipe_file.parent / "image.tif")
    labels = write(tmp_path / "a.gpkg", blots, [2.0, float("nan"), 0.0], utm)
    assert set(np.unique(codes_of(recipe_file, labels))) == {0, 2, IGNORED}
    assert "1 features have no kind" in caplog.text


def test_other_words_are_given_a_class(recipe_file: Path, tmp_path: Path, blots: list[Any]) -> None:
    _, _, utm = centres(recipe_file.parent / "image.tif")
    labels = write(tmp_path / "a.gpkg", blots, ["Wolke", "Weiß nicht", "freies Land"], utm)
    meant = "data.vectors.classes={Wolke='cloud', 'freies Land'='clear'}"
    found = codes_of(recipe_file, labels, meant, "data.vectors.ignore=['Weiß nicht']")
    assert set(np.unique(found)) == {0, 1, IGNORED}


SQUARE = shapely.box(0, 0, 1, 1)


def elsewhere(folder: Path, utm: CRS) -> Path:
    return write(folder / "a.gpkg", [SQUARE], ["cloud"], utm)


def without_crs(folder: Path, utm: CRS) -> Path:
    return write(folder / "a.gpkg", [SQUARE], ["cloud"], None)


def two_layers(folder: Path, utm: CRS) -> Path:
    write(folder / "a.gpkg", [SQUARE], ["cloud"], utm, layer="one")
    return write(folder / "a.gpkg", [SQUARE], ["cloud"], utm, layer="two", append=True)


def empty(folder: Path, utm: CRS) -> Path:
    return write(folder / "a.gpkg", [], np.array([], object), utm)


def damaged(folder: Path, utm: CRS) -> Path:
    path = elsewhere(folder, utm)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def plain_parquet(folder: Path, utm: CRS) -> Path:
    pyarrow.parquet.write_table(pa.table({"kind": ["cloud"]}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize(
    ("make", "override", "kind", "words"),
    [
        (elsewhere, "seed=0", LabelError, r"a\.gpkg does not lie on image\.tif"),
        (elsewhere, "data.vectors.class_column=Kind", LabelError, r"no column Kind; it has kind\."),
        (elsewhere, "data.vectors.layer=b", SourceError, "cannot be read as polygons or points"),
        (two_layers, "seed=0", LabelError, r"2 layers with geometries \(one, two\)"),
        (empty, "seed=0", LabelError, "holds no feature"),
        (without_crs, "seed=0", LabelError, "has no CRS"),
        (damaged, "seed=0", SourceError, "cannot be read as polygons or points"),
        (plain_parquet, "seed=0", SourceError, "no whole GeoParquet"),
    ],
)
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_what_is_wrong_with_the_file_is_said_in_one_line(
    recipe_file: Path,
    tmp_path: Path,
    make: Callable[[Path, CRS], Path],
    override: str,
    kind: type[GeodeployError],
    words: str,
) -> None:
    _, _, utm = centres(recipe_file.parent / "image.tif")
    with pytest.raises(kind, match=words) as caught:
        codes_of(recipe_file, make(tmp_path, utm), override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.gpkg", "a.parquet"])
@pytest.mark.parametrize("radius", [None, 90])
def test_features_around_the_world_are_left_aside(
    recipe_file: Path, tmp_path: Path, name: str, radius: int | None
) -> None:
    """Where UTM ends, and at the poles; but not a point beside the scene that reaches into it."""
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    beside = in_crs(shapely.Point(xs[50, 0] - 70, ys[50, 0]), utm, WGS84)
    within = in_crs(shapely.Point(xs[9, 9], ys[9, 9]), utm, WGS84)
    far = [shapely.Point(x, y) for x, y in [(90, 3), (5, 90), (100, -90), (179, 80), (-99, -45)]]
    labels = write(tmp_path / name, [*far, beside, within], ["cirrus"] * 5 + ["cloud"] * 2, WGS84)
    found = codes_of(
        recipe_file, labels, *([f"data.vectors.point_radius_m={radius}"] if radius else [])
    )
    assert found[9, 9] == 1
    assert found[50, 0] == (1 if radius else IGNORED)
    assert 2 not in found


def geojson(path: Path, corners: list[tuple[float, float]], kind: object) -> Path:
    geometry = {"type": "Polygon", "coordinates": [corners]}
    feature = {"type": "Feature", "properties": {"kind": kind}, "geometry": geometry}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


@pytest.mark.filterwarnings("ignore:Non closed ring:RuntimeWarning")  # GDAL's own word on it
def test_odd_features_are_refused_in_one_line(recipe_file: Path, tmp_path: Path) -> None:
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    move = pyproj.Transformer.from_crs(utm.to_wkt(), 4326, always_xy=True).transform
    inner = [move(xs[row, col], ys[row, col]) for row, col in [(9, 9), (9, 40), (40, 9), (9, 9)]]
    world = [(-180.0, -90.0), (180.0, -90.0), (180.0, 90.0), (-180.0, 90.0), (-180.0, -90.0)]
    for corners, kind, words in [
        (inner[:2], "cloud", r"a\.geojson holds a geometry that is none"),
        (world, "cloud", "points that do not exist in its CRS"),
        (inner, ["cloud"] * 30, r"kind says \['cloud' 'cloud'"),
        (inner, "a\nb", r"kind says a b, which is none of"),
    ]:
        with pytest.raises(LabelError, match=words) as caught:
            codes_of(recipe_file, geojson(tmp_path / "a.geojson", corners, kind))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_words_that_are_no_class_are_listed(
    recipe_file: Path, tmp_path: Path, blots: list[Any]
) -> None:
    _, _, utm = centres(recipe_file.parent / "image.tif")
    labels = write(tmp_path / "a.gpkg", blots * 3, ["cloud", *"abcdefg", "a"], utm)
    with pytest.raises(LabelError, match=r"kind says a, b, c, d, e and 2 more, which are none of"):
        codes_of(recipe_file, labels)


def test_lines_and_features_smaller_than_pixels_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    xs, ys, utm = centres(recipe_file.parent / "image.tif")
    line = shapely.LineString([(xs[0, 0], ys[0, 0]), (xs[9, 9], ys[9, 9])])
    with pytest.raises(LabelError, match="holds lines; polygons or points are needed"):
        codes_of(recipe_file, write(tmp_path / "a.gpkg", [line], ["cloud"], utm))
    crumb = shapely.Point(xs[5, 5] + 10, ys[5, 5]).buffer(4)
    with pytest.raises(LabelError, match=r"no pixel of image\.tif has its centre in a feature"):
        codes_of(recipe_file, write(tmp_path / "b.gpkg", [crumb], ["cloud"], utm))


def test_the_recipe_must_name_the_column_and_classes_that_there_are(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"scene\.0\.labels are polygons or points"):
        load_recipe(recipe_file, ["data.scene.0.labels=a.gpkg"])
    with pytest.raises(RecipeError, match=r"data\.vectors names the class snow"):
        load_recipe(recipe_file, [COLUMN, "data.vectors.priority=['snow']"])


def test_a_recipe_with_odd_words_reads_back(recipe_file: Path, tmp_path: Path) -> None:
    words = "data.vectors.classes={'freies Land'='clear', 'a.b'='cloud', '\"'='cloud'}"
    recipe = load_recipe(recipe_file, [COLUMN, words, "data.vectors.point_radius_m=5"])
    (tmp_path / "recipe.toml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe


def test_a_scene_across_180_degrees_has_what_lies_on_either_side(
    recipe_file: Path, tmp_path: Path, make_raster: Callable[..., Path]
) -> None:
    grid = Affine(0.01, 0, 179.5, 0, -0.01, -17)
    pixels = np.full((6, 50, 100), 0.3, np.float32)
    image = make_raster(tmp_path / "fiji.tif", pixels, crs=WGS84, transform=grid)
    shapes = [shapely.box(179.6, -17.2, 179.8, -17.1), shapely.box(-179.8, -17.4, -179.7, -17.1)]
    labels = write(tmp_path / "a.gpkg", shapes, ["cloud", "cirrus"], WGS84)
    found = codes_of(recipe_file, labels, f"data.scene.0.image={image}")
    needed = np.full((50, 100), IGNORED)
    needed[10:20, 10:30] = 1
    needed[10:40, 70:80] = 2
    np.testing.assert_array_equal(found, needed)
