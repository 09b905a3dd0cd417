"""Chips in folders, cut from the scene that ships, and what may be wrong with them."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.windows import Window

from geodeploy.errors import GeodeployError, LabelError, RecipeError, SourceError
from geodeploy.train import data
from geodeploy.train.augment import training_batches
from geodeploy.train.chips import list_scenes
from geodeploy.train.data import TEST, TRAINING, VALIDATION, open_scenes
from geodeploy.train.recipe import load_recipe, recipe_text

NAMES = ["a", "b", "east/c", "east/d"]


def cut(source: Path, target: Path, number: int) -> None:
    """One of the squares of 40 pixels along the top of ``source``."""
    window = Window(0 if number == 3 else 40 * number, 40 * (number == 3), 40, 40)
    target.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(source) as whole:
        profile = whole.profile | {
            "height": 40,
            "width": 40,
            "transform": whole.transform @ Affine.translation(window.col_off, window.row_off),
        }
        with rasterio.open(target, "w", **profile) as chip:
            chip.write(whole.read(window=window))
            chip.descriptions = whole.descriptions
            chip.scales, chip.offsets = whole.scales, whole.offsets


@pytest.fixture
def folder(recipe_file: Path, tmp_path: Path) -> Path:
    """Four chips, and a recipe that trains on all."""
    for number, name in enumerate(NAMES):
        cut(recipe_file.parent / "image.tif", tmp_path / f"images/{name}.tif", number)
        cut(recipe_file.parent / "labels.tif", tmp_path / f"labels/{name}_labels.tif", number)
    scene = '[[data.scene]]\nimage = "image.tif"\nlabels = "labels.tif"\n'
    chips = '[[data.chips]]\nimages = "images"\nlabels = "labels"\nlabel_suffix = "_labels.tif"\n'
    text = recipe_file.read_text()
    assert scene in text
    (tmp_path / "chips.toml").write_text(text.replace(scene, chips))
    return tmp_path


def opened(folder: Path, *overrides: str) -> dict[str, tuple[str, np.ndarray]]:
    """The part and the codes of each chip, by its name."""
    with open_scenes(load_recipe(folder / "chips.toml", overrides)) as scenes:
        parts = {TRAINING: "train", VALIDATION: "validation", TEST: "test"}
        return {scene.raster.name: (parts[scene.part.max()], scene.codes) for scene in scenes}


def test_chips_are_paired_by_their_name(folder: Path, recipe_file: Path) -> None:
    found = opened(folder, "data.chips.0.split=train")
    assert list(found) == ["a.tif", "b.tif", "c.tif", "d.tif"]
    with rasterio.open(recipe_file.parent / "labels.tif") as file:
        labels = file.read(1)
    for number, name in enumerate("abc"):
        part, codes = found[f"{name}.tif"]
        assert part == "train"
        np.testing.assert_array_equal(codes, labels[:40, 40 * number : 40 * number + 40])


def test_images_and_labels_may_share_a_folder(folder: Path) -> None:
    for file in (folder / "labels").rglob("*.tif"):
        file.rename(folder / "images" / file.relative_to(folder / "labels"))
    found = opened(folder, "data.chips.0.split=train", "data.chips.0.labels=images")
    assert list(found) == ["a.tif", "b.tif", "c.tif", "d.tif"]


def test_each_chip_may_have_a_folder_of_its_own(folder: Path) -> None:
    for kind in ("images", "labels"):
        for file in list((folder / kind).rglob("*.tif")):
            chip = folder / "chips" / file.stem.removesuffix("_labels")
            chip.mkdir(parents=True, exist_ok=True)
            file.rename(chip / f"{kind}.tif")
    (folder / "val.txt").write_text("c\n")
    (folder / "train.txt").write_text("a\nb\nd/images.tif\n")
    suffixes = "image_suffix='/images.tif', label_suffix='/labels.tif'"
    table = f"images='chips', labels='chips', {suffixes}, train='train.txt', validation='val.txt'"
    recipe = load_recipe(folder / "chips.toml", [f"data.chips=[{{{table}}}]"])
    assert [(scene.image.parent.name, scene.split) for _, scene in list_scenes(recipe)] == [
        ("a", "train"), ("b", "train"), ("c", "validation"), ("d", "train"),
    ]  # fmt: skip


def test_lists_say_what_each_chip_is_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train.txt").write_text("east/d.tif\n\na\n")
    (folder / "val.txt").write_text("east/c\n")
    (folder / "test.txt").write_text("b")
    lists = ["train", "validation", "test"]
    files = [f"data.chips.0.{split}={split[:5].replace('valid', 'val')}.txt" for split in lists]
    found = {name: part for name, (part, _) in opened(folder, *files).items()}
    assert found == {"a.tif": "train", "b.tif": "test", "c.tif": "validation", "d.tif": "train"}
    with caplog.at_level(logging.WARNING):
        opened(folder, *files[:2])
    assert "1 chip in no list (b): left out" in caplog.text


def move(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / "elsewhere.tif")


def lists(train: str, validation: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "train.txt").write_text(train)
        (folder / "val.txt").write_text(validation)

    return write


TRAIN = "data.chips.0.split=train"
LISTS = (
    "data.chips=[{images='images', labels='labels', label_suffix='_labels.tif', "
    "train='train.txt', validation='val.txt'}]"
)


@pytest.mark.parametrize(
    ("spoil", "override", "kind", "words"),
    [
        (move("labels/a_labels.tif"), TRAIN, LabelError, "data.chips.0: 1 image without labels (a). "),
        (move("images/east/c.tif"), TRAIN, LabelError, "1 label file without an image (east/c). "),
        (
            lambda folder: (folder / "labels/b_labels.tif").rename(folder / "labels/z_labels.tif"),
            TRAIN,
            LabelError,
            "1 image without labels (b) and 1 label file without an image (z). A chip and its labels",
        ),
        (move("labels"), TRAIN, SourceError, "data.chips.0.labels: the folder "),
        (lists("a\nx\ny", "b"), LISTS, LabelError, "train.txt names 2 chips not in images (x, y). "),
        (lists("a\nb", "b"), LISTS, LabelError, "val.txt names 1 chip of another split (b). "),
        (lambda folder: None, LISTS, SourceError, "data.chips.0.train: "),
        (
            lambda folder: None,
            "data.chips=[{images='images', labels='labels', split='train', label_suffix='.png'}]",
            SourceError,
            "data.chips.0.labels: no file in ",
        ),
        (lambda folder: None, "seed=0", RecipeError, "give either a split or the files that list"),
        (
            lambda folder: None,
            "data.chips=[{images='images', labels='labels', split='train', image_suffix='*.tif'}]",
            SourceError,
            "data.chips.0.images: no file in ",
        ),
        (
            lambda folder: None,
            "data.chips=[{images='images', labels='labels', split='train', label_suffix='.geojson'}]",
            RecipeError,
            "chips.0.labels are polygons or points: vectors.class_column must name",
        ),
        (lambda folder: None, "data.chips.0.split=test", RecipeError, "at least one must train"),
        (lambda folder: None, "data.chips=[]", RecipeError, "scene is missing, and so are chips"),
    ],
)
def test_what_does_not_fit_is_counted_and_named(
    folder: Path, spoil: Callable[[Path], object], override: str, kind: type[GeodeployError], words: str
) -> None:
    spoil(folder)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        opened(folder, override)
    assert "\n" not in str(caught.value)


def test_many_chips_do_not_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts open files as Linux shows them")
    monkeypatch.setattr(data, "_OPEN", 3)
    recipe = load_recipe(folder / "chips.toml", [TRAIN])

    def count() -> int:
        files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        return sum(file.startswith(str(folder)) for file in files)

    with open_scenes(recipe) as scenes:
        batch = next(training_batches(scenes, recipe, np.full(6, 0.2, np.float32)))
        assert batch.pixels.std() > 0.01
        assert count() == 0


def test_a_recipe_with_chips_reads_back_and_one_without_says_nothing_of_them(
    folder: Path, recipe_file: Path
) -> None:
    recipe = load_recipe(folder / "chips.toml", [TRAIN])
    (folder / "recipe.toml").write_text(recipe_text(recipe))
    assert load_recipe(folder / "recipe.toml") == recipe
    # A training that an older version began can be gone on with: its recipe has the same text.
    plain = recipe_text(load_recipe(recipe_file))
    assert "chips" not in plain
    assert "vectors" not in plain
