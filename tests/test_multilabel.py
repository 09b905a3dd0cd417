"""What whole tiles show, from the recipe to the scores of the map.

The judges are sklearn's definitions computed by hand, numpy on the labels, and ONNX Runtime by itself.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import rioxarray  # noqa: F401
import torch
import xarray
from numpy.typing import NDArray
from torch.nn import functional

from geodeploy import PredictOptions, predict, predict_array
from geodeploy.derived import DerivedOptions
from geodeploy.errors import LabelError, ParityError, RecipeError
from geodeploy.evaluate import evaluate
from geodeploy.export import export, export_adapters, verify
from geodeploy.export.options import ExportOptions
from geodeploy.inspect import inspect
from geodeploy.labels import IGNORED, present_classes
from geodeploy.scores import LabelCount, MultilabelScores
from geodeploy.spec import Presence, SegmentationClass
from geodeploy.train import check_data, train
from geodeploy.train.data import TRAINING, open_scenes, tile_shares
from geodeploy.train.losses import build_label_loss, positive_weights
from geodeploy.train.recipe import load_recipe, recipe_text
from geodeploy.train.run import load_run

TILE = 16
NAMES = ("water", "forest", "built")
SPECTRA = np.array([[0.05, 0.03], [0.08, 0.45], [0.35, 0.3]])
"""Red and near infrared of each class."""

RECIPE = """
name = "cover"
task = "multilabel"
[data]
bands = ["red", "nir"]
valid_range = [-0.2, 1.6]
gsd_m = 30
{data}
[[classes]]
value = 3
name = "water"
color = "#2b6cb0"
[[classes]]
value = 7
name = "forest"
color = "#117733"
[[classes]]
value = 8
name = "built"
color = "#ee6677"
[model]
backbone = "light"
weights = "random"
tile = 16
[model.options]
channels = [12, 24]
[method]
name = "full"
[training]
steps = 100
validate_every = 25
batch = 16
lr = 1e-2
device = "cpu"
"""
SCENES = """
presence = { share = 0.2 }
[[data.scene]]
image = "image.tif"
labels = "labels.tif"
split = "train"
[[data.scene]]
image = "other.tif"
labels = "other_labels.tif"
split = "validation"
"""
CHIPS = """
[[data.chips]]
images = "chips"
labels = "labels.csv"
train = "train.txt"
validation = "validation.txt"
"""


def write(path: Path, values: NDArray[Any], names: Sequence[str] = (), **profile: Any) -> Path:
    count, height, width = values.shape
    about = {
        "driver": "GTiff",
        "crs": "EPSG:32616",
        "transform": rasterio.Affine(30, 0, 2e5, 0, -30, 4e6),
    }
    about |= {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", **about | profile) as dataset:
        dataset.write(values)
        if names:
            dataset.descriptions = names
    return path


def ground(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Positions of classes in fields of 8 pixels."""
    fields = rng.integers(0, 3, (-(-height // 8), -(-width // 8)))
    return np.kron(fields, np.ones((8, 8), int))[:height, :width].astype(np.uint8)


def seen(rng: np.random.Generator, positions: NDArray[np.uint8]) -> NDArray[np.float32]:
    pixels = np.moveaxis(SPECTRA[positions], -1, 0)
    return (pixels + rng.normal(0, 0.02, pixels.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with two scenes and one with chips, in both of which what is shown is certain."""
    folder = tmp_path_factory.mktemp("cover")
    rng = np.random.default_rng(5)
    values = np.array([3, 7, 8], np.uint8)
    for name, labels, size in (("image", "labels", (130, 150)), ("other", "other_labels", (75, 90))):
        positions = ground(rng, *size)
        pixels = seen(rng, positions)
        coded = values[positions]
        coded[40:60, 30:70] = 0  # nobody knows
        pixels[:, 20:45, 60:90] = np.nan
        write(folder / f"{name}.tif", pixels, ("red", "nir"))
        write(folder / f"{labels}.tif", coded[np.newaxis], nodata=0)
    (folder / "scenes.toml").write_text(RECIPE.format(data=SCENES))
    (folder / "chips").mkdir()
    rows = []
    for number in range(24):
        positions = ground(rng, TILE, TILE)
        write(folder / "chips" / f"c{number}.tif", seen(rng, positions), ("red", "nir"))
        rows.append([f"c{number}.tif", *(int((positions == place).any()) for place in range(3)), "x"])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["chip", *NAMES, "season"], *rows])
    (folder / "train.txt").write_text("".join(f"c{number}\n" for number in range(16)))
    (folder / "validation.txt").write_text("".join(f"c{number}.tif\n" for number in range(16, 24)))
    (folder / "chips.toml").write_text(RECIPE.format(data=CHIPS))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "cover"
    train(folder / "scenes.toml", output)
    return output


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "cover.onnx"
    export(run, path)
    return path


def known_labels(folder: Path, name: str) -> NDArray[np.uint8]:
    """What each cell of a scene shows by its raster of classes, (K, rows, cols); 255 where unknown."""
    with rasterio.open(folder / f"{name}.tif") as dataset:
        valid = np.isfinite(dataset.read()).all(axis=0)
    labels = {"image": "labels", "other": "other_labels"}[name]
    with rasterio.open(folder / f"{labels}.tif") as dataset:
        coded = np.where(valid, dataset.read(1), 0)
    height, width = coded.shape
    shown = np.full((3, -(-height // TILE), -(-width // TILE)), 255, np.uint8)
    for row in range(shown.shape[1]):
        for col in range(shown.shape[2]):
            top, left = min(row * TILE, height - TILE), min(col * TILE, width - TILE)
            tile = coded[top : top + TILE, left : left + TILE]
            if (tile > 0).mean() >= 0.9:
                shown[:, row, col] = [
                    (tile == value).sum() / (tile > 0).sum() >= 0.2 for value in (3, 7, 8)
                ]
    return shown


def average_precision(labels: NDArray[np.uint8], scores: NDArray[np.float64]) -> float:
    """The sum over the thresholds of (R_n - R_n-1) P_n, as scikit-learn documents it."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = scores >= threshold
        recall, precision = labels[found].sum() / labels.sum(), labels[found].mean()
        total, before = total + (recall - before) * precision, recall
    return total


def test_a_run_learns_what_tiles_show_and_its_card_says_so(folder: Path, run: Path) -> None:
    scores = MultilabelScores.model_validate(json.loads((run / "metrics.json").read_text())["scores"])
    assert scores.mean_average_precision is not None
    assert scores.mean_average_precision > 0.97
    assert min(item.f1 or 0 for item in scores.labels) > 0.85
    card = (run / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "a tile of 16 x 16 pixels (480 m) of reflectance imagery shows" in card
    assert "those that have 20.0% or more of its labelled pixels" in card
    assert {"curves.png", "predictions.png", "split.png"} <= {path.name for path in run.iterdir()}
    spec = load_run(run).spec
    assert (spec.task, spec.overlap, spec.presence) == ("multilabel", 0, Presence(share=0.2))


@pytest.mark.parametrize("overlap", [0, 6])
def test_scores_of_the_map_are_those_of_its_cells_by_hand(
    folder: Path, run: Path, exported: Path, tmp_path: Path, overlap: int
) -> None:
    options = PredictOptions(overlap=overlap)
    scores = evaluate(run, folder / "other.tif", folder / "other_labels.tif", options=options)
    assert scores == evaluate(
        exported, folder / "other.tif", folder / "other_labels.tif", options=options
    )
    assert isinstance(scores, MultilabelScores)
    if overlap:
        return
    # Validation counts just the same tiles.
    assert (
        scores.labels
        == MultilabelScores.model_validate(
            json.loads((run / "metrics.json").read_text())["scores"]
        ).labels
    )
    predict(folder / "other.tif", exported, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as dataset:
        found = dataset.read()
    shown = known_labels(folder, "other")
    known = (shown[0] != 255) & (found[0] != 255)
    assert 10 < known.sum() < known.size
    assert scores.ignored == (~known).sum()
    precisions = []
    for item, labels, stored in zip(scores.labels, shown, found, strict=True):
        truth, probabilities = labels[known], stored[known] / 250
        precisions.append(average_precision(truth, probabilities))
        assert item.average_precision == pytest.approx(precisions[-1])
        hits = (truth * (probabilities >= 0.5)).sum()
        assert item.f1 == pytest.approx(2 * hits / (truth.sum() + (probabilities >= 0.5).sum()))
        assert (item.positives, item.tiles) == (truth.sum(), known.sum())
    assert scores.mean_average_precision == pytest.approx(np.mean(precisions))
    truth, said = shown[:, known], found[:, known] >= 125
    assert scores.micro_f1 == pytest.approx(2 * (truth * said).sum() / (truth.sum() + said.sum()))
    assert scores.macro_f1 == pytest.approx(np.mean([item.f1 for item in scores.labels]))


def test_chips_and_a_table_teach_the_same(folder: Path, tmp_path: Path) -> None:
    report = train(folder / "chips.toml", tmp_path / "run", overrides=["training.steps=80"])
    scores = report.metrics.scores
    assert isinstance(scores, MultilabelScores)
    assert (scores.mean_average_precision or 0) > 0.9
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[16:]
    assert [item.positives for item in scores.labels] == [
        sum(int(row[name]) for row in rows) for name in NAMES
    ]
    assert {item.tiles for item in scores.labels} == {8}
    assert (
        recipe_text(load_recipe(tmp_path / "run" / "recipe.toml"))
        == (tmp_path / "run" / "recipe.toml").read_text()
    )


def test_the_last_weights_are_kept_where_nothing_can_be_scored(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "chip,water,forest,built\na,1,0,1\nb,0,1,0\neast/c,0,0,0\n",
        'train = "train.txt"\nvalidation = "validation.txt"',
    )
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "validation.txt").write_text("east/c\n")
    overrides = ["training.steps=3", "training.validate_every=1", "training.patience=1"]
    metrics = train(path, tmp_path / "run", overrides=overrides).metrics
    assert (metrics.best_step, metrics.steps) == (3, 3)
    assert isinstance(metrics.scores, MultilabelScores)
    assert metrics.scores.mean_average_precision is None


def table(folder: Path, text: str, keys: str = "", *, side: int = TILE) -> Path:
    """A recipe for three small chips and a table that says ``text``."""
    rng = np.random.default_rng(0)
    (folder / "chips" / "east").mkdir(parents=True)
    for name in ("a", "b", "east/c"):
        pixels = rng.uniform(0, 0.6, (2, side, 12)).astype(np.float32)
        write(folder / "chips" / f"{name}.tif", pixels, ("red", "nir"))
    (folder / "labels.csv").write_text(text)
    (folder / "train.txt").write_text("a\nb\neast/c\n")
    chips = '[[data.chips]]\nimages = "chips"\nlabels = "labels.csv"\n'
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(data=chips + (keys or 'split = "train"')))
    return path


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        (
            "water,name,built,forest\n1,a,0,0\n0,b.tif,0,0\n,east/c,1,1\n0,unused,0,0\n",
            'split = "train"\nname_column = "name"',
            [[1, 0, 0], [0, 0, 0], [IGNORED, 1, 1]],
        ),
        (
            "chip,shows\na.tif,water; built\nb,\neast/c.tif,7\n",
            'split = "train"\nlabel_column = "shows"',
            [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
        ),
    ],
)
def test_a_table_has_a_column_a_class_or_one_that_lists_them(
    tmp_path: Path, text: str, keys: str, expected: list[list[int]]
) -> None:
    with open_scenes(load_recipe(table(tmp_path, text, keys))) as scenes:
        assert [scene.tiles.shown.tolist() for scene in scenes] == expected
        shown, absent = tile_shares(scenes, TILE, 0)
    labels = np.array(expected)
    np.testing.assert_array_equal(shown, (labels == 1).sum(axis=0))
    np.testing.assert_array_equal(absent, (labels == 0).sum(axis=0))


WHOLE = "chip,water,forest,built\na,1,0,0\nb,0,1,0\neast/c,0,0,1\n"


@pytest.mark.parametrize(
    ("text", "keys", "told"),
    [
        (WHOLE.replace(",built", ",town"), "", "labels.csv has no column built; it has chip, water"),
        (WHOLE.replace("b,0,1,0\n", ""), "", r"1 image without a row in labels.csv \(b\)\. "),
        (WHOLE + "a.tif,1,0,0\n", "", "labels.csv has two rows for a, in lines 2 and 5. Remove one"),
        (WHOLE.replace("a,1", "a,yes"), "", "labels.csv, line 2 says 'yes' of water; 1, 0 or nothing"),
        (WHOLE.replace("a,1,0", "a,1"), "", "line 2 has 3 fields, the first line has 4"),
        (WHOLE.replace("forest", "water"), "", "has two columns of one name"),
        ("", "", r"3 images without a row in labels.csv \(a, b, east/c\)"),
        (
            "chip,shows\na,sea\nb,\neast/c,\n",
            'split = "train"\nlabel_column = "shows"',
            r"line 2 names sea, which is none of the classes \(water, forest, built\)\. Add it",
        ),
        (WHOLE, 'split = "train"\nlabel_column = "kinds"', "has no column kinds; it has chip"),
        (WHOLE, 'split = "train"\nname_column = "file"', "has no column file; it has chip"),
    ],
)
def test_a_table_that_says_other_things_is_refused_in_one_line(
    tmp_path: Path, text: str, keys: str, told: str
) -> None:
    recipe = load_recipe(table(tmp_path, text, keys))
    with pytest.raises(LabelError, match=told) as caught, open_scenes(recipe):
        pass
    assert "\n" not in str(caught.value)


def test_a_chip_larger_than_the_tile_is_refused_and_a_smaller_one_mirrored(tmp_path: Path) -> None:
    recipe = table(tmp_path, WHOLE, side=20)
    with pytest.raises(LabelError, match=r"a.tif has 20 x 12 pixels, model.tile is 16: the labels in"):
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", overrides=["model.tile=24", "training.steps=1"])
    tiles = load_run(tmp_path / "run").tiles
    assert tiles.pixels.shape == (3, 2, 24, 24)
    np.testing.assert_array_equal(tiles.pixels[:, :, 20:], tiles.pixels[:, :, 15:19][:, :, ::-1])
    assert sorted(tiles.labels.tolist()) == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_the_exported_model_gives_what_pytorch_gives(run: Path, exported: Path) -> None:
    report = json.loads(exported.with_suffix(".parity.json").read_text())
    tuned = load_run(run)
    with torch.inference_mode():
        expected = tuned.model(torch.from_numpy(tuned.tiles.pixels)).numpy()
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixels": tuned.tiles.pixels})
    assert found.shape == (len(tuned.tiles.pixels), 3)
    shares = [1 / (1 + np.exp(-values.astype(np.float64))) for values in (found, expected)]
    apart = np.abs(shares[0] - shares[1]).max()
    assert report["exported"]["probability_diff"] == pytest.approx(apart, abs=2e-7)
    assert apart < 1e-5
    assert report["exported"]["decision_agreement"] == 1
    assert ((found > 0) == (tuned.tiles.labels == 1)).mean() > 0.85
    told = inspect(exported)
    assert told.spec.parity.probability_diff == report["exported"]["probability_diff"]
    assert "from the tuned model's" in str(told)
    item = json.loads(exported.with_suffix(".stac.json").read_text())
    assert item["properties"]["mlm:tasks"] == ["scene-classification"]
    output = item["properties"]["mlm:output"][0]["result"]
    assert (output["shape"], output["dim_order"]) == ([-1, 3], ["batch", "class"])


@pytest.mark.parametrize("factor", [0.9, -1.0])
def test_a_model_whose_weights_are_off_is_refused(
    run: Path, exported: Path, tmp_path: Path, factor: float
) -> None:
    path, graph = tmp_path / "off.onnx", onnx.load(exported)
    head = load_run(run).model.decoder.head.weight.detach().numpy()
    for initial in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(initial)
        if values.shape == head.shape and np.allclose(values, head):
            initial.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(factor), initial.name))
    onnx.save(graph, path)
    with pytest.raises(ParityError, match=r"probabilities differ by up to .*, at most 0\.0001 may be"):
        verify(run, path)


def test_halves_other_forms_and_adapters_keep_the_parity_or_are_refused(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    report = export(run, tmp_path / "half.onnx", options=ExportOptions(precision="fp16"))
    assert report.released
    assert 0 < report.exported.probability_diff < 1e-2
    predict(folder / "other.tif", tmp_path / "half.onnx", tmp_path / "half.tif")
    assert export(run, tmp_path / "cover.pt2", options=ExportOptions(to="torch-export")).released
    export(run, tmp_path / "served", options=ExportOptions(to="triton"))
    assert (
        'name: "logits" data_type: TYPE_FP32 dims: [3] '
        in (tmp_path / "served" / "config.pbtxt").read_text()
    )
    for flag, asked in (
        ("--profile deepness", {"profile": "deepness"}),
        ("--precision int8", {"precision": "int8"}),
    ):
        with pytest.raises(RecipeError, match=f"{flag} is for models of classes of pixels"):
            export(run, tmp_path / "no.onnx", options=ExportOptions(**asked))
    vit = [
        "model={backbone='vit_tiny_patch16_224', weights='random', tile=16, "
        "options={embed_dim=32, depth=2, num_heads=2, patch_size=8}}",
        "method={name='lora', r=2, alpha=2}",
        "training.steps=2",
    ]
    train(folder / "scenes.toml", tmp_path / "lora", overrides=vit)
    export_adapters([tmp_path / "lora"], tmp_path / "adapters")
    adapted = PredictOptions(adapter=tmp_path / "adapters" / "lora.onnx_adapter")
    base = tmp_path / "adapters" / "base.onnx"
    predict(folder / "other.tif", base, tmp_path / "adapted.tif", options=adapted)
    predict(folder / "other.tif", tmp_path / "lora", tmp_path / "tuned.tif")
    maps = [rasterio.open(tmp_path / name).read() for name in ("adapted.tif", "tuned.tif")]
    assert np.abs(maps[0].astype(int) - maps[1]).max() <= 1


# rioxarray multiplies transforms as affine no longer likes it.
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_stac_item_and_an_array_tell_the_probabilities(
    folder: Path, exported: Path, tmp_path: Path
) -> None:
    asked = PredictOptions(derived=DerivedOptions(stac=True, acquired="2020-06-01"))
    report = predict(folder / "other.tif", exported, tmp_path / "map.tif", options=asked)
    item = json.loads((tmp_path / "map.stac.json").read_text())
    assert [band["name"] for band in item["assets"]["map"]["bands"]] == list(NAMES)
    assert item["assets"]["map"]["raster:scale"] == 0.004
    assert item["properties"]["proj:shape"] == [5, 6]
    assert "Classified tile by tile by the model cover" in item["properties"]["processing:lineage"]
    assert "of the cells, mean probability" in str(report)
    with rasterio.open(folder / "other.tif") as dataset:
        pixels, grid = dataset.read(), dataset.transform
    array = xarray.DataArray(pixels, dims=("band", "y", "x"), coords={"band": ["red", "nir"]})
    array = array.rio.write_crs(32616).rio.write_transform(grid).rio.write_nodata(np.nan)
    found = predict_array(array, exported)
    assert list(found.class_name.values) == list(NAMES)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        expected = dataset.read(masked=True).astype(np.float32).filled(np.nan) * np.float32(0.004)
        assert found.rio.transform() == dataset.transform
    np.testing.assert_array_equal(found.values, expected)
    assert found.x.values[0] == 2e5 + 30 * TILE / 2


def test_data_check_counts_what_tables_and_rasters_say(folder: Path) -> None:
    for name in ("scenes", "chips"):
        report = check_data(folder / f"{name}.toml")
        assert not report.errors
        with open_scenes(load_recipe(folder / f"{name}.toml")) as scenes:
            expected = sum(scene.counts(TRAINING, 3) for scene in scenes)
        assert [item.train for item in report.classes] == expected.tolist()
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[:16]
    assert report.classes[0].train == TILE**2 * sum(int(row["water"]) for row in rows)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.dice=0.5", 'training.dice is for task "segmentation", and this is "multilabel"'),
        ("training.mse=0.5", 'training.mse is for task "regression"'),
        ("distillation.weight=1.0", "distillation is for"),
        ("model.decoder=unet", 'model.decoder: "multilabel" has one linear layer .* found "unet"'),
        ("method.name=vit_adapter", "linear does not join ViT-Adapter's maps .*; take another method"),
        ("task=segmentation", 'data.presence is for task "multilabel", and this is "segmentation"'),
        ("training.class_weights=[1, 2]", "class_weights has 2 numbers for 3 classes"),
        ("data.presence.share=0", "data.presence.share must be greater than 0"),
        (
            "data.chips=[{images='a', labels='b.csv', split='train'}]\naugmentation.zoom=[0.5, 1]",
            "augmentation.zoom must begin with 1 or more where labels are a table",
        ),
        ("data.chips=[{images='c', labels='l', split='train', label_column='x'}]", "labels is no such"),
    ],
)
def test_what_does_not_belong_to_the_task_is_refused(folder: Path, override: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        load_recipe(folder / "scenes.toml", override.split("\n"))
    assert "\n" not in str(caught.value)


def test_a_table_is_refused_where_each_pixel_is_learned(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r'chips\.0\.labels is a table, for task "multilabel"'):
        load_recipe(recipe_file, ["data.chips=[{images='a', labels='b.csv', split='train'}]"])


def test_labels_too_sparse_for_any_tile_are_refused(folder: Path, tmp_path: Path) -> None:
    with rasterio.open(folder / "labels.tif") as dataset:
        sparse = dataset.read()
    sparse[:, ::5] = 0
    write(tmp_path / "sparse.tif", sparse, nodata=0)
    overrides = [f"data.scene.0.labels={tmp_path / 'sparse.tif'}"]
    with pytest.raises(LabelError, match="No tile of 16 pixels to train on has labels on 90% of it"):
        train(folder / "scenes.toml", tmp_path / "run", overrides=overrides)
    overrides += ["data.presence.labelled=0.7", "training.steps=1", "training.balanced_windows=0.5"]
    train(folder / "scenes.toml", tmp_path / "run", overrides=overrides)


def test_a_picture_of_a_confusion_matrix_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--picture draws a confusion matrix, of classes of pixels"):
        evaluate(run, folder / "other.tif", folder / "other_labels.tif", picture=tmp_path / "m.png")


def test_the_loss_is_the_mean_over_what_is_known() -> None:
    rng = np.random.default_rng(0)
    logits, labels = torch.tensor(rng.normal(0, 3, (6, 3))), torch.tensor(rng.integers(0, 2, (6, 3)))
    labels[2] = IGNORED
    labels[0, 1] = IGNORED
    found = build_label_loss((1.0, 2.0, 5.0))(logits, labels, None)
    known = labels != IGNORED
    shares, truth = logits.sigmoid(), labels.double()
    each = -(torch.tensor([1.0, 2.0, 5.0]) * truth * shares.log() + (1 - truth) * (1 - shares).log())
    assert found.item() == pytest.approx(each[known].mean().item())
    assert build_label_loss((1.0,) * 3)(logits, torch.full((6, 3), IGNORED), None).item() == 0
    plain = functional.binary_cross_entropy_with_logits(logits[known], truth[known])
    assert build_label_loss((1.0,) * 3)(logits, labels, None).item() == pytest.approx(plain.item())


def test_balanced_weights_are_the_ratio_of_tiles_without_to_tiles_with() -> None:
    shown, absent = np.array([20, 1, 0, 90]), np.array([80, 99, 100, 10])
    assert positive_weights("balanced", shown, absent) == pytest.approx((4, 10, 1, 1 / 9), rel=0.2)
    assert positive_weights("none", shown, absent) == (1,) * 4
    assert positive_weights((1.0, 2.0, 3.0, 4.0), shown, absent) == (1, 2, 3, 4)


def test_a_tile_shows_what_covers_enough_of_what_is_labelled() -> None:
    codes = np.full((10, 10), IGNORED, np.uint8)
    codes[:9] = 0
    codes[0] = 1
    codes[1, :4] = 2
    presence = Presence(share=0.05, labelled=0.9)
    assert present_classes(codes, 4, presence).tolist() == [1, 1, 0, 0]
    codes[8, 0] = IGNORED
    assert present_classes(codes, 4, presence).tolist() == [IGNORED] * 4
    assert present_classes(codes, 4, presence, inside=0.9).tolist() == [1, 1, 0, 0]


def test_scores_tell_a_class_that_is_nowhere_from_one_that_is_missed() -> None:
    classes = [
        SegmentationClass(value=place, name=name, color="#000000") for place, name in enumerate("abc")
    ]
    count = LabelCount(classes)
    count.add(np.array([[1, 1, 0, 255], [0, 0, 0, 255], [1, 0, 0, 255]]),
              np.array([[250, 130, 130, 9], [0, 3, 124, 9], [10, 20, 20, 9]]))  # fmt: skip
    a, b, c = (scores := count.scores()).labels
    assert (a.average_precision, a.precision, a.recall) == pytest.approx((0.5 + 0.5 * 2 / 3, 2 / 3, 1))
    assert (b.average_precision, b.f1, b.positives) == (None, None, 0)
    assert (c.average_precision, c.f1, c.recall) == (pytest.approx(1 / 3), 0, 0)
    assert scores.ignored == 1
    assert scores.macro_f1 == pytest.approx((0.8 + 0) / 2)
    assert scores.micro_f1 == pytest.approx(2 * 2 / (3 + 3))
    assert "mean AP 0.583" in str(scores)


def test_training_again_gives_the_same_run(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(folder / "chips.toml", tmp_path / name, overrides=["training.steps=3"])
    for file in ("head.safetensors", "backbone.safetensors", "spec.json", "tiles.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_labels_of_no_tile_are_told(folder: Path, exported: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.tif", np.zeros((1, 75, 90), np.uint8), nodata=0)
    with pytest.raises(LabelError, match=r"empty\.tif has no label where the scene has data"):
        evaluate(exported, folder / "other.tif", empty)
