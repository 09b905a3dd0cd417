from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio.windows import Window

from geodeploy.labels import IGNORED
from geodeploy.train.augment import Light, read_training_tile, relight, training_batches
from geodeploy.train.clouds import _CLEAR, _DARK, _LIT, _OPAQUE, CloudMaker, fractal
from geodeploy.train.data import class_shares, open_scenes
from geodeploy.train.recipe import load_recipe

SHADOW, WATER, LAND, CLOUD = range(4)
"""Positions of the classes below."""
CLASSES = "classes=[{}]".format(
    ", ".join(
        f"{{value={value}, name='{name}', color='#00000{value}'}}"
        for value, name in ((0, "shadow"), (1, "water"), (3, "land"), (4, "cloud"))
    )
)
SKY = "augmentation.clouds={share=1, cloud=4, shadow=0, unshaded=[1]}"
SIDE = 96
MEAN = np.full(6, 0.2, np.float32)
SEEDS = pytest.mark.parametrize("seed", range(12))


def maker(recipe_file: Path, clouds: str = SKY) -> CloudMaker:
    return CloudMaker(load_recipe(recipe_file, [CLASSES, clouds]))


def ground(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (6, SIDE, SIDE) and codes in patches of four by four: all classes, and some without."""
    rng = np.random.default_rng(1000 + seed)
    pixels = rng.uniform(-0.02, 0.6, (6, SIDE, SIDE)).astype(np.float32)
    patches = rng.choice([SHADOW, WATER, LAND, CLOUD, IGNORED], (SIDE // 4, SIDE // 4))
    return pixels, np.kron(patches, np.ones((4, 4))).astype(np.uint8)


def sky(clouds: CloudMaker, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cover and the shadows that ``clouds`` draws first from this seed."""
    rng = np.random.default_rng(seed)
    cover = clouds._draw_cover(SIDE, rng)
    return cover, clouds._cast(cover, rng)


@SEEDS
def test_labels_change_only_where_pixels_do(recipe_file: Path, seed: int) -> None:
    clouds, (pixels, codes) = maker(recipe_file), ground(seed)
    before = pixels.copy(), codes.copy()
    mixed, after, changed = clouds(pixels, codes, np.random.default_rng(seed))
    np.testing.assert_array_equal(pixels, before[0])
    np.testing.assert_array_equal(codes, before[1])
    relabelled = after != codes
    assert relabelled.any()
    assert changed[relabelled].all()
    moved = np.abs(mixed - pixels).max(axis=0)
    assert (moved[relabelled] > 1e-3).all()
    assert moved[~changed].max() < 0.2  # a tenth of a cloud or of the light
    assert not changed.all()


@SEEDS
def test_what_is_opaque_is_cloud_and_what_is_thin_is_nothing_for_sure(
    recipe_file: Path, seed: int
) -> None:
    clouds, (pixels, codes) = maker(recipe_file), ground(seed)
    cover, _ = sky(clouds, seed)
    mixed, after, _ = clouds(pixels, codes, np.random.default_rng(seed))
    assert (after[cover > _OPAQUE] == CLOUD).all()
    thin = (cover > _CLEAR) & (cover <= _OPAQUE)
    np.testing.assert_array_equal(after[thin], np.where(codes[thin] == CLOUD, CLOUD, IGNORED))
    made = (after == CLOUD) & (codes != CLOUD)
    assert (cover[made] > _OPAQUE).all()
    whole = cover == 1
    if whole.any():  # of the ground nothing is left
        other, _, _ = clouds(pixels + 0.1, codes, np.random.default_rng(seed))
        np.testing.assert_array_equal(mixed[:, whole], other[:, whole])


@SEEDS
def test_a_shadow_darkens_to_the_light_of_the_air_and_never_brightens(
    recipe_file: Path, seed: int
) -> None:
    clouds, (pixels, codes) = maker(recipe_file), ground(seed)
    cover, taken = sky(clouds, seed)
    mixed, after, _ = clouds(pixels, codes, np.random.default_rng(seed))
    path = np.broadcast_to(clouds.path[:, None, None], pixels.shape)
    bare = cover == 0
    assert (mixed <= pixels)[:, bare].all()
    assert (mixed >= np.minimum(path, pixels) - 1e-6)[:, bare].all()
    shaded = bare & (taken > _LIT)
    lit = shaded & (pixels > path + 0.01)
    assert (mixed[lit] < pixels[lit]).all()
    needed = (path + (pixels - path) * (1 - taken))[lit]
    np.testing.assert_allclose(mixed[lit], needed, atol=1e-6)

    dark = bare & (taken > _DARK)
    assert (after[dark & (codes == LAND)] == SHADOW).all()
    for code in (WATER, LAND):
        between = shaded & (codes == code) & ~(dark & (codes == LAND))
        assert (after[between] == IGNORED).all()
    for code in (SHADOW, CLOUD, IGNORED):  # known already, or not at all
        assert (after[bare & (codes == code)] == code).all()
    assert not ((after == SHADOW) & np.isin(codes, [WATER, IGNORED, CLOUD])).any()


def test_shadows_do_come_up(recipe_file: Path) -> None:
    clouds, (pixels, codes) = maker(recipe_file), ground(0)
    codes[:] = LAND
    counts = [
        (clouds(pixels, codes, np.random.default_rng(seed))[1] == SHADOW).mean() for seed in range(40)
    ]
    assert 0.03 < np.mean(counts) < 0.2


@SEEDS
def test_a_model_without_such_classes_learns_nothing_under_clouds_and_its_ground_in_shadow(
    recipe_file: Path, seed: int
) -> None:
    clouds, (pixels, codes) = maker(recipe_file, "augmentation.clouds={share=1}"), ground(seed)
    cover, _ = sky(clouds, seed)
    _, after, changed = clouds(pixels, codes, np.random.default_rng(seed))
    assert (after[cover > _CLEAR] == IGNORED).all()
    clear = cover <= _CLEAR
    np.testing.assert_array_equal(after[clear], codes[clear])
    assert changed[clear].any()  # by shadows


def test_the_sky_is_neither_empty_nor_closed_and_as_bright_as_clouds_are(recipe_file: Path) -> None:
    clouds = maker(recipe_file)
    black, codes = np.zeros((6, SIDE, SIDE), np.float32), np.full((SIDE, SIDE), LAND, np.uint8)
    shares, whitest, infrared = [], [], []
    for seed in range(150):
        mixed, after, _ = clouds(black, codes, np.random.default_rng(seed))
        opaque = after == CLOUD
        shares.append(opaque.mean())
        whitest.append(mixed.max())
        infrared.append(mixed[4:, opaque].mean() / mixed[:4, opaque].mean())
    assert min(shares) > 0
    assert max(shares) < 0.5
    assert 0.1 < np.mean(shares) < 0.35
    assert min(whitest) > 0.1
    assert max(whitest) < 1.6
    assert np.mean(infrared) < 0.9  # droplets and ice absorb there


def test_a_shadow_that_leaves_at_one_edge_comes_from_a_cloud_beyond_the_other(
    recipe_file: Path,
) -> None:
    # The noise goes on beyond its edges as if it were laid side by side: no jump where it is rolled.
    noise = fractal(64, 1.8, np.random.default_rng(0))
    assert noise.mean() == pytest.approx(0, abs=1e-9)
    assert noise.std() == pytest.approx(1)
    inner = np.abs(np.diff(noise, axis=0)).max()
    assert np.abs(noise[0] - noise[-1]).max() < 1.5 * inner
    cover, taken = sky(maker(recipe_file), 3)
    strength = taken.max() / cover.max()
    assert 0.4 <= strength <= 0.85
    np.testing.assert_allclose(
        np.sort(taken, axis=None), np.sort(cover * strength, axis=None), rtol=1e-5
    )
    assert not np.allclose(taken, cover * strength)


def test_the_same_seed_makes_the_same_clouds(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["augmentation.clouds={share=0.5, cloud=1}"])
    other = load_recipe(recipe_file, ["augmentation.clouds={share=0.5, cloud=1}", "seed=4"])
    with open_scenes(recipe) as scenes:
        one, two, three = (
            list(islice(training_batches(scenes, item, MEAN), 3)) for item in (recipe, recipe, other)
        )
    for first, again in zip(one, two, strict=True):
        assert torch.equal(first.pixels, again.pixels)
        assert torch.equal(first.labels, again.labels)
    assert not torch.equal(one[0].pixels, three[0].pixels)


def test_without_a_share_nothing_is_drawn(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["augmentation.clouds.cloud=1"])
    ours, judge = np.random.default_rng(5), np.random.default_rng(5)
    light = Light(recipe, MEAN)
    with open_scenes(recipe) as (scene,):
        read_training_tile(scene, Window(10, 10, 32, 32), recipe, light, ours)
    judge.integers(0, 8)
    relight(np.ones((6, 1, 1), np.float32), recipe.augmentation, light.veil, judge)
    assert ours.bit_generator.state == judge.bit_generator.state


@pytest.mark.parametrize(("share", "clouded"), [(0.0, 0), (0.3, 0.3), (1.0, 1)])
def test_share_is_of_the_windows(recipe_file: Path, share: float, clouded: float) -> None:
    recipe = load_recipe(
        recipe_file,
        [f"augmentation.clouds={{share={share}}}", "augmentation.gain=0", "augmentation.d4=false"],
    )
    rng, window, count = np.random.default_rng(0), Window(10, 10, 32, 32), 200
    light = Light(recipe, MEAN)
    with open_scenes(recipe) as (scene,):
        plain = scene.raster.read_pixels(window)[0]
        tiles = [read_training_tile(scene, window, recipe, light, rng)[0] for _ in range(count)]
    assert np.mean([(tile != plain).any() for tile in tiles]) == pytest.approx(clouded, abs=0.1)


def test_pixels_without_data_stay_so_under_clouds(
    recipe_file: Path, tmp_path: Path, make_raster: Callable[..., Path]
) -> None:
    pixels = np.full((6, 64, 64), 0.1, np.float32)
    pixels[:, :, :20] = np.nan
    image = make_raster(tmp_path / "image.tif", pixels)
    labels = make_raster(tmp_path / "labels.tif", np.zeros((1, 64, 64), np.uint8))
    recipe = load_recipe(
        recipe_file,
        [
            f"data.scene=[{{image='{image}', labels='{labels}', split='train'}}]",
            "augmentation.clouds={share=1, cloud=1, shadow=2}",
            "augmentation.zoom=[1, 1]",
            "model.tile=64",
        ],
    )
    rng = np.random.default_rng(0)
    with open_scenes(recipe) as (scene,):
        for _ in range(10):
            tile, codes, _ = read_training_tile(
                scene, Window(0, 0, 64, 64), recipe, Light(recipe, MEAN), rng
            )
            empty = (tile == MEAN[:, None, None]).all(axis=0)
            assert empty.sum() == 20 * 64
            assert (codes[empty] == IGNORED).all()
            assert (codes[~empty] == 1).any()


def test_a_class_that_only_clouds_bring_up_is_not_said_to_be_absent(
    recipe_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = recipe_file.read_text().count("[[classes]]")
    plain = [f"classes.{more - 1}.value=9", "data.ignore=[2]"]
    with open_scenes(load_recipe(recipe_file, plain)) as scenes:
        assert class_shares(scenes, 3)[2] == 0
    assert "No training pixel is labelled cirrus" in caplog.text
    caplog.clear()
    with open_scenes(load_recipe(recipe_file, [*plain, "augmentation.clouds={share=0.1, cloud=9}"])):
        pass
    assert "No training pixel" not in caplog.text


def test_a_lost_band_holds_its_mean_and_the_others_what_they_did(recipe_file: Path) -> None:
    plain = ["augmentation.gain=0", "augmentation.d4=false", "augmentation.zoom=[1, 1]"]
    recipe = load_recipe(recipe_file, [*plain, "augmentation.band_dropout=0.5"])
    mean = np.linspace(0.1, 0.6, 6, dtype=np.float32)
    rng, window, lost = np.random.default_rng(0), Window(40, 30, 32, 32), []
    with open_scenes(recipe) as (scene,):
        for _ in range(100):
            pixels, _, _ = read_training_tile(scene, window, recipe, Light(recipe, mean), rng)
            gone = [band for band in range(6) if (pixels[band] == mean[band]).all()]
            kept = [band for band in range(6) if band not in gone]
            np.testing.assert_array_equal(pixels[kept], scene.raster.read_pixels(window)[0][kept])
            assert len(gone) <= 1
            lost += gone
    assert set(lost) == set(range(6))
    assert 30 < len(lost) < 70
