from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.windows import Window

from geodeploy.labels import IGNORED
from geodeploy.train.augment import (
    Light,
    _find_label,
    draw_window,
    haze_by_band,
    read_training_tile,
    relight,
    resample_nearest,
    resample_pixels,
    sum_classes,
    sum_labels,
    training_batches,
    turn,
)
from geodeploy.train.data import TRAINING, open_scenes, sample_tiles
from geodeploy.train.recipe import Augmentation, load_recipe

MEAN = np.full(6, 0.2, np.float32)


@given(symmetry=st.integers(0, 7), side=st.integers(1, 9))
def test_pixels_and_labels_turn_alike(symmetry: int, side: int) -> None:
    labels = np.random.default_rng(side).integers(0, 9, (side, side)).astype(np.uint8)
    pixels = np.stack([labels, labels * 2]).astype(np.float32)
    turned = turn(pixels, symmetry)
    np.testing.assert_array_equal(turned[0], turn(labels, symmetry))
    np.testing.assert_array_equal(turned[1], turn(labels, symmetry) * 2)


def test_the_eight_symmetries_are_eight() -> None:
    square = np.arange(9).reshape(3, 3)
    assert len({turn(square, symmetry).tobytes() for symmetry in range(8)}) == 8


@given(side=st.integers(4, 60), tile=st.integers(4, 60))
def test_labels_are_resampled_onto_the_pixels_they_belong_to(side: int, tile: int) -> None:
    # A ramp: its bilinear value at a pixel's centre is the place it was taken from.
    ramp = np.tile(np.arange(side, dtype=np.float32) + 0.5, (side, 1))
    resampled = resample_pixels(ramp[np.newaxis], tile)[0]
    nearest = resample_nearest(np.floor(ramp).astype(np.uint8), tile) + 0.5
    inner = slice(1 + tile // side, -1 - tile // side or None)  # the ramp flattens at the edge
    assert np.abs(resampled - nearest)[inner, inner].max(initial=0) <= max(side / tile, 1) / 2 + 1e-3


def test_a_scene_painted_with_its_labels_stays_so_whatever_is_done_to_it(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.scene.0.split=train", "augmentation.gain=0"])
    rng = np.random.default_rng(1)
    with open_scenes(recipe) as (scene,):

        class Painted:
            name = "painted"

            def read_pixels(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
                codes = scene.codes[window.toslices()]
                return np.tile(codes, (6, 1, 1)).astype(np.float32), codes != IGNORED

        painted = type(scene)(Painted(), scene.codes, scene.part)
        light = Light(recipe, MEAN)
        for _ in range(20):
            # No zoom: no mixing of neighbours.
            window = draw_window(painted, sum_labels(painted), 32, (1.0, 1.0), rng)
            pixels, codes, taught = read_training_tile(painted, window, recipe, light, rng)
            assert taught is None
            labelled = codes != IGNORED
            assert labelled.any()
            np.testing.assert_array_equal(pixels[0][labelled], codes[labelled])


def test_windows_lie_inside_and_have_labels_even_if_only_one_pixel_has(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.scene.0.split=train"])
    rng = np.random.default_rng(0)
    with open_scenes(recipe) as (scene,):
        scene.codes.fill(IGNORED)
        scene.codes[116, 0] = 1
        for _ in range(30):
            window = draw_window(scene, sum_labels(scene), 8, (0.5, 2.0), rng)
            assert 4 <= window.width == window.height <= 16
            assert 0 <= window.row_off <= 117 - window.height
            assert 0 <= window.col_off <= 131 - window.width
            assert (scene.codes_of(window, TRAINING) == 1).any()


def test_every_label_to_train_on_is_found_by_its_number(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with open_scenes(recipe) as (scene,):
        scene.codes[np.random.default_rng(0).random(scene.codes.shape) < 0.99] = IGNORED
        needed = np.argwhere((scene.part == TRAINING) & (scene.codes != IGNORED))
        summed = sum_labels(scene)
        found = [_find_label(scene, summed, number) for number in range(summed[-1])]
    assert len(summed) == 2 * 3  # of 117 x 131 pixels
    assert sorted(found) == [tuple(place) for place in needed.tolist()]


def test_a_scene_smaller_than_the_tile_is_mirrored_as_predict_does(recipe_file: Path) -> None:
    plain = ["augmentation.d4=false", "augmentation.gain=0", "augmentation.zoom=[1, 1.3]"]
    recipe = load_recipe(recipe_file, ["model.tile=160", "data.scene.0.split=train", *plain])
    with open_scenes(recipe) as scenes:
        batch = next(training_batches(scenes, recipe, MEAN))
        (needed,) = sample_tiles(scenes, recipe, MEAN, 2)
    for pixels, codes in zip(batch.pixels.numpy(), batch.labels.numpy(), strict=True):
        np.testing.assert_array_equal(pixels, needed.pixels)
        np.testing.assert_array_equal(codes, needed.codes)


def test_a_scene_as_large_as_the_tile_is_never_mirrored(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.scene.0.split=train"])
    rng = np.random.default_rng(0)
    with open_scenes(recipe) as (scene,):
        sides = {draw_window(scene, sum_labels(scene), 100, (1, 1.3), rng).height for _ in range(30)}
    assert max(sides) == 117
    assert min(sides) >= 100


def test_gain_acts_on_all_bands_and_haze_on_blue_most() -> None:
    rng = np.random.default_rng(0)
    pixels = np.ones((3, 2, 2), np.float32)
    lit = relight(pixels, Augmentation(gain=0.3), np.zeros(3, np.float32), rng)
    assert np.unique(lit).size == 1
    assert lit[0, 0, 0] != 1
    veil = haze_by_band(["blue", "red", "swir22", "elevation"])
    assert veil[0] == 1
    assert np.all(np.diff(veil) < 0)
    assert veil[3] == 0


def test_no_augmentation_leaves_pixels_as_they_are(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["augmentation.d4=false", "augmentation.gain=0", "augmentation.zoom=[1, 1]"],
    )
    rng = np.random.default_rng(0)
    window = Window(40, 30, 32, 32)
    with open_scenes(recipe) as (scene,):
        pixels, _, _ = read_training_tile(scene, window, recipe, Light(recipe, MEAN), rng)
        np.testing.assert_array_equal(pixels, scene.raster.read_pixels(window)[0])


@pytest.mark.parametrize(("seed", "same"), [(3, True), (4, False)])
def test_the_same_seed_draws_the_same_batches(recipe_file: Path, seed: int, same: bool) -> None:
    recipe = load_recipe(recipe_file)
    other = load_recipe(recipe_file, [f"seed={seed}"])
    with open_scenes(recipe) as scenes:
        first = list(islice(training_batches(scenes, recipe, MEAN), 2))
        again = list(islice(training_batches(scenes, other, MEAN), 2))
    assert same == all(
        torch.equal(one.pixels, two.pixels) and torch.equal(one.labels, two.labels)
        for one, two in zip(first, again, strict=True)
    )


@pytest.mark.parametrize(
    ("weights", "share"), [((None, None), 0.8), ((1.0, 3.0), 0.25), ((1.0, 1.0), 0.5)]
)
def test_scenes_are_drawn_by_their_weight_or_by_their_pixels_to_learn_from(
    recipe_file: Path,
    tmp_path: Path,
    make_raster: Callable[..., Path],
    weights: tuple[float | None, float | None],
    share: float,
) -> None:
    tables = []
    for name, rows, weight in (("a", 128, weights[0]), ("b", 32, weights[1])):
        pixels = np.full((6, rows, 64), 0.5 if name == "a" else 0.1, np.float32)
        image = make_raster(tmp_path / f"{name}.tif", pixels)
        labels = make_raster(tmp_path / f"{name}_labels.tif", np.zeros((1, rows, 64), np.uint8))
        given = "" if weight is None else f", weight={weight}"
        tables.append(f"{{image='{image}', labels='{labels}', split='train'{given}}}")
    recipe = load_recipe(
        recipe_file,
        [f"data.scene=[{', '.join(tables)}]", "training.batch=20", "augmentation.gain=0"],
    )
    with open_scenes(recipe) as scenes:
        batches = islice(training_batches(scenes, recipe, MEAN), 20)
        drawn = np.concatenate([batch.pixels[:, 0, 0, 0].numpy() for batch in batches])
    assert (drawn > 0.3).mean() == pytest.approx(share, abs=0.07)


def test_balanced_windows_hold_each_class_alike_wherever_its_pixels_lie(
    recipe_file: Path, tmp_path: Path, make_raster: Callable[..., Path]
) -> None:
    tables = []
    for name in "ab":
        labels = np.zeros((1, 200, 200), np.uint8)
        if name == "b":
            labels[0, 150, 70] = 1  # one pixel of 80 000
            labels[0, :4] = 2
        image = make_raster(tmp_path / f"{name}.tif", np.full((6, 200, 200), 0.3, np.float32))
        drawn = make_raster(tmp_path / f"{name}_labels.tif", labels)
        tables.append(f"{{image='{image}', labels='{drawn}', split='train'}}")
    scene_list = f"data.scene=[{', '.join(tables)}]"
    options = [scene_list, "training.batch=30", "augmentation.d4=false", "augmentation.zoom=[1, 1]"]

    def drawn_with(share: float) -> np.ndarray:
        recipe = load_recipe(recipe_file, [*options, f"training.balanced_windows={share}"])
        with open_scenes(recipe) as scenes:
            return next(training_batches(scenes, recipe, MEAN)).labels.numpy()

    codes = np.concatenate([drawn_with(1.0), drawn_with(0.99)])
    holding = [(codes == position).any(axis=(1, 2)) for position in range(3)]
    assert holding[0].all()
    assert holding[1].mean() == pytest.approx(1 / 3, abs=0.15)
    assert holding[2].mean() == pytest.approx(1 / 3, abs=0.15)
    _, rows, cols = np.nonzero(codes == 1)
    assert rows.std() > 5
    assert cols.std() > 5
    assert (drawn_with(0.0) == 1).any(axis=(1, 2)).mean() < 0.1


def test_balanced_windows_are_not_drawn_around_what_validates(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.balanced_windows=1"])
    with open_scenes(recipe) as (scene,):
        (by_class,) = ([sums[0][-1] for _, sums in sum_classes([scene], 3)],)
        counts = [((scene.codes == position) & (scene.part == 1)).sum() for position in range(3)]
    assert by_class == counts
