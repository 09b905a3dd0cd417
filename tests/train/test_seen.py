from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

from geodeploy.errors import LabelError
from geodeploy.train.data import TRAINING, open_scenes
from geodeploy.train.recipe import load_recipe
from geodeploy.train.seen import compute_seen

Make = Callable[..., Path]


def test_what_was_seen_is_what_all_but_a_thousandth_of_the_training_pixels_lie_in(
    recipe_file: Path,
) -> None:
    with open_scenes(load_recipe(recipe_file)) as (scene,):
        found = compute_seen([scene], 6)
        with rasterio.open(recipe_file.parent / "image.tif") as image:
            pixels = image.read() * np.float64(2e-5) - 0.1
        chosen = pixels[:, scene.part == TRAINING]
    low = np.quantile(chosen, 0.001, axis=1, method="lower")
    high = np.quantile(chosen, 0.999, axis=1, method="higher")
    np.testing.assert_allclose(found, np.stack([low, high], axis=1), rtol=0, atol=1e-7)
    outside = [
        (band < ends[0]).mean() + (band > ends[1]).mean()
        for band, ends in zip(chosen, found, strict=True)
    ]
    assert max(outside) <= 0.002


@pytest.fixture
def two_scenes(recipe_file: Path, tmp_path: Path, make_raster: Make) -> tuple[list[str], np.ndarray]:
    """Overrides that train on two scenes of six kinds of numbers, and their valid pixels."""
    rng = np.random.default_rng(4)
    tables, parts = [], []
    for name, height, width in (("a", 700, 60), ("b", 90, 131)):
        pixels = rng.normal(300, 8, (6, height, width))  # kelvin
        pixels[1] = rng.normal(0, 3, (height, width))  # of both signs
        pixels[2] = rng.integers(0, 50, (height, width)) / 49  # few values, many at either end
        pixels[3] = 0.0 if name == "a" else -0.0
        pixels[4] = rng.random((height, width)) ** 20  # most of them tiny
        pixels[0, ::90, 7] = 3e30  # far off, but few
        pixels[1, ::90, 7] = -3e30
        pixels[:, height // 2 :, :20] = np.nan
        pixels = pixels.astype(np.float32)
        parts.append(pixels[:, np.isfinite(pixels[0])])
        image = make_raster(tmp_path / f"{name}.tif", pixels, blockysize=16)
        labels = make_raster(tmp_path / f"{name}_labels.tif", np.ones((1, height, width), np.uint8))
        tables.append(f"{{image='{image}', labels='{labels}', split='train'}}")
    return [f"data.scene=[{', '.join(tables)}]", "data.valid_range=[-1e31, 1e31]"], np.concatenate(
        parts, axis=1
    )


def test_what_was_seen_in_several_scenes_is_exact_whatever_the_numbers(
    recipe_file: Path, two_scenes: tuple[list[str], np.ndarray]
) -> None:
    overrides, pixels = two_scenes
    with open_scenes(load_recipe(recipe_file, overrides)) as scenes:
        found = compute_seen(scenes, 6)
        assert len(list(scenes[0].raster.stripes())) > 2
    assert found[3] is None  # one value everywhere
    rest = pixels.shape[1] // 1000
    ordered = np.sort(pixels, axis=1)
    for band in (0, 1, 2, 4, 5):
        low, high = ordered[band, rest], ordered[band, -1 - rest]
        assert np.float32(found[band]).tolist() == [low, high]
        about = np.quantile(pixels[band], [0.001, 0.999])
        np.testing.assert_allclose(found[band], about, rtol=0.02, atol=1e-30)
    assert 320 < found[0][1] < 340  # not drawn out by the few far off
    assert found[2] == (0.0, 1.0)


def test_training_areas_without_data_are_refused(
    recipe_file: Path, tmp_path: Path, make_raster: Make
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        path = make_raster(
            tmp_path / "empty.tif",
            np.full((6, 117, 131), np.nan, np.float32),
            transform=image.transform,
            crs=image.crs,
        )
    recipe = load_recipe(recipe_file, [f"data.scene.0.image={path}"])
    with pytest.raises(LabelError, match="No training scene has a labelled pixel"), open_scenes(recipe):
        pass
