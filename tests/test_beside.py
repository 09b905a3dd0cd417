"""Confidence, probabilities and disagreement: the judge has the whole array and every tile's answer."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rio_cogeo.cogeo import cog_validate

from geodeploy import PredictOptions, predict, predict_scenes
from geodeploy.derived import DerivedOptions
from geodeploy.errors import GridError, OutputError

Make = Callable[..., Any]
MakeRaster = Callable[..., Path]

TILE, HEIGHT, WIDTH = 32, 90, 75
ALL = {"confidence": True, "probabilities": True, "disagreement": True}
HALF_A_STEP = 0.002 + 2e-5
"""Of what is stored, and what float32 adds."""


@pytest.fixture(scope="module")
def scene(make_raster: MakeRaster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(2).uniform(0, 0.6, (2, HEIGHT, WIDTH)).astype(np.float32)
    pixels[:, 20:60, 50:] = np.nan
    return make_raster(tmp_path_factory.mktemp("scene") / "scene.tif", pixels, names=("red", "nir"))


@pytest.fixture(scope="module")
def model(make_model: Make, make_spec: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One that looks around itself, so that its tiles disagree near their edges."""
    spec = make_spec(("red", "nir"), (0, 3, 7), tile=TILE, overlap=12)
    return make_model(
        tmp_path_factory.mktemp("model") / "m.onnx", spec, kernels=(3,), whole_numbers=True
    )


def read(path: Path) -> NDArray[np.float64]:
    """What a raster means: stored values times their scale, NaN for nodata."""
    with rasterio.open(path) as dataset:
        stored = dataset.read().astype(np.float64)
        stored[stored == dataset.nodata] = np.nan
        return stored * np.reshape(dataset.scales, (-1, 1, 1))


def answers(
    scene: Path, model: Any, overlap: int, blend: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Every tile's probabilities (N, K, H, W), 0 where it is not, its weights (N, H, W), and valid."""
    with rasterio.open(scene) as dataset:
        pixels = dataset.read().astype(np.float64)
    valid = np.isfinite(pixels).all(axis=0)
    pixels = np.where(valid, pixels, 0.2)
    edge = np.minimum(np.arange(TILE), np.arange(TILE)[::-1])
    line = np.sin(np.pi / 2 * np.minimum((edge + 0.5) / overlap, 1)) ** 2
    if blend == "flat":
        line = np.ones(TILE)
    probs, weights = [], []
    stride = TILE - overlap
    tops, lefts = (range(0, -(-(size - TILE) // stride) * stride + 1, stride) for size in valid.shape)
    for top, left in product(tops, lefts):
        row, col = min(top, HEIGHT - TILE), min(left, WIDTH - TILE)
        scores = model.on_the_whole(pixels[:, row : row + TILE, col : col + TILE])
        shares = np.exp(scores - scores.max(axis=0))
        shares /= shares.sum(axis=0)
        whole, weight = np.zeros((3, HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH))
        here = np.s_[top : row + TILE, left : col + TILE]
        whole[:, *here] = shares[:, top - row :, left - col :]
        weight[here] = np.outer(line, line)[: row + TILE - top, : col + TILE - left]
        probs.append(whole)
        weights.append(weight)
    return np.array(probs), np.array(weights), valid


@pytest.mark.parametrize(
    ("overlap", "blend"), [(12, "cosine"), (12, "flat"), (21, "cosine"), (21, "flat")]
)
def test_all_three_are_those_of_the_whole_array(
    scene: Path, model: Any, tmp_path: Path, overlap: int, blend: Any
) -> None:
    options = PredictOptions(overlap=overlap, blend=blend, **ALL)
    report = predict(scene, model.path, tmp_path / "map.tif", options=options)
    probs, weights, valid = answers(scene, model, overlap, blend)
    mean = (weights[:, np.newaxis] * probs).sum(axis=0) / weights.sum(axis=0)
    judge = np.where(valid, mean, np.nan)
    confidence, probabilities, disagreement = (read(path) for path in report.beside)
    np.testing.assert_allclose(probabilities, judge, atol=HALF_A_STEP)
    np.testing.assert_allclose(confidence[0], judge.max(axis=0), atol=HALF_A_STEP)
    apart, pairs = np.zeros((HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH))
    for one, other in combinations(range(len(probs)), 2):
        weight = weights[one] * weights[other]
        apart += weight * ((probs[one] - probs[other]) ** 2).sum(axis=0) / 2
        pairs += weight
    compared = valid & (pairs > 0)
    square = np.divide(apart, pairs, out=np.full((HEIGHT, WIDTH), np.nan), where=compared)
    np.testing.assert_allclose(disagreement[0], np.sqrt(square), atol=HALF_A_STEP)
    assert 0 < (~compared & valid).sum() < compared.sum()
    assert np.nanmax(disagreement) > 0.2


def test_the_map_is_byte_for_byte_the_same_without_them(
    scene: Path, model: Any, tmp_path: Path
) -> None:
    predict(scene, model.path, tmp_path / "map.tif", options=PredictOptions(**ALL))
    predict(scene, model.path, tmp_path / "alone.tif")
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "alone.tif").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("alone.tif", "alone.tif.aux.xml", "map.tif", "map.tif.aux.xml"),
        *("map_confidence.tif", "map_probabilities.tif", "map_disagreement.tif"),
    }


def test_smoothing_the_map_leaves_what_the_model_said(scene: Path, model: Any, tmp_path: Path) -> None:
    rough = predict(scene, model.path, tmp_path / "a.tif", options=PredictOptions(**ALL))
    smooth = predict(scene, model.path, tmp_path / "b.tif", options=PredictOptions(smooth=5, **ALL))
    assert (read(rough.map) != read(smooth.map)).any()
    for one, other in zip(rough.beside, smooth.beside, strict=True):
        np.testing.assert_array_equal(read(one), read(other))


def test_of_an_area_they_are_a_cut_of_the_whole(scene: Path, model: Any, tmp_path: Path) -> None:
    whole = predict(scene, model.path, tmp_path / "whole.tif", options=PredictOptions(**ALL))
    left, top = rasterio.open(scene).transform @ (9, 13)
    box = f"{left},{top - 30 * 50},{left + 30 * 60},{top}@EPSG:32616"
    cut = predict(scene, model.path, tmp_path / "cut.tif", options=PredictOptions(aoi=box, **ALL))
    for one, other in zip(whole.beside, cut.beside, strict=True):
        np.testing.assert_array_equal(read(one)[:, 13:63, 9:69], read(other))


def test_each_is_a_cog_on_the_grid_of_the_map_that_says_what_it_holds(
    real_scene: Path, tmp_path: Path
) -> None:
    report = predict(real_scene, output=tmp_path / "map.tif", options=PredictOptions(**ALL))
    names = tuple(item.name for item in report.classes)
    bands = [("confidence",), names, ("disagreement",)]
    for path, expected in zip(report.beside, bands, strict=True):
        assert cog_validate(path, quiet=True) == (True, [], [])
        with rasterio.open(path) as dataset, rasterio.open(report.map) as mapped:
            assert (dataset.crs, dataset.transform) == (mapped.crs, mapped.transform)
            assert dataset.shape == mapped.shape
            assert dataset.descriptions == expected
            assert dataset.nodatavals == (255,) * len(expected)
            assert dataset.scales == (0.004,) * len(expected)
            assert dataset.tags()["GEODEPLOY_MODEL_SHA256"] == report.model_sha256
            assert rasterio.enums.ColorInterp.alpha not in dataset.colorinterp
            stored = np.ma.masked_equal(dataset.read(len(expected)), 255)
            tags = dataset.tags(len(expected))
            assert float(tags["STATISTICS_MEAN"]) == pytest.approx(stored.mean())
    assert f"beside it: {report.beside[0]}" in str(report)


def test_where_tiles_agree_the_disagreement_is_nothing(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    options = PredictOptions(disagreement=True)
    (path,) = predict(small_scene, pointwise.path, tmp_path / "map.tif", options=options).beside
    found = read(path)
    assert set(np.unique(found[np.isfinite(found)])) == {0}


def test_a_scene_in_one_tile_says_that_there_is_nothing_to_compare(
    pointwise: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    pixels = np.full((6, 50, 60), 0.3, np.float32)
    scene = make_raster(tmp_path / "scene.tif", pixels)
    options = PredictOptions(disagreement=True)
    report = predict(scene, pointwise.path, tmp_path / "map.tif", options=options)
    assert report.warnings == ("No pixel of scene.tif lies in two tiles: the disagreement is nodata.",)
    assert np.isnan(read(report.beside[0])).all()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"blend": "crop"}, "--blend crop takes each pixel from one"), ({"overlap": 0}, "overlap is 0")],
)
def test_disagreement_is_refused_where_tiles_are_not_mixed(
    scene: Path, model: Any, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    asked = PredictOptions(disagreement=True, **options)
    with pytest.raises(GridError, match=complaint):
        predict(scene, model.path, tmp_path / "map.tif", options=asked)
    assert list(tmp_path.iterdir()) == []
    predict(scene, model.path, tmp_path / "map.tif", options=PredictOptions(confidence=True, **options))


def test_one_that_exists_is_refused_before_any_work(scene: Path, model: Any, tmp_path: Path) -> None:
    twin = tmp_path / "twin.tif"
    twin.write_bytes(scene.read_bytes())
    there = tmp_path / "scene_map_confidence.tif"
    there.write_text("dear to somebody")
    options = PredictOptions(confidence=True)
    with pytest.raises(OutputError, match=r"scene_map_confidence\.tif exists.*--overwrite"):
        predict_scenes([twin, scene], model.path, tmp_path, options=options)
    assert {path.name for path in tmp_path.iterdir()} == {"twin.tif", there.name}
    predict_scenes([twin, scene], model.path, tmp_path)
    assert there.read_text() == "dear to somebody"
    again = PredictOptions(confidence=True, overwrite=True)
    for report in predict_scenes([twin, scene], model.path, tmp_path, options=again):
        assert [path.name for path in report.beside] == [f"{report.map.stem}_confidence.tif"]
        assert np.nanmax(read(report.beside[0])) <= 1


def test_the_stac_item_has_them_as_assets(scene: Path, model: Any, tmp_path: Path) -> None:
    derived = DerivedOptions(stac=True, acquired="2020-06-01")
    predict(scene, model.path, tmp_path / "map.tif", options=PredictOptions(derived=derived, **ALL))
    assets = json.loads((tmp_path / "map.stac.json").read_text())["assets"]
    found = assets["map_probabilities.tif"]
    assert found["href"] == "./map_probabilities.tif"
    assert found["type"] == "image/tiff; application=geotiff; profile=cloud-optimized"
    assert [band["name"] for band in found["bands"]] == ["class 0", "class 3", "class 7"]
    assert (found["nodata"], found["raster:scale"]) == (255, 0.004)
    assert {"map_confidence.tif", "map_disagreement.tif"} <= assets.keys()


def test_the_command_makes_them_and_its_report_names_them(
    scene: Path, model: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "geodeploy", "predict", str(scene), "-m", str(model.path)]
    flags = ["--confidence", "--probabilities", "--disagreement", "--json", "-o", "map.tif"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, check=True)
    beside = json.loads(done.stdout)["beside"]
    assert beside == ["map_confidence.tif", "map_probabilities.tif", "map_disagreement.tif"]
    assert all((tmp_path / name).exists() for name in beside)
