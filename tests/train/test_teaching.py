"""Students of models whose answer is known: ONNX files of one convolution, and RUNs."""

import itertools
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.windows import Window

from geodeploy import distil, predict
from geodeploy.errors import GeodeployError, LabelError, ModelError, RecipeError
from geodeploy.export import export
from geodeploy.labels import IGNORED
from geodeploy.raster import open_raster
from geodeploy.runtime import open_session
from geodeploy.train import train
from geodeploy.train.augment import (
    Light,
    draw_window,
    read_training_tile,
    sum_labels,
    training_batches,
)
from geodeploy.train.data import TRAINING, VALIDATION, open_scenes
from geodeploy.train.recipe import Recipe, load_recipe
from geodeploy.train.run import load_run
from geodeploy.train.teaching import map_probabilities, teach

Make = Callable[..., Any]
Tune = Callable[..., Path]

SIX = ("blue", "green", "red", "nir", "swir16", "swir22")
MEAN = np.full(6, 0.2, np.float32)
TILE = 32
PLAIN = ("augmentation.gain=0", "augmentation.d4=false", "augmentation.zoom=[1, 1]")
LIGHT = (
    "model.backbone=light",
    "model.options={channels=[8, 16]}",
    "model.decoder_channels=[16]",
    "method.name=full",
)
RULE = np.zeros((3, 6, 1, 1), np.float32)
RULE[[0, 1, 2], [0, 3, 4]] = 30
"""Whichever of blue, near infrared and 1.6 micrometres is the brightest."""


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory, make_model: Make, make_spec: Make) -> Path:
    """A model of the tiny recipe's task that looks at each pixel alone."""
    path = tmp_path_factory.mktemp("teacher") / "rule.onnx"
    make_model(path, make_spec(values=(0, 1, 2), tile=TILE, overlap=8), weights=[RULE])
    return path


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory, make_raster: Make) -> tuple[Path, np.ndarray]:
    """A scene without labels, in which the rule's three classes lie about, and its pixels."""
    rng = np.random.default_rng(8)
    coarse = rng.uniform(0.05, 0.5, (6, 12, 12))
    pixels = np.kron(coarse, np.ones((1, 8, 8))) + rng.normal(0, 0.01, (6, 96, 96))
    path = tmp_path_factory.mktemp("wild") / "wild.tif"
    return make_raster(path, pixels.astype(np.float32)), pixels


def with_wild(recipe_file: Path, wild: Path, *, split: str = "blocks") -> str:
    """The recipe's own scene and ``wild``, as an override."""
    folder = recipe_file.parent
    return (
        f"data.scene=[{{image='{folder / 'image.tif'}', labels='{folder / 'labels.tif'}', "
        f"split='{split}'}}, {{image='{wild}', split='train'}}]"
    )


def taught_by(recipe_file: Path, *teachers: Path, more: tuple[str, ...] = ()) -> Recipe:
    names = ", ".join(f"'{teacher}'" for teacher in teachers)
    return load_recipe(recipe_file, [*more, f"distillation.teachers=[{names}]"])


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=0))
    return exponents / exponents.sum(axis=0)


def starts(length: int) -> list[int]:
    """Where tiles begin that overlap by half, the last one moved back inside."""
    last = max(length - TILE, 0)
    return [min(start, last) for start in range(0, last + TILE // 2, TILE // 2)]


# What the teachers say ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(75, 90), (64, 32), (20, 50)])
def test_a_map_of_probabilities_is_the_weighted_mean_of_tiles_that_overlap_by_half(
    tmp_path: Path, make_model: Make, make_spec: Make, make_raster: Make, size: tuple[int, int]
) -> None:
    model = make_model(
        tmp_path / "m.onnx", make_spec(values=(0, 1, 2), tile=TILE), kernels=(3, 3), seed=2
    )
    pixels = np.random.default_rng(1).uniform(0, 0.6, (6, *size)).astype(np.float32)
    pixels[2, 3:9, 5:30] = np.nan
    pixels[:, 30:, :40] = np.nan  # a whole tile of nothing, and parts of others
    valid = np.isfinite(pixels).all(axis=0)
    with (
        closing(open_session(model.path, device="cpu", threads=1)) as session,
        open_raster(make_raster(tmp_path / "s.tif", pixels, blockysize=16), band_names=SIX) as raster,
    ):
        found = map_probabilities(session, raster)

    edge = np.minimum(np.arange(TILE), np.arange(TILE)[::-1])
    ramp = np.sin(np.pi / 2 * np.minimum((edge + 0.5) / (TILE // 2), 1)) ** 2
    total, weighed = np.zeros((3, *size)), np.zeros(size)
    filled = np.where(valid, pixels, 0.2)  # the mean of make_spec's bands
    for row, col in itertools.product(starts(size[0]), starts(size[1])):
        area = (slice(row, row + TILE), slice(col, col + TILE))
        inside = valid[area]
        if not inside.any():
            continue
        height, width = inside.shape
        short = ((0, 0), (0, TILE - height), (0, TILE - width))
        tile = np.pad(filled[:, *area], short, mode="reflect")
        probs = softmax(model.on_the_whole(tile))[:, :height, :width]
        weight = np.outer(ramp[:height], ramp[:width]) * inside
        total[:, *area] += probs * weight
        weighed[area] += weight
    needed = np.divide(total, weighed, out=np.zeros_like(total), where=weighed > 0)
    np.testing.assert_allclose(found, needed, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=0)[valid], 1, atol=1e-5)
    assert not found[:, ~valid].any()


def test_two_teachers_are_averaged_and_scenes_for_validation_are_not_mapped(
    recipe_file: Path, tmp_path: Path, rule: Path, make_model: Make, make_spec: Make
) -> None:
    other = np.roll(RULE, 1, axis=0) / 3
    make_model(tmp_path / "other.onnx", make_spec(values=(0, 1, 2), tile=TILE), weights=[other])
    scene = "{{image='image.tif', labels='labels.tif', split='{}'}}".format
    scenes = f"data.scene=[{scene('train')}, {scene('validation')}]"
    recipe = taught_by(recipe_file, rule, tmp_path / "other.onnx", more=(scenes,))
    with open_scenes(recipe) as opened:
        taught, untaught = teach(opened, recipe)
        pixels, _ = taught.raster.read_pixels(Window(0, 0, 131, 117))
        assert taught.codes is opened[0].codes
    assert untaught.taught is None
    each = [softmax(np.tensordot(w[:, :, 0, 0], pixels.astype(float), axes=1)) for w in (RULE, other)]
    assert taught.taught.dtype == np.uint8
    assert np.abs(taught.taught / 255 - np.mean(each, axis=0)).max() < 0.51 / 255
    assert np.abs(taught.taught / 255 - each[0]).max() > 0.1


def test_a_run_teaches_as_its_export_does_and_leaves_the_threads_alone(
    recipe_file: Path, tmp_path: Path, tune: Tune
) -> None:
    run = tune()
    export(run, tmp_path / "m.onnx")
    told = []
    for teacher in (run, tmp_path / "m.onnx"):
        recipe = taught_by(recipe_file, teacher)
        with open_scenes(recipe) as scenes:
            told.append(teach(scenes, recipe)[0].taught.astype(int))
    assert np.abs(told[0] - told[1]).max() <= 1
    assert np.abs(told[0].sum(axis=0) - 255).max() <= 2
    assert torch.get_num_threads() == 1


# What reaches the student ------------------------------------------------------------------------


def test_probabilities_are_resampled_and_turned_with_the_pixels(
    recipe_file: Path, tmp_path: Path, rule: Path, make_raster: Make
) -> None:
    rng = np.random.default_rng(3)
    said = np.rint(np.kron(rng.uniform(0, 255, (15, 15)), np.ones((6, 6)))).astype(np.uint8)
    pixels = np.repeat(said[np.newaxis] / np.float32(255), 6, axis=0).astype(np.float32)
    image = make_raster(tmp_path / "painted.tif", pixels)
    labels = make_raster(tmp_path / "labels.tif", np.zeros((1, 90, 90), np.uint8))
    more = (
        f"data.scene=[{{image='{image}', labels='{labels}', split='train'}}]",
        "augmentation.gain=0",
        "augmentation.zoom=[0.5, 1.8]",
    )
    recipe = taught_by(recipe_file, rule, more=more)
    sides, corners = set(), set()
    with open_scenes(recipe) as (scene,):
        painted = replace(scene, taught=np.stack([said, 255 - said, 0 * said]))
        for _ in range(40):
            window = draw_window(painted, sum_labels(painted), TILE, (0.5, 1.8), rng)
            tile, _, taught = read_training_tile(painted, window, recipe, Light(recipe, MEAN), rng)
            np.testing.assert_allclose(taught[0], tile[0], atol=1e-5)
            np.testing.assert_allclose(taught[1], 1 - tile[0], atol=1e-5)
            assert not taught[2].any()
            sides.add(window.width)
            corners.add(float(tile[0, 0, 0]))
    assert min(sides) < TILE < max(sides)
    assert len(corners) > 20


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_taught_where_clouds_changed_the_pixels(
    recipe_file: Path, rule: Path, seed: int
) -> None:
    clouds = "augmentation.clouds={share=1, cloud=1, shadow=2}"
    recipe = taught_by(recipe_file, rule, more=(*PLAIN, clouds, "data.scene.0.split=train"))
    light, window = Light(recipe, MEAN), Window(20, 30, TILE, TILE)
    rng, judge = np.random.default_rng(seed), np.random.default_rng(seed)
    with open_scenes(recipe) as (scene,):
        sure = replace(scene, taught=np.stack([np.full_like(scene.codes, 255)] + [0 * scene.codes] * 2))
        _, codes, taught = read_training_tile(sure, window, recipe, light, rng)
        judge.random()
        _, needed, changed = light.clouds(
            scene.raster.read_pixels(window)[0], scene.codes_of(window, TRAINING), judge
        )
    assert changed.any()
    assert not changed.all()
    np.testing.assert_array_equal(taught[0], np.where(changed, 0, 1))
    assert not taught[1:].any()
    np.testing.assert_array_equal(codes, needed)  # and the clouds are learned from their labels


def test_nothing_is_taught_of_validation_pixels_nor_where_there_is_no_data(
    recipe_file: Path, tmp_path: Path, rule: Path, make_raster: Make
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        pixels = (image.read() * 2e-5 - 0.1).astype(np.float32)
        pixels[3, 40:60, 40:60] = np.nan
        path = make_raster(tmp_path / "holes.tif", pixels, transform=image.transform, crs=image.crs)
    recipe = taught_by(recipe_file, rule, more=(f"data.scene.0.image={path}", *PLAIN))
    rng = np.random.default_rng(0)
    with open_scenes(recipe) as opened:
        (scene,) = teach(opened, recipe)
        empty = ~scene.raster.read_pixels(Window(0, 0, 131, 117))[1]
        assert not scene.taught[:, empty].any()
        assert scene.taught[:, ~empty].any(axis=0).all()
        learned = (scene.part == TRAINING) & (~empty | (scene.codes != IGNORED))
        np.testing.assert_array_equal(scene.teaches(Window(0, 0, 131, 117)), learned)
        assert sum_labels(scene)[-1] == learned.sum()
        for row, col in itertools.product((0, 32, 64, 80), (0, 32, 64, 96)):
            window = Window(col, row, TILE, TILE)
            _, _, taught = read_training_tile(scene, window, recipe, Light(recipe, MEAN), rng)
            area = window.toslices()
            told = taught.any(axis=0)[: len(empty[area])]
            needed = (scene.part[area] == TRAINING) & ~empty[area]
            np.testing.assert_array_equal(told, needed)

        # Enlarged, a hole has a soft edge; what predict would fill in is not taught either.
        window = Window(36, 36, 20, 20)
        tile, _, taught = read_training_tile(scene, window, recipe, Light(recipe, MEAN), rng)
        assert not taught[:, (tile == MEAN[:, None, None]).all(axis=0)].any()


def test_windows_are_drawn_where_a_teacher_speaks(
    recipe_file: Path, tmp_path: Path, rule: Path, make_raster: Make
) -> None:
    pixels = np.full((6, 400, 400), np.nan, np.float32)
    pixels[:, 300:310, 20:30] = 0.3
    image = make_raster(tmp_path / "mostly_empty.tif", pixels)
    recipe = taught_by(recipe_file, rule, more=(with_wild(recipe_file, image),))
    rng = np.random.default_rng(0)
    with open_scenes(recipe) as opened:
        scene = teach(opened, recipe)[1]
        summed = sum_labels(scene)
        assert summed[-1] == 100
        for _ in range(10):
            window = draw_window(scene, summed, TILE, (1.0, 1.0), rng)
            assert scene.taught[:, *window.toslices()].any()


def test_batches_hold_what_is_taught_only_with_teachers(recipe_file: Path, rule: Path) -> None:
    recipe = taught_by(recipe_file, rule)
    with open_scenes(recipe) as scenes:
        batch = next(training_batches(teach(scenes, recipe), recipe, MEAN))
        plain = next(training_batches(scenes, load_recipe(recipe_file), MEAN))
    assert plain.taught is None
    assert batch.taught.shape == (2, 3, TILE, TILE)
    assert batch.taught.dtype == torch.float32
    assert torch.equal(plain.pixels, batch.pixels)  # every pixel has a label here: the same draws
    assert torch.equal(plain.labels, batch.labels)


# From the recipe to the RUN ----------------------------------------------------------------------


def agreement(run: Path, wild: tuple[Path, np.ndarray], output: Path) -> float:
    """The share of pixels in which a RUN's map of ``wild`` is what the rule says."""
    predict(wild[0], run, output)
    with rasterio.open(output) as written:
        return float((written.read(1) == wild[1][[0, 3, 4]].argmax(axis=0)).mean())


def test_a_student_learns_a_rule_that_no_label_shows(
    recipe_file: Path, tmp_path: Path, rule: Path, wild: tuple[Path, np.ndarray]
) -> None:
    steps = (
        "training.steps=100",
        "training.validate_every=100",
        "training.lr=1e-2",
        "training.batch=4",
    )
    overrides = [with_wild(recipe_file, wild[0]), *LIGHT, *steps, "training.dice=0"]
    train(recipe_file, tmp_path / "alone", overrides=overrides)
    distil(
        recipe_file,
        tmp_path / "student",
        teachers=[rule],
        overrides=[*overrides, "distillation.weight=10"],
    )
    alone = agreement(tmp_path / "alone", wild, tmp_path / "alone.tif")
    student = agreement(tmp_path / "student", wild, tmp_path / "student.tif")
    assert alone < 0.5
    assert student > 0.7  # the rest are edges: the student sees at half the resolution


def test_a_student_needs_its_teacher_no_more_and_its_recipe_repeats_it(
    recipe_file: Path, tmp_path: Path, rule: Path, wild: tuple[Path, np.ndarray]
) -> None:
    teacher = tmp_path / "teacher.onnx"
    shutil.copy(rule, teacher)
    run = tmp_path / "run"
    overrides = [with_wild(recipe_file, wild[0]), *LIGHT, "training.steps=2"]
    report = distil(recipe_file, run, teachers=[teacher], overrides=overrides)
    assert report.metrics.scores is not None
    recipe = load_recipe(run / "recipe.toml")
    assert recipe.distillation.teachers == (teacher,)
    train(run / "recipe.toml", tmp_path / "again")
    distil(run / "recipe.toml", tmp_path / "third", overrides=["distillation.weight=3"])
    weights, again, third = (
        (tmp_path / name / "backbone.safetensors").read_bytes() for name in ("run", "again", "third")
    )
    assert weights == again
    assert weights != third

    teacher.unlink()
    assert load_run(run).recipe == recipe
    assert export(run, tmp_path / "student.onnx").exported.argmax_agreement > 0.999
    card = (run / "README.md").read_text()
    assert "Distilled from `teacher.onnx`" in card
    assert f"`{wild[0]}`: train, without labels" in card


def test_without_labels_to_train_on_those_to_validate_on_are_enough(
    recipe_file: Path, tmp_path: Path, rule: Path, wild: tuple[Path, np.ndarray]
) -> None:
    overrides = [with_wild(recipe_file, wild[0], split="validation"), *LIGHT]
    overrides.append("training.class_weights=balanced")
    report = distil(recipe_file, tmp_path / "run", teachers=[rule], overrides=overrides)
    assert report.metrics.scores is not None
    assert load_run(tmp_path / "run").recipe.data.scene[1].labels is None
    with pytest.raises(LabelError, match="No training scene has a labelled pixel"):
        train(recipe_file, tmp_path / "other", overrides=overrides)
    wild_alone = f"data.scene=[{{image='{wild[0]}', split='train'}}]"
    with pytest.raises(LabelError, match="No scene has a labelled pixel"):
        distil(recipe_file, tmp_path / "other", teachers=[rule], overrides=[wild_alone, *LIGHT])
    assert not (tmp_path / "other").exists()


def test_train_leaves_out_a_scene_without_labels_and_says_so_in_one_line(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "geodeploy")
    overrides = [with_wild(recipe_file, Path("/nowhere/wild.tif")), "training.steps=1"]
    train(recipe_file, tmp_path / "run", overrides=overrides)
    (line,) = [item.getMessage() for item in caplog.records if "no labels" in item.getMessage()]
    assert line.startswith("data.scene.1 (/nowhere/wild.tif) has no labels: left out")
    assert "wild.tif" not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"bands": SIX[::-1]}, r"has bands \['swir22', .*the recipe has \['blue'"),
        ({"bands": SIX[:5]}, r"has bands \['blue', .*the recipe has \['blue'"),
        ({"values": (0, 1, 3)}, r"has classes \[0, 1, 3\], the recipe has \[0, 1, 2\]"),
        ({"values": (0, 1)}, r"has classes \[0, 1\], the recipe has \[0, 1, 2\]"),
        ({"units": "kelvin"}, "has units kelvin, the recipe has reflectance"),
    ],
)
def test_a_teacher_of_another_task_is_refused_in_one_line(
    recipe_file: Path,
    tmp_path: Path,
    rule: Path,
    make_model: Make,
    make_spec: Make,
    spec: dict[str, Any],
    words: str,
) -> None:
    make_model(tmp_path / "m.onnx", make_spec(**{"values": (0, 1, 2), "tile": TILE} | spec))
    # The second of two, and before any scene is opened.
    with pytest.raises(RecipeError, match=f"The teacher .*m.onnx {words}") as caught:
        distil(
            recipe_file,
            tmp_path / "run",
            teachers=[rule, tmp_path / "m.onnx"],
            overrides=["data.root=nowhere"],
        )
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_no_teacher_or_one_that_is_none_is_refused_in_one_line(
    recipe_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "text.txt").write_text("no model")
    cases: list[tuple[list[Path], type[GeodeployError], str]] = [
        ([], RecipeError, "names no teacher. Give a RUN with --teacher, or distillation.teachers"),
        ([tmp_path / "gone"], ModelError, "gone does not exist"),
        ([folder], ModelError, r"is no whole RUN: it has no spec\.json"),
        ([tmp_path / "text.txt"], ModelError, r"text\.txt is not an ONNX model"),
    ]
    for teachers, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            distil(recipe_file, tmp_path / "run", teachers=teachers)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_student_is_found_before_a_teacher_maps_a_scene(
    recipe_file: Path, tmp_path: Path, rule: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "geodeploy")
    with pytest.raises(RecipeError, match="lora needs a plain vision transformer"):
        distil(recipe_file, tmp_path / "run", teachers=[rule], overrides=[*LIGHT, "method.name=lora"])
    assert "mapped" not in caplog.text


def test_validation_goes_by_labels_and_not_by_the_teacher(
    recipe_file: Path, rule: Path, wild: tuple[Path, np.ndarray]
) -> None:
    recipe = taught_by(recipe_file, rule, more=(with_wild(recipe_file, wild[0]),))
    with open_scenes(recipe) as opened:
        own, other = teach(opened, recipe)
        assert own.count(VALIDATION) == opened[0].count(VALIDATION) > 0
        assert other.count(TRAINING) == other.count(VALIDATION) == 0
        assert other.teaches(Window(0, 0, 96, 96)).all()
