"""Maps of an area: a cut of the whole map, pixel by pixel."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rasterio.features import geometry_mask
from rio_cogeo.cogeo import cog_validate

from geodeploy import PredictOptions, evaluate, predict, predict_scenes
from geodeploy.errors import AreaError

SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]
HEIGHT, WIDTH = 700, 430
CRS = "EPSG:32616"


@pytest.fixture(scope="module")
def whole(
    make_model: Callable[..., Any],
    make_raster: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Path, Any, Path]:
    """A model that looks around itself, a scene, its whole map, and a folder to map areas in."""
    place = tmp_path_factory.mktemp("whole")
    model = make_model(place / "model.onnx", kernels=(3, 3))
    pixels = np.random.default_rng(1).uniform(0, 0.6, (6, HEIGHT, WIDTH)).astype(np.float32)
    pixels[:, 300:340, :200] = np.nan
    transform = Affine(30, 0, 5e5, 0, -30, 4e6)
    scene = make_raster(place / "scene.tif", pixels, transform=transform)
    predict(scene, model.path, place / "map.tif")
    with rasterio.open(place / "map.tif") as dataset:
        return model, scene, dataset.read(1), place


def box(top: int, left: int, bottom: int, right: int) -> str:
    """Pixels ``top`` to ``bottom``, ``left`` to ``right`` of the scene."""
    return f"{5e5 + 30 * left},{4e6 - 30 * bottom},{5e5 + 30 * right},{4e6 - 30 * top}@{CRS}"


@settings(max_examples=12, phases=[Phase.generate])
@given(data=st.data(), blend=st.sampled_from(["cosine", "flat", "crop"]))
def test_the_map_of_a_box_is_a_cut_of_the_whole_map(
    whole: Any, data: st.DataObject, blend: Any
) -> None:
    model, scene, expected, place = whole
    top, left = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
    bottom, right = data.draw(st.integers(top + 1, HEIGHT)), data.draw(st.integers(left + 1, WIDTH))
    if blend != "cosine":
        path = place / f"{blend}.tif"
        if not path.exists():
            predict(scene, model.path, path, options=PredictOptions(blend=blend))
        with rasterio.open(path) as dataset:
            expected = dataset.read(1)
    options = PredictOptions(aoi=box(top, left, bottom, right), blend=blend, overwrite=True)
    report = predict(scene, model.path, place / "cut.tif", options=options)
    with rasterio.open(place / "cut.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), expected[top:bottom, left:right])
        corner = Affine(30, 0, 5e5 + 30 * left, 0, -30, 4e6 - 30 * top)
        assert dataset.transform.almost_equals(corner, 1e-9)
    assert (report.height, report.width) == (bottom - top, right - left)
    assert report.valid_pixels + report.nodata_pixels == report.height * report.width


@pytest.fixture(scope="module")
def patchy(
    make_model: Callable[..., Any],
    make_raster: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A model and a scene whose map has patches of each class, of any size."""
    place, random = tmp_path_factory.mktemp("patchy"), np.random.default_rng(2)
    # A band a class, the greatest of which wins.
    weights = np.eye(4, 6, dtype=np.float32).reshape(4, 6, 1, 1)
    model = make_model(place / "model.onnx", weights=[weights])
    pixels = sum(
        np.kron(random.uniform(0, 0.2, (6, HEIGHT // side, WIDTH // side)), np.ones((1, side, side)))
        for side in (1, 2, 5, 10)
    )
    transform = Affine(30, 0, 5e5, 0, -30, 4e6)
    scene = make_raster(place / "scene.tif", pixels.astype(np.float32), transform=transform)
    return model.path, scene


@pytest.mark.parametrize("cleaning", [{"smooth": 9}, {"sieve": 7}, {"smooth": 5, "sieve": 7}])
@pytest.mark.parametrize(
    "edges",
    [
        (30, 53, 690, 380),
        (101, 53, 450, 380),
        (0, 0, 9, 11),
        (400, 200, HEIGHT, WIDTH),
        (300, 100, 301, 101),
    ],
)
def test_a_clean_map_of_an_area_is_a_cut_of_the_whole(
    patchy: tuple[Path, Path],
    tmp_path: Path,
    cleaning: dict[str, int],
    edges: tuple[int, int, int, int],
) -> None:
    model, scene = patchy
    top, left, bottom, right = edges
    asked = PredictOptions(confidence=True, disagreement=True, **cleaning)
    everything = predict(scene, model, tmp_path / "all.tif", options=asked)
    assert everything.warnings == ()
    assert all(item.pixels for item in everything.classes)
    options = asked.model_copy(update={"aoi": box(top, left, bottom, right)})
    report = predict(scene, model, tmp_path / "cut.tif", options=options)
    notes = [note for note in report.warnings if "disagreement" not in note]
    assert not notes
    assert (report.height, report.width) == (bottom - top, right - left)
    for name in ("", "_confidence", "_disagreement"):
        with (
            rasterio.open(tmp_path / f"all{name}.tif") as all_,
            rasterio.open(tmp_path / f"cut{name}.tif") as cut,
        ):
            judge = all_.read(1)[top:bottom, left:right]
            np.testing.assert_array_equal(cut.read(1), judge)
            assert cut.transform.almost_equals(all_.transform @ Affine.translation(left, top), 1e-9)
        if not name:
            counts = {value: int((judge == value).sum()) for value in (0, 1, 3, 4)}
            assert {item.value: item.pixels for item in report.classes} == counts
    again = predict(scene, model, tmp_path / "cut.tif", options=options)
    assert again.was_there
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_a_clean_map_of_polygons_is_that_of_the_whole_inside_them(
    patchy: tuple[Path, Path], tmp_path: Path
) -> None:
    model, scene = patchy
    asked = PredictOptions(smooth=5, sieve=7, confidence=True)
    predict(scene, model, tmp_path / "all.tif", options=asked)
    corners = [(10, 10, 60, 70), (620, 380, 690, 425)]  # a corner of the scene each, far apart
    shapes = []
    for top, left, bottom, right in corners:
        xs, ys = (5e5 + 30 * left, 5e5 + 30 * right), (4e6 - 30 * bottom, 4e6 - 30 * top)
        shapes.append([[(xs[0], ys[0]), (xs[1], ys[0]), (xs[1], ys[1]), (xs[0], ys[0])]])
    area = {"type": "MultiPolygon", "coordinates": shapes}
    crs = {"type": "name", "properties": {"name": CRS}}
    (tmp_path / "a.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "crs": crs, "features": [
            {"type": "Feature", "properties": {}, "geometry": area}]})
    )  # fmt: skip
    options = asked.model_copy(update={"aoi": str(tmp_path / "a.geojson")})
    report = predict(scene, model, tmp_path / "cut.tif", options=options)
    assert report.tiles_skipped
    for name in ("", "_confidence"):
        with (
            rasterio.open(tmp_path / f"all{name}.tif") as all_,
            rasterio.open(tmp_path / f"cut{name}.tif") as cut,
        ):
            judge, found = all_.read(1)[10:690, 10:425], cut.read(1)
            inside = geometry_mask([area], out_shape=found.shape, transform=cut.transform, invert=True)
        np.testing.assert_array_equal(found[inside], judge[inside])
        assert (found[~inside] == 255).all()
        assert inside.any()


def test_polygons_cut_the_map_and_spare_the_tiles_between_them(whole: Any, tmp_path: Path) -> None:
    model, scene, expected, _ = whole
    corners = [(10, 10, 60, 70), (620, 380, 690, 425)]
    shapes = []
    for top, left, bottom, right in corners:
        x, y = [5e5 + 30 * col for col in (left, right)], [4e6 - 30 * row for row in (top, bottom)]
        shapes.append([[[x[0], y[0]], [x[1], y[0]], [x[1], y[1]], [x[0], y[1]], [x[0], y[0]]]])
    document = {"type": "MultiPolygon", "coordinates": shapes, "crs": {"properties": {"name": CRS}}}
    (tmp_path / "a.geojson").write_text(json.dumps(document))
    options = PredictOptions(aoi=str(tmp_path / "a.geojson"))
    report = predict(scene, model.path, tmp_path / "map.tif", options=options)
    judge = np.full((HEIGHT, WIDTH), 255, np.uint8)
    for top, left, bottom, right in corners:
        judge[top:bottom, left:right] = expected[top:bottom, left:right]
    with rasterio.open(tmp_path / "map.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), judge[10:690, 10:425])
    assert report.tiles_run <= 4 + 9
    assert report.tiles_skipped > 50
    assert cog_validate(tmp_path / "map.tif", quiet=True)[0]


def test_a_small_area_of_a_large_scene_runs_few_tiles(whole: Any, tmp_path: Path) -> None:
    model, scene, _, _ = whole
    options = PredictOptions(aoi=box(330, 300, 350, 310))
    report = predict(scene, model.path, tmp_path / "map.tif", options=options)
    assert report.tiles_run <= 4
    assert report.batch <= 9


def test_an_area_is_taken_on_the_grid_of_the_size_asked_for(whole: Any, tmp_path: Path) -> None:
    model, scene, _, _ = whole
    predict(scene, model.path, tmp_path / "all.tif", options=PredictOptions(gsd=60))
    options = PredictOptions(gsd=60, aoi=box(100, 100, 300, 200))
    predict(scene, model.path, tmp_path / "map.tif", options=options)
    with rasterio.open(tmp_path / "all.tif") as all_, rasterio.open(tmp_path / "map.tif") as map_:
        np.testing.assert_array_equal(map_.read(1), all_.read(1)[50:150, 50:100])


def test_an_area_that_does_not_lie_on_a_scene_is_refused_before_any_work(
    whole: Any, real_scene: Path, tmp_path: Path
) -> None:
    model, scene, _, _ = whole
    options = PredictOptions(aoi=box(0, 0, 10, 10))
    with pytest.raises(AreaError, match=r"does not lie on landsat8_cloudy\.tif"):
        predict_scenes([scene, real_scene], model.path, tmp_path, options=options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AreaError, match="cut the labels"):
        evaluate(model.path, scene, scene, options=options)
