"""Training on several dates of a place: files of a date each, and one file that holds them all."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.windows import Window

from geodeploy import PredictOptions, predict
from geodeploy.errors import RecipeError, SourceError
from geodeploy.export import export
from geodeploy.train import check_data, train
from geodeploy.train.augment import training_batches
from geodeploy.train.data import TRAINING, compute_statistics, open_scenes
from geodeploy.train.recipe import Augmentation, load_recipe
from geodeploy.train.run import load_run

BANDS = 6
TWO = "model.timesteps=2"
SPLIT = ("data.scene.0.earlier=['winter.tif']", TWO)
STACKED = (
    "data.scene.0.image=stacked.tif",
    f"data.scene.0.bands={[str(number) for number in range(1, 2 * BANDS + 1)]}",
    TWO,
)
PRITHVI = ("model.backbone=prithvi_eo_v2_tiny", "model.scaling=zscore")
LIGHT = ("model.backbone=light", "model.options={channels=[8, 8, 16]}", "model.decoder_channels=[8, 8]")


@pytest.fixture(scope="module")
def recipe(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, with the same place darker and bluer beside it, and both dates in one file."""
    folder = tmp_path_factory.mktemp("dates") / "recipe"
    recipe_file = Path(shutil.copytree(recipe_file.parent, folder)) / recipe_file.name
    with rasterio.open(recipe_file.with_name("image.tif")) as image:
        stored, profile = image.read(), image.profile
        descriptions, scales, offsets = image.descriptions, image.scales, image.offsets
    profile["nodata"] = 0
    factors = np.linspace(0.9, 0.5, BANDS)[:, np.newaxis, np.newaxis]
    winter = (stored * factors).astype(stored.dtype)
    winter[:, :9, :7] = 0
    with rasterio.open(recipe_file.with_name("winter.tif"), "w", **profile) as file:
        file.write(winter)
        file.descriptions, file.scales, file.offsets = descriptions, scales, offsets
    with rasterio.open(
        recipe_file.with_name("stacked.tif"), "w", **(profile | {"count": 2 * BANDS})
    ) as file:
        file.write(np.concatenate([winter, stored]))
        file.scales, file.offsets = scales * 2, offsets * 2
    return recipe_file


@pytest.mark.parametrize("network", [PRITHVI, LIGHT], ids=["prithvi", "light"])
def test_a_model_of_two_dates_is_trained_exported_and_maps_them(
    network: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    train(recipe, tmp_path / "run", overrides=(*SPLIT, *network, *_method(network)))
    run = load_run(tmp_path / "run")
    assert run.spec.timesteps == 2
    assert len(run.spec.bands) == BANDS
    model = tmp_path / "model.onnx"
    assert export(tmp_path / "run", model).exported.argmax_agreement == 1
    earlier = PredictOptions(earlier=(recipe.with_name("winter.tif"),))
    predict(recipe.with_name("image.tif"), model, tmp_path / "apart.tif", options=earlier)
    numbers = tuple(str(number) for number in range(1, 2 * BANDS + 1))
    predict(
        recipe.with_name("stacked.tif"),
        model,
        tmp_path / "stacked.tif",
        options=PredictOptions(bands=numbers),
    )
    with rasterio.open(tmp_path / "apart.tif") as one, rasterio.open(tmp_path / "stacked.tif") as other:
        found = one.read(1)
        assert (found[:9, :7] == 255).all()
        np.testing.assert_array_equal(found, other.read(1))
    # PyTorch on one tile away from all borders, where nothing is blended.
    tile = run.spec.tile
    with rasterio.open(recipe.with_name("stacked.tif")) as file:
        scales = np.array(file.scales, np.float32)[:, np.newaxis, np.newaxis]
        offsets = np.array(file.offsets, np.float32)[:, np.newaxis, np.newaxis]
        pixels = file.read().astype(np.float32) * scales + offsets
    step = tile - run.spec.overlap
    corner = pixels[:, step : step + tile, step : step + tile]
    with torch.inference_mode():
        judged = run.model(torch.from_numpy(corner)[None])[0].argmax(dim=0).numpy()
    values = np.array(run.spec.class_values)[judged]
    inner = slice(run.spec.overlap, step)
    mapped = found[step : step + tile, step : step + tile]
    assert (values[inner, inner] == mapped[inner, inner]).mean() > 0.99


def _method(network: tuple[str, ...]) -> tuple[str, ...]:
    return ("method={name='full'}",) if network is LIGHT else ()


def test_dates_in_one_file_are_those_of_files_apart(recipe: Path) -> None:
    batches = []
    for overrides in (SPLIT, STACKED):
        loaded = load_recipe(recipe, (*overrides, "model.backbone=prithvi_eo_v2_tiny"))
        with open_scenes(loaded) as scenes:
            mean = np.full(2 * BANDS, 0.2, np.float32)
            batches.append(next(training_batches(scenes, loaded, mean)))
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    assert torch.equal(batches[0].labels, batches[1].labels)
    assert batches[0].pixels.shape[1] == 2 * BANDS


def test_each_band_has_the_statistics_of_all_dates(recipe: Path) -> None:
    with open_scenes(load_recipe(recipe, (*SPLIT, *PRITHVI))) as scenes:
        found = compute_statistics(scenes, BANDS)
        (scene,) = scenes
        pixels, valid = scene.raster.read_pixels(Window(0, 0, scene.raster.width, scene.raster.height))
        learned = valid & (scene.part == TRAINING)
    both = np.concatenate([pixels[:BANDS, learned], pixels[BANDS:, learned]], axis=1)
    np.testing.assert_allclose(found.mean, both.mean(axis=1, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(found.std, both.std(axis=1, dtype=np.float64), rtol=1e-4)


def test_every_date_has_its_own_air(recipe: Path) -> None:
    loaded, drawn = load_recipe(recipe, (*SPLIT, *LIGHT)), []
    with open_scenes(loaded) as scenes:
        for settings in (Augmentation(), Augmentation(haze=0.3)):
            given = loaded.model_copy(update={"augmentation": settings})
            drawn.append(next(training_batches(scenes, given, np.zeros(2 * BANDS, np.float32))).pixels)
    added = (drawn[1] - drawn[0]).amax(dim=(2, 3))
    older, newer = added[:, 0], added[:, BANDS]  # what haze adds to blue
    assert (older > 0).all()
    assert (older - newer).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((TWO,), r"model\.timesteps is 2, and image\.tif has 1 date\. Name the files of the other"),
        (
            ("data.scene.0.earlier=['winter.tif']",),
            r"model\.timesteps is 1, and image\.tif has 2 dates",
        ),
        (("data.scene.0.earlier=['gone.tif']", TWO), r"gone\.tif"),
    ],
)
def test_dates_that_the_model_does_not_take_are_refused(
    overrides: tuple[str, ...], words: str, recipe: Path, tmp_path: Path
) -> None:
    given = (*overrides, *PRITHVI)
    with pytest.raises(SourceError, match=words):
        train(recipe, tmp_path / "run", overrides=given)
    assert not (tmp_path / "run").exists()
    assert any(item.severity == "error" for item in check_data(recipe, overrides=given).findings)


def test_made_up_clouds_are_for_one_date(recipe: Path) -> None:
    clouds = "augmentation.clouds={share=0.5, cloud=1}"
    with pytest.raises(RecipeError, match="share must be 0 for a model of several dates"):
        load_recipe(recipe, (*SPLIT, *PRITHVI, clouds))


def test_data_of_several_dates_are_checked(recipe: Path) -> None:
    for overrides in (SPLIT, STACKED):
        found = check_data(recipe, overrides=(*overrides, *PRITHVI)).findings
        assert not [item for item in found if item.severity == "error"]
