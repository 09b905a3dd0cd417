"""The profile for Deepness and GeoDeep: GeoDeep itself runs it, and it is the tuned model."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.errors import RecipeError
from geodeploy.export import export, verify
from geodeploy.export.deepness import deepness_metadata, deepness_spec
from geodeploy.export.options import ExportOptions
from geodeploy.predict import PredictOptions, predict
from geodeploy.runtime import open_session
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.reference import difference, reference_of
from geodeploy.spec import METADATA_KEY, REFERENCE_KEY, ModelSpec
from geodeploy.train.run import load_run

Tune = Callable[..., Path]
THREE_BANDS = ('data.bands=["red", "green", "blue"]', "training.steps=60", "method.name=full")
LOW, HIGH = 0.0, 0.7


@pytest.fixture(scope="module")
def exported(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A RUN for red, green and blue, its plain ONNX and the one for Deepness."""
    run = tune(*THREE_BANDS)
    folder = tmp_path_factory.mktemp("deepness")
    export(run, folder / "plain.onnx")
    options = ExportOptions(profile="deepness", range=(LOW, HIGH))
    export(run, folder / "deepness.onnx", options=options)
    return run, folder / "plain.onnx", folder / "deepness.onnx"


@pytest.fixture(scope="module")
def bytes_scene(real_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red, green and blue of the real scene in 8 bits, with tags that say what they stand for."""
    path = tmp_path_factory.mktemp("bytes") / "scene.tif"
    with rasterio.open(real_scene) as scene:
        window = Window(200, 150, 104, 104)
        stored = scene.read((3, 2, 1), window=window)
        reflectance = stored * scene.scales[0] + scene.offsets[0]
        profile = {"count": 3, "height": 104, "width": 104, "dtype": "uint8", "nodata": None}
        with rasterio.open(path, "w", **scene.profile | profile, photometric="minisblack") as output:
            output.write(
                np.rint(np.clip((reflectance - LOW) / (HIGH - LOW), 0, 1) * 255).astype("uint8")
            )
            output.descriptions = ("red", "green", "blue")
            output.scales, output.offsets = [(HIGH - LOW) / 255] * 3, [LOW] * 3
    return path


def test_geodeep_makes_the_map_that_we_make_of_the_same_pixels(
    exported: tuple[Path, Path, Path], bytes_scene: Path, tmp_path: Path
) -> None:
    if find_spec("geodeep") is None:
        pytest.skip("needs geodeep: pip install 'geodeploy-eo[dev]'")
    _, plain, deepness = exported
    command = [sys.executable, "-m", "geodeep.scripts.main", bytes_scene, deepness, "-q", "-t", "mask"]
    subprocess.run([*map(str, command), "-o", str(tmp_path / "theirs.tif")], check=True, timeout=120)
    options = PredictOptions(overlap=8, blend="crop")
    predict(bytes_scene, plain, tmp_path / "ours.tif", options=options)
    with rasterio.open(tmp_path / "theirs.tif") as theirs, rasterio.open(tmp_path / "ours.tif") as ours:
        found, expected = theirs.read(1), median_of_5(ours.read(1))
    assert len(np.unique(expected)) > 1
    # GeoDeep smooths what it found; at the edge it does so in one of two ways.
    assert (found[2:-2, 2:-2] == expected).mean() > 0.999


def median_of_5(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of the square around each pixel that has a whole one."""
    squares = np.lib.stride_tricks.sliding_window_view(classes, (5, 5))
    return np.median(squares, axis=(2, 3)).astype(np.uint8)


def test_the_graph_takes_bytes_over_255_and_gives_the_probabilities_of_the_tuned_model(
    exported: tuple[Path, Path, Path],
) -> None:
    run, _, deepness = exported
    stored = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    session = onnxruntime.InferenceSession(deepness, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixels": np.float32(stored / 255)})
    reflectance = torch.from_numpy(LOW + stored / 255 * (HIGH - LOW)).float()
    with torch.inference_mode():
        judge = load_run(run).model(reflectance).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, judge, atol=1e-5)


def test_the_metadata_are_json_under_the_names_that_deepness_looks_up(
    exported: tuple[Path, Path, Path],
) -> None:
    session = onnxruntime.InferenceSession(exported[2], providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    ours = (METADATA_KEY, REFERENCE_KEY)
    assert {name: json.loads(value) for name, value in metadata.items() if name not in ours} == {
        "model_type": "Segmentor",
        "class_names": {"0": "clear", "1": "cloud", "2": "cirrus"},
        "tile_size": 32,
        "tiles_size": 32,
        "tiles_overlap": 25,
        "seg_thresh": 0,
        "seg_small_segment": 0,
    }


def test_the_resolution_is_told_in_centimetres(make_spec: Callable[..., ModelSpec]) -> None:
    assert deepness_metadata(make_spec(gsd_m=30.0))["resolution"] == "3000.0"


def test_here_it_maps_what_the_plain_model_maps(
    exported: tuple[Path, Path, Path], real_scene: Path, tmp_path: Path
) -> None:
    maps = []
    for model in exported[1:]:
        predict(real_scene, model, tmp_path / f"{model.stem}.tif", options=PredictOptions(aoi=None))
        with rasterio.open(tmp_path / f"{model.stem}.tif") as made:
            maps.append(made.read(1))
    assert (maps[0] == maps[1]).mean() > 0.9999


def test_what_rounding_to_8_bits_changes_is_reported(exported: tuple[Path, Path, Path]) -> None:
    run, plain, deepness = exported
    report = verify(run, deepness)
    assert report.released
    assert report.eight_bit is not None
    assert 0.5 < report.eight_bit.argmax_agreement <= report.exported.argmax_agreement
    assert report.eight_bit.max_abs_diff > 10 * report.exported.max_abs_diff
    assert "fed with 8-bit values" in str(report)
    assert verify(run, plain).eight_bit is None


def test_the_item_says_how_to_scale(exported: tuple[Path, Path, Path]) -> None:
    item = json.loads(exported[2].with_suffix(".stac.json").read_text())
    (taken,), (given,) = item["properties"]["mlm:input"], item["properties"]["mlm:output"]
    assert taken["value_scaling"] == [{"type": "min-max", "minimum": LOW, "maximum": HIGH}] * 3
    assert given["name"] == "probabilities"


def test_a_range_that_misses_a_band_is_refused_with_the_flag(tune: Tune, tmp_path: Path) -> None:
    options = ExportOptions(profile="deepness", range=(0.0, 0.01))
    with pytest.raises(
        RecipeError, match=r"--range 0 0\.01: band red has its mean outside, 0\.\d+ refl"
    ):
        export(tune(*THREE_BANDS), tmp_path / "model.onnx", options=options)
    with pytest.raises(RecipeError, match="--profile deepness"):
        export(tune(*THREE_BANDS), tmp_path / "model.onnx", options=ExportOptions(range=(0, 1)))
    assert not list(tmp_path.iterdir())


def test_without_a_range_it_is_what_the_training_pixels_lay_in(
    make_spec: Callable[..., ModelSpec],
) -> None:
    options = ExportOptions(profile="deepness")
    assert deepness_spec(make_spec(seen=(0.0123456, 0.98765)), options).input_range == (0.0123, 0.988)
    assert deepness_spec(make_spec(seen=None), options).input_range == (-0.2, 1.6)


def test_it_keeps_tiles_and_probabilities_to_be_held_against_on_a_gpu(
    exported: tuple[Path, Path, Path],
) -> None:
    run, _, deepness = exported
    reference = reference_of(read_onnx(deepness))
    assert reference is not None
    with torch.inference_mode():
        logits = load_run(run).model(torch.from_numpy(reference.pixels))
    judge = logits.softmax(dim=1).numpy()[:, :, ::4, ::4]
    np.testing.assert_allclose(reference.outputs, judge, rtol=1e-3, atol=1e-4)
    assert difference(open_session(deepness, device="cpu"), reference) is None
