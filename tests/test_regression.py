"""A regression from the recipe to the map.

The judges are numpy, PyTorch for the ONNX file, and what the labels were made of.
"""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import torch
from numpy.typing import NDArray

from geodeploy.errors import LabelError, ParityError, RecipeError
from geodeploy.evaluate import evaluate
from geodeploy.export import export, verify
from geodeploy.export.options import ExportOptions
from geodeploy.inspect import inspect
from geodeploy.predict import predict
from geodeploy.scores import RegressionScores
from geodeploy.spec import Target
from geodeploy.train import check_data, train
from geodeploy.train.augment import training_batches
from geodeploy.train.data import TRAINING, open_scenes
from geodeploy.train.losses import build_value_loss
from geodeploy.train.recipe import Training, load_recipe, recipe_text
from geodeploy.train.run import load_run

RECIPE = """
name = "forest"
task = "regression"
[data]
bands = ["red", "nir"]
valid_range = [-0.2, 1.6]
[data.blocks]
size = 32
gap = 4
[[data.scene]]
image = "image.tif"
labels = "labels.tif"
[[targets]]
name = "height"
unit = "m"
valid_range = [0, 90]
[[targets]]
name = "biomass"
unit = "Mg/ha"
[model]
backbone = "light"
weights = "random"
tile = 32
overlap = 8
decoder_channels = [16]
[model.options]
channels = [16, 24]
[method]
name = "full"
[training]
steps = 60
validate_every = 20
batch = 4
lr = 5e-3
device = "cpu"
"""


def write(path: Path, values: NDArray[Any], names: tuple[str, ...], **profile: Any) -> Path:
    count, height, width = values.shape
    about = {
        "driver": "GTiff",
        "crs": "EPSG:32616",
        "transform": rasterio.Affine(30, 0, 2e5, 0, -30, 4e6),
    }
    about |= {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", **about | profile) as dataset:
        dataset.write(values)
        dataset.descriptions = names
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and a scene where height is 40 nir and biomass 900 red nir, but for noise and gaps."""
    folder = tmp_path_factory.mktemp("forest")
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0.05, 0.6, (2, 14, 12))
    image = np.kron(coarse, np.ones((1, 10, 10))) + rng.normal(0, 0.01, (2, 140, 120))
    red, nir = image
    labels = np.stack([40 * nir, 900 * red * nir]).clip(0)
    labels[:, 60:75, 20:90] = np.nan
    labels[1, :20] = np.nan
    write(folder / "image.tif", image.astype(np.float32), ("red", "nir"))
    # In another order than the recipe's: the names tell.
    write(folder / "labels.tif", labels[::-1].astype(np.float32), ("biomass", "height"), nodata=np.nan)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "forest"
    train(folder / "recipe.toml", output)
    return output


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "forest.onnx"
    export(run, path)
    return path


def labels_of(folder: Path) -> NDArray[np.float32]:
    with rasterio.open(folder / "labels.tif") as dataset:
        return dataset.read([2, 1])


def test_a_run_learns_the_quantities_and_says_so_in_their_units(folder: Path, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    height, biomass = metrics["scores"]["targets"]
    assert (height["name"], height["unit"], biomass["unit"]) == ("height", "m", "Mg/ha")
    assert height["r2"] > 0.8
    assert biomass["r2"] > 0.5
    best = min(
        metrics["history"],
        key=lambda check: sum(item["rmse"] / item["std"] for item in check["scores"]["targets"]),
    )
    assert metrics["best_step"] == best["step"]
    card = (run / "README.md").read_text()
    assert "| height | m |" in card
    assert "image-segmentation" not in card
    assert {"curves.png", "predictions.png", "split.png"} <= {path.name for path in run.iterdir()}


def test_the_spec_holds_the_statistics_of_the_training_labels(folder: Path, run: Path) -> None:
    spec = load_run(run).spec
    assert (spec.task, spec.output, spec.outputs) == ("regression", "values", ["height", "biomass"])
    with open_scenes(load_recipe(folder / "recipe.toml")) as (scene,):
        training = scene.part == TRAINING
    for target, band in zip(spec.targets, labels_of(folder), strict=True):
        known = band[training & np.isfinite(band)].astype(np.float64)
        assert target.mean == pytest.approx(known.mean(), rel=1e-6)
        assert target.std == pytest.approx(known.std(), rel=1e-6)
    told = str(inspect(run))
    assert "height (m)" in told


def test_scores_of_the_map_are_those_of_numpy(folder: Path, run: Path, tmp_path: Path) -> None:
    predict(folder / "image.tif", run, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as dataset:
        found = dataset.read().astype(np.float64)
    scores = evaluate(run, folder / "image.tif", folder / "labels.tif")
    assert isinstance(scores, RegressionScores)
    for item, labels, values in zip(scores.targets, labels_of(folder), found, strict=True):
        known = np.isfinite(labels)
        truth, error = labels[known].astype(np.float64), (values - labels)[known]
        assert item.pixels == known.sum()
        assert item.rmse == pytest.approx(np.sqrt((error**2).mean()))
        assert item.mae == pytest.approx(np.abs(error).mean())
        assert item.bias == pytest.approx(error.mean())
        assert item.r2 == pytest.approx(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert scores.ignored == (~np.isfinite(labels_of(folder)).any(axis=0)).sum()


def test_scores_on_another_grid_take_the_nearest_label_and_the_tags_of_the_file(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    coarse = np.arange(2 * 20 * 20, dtype=np.uint8).reshape(2, 20, 20) % 90
    grid = rasterio.Affine(90, 0, 2e5 + 300, 0, -90, 4e6 - 300)
    path = write(tmp_path / "coarse.tif", coarse, ("height", "biomass"), transform=grid)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales = (0.5, 2.0)
    scores = evaluate(run, folder / "image.tif", path)
    assert [item.pixels for item in scores.targets] == [3600, 3600]
    assert scores.targets[0].std == pytest.approx((coarse[0] * 0.5).std())
    assert scores.targets[1].std == pytest.approx((coarse[1] * 2.0).std())


def test_the_exported_model_gives_what_pytorch_gives_in_the_unit(run: Path, exported: Path) -> None:
    report = json.loads(exported.with_suffix(".parity.json").read_text())
    tuned = load_run(run)
    # Tile by tile, as the report has it: in a batch the sums are rounded in another way.
    tiles = np.split(tuned.tiles.pixels, len(tuned.tiles.pixels))
    with torch.inference_mode():
        expected = np.concatenate([tuned.model(torch.from_numpy(tile)).numpy() for tile in tiles])
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(["values"], {"pixels": tile})[0] for tile in tiles])
    spreads = np.reshape([target.std for target in tuned.spec.targets], (2, 1, 1))
    apart = np.abs(found - expected) / spreads
    assert report["exported"]["spread_diff"] == pytest.approx(apart.max(), rel=0.1)
    assert apart.max() < 1e-4
    known = np.isfinite(tuned.tiles.labels)
    assert np.abs(found - tuned.tiles.labels)[:, 0][known[:, 0]].mean() < 4  # metres
    told = inspect(exported)
    assert told.spec.parity.spread_diff == report["exported"]["spread_diff"]
    assert "standard deviations from the tuned model" in str(told)
    item = json.loads(exported.with_suffix(".stac.json").read_text())
    assert item["properties"]["mlm:tasks"] == ["regression"]
    assert "height (m), biomass (Mg/ha)" in item["properties"]["mlm:output"][0]["description"]


@pytest.mark.parametrize(("factor", "shift"), [(1.01, 0.0), (1.0, 0.1)])
def test_a_model_whose_unit_is_off_by_little_is_refused(
    run: Path, exported: Path, tmp_path: Path, factor: float, shift: float
) -> None:
    path, graph = tmp_path / "off.onnx", onnx.load(exported)
    spread, middle = load_run(run).model.value_std.numpy(), load_run(run).model.value_mean.numpy()
    for initial in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(initial)
        if values.shape == (2, 1, 1) and np.array_equal(values, spread):
            initial.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(factor), initial.name))
        elif values.shape == (2, 1, 1) and np.array_equal(values, middle):
            initial.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(shift), initial.name))
    onnx.save(graph, path)
    with pytest.raises(ParityError, match=r"of the training labels, at most 0\.001"):
        verify(run, path)


def test_the_profile_for_classes_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--profile deepness is for models of classes"):
        export(run, tmp_path / "m.onnx", options=ExportOptions(profile="deepness"))
    assert not list(tmp_path.iterdir())


def test_data_check_tells_the_labels_of_each_split(folder: Path) -> None:
    report = check_data(folder / "recipe.toml")
    assert not report.errors
    with open_scenes(load_recipe(folder / "recipe.toml")) as (scene,):
        part = scene.part
    splits = {"train": 1, "validation": 2}
    assert {(fact.name, fact.split) for fact in report.targets} == {
        (name, split) for name in ("height", "biomass") for split in splits
    }
    for fact in report.targets:
        band = labels_of(folder)[("height", "biomass").index(fact.name)][part == splits[fact.split]]
        assert fact.pixels == np.isfinite(band).sum()
        judge = np.nanmean(band), np.nanstd(band), np.nanmin(band), np.nanmax(band)
        assert (fact.mean, fact.std, fact.minimum, fact.maximum) == pytest.approx(judge, rel=1e-5)
    assert "height" in str(report)


def test_windows_hold_the_labels_of_their_pixels_however_they_are_turned(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.toml", ["augmentation.zoom=[0.7, 1.4]"])
    with open_scenes(recipe) as scenes:
        batch = next(training_batches(scenes, recipe, np.zeros(2, np.float32)))
    pixels, labels = batch.pixels.numpy(), batch.labels.numpy()
    known = np.isfinite(labels[:, 0])
    assert 0 < known.sum() < known.size
    # Labels are the nearest, pixels are mixed: they differ at the borders of the fields alone.
    close = np.abs(labels[:, 0] - 40 * pixels[:, 1]) < 1.5
    assert close[known].mean() > 0.75


def test_training_again_gives_the_same_run(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(folder / "recipe.toml", tmp_path / name, overrides=["training.steps=3"])
    for file in ("head.safetensors", "backbone.safetensors", "spec.json", "tiles.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_recipe_in_a_run_is_read_as_the_same(folder: Path, run: Path) -> None:
    text = (run / "recipe.toml").read_text()
    assert recipe_text(load_recipe(run / "recipe.toml")) == text
    assert "dice" not in tomllib.loads(text)["training"]


@pytest.mark.parametrize(
    ("weights", "judge"),
    [
        ({}, lambda error: error**2),
        ({"mse": 0, "mae": 2}, lambda error: 2 * np.abs(error)),
        (
            {"mse": 0, "huber": 1},
            lambda error: np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5),
        ),
    ],
)
def test_losses_are_means_over_the_labels_of_each_target(
    weights: dict[str, float], judge: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> None:
    rng = np.random.default_rng(0)
    found, labels = rng.normal(0, 20, (2, 3, 2, 5, 5))
    labels[:, 0, :3] = np.nan
    std = np.array([10.0, 3.0])
    loss = build_value_loss(Training(steps=1, **weights), torch.tensor(std).reshape(2, 1, 1))
    outputs = torch.tensor(found, requires_grad=True)
    value = loss(outputs, torch.tensor(labels), None)
    errors = judge((found - labels) / std.reshape(2, 1, 1))
    assert value.item() == pytest.approx(np.mean([np.nanmean(errors[:, place]) for place in (0, 1)]))
    value.backward()
    assert torch.isfinite(outputs.grad).all()
    assert loss(outputs, torch.full((3, 2, 5, 5), float("nan")), None).item() == 0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.dice=0.5", 'training.dice is for task "segmentation", and this is "regression"'),
        ("training.class_weights=balanced", "training.class_weights is for"),
        ("augmentation.clouds.cloud=1", "augmentation.clouds.cloud is for"),
        ("data.vectors.class_column=kind", "data.vectors is for"),
        ("distillation.weight=1.0", "distillation is for"),
        ("task=segmentation", 'targets is for task "regression", and this is "segmentation"'),
        ("training.mse=0", "mse, mae and huber are all 0"),
        ("targets.1.name=height", "target names must differ"),
        ("task=painting", "task must be"),
    ],
)
def test_what_does_not_belong_to_the_task_is_refused(folder: Path, override: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        load_recipe(folder / "recipe.toml", [override])
    assert "\n" not in str(caught.value)


def test_labels_out_of_range_or_without_the_bands_are_refused(folder: Path, tmp_path: Path) -> None:
    values = labels_of(folder)
    values[0, 3, 5] = -9999
    write(tmp_path / "odd.tif", values, ("height", "biomass"))
    recipe = folder / "recipe.toml"
    overrides = [f"data.scene.0.labels={tmp_path / 'odd.tif'}"]
    with pytest.raises(LabelError, match=r"odd.tif holds -9999 m of height, .* 0 to 90\. Mark such"):
        train(recipe, tmp_path / "run", overrides=overrides)
    train(recipe, tmp_path / "run", overrides=[*overrides, "data.ignore=[-9999]", "training.steps=1"])
    write(tmp_path / "odd.tif", values[[0, 1, 1]], ("a", "b", "c"))
    with pytest.raises(
        LabelError, match=r"odd.tif has 3 band\(s\) \(a, b, c\); one for each of height"
    ):
        train(recipe, tmp_path / "other", overrides=overrides)


def test_bands_of_other_names_are_not_taken_in_order(folder: Path, tmp_path: Path) -> None:
    recipe, values = folder / "recipe.toml", labels_of(folder)
    labels = tmp_path / "labels.tif"
    overrides = [f"data.scene.0.labels={labels}"]
    write(labels, values[::-1], ("biomass", "canopy height"), nodata=np.nan)
    with pytest.raises(LabelError, match=r"band biomass where height is expected: .* Name the targets"):
        train(recipe, tmp_path / "run", overrides=overrides)
    assert check_data(recipe, overrides=overrides).errors
    for names in ((None, None), ("height", None)):
        write(labels, values, names, nodata=np.nan)
        with open_scenes(load_recipe(recipe, overrides)) as (scene,):
            np.testing.assert_array_equal(scene.values, values)


def test_data_check_tells_targets_without_labels_as_a_training_does(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, values = folder / "recipe.toml", labels_of(folder)
    with open_scenes(load_recipe(recipe)) as (scene,):
        trains, validates = scene.part == 1, scene.part == 2
    labels = tmp_path / "labels.tif"
    overrides = [f"data.scene.0.labels={labels}", "training.steps=1"]

    def told(change: float, where: NDArray[np.bool_]) -> list[str]:
        changed = values.copy()
        changed[1][where & np.isfinite(values[1])] = change
        write(labels, changed, ("height", "biomass"), nodata=np.nan)
        report = check_data(recipe, overrides=overrides)
        return [
            f"{item.severity}: {item.message}" for item in report.findings if item.kind == "classes"
        ]

    assert told(np.nan, trains) == [
        "error: targets.1: biomass is known at none of the training pixels: nothing can be learned "
        "from it."
    ]
    assert "error: targets.1: biomass is 7 at every one" in told(7, trains)[0]
    assert told(np.nan, validates) == [
        "warning: no label that validates has biomass: it is not scored."
    ]
    train(recipe, tmp_path / "run", overrides=overrides)
    assert "No label that validates has biomass" in caplog.text


def test_a_quantity_that_is_one_number_everywhere_is_refused(folder: Path, tmp_path: Path) -> None:
    values = np.full((2, 140, 120), 7, np.float32)
    write(tmp_path / "flat.tif", values, ("height", "biomass"))
    with pytest.raises(
        RecipeError, match=r"targets.0: height is 7 at every one of the training pixels"
    ):
        train(
            folder / "recipe.toml",
            tmp_path / "run",
            overrides=[f"data.scene.0.labels={tmp_path / 'flat.tif'}"],
        )


def test_a_target_says_itself() -> None:
    assert str(Target(name="ndvi")) == "ndvi"
    assert str(Target(name="height", unit="m")) == "height (m)"
