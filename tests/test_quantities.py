"""Maps of quantities. The judges are the whole array in float64, numpy and rasterio."""

import json
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pystac
import pytest
import rasterio
from numpy.typing import NDArray
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from rio_cogeo.cogeo import cog_validate

import geodeploy.engine
from geodeploy import PredictOptions, predict
from geodeploy.derived import DerivedOptions
from geodeploy.errors import ModelError, RecipeError
from geodeploy.inspect import inspect
from geodeploy.spec import Target

Make = Callable[..., Any]

TILE, OVERLAP = 32, 12
HEIGHT, WIDTH = 83, 107
TARGETS = (Target(name="height", unit="m"), Target(name="biomass", unit="Mg/ha"))


@pytest.fixture(scope="module")
def scene(make_raster: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(2).uniform(0, 0.6, (2, HEIGHT, WIDTH)).astype(np.float32)
    pixels[:, 20:60, 50:90] = np.nan
    return make_raster(tmp_path_factory.mktemp("scene") / "scene.tif", pixels, names=("red", "nir"))


@pytest.fixture(scope="module")
def model(make_model: Make, make_spec: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One that looks around itself, so that its tiles disagree near their edges."""
    spec = make_spec(("red", "nir"), tile=TILE, overlap=OVERLAP, targets=TARGETS)
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    return make_model(path, spec, kernels=(3,), whole_numbers=True)


def read(path: Path) -> NDArray[np.float32]:
    with rasterio.open(path) as dataset:
        return dataset.read()


def answers(
    scene: Path, model: Any, blend: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Every tile's quantities (N, K, H, W), 0 where it is not, its weights (N, H, W), and valid."""
    pixels = read(scene).astype(np.float64)
    valid = np.isfinite(pixels).all(axis=0)
    pixels = np.where(valid, pixels, 0.2)
    edge = np.minimum(np.arange(TILE), np.arange(TILE)[::-1])
    line = np.sin(np.pi / 2 * np.minimum((edge + 0.5) / OVERLAP, 1)) ** 2
    line = np.ones(TILE) if blend == "flat" else line
    found, weights, stride = [], [], TILE - OVERLAP
    tops, lefts = (range(0, -(-(size - TILE) // stride) * stride + 1, stride) for size in valid.shape)
    for top, left in product(tops, lefts):
        row, col = min(top, HEIGHT - TILE), min(left, WIDTH - TILE)
        values = model.on_the_whole(pixels[:, row : row + TILE, col : col + TILE])
        whole, weight = np.zeros((len(values), HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH))
        here = np.s_[top : row + TILE, left : col + TILE]
        whole[:, *here] = values[:, top - row :, left - col :]
        weight[here] = np.outer(line, line)[: row + TILE - top, : col + TILE - left]
        found.append(whole)
        weights.append(weight)
    return np.array(found), np.array(weights), valid


@pytest.mark.parametrize("blend", ["cosine", "flat"])
def test_the_map_is_the_weighted_mean_of_the_tiles_and_the_disagreement_that_of_their_pairs(
    scene: Path, model: Any, tmp_path: Path, blend: Any
) -> None:
    options = PredictOptions(blend=blend, disagreement=True)
    report = predict(scene, model.path, tmp_path / "map.tif", options=options)
    found, weights, valid = answers(scene, model, blend)
    mean = (weights[:, np.newaxis] * found).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(read(report.map), np.where(valid, mean, np.nan), atol=1e-5)
    apart, pairs = np.zeros(mean.shape), np.zeros(valid.shape)
    for one, other in combinations(range(len(found)), 2):
        weight = weights[one] * weights[other]
        apart += weight * (found[one] - found[other]) ** 2 / 2
        pairs += weight
    compared = valid & (pairs > 0)
    judge = np.sqrt(np.divide(apart, pairs, out=np.full(mean.shape, np.nan), where=compared))
    (beside,) = report.beside
    np.testing.assert_allclose(read(beside), judge, atol=1e-5)
    assert np.nanmax(judge, axis=(1, 2)).min() > 0.1


def test_a_pointwise_model_gives_just_what_the_whole_array_does(
    make_model: Make, make_spec: Make, make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    spec = make_spec(("red",), mean=9.0, valid_range=(0.0, 255.0), targets=TARGETS[:1])
    model = make_model(tmp_path / "m.onnx", spec, whole_numbers=True, seed=1)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 150, 71), dtype=np.uint8)
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red",))
    predict(made, model.path, tmp_path / "map.tif")
    np.testing.assert_array_equal(read(tmp_path / "map.tif"), model.on_the_whole(pixels))


def test_the_file_is_a_cog_that_says_what_it_holds(
    make_model: Make, make_spec: Make, make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(3).uniform(0, 0.6, (2, 530, 40)).astype(np.float32)
    pixels[:, 100:130, :25] = np.nan
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red", "nir"))
    spec = make_spec(("red", "nir"), targets=TARGETS)
    model = make_model(tmp_path / "m.onnx", spec, kernels=(3,))
    report = predict(made, model.path, tmp_path / "map.tif")
    assert cog_validate(report.map) == (True, [], [])
    values = read(report.map).astype(np.float64)
    with rasterio.open(report.map) as dataset:
        assert dataset.dtypes == ("float32", "float32")
        assert np.isnan(dataset.nodata)
        assert dataset.descriptions == ("height", "biomass")
        assert dataset.units == ("m", "Mg/ha")
        assert dataset.tags()["GEODEPLOY_TARGETS"] == "height (m); biomass (Mg/ha)"
        told = [dataset.tags(index) for index in (1, 2)]
    for band, tags, item in zip(values, told, report.targets, strict=True):
        judge = np.nanmin(band), np.nanmax(band), np.nanmean(band), np.nanstd(band)
        names = ("MINIMUM", "MAXIMUM", "MEAN", "STDDEV")
        np.testing.assert_allclose([float(tags[f"STATISTICS_{name}"]) for name in names], judge)
        np.testing.assert_allclose((item.minimum, item.maximum, item.mean, item.std), judge)
    assert report.valid_pixels == np.isfinite(values[0]).sum()
    assert not report.classes
    with rasterio.open(report.map, overview_level=0) as dataset:
        overview = dataset.read()
    squares = values.reshape(2, 265, 2, 20, 2)
    with np.errstate(invalid="ignore"):
        mean = np.nansum(squares, axis=(2, 4)) / np.isfinite(squares).sum(axis=(2, 4))
    np.testing.assert_allclose(overview, mean, rtol=1e-5)


def test_an_older_class_map_leaves_no_names_beside_it(
    scene: Path, model: Any, make_model: Make, make_spec: Make, tmp_path: Path
) -> None:
    classes = make_model(tmp_path / "c.onnx", make_spec(("red", "nir")))
    predict(scene, classes.path, tmp_path / "map.tif")
    predict(scene, model.path, tmp_path / "map.tif", options=PredictOptions(overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"c.onnx", "map.tif", "map.tif.aux.xml"}
    assert "Category" not in (tmp_path / "map.tif.aux.xml").read_text()


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 5, "readers": 1}, {"threads": 2}])
def test_batch_and_threads_change_no_byte(
    scene: Path, model: Any, tmp_path: Path, options: dict[str, int]
) -> None:
    for name, given in (("one.tif", {}), ("other.tif", options)):
        asked = PredictOptions(disagreement=True, **given)
        predict(scene, model.path, tmp_path / name, options=asked)
    for end in (".tif", "_disagreement.tif"):
        one, other = tmp_path / f"one{end}", tmp_path / f"other{end}"
        assert one.read_bytes() == other.read_bytes()


def test_an_area_is_a_cut_of_the_whole_map(scene: Path, model: Any, tmp_path: Path) -> None:
    whole = predict(
        scene, model.path, tmp_path / "whole.tif", options=PredictOptions(disagreement=True)
    )
    left, top = rasterio.open(scene).transform @ (9, 13)
    box = f"{left},{top - 30 * 50},{left + 30 * 60},{top}@EPSG:32616"
    asked = PredictOptions(aoi=box, disagreement=True)
    cut = predict(scene, model.path, tmp_path / "cut.tif", options=asked)
    for one, other in ((whole.map, cut.map), (whole.beside[0], cut.beside[0])):
        np.testing.assert_array_equal(read(one)[:, 13:63, 9:69], read(other))


def test_in_parts_and_after_a_stop_the_bytes_are_the_same(
    make_model: Make,
    make_spec: Make,
    make_raster: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec(("red", "nir"), targets=TARGETS)
    model = make_model(tmp_path / "m.onnx", spec, kernels=(3,))
    pixels = np.random.default_rng(3).uniform(0, 0.6, (2, 1200, 90)).astype(np.float32)
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red", "nir"))
    predict(made, model.path, tmp_path / "whole.tif")
    calls = 0

    def stop(done: int, rows: int) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(made, model.path, tmp_path / "again.tif", progress=stop)
    report = predict(made, model.path, tmp_path / "again.tif")
    assert calls == 1
    assert 0 < report.pixels_kept < 1200 * 90
    assert (tmp_path / "again.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    # In panels of two tiles, other pieces are added up.
    monkeypatch.setattr(geodeploy.engine, "PANEL_BYTES", 2**20)
    predict(made, model.path, tmp_path / "panels.tif")
    assert (tmp_path / "panels.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--confidence", {"confidence": True}),
        ("--probabilities", {"probabilities": True}),
        ("--smooth", {"smooth": 3}),
        ("--sieve", {"sieve": 9}),
        ("--polygons", {"derived": DerivedOptions(polygons=Path(".geojson"))}),
        ("--area", {"derived": DerivedOptions(area=Path(".csv"))}),
        ("--preview", {"derived": DerivedOptions(preview=Path(".png"))}),
    ],
)
def test_what_is_for_classes_alone_is_refused_before_any_work(
    scene: Path, model: Any, tmp_path: Path, flag: str, options: dict[str, Any]
) -> None:
    with pytest.raises(
        RecipeError, match=rf"^{flag} is for maps of classes; the model tiny gives .*m\)"
    ):
        predict(scene, model.path, tmp_path / "map.tif", options=PredictOptions(**options))
    assert not list(tmp_path.iterdir())


def test_nan_from_the_model_stops_the_run_or_is_left_out(
    make_model: Make, make_spec: Make, make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    spec = make_spec(("red",), tile=TILE, overlap=0, targets=TARGETS[:1])
    model = make_model(tmp_path / "m.onnx", spec, weights=[np.ones((1, 1, 1, 1), np.float32)])
    graph = onnx.load(model.path)
    graph.graph.node[-1].output[0] = "linear"
    graph.graph.node.append(onnx.helper.make_node("Sqrt", ["linear"], ["logits"]))
    onnx.save(graph, model.path)
    pixels = np.full((1, 40, 70), 0.25, np.float32)
    pixels[0, 5, 33] = -0.1
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red",))
    with pytest.raises(ModelError, match="NaN or infinity for the tile at row 0, column 32"):
        predict(made, model.path, tmp_path / "map.tif")
    report = predict(made, model.path, tmp_path / "map.tif", options=PredictOptions(on_error="skip"))
    assert (report.tiles_failed, report.hole_pixels) == (1, TILE * TILE)
    judge = np.full((1, 40, 70), 0.5, np.float32)
    judge[0, :TILE, TILE : 2 * TILE] = np.nan
    np.testing.assert_array_equal(read(report.map), judge)


def test_a_stac_item_and_inspect_tell_the_quantities(scene: Path, model: Any, tmp_path: Path) -> None:
    derived = DerivedOptions(stac=True, acquired="2020-06-01")
    options = PredictOptions(disagreement=True, derived=derived)
    report = predict(scene, model.path, tmp_path / "map.tif", options=options)
    item = json.loads((tmp_path / "map.stac.json").read_text())
    JsonSchemaSTACValidator().validate_core(item, pystac.STACObjectType.ITEM, "1.1.0", "map")
    asset = item["assets"]["map"]
    assert [(band["name"], band["unit"]) for band in asset["bands"]] == [
        ("height", "m"),
        ("biomass", "Mg/ha"),
    ]
    assert (asset["data_type"], asset["nodata"]) == ("float32", "nan")
    means = [band["statistics"]["mean"] for band in asset["bands"]]
    np.testing.assert_allclose(means, np.nanmean(read(report.map), axis=(1, 2)), rtol=1e-5)
    assert item["properties"]["title"] == "Map of height, biomass map"
    assert item["properties"]["processing:lineage"].startswith("Predicted by the model tiny")
    assert item["assets"]["map_disagreement.tif"]["bands"][1]["unit"] == "Mg/ha"
    assert not any("classification" in name for name in item["stac_extensions"])
    told = inspect(report.map)
    assert told.seams is None
    assert told.tags["TARGETS"] == "height (m); biomass (Mg/ha)"
