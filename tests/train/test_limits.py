"""Pixels outside of data.valid_range, as nodata leaves them that nobody marked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from geodeploy.labels import IGNORED
from geodeploy.train import check_data, train
from geodeploy.train.augment import Light, read_training_tile
from geodeploy.train.data import (
    TRAINING,
    compute_statistics,
    labelled_places,
    open_scenes,
    read_tile,
)
from geodeploy.train.limits import limits_of
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import load_run
from geodeploy.train.seen import compute_seen
from geodeploy.train.teaching import map_probabilities

MEAN = np.full(6, 0.2, np.float32)
ROWS = slice(40, 45)
Remake = Callable[..., Path]


@pytest.fixture
def remake(recipe_file: Path, tmp_path: Path) -> Remake:
    """The recipe's image in reflectance, its pixels changed, with or without a nodata value."""

    def make(name: str, change: Callable[[np.ndarray], None], *, nodata: float | None = None) -> Path:
        with rasterio.open(recipe_file.parent / "image.tif") as source:
            pixels = (source.read() * 2e-5 - 0.1).astype(np.float32)
            change(pixels)
            profile = source.profile | {"dtype": "float32", "nodata": nodata}
            with rasterio.open(tmp_path / name, "w", **profile) as target:
                target.write(pixels)
                target.descriptions = source.descriptions
        return tmp_path / name

    return make


def strike(pixels: np.ndarray) -> None:
    pixels[:, ROWS] = -9999


def test_nodata_that_nobody_marked_changes_no_statistics_and_is_told(
    recipe_file: Path, remake: Remake, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for image in (remake("bare.tif", strike), remake("marked.tif", strike, nodata=-9999)):
        recipe = load_recipe(recipe_file, [f"data.scene.0.image={image}"])
        with open_scenes(recipe) as scenes:
            found.append((compute_statistics(scenes, 6), compute_seen(scenes, 6)))
    assert found[0] == found[1]
    assert min(found[0][0].mean) > 0
    told = [record.message for record in caplog.records if "valid_range" in record.message]
    assert told == [
        "bare.tif: 655 of 15,327 pixels lie outside data.valid_range, and are left out as if they held "
        "no data. Stored is mostly -9999, probably nodata that is not marked: mark it with "
        "gdal_edit.py -a_nodata -9999, or widen data.valid_range if it is real."
    ]


def test_a_pixel_outside_in_one_band_carries_no_label_and_the_mean_in_all(
    recipe_file: Path, remake: Remake
) -> None:
    def spoil(pixels: np.ndarray) -> None:
        pixels[3, 10:14, 10:20] = 50.0

    image = remake("odd.tif", spoil)
    recipe = load_recipe(
        recipe_file,
        [
            f"data.scene.0.image={image}", "data.scene.0.split=train",
            "augmentation={gain=0, zoom=[1, 1], d4=false}",
        ],
    )  # fmt: skip
    with open_scenes(recipe) as (scene,):
        place = next(labelled_places(scene, 32, 8, part=TRAINING))
        tile = read_tile(scene, place, 32, MEAN, part=TRAINING)
        window, rng = Window(0, 0, 32, 32), np.random.default_rng(0)
        learned = read_training_tile(scene, window, recipe, Light(recipe, MEAN), rng)
    for pixels, codes in ((tile.pixels, tile.codes), learned[:2]):
        assert (pixels[:, 10:14, 10:20] == MEAN[0]).all()
        assert (codes[10:14, 10:20] == IGNORED).all()
        assert (codes != IGNORED).sum() == 32 * 32 - 40


def test_what_saturates_a_little_above_the_range_is_real(recipe_file: Path, remake: Remake) -> None:
    def saturate(pixels: np.ndarray) -> None:
        pixels[:, :20] = 1.6001

    recipe = load_recipe(recipe_file, [f"data.scene.0.image={remake('white.tif', saturate)}"])
    with open_scenes(recipe) as (scene,):
        assert scene.outside.pixels == 0
        assert (scene.codes[:20] != IGNORED).all()


@pytest.mark.parametrize(
    ("value", "advice"), [(-9999, "gdal_edit.py -a_nodata -9999"), (None, "Check")]
)
def test_the_check_of_data_finds_what_is_outside_and_names_what_mends_it(
    recipe_file: Path, remake: Remake, value: float | None, advice: str
) -> None:
    def spoil(pixels: np.ndarray) -> None:
        odd = np.linspace(5, 6, 6 * 5 * 131, dtype=np.float32).reshape(6, 5, 131)
        pixels[:, ROWS] = odd if value is None else value

    report = check_data(recipe_file, overrides=[f"data.scene.0.image={remake('odd.tif', spoil)}"])
    (finding,) = [item for item in report.findings if item.kind == "nodata"]
    assert finding.severity == "warning"
    assert "655 of 15,327 pixels lie outside data.valid_range" in finding.message
    assert advice in finding.message
    (facts,) = report.scenes
    assert facts.nodata_share == pytest.approx(655 / 15327)
    assert max(facts.means) < 1


def test_a_teacher_says_nothing_of_pixels_outside(
    recipe_file: Path, remake: Remake, tune: Callable[..., Path]
) -> None:
    from geodeploy.runtime import open_session

    recipe = load_recipe(recipe_file, [f"data.scene.0.image={remake('bare.tif', strike)}"])
    session = open_session(tune(), device="cpu", threads=1)
    with open_scenes(recipe) as (scene,):
        told = map_probabilities(session, scene.raster, limits_of(recipe))
    session.close()
    silent = ~told.any(axis=0)
    assert silent[ROWS].all()
    assert silent.sum() == 655


def test_a_run_normalises_by_real_data_alone(recipe_file: Path, remake: Remake, tmp_path: Path) -> None:
    override = f"data.scene.0.image={remake('bare.tif', strike)}"
    train(recipe_file, tmp_path / "run", overrides=[override, "training.steps=1"])
    run = load_run(tmp_path / "run")
    assert all(0 < band.mean < 1 and band.std < 1 for band in run.spec.bands)
    assert run.tiles.pixels.min() > -1
