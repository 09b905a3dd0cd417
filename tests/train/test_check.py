"""The check of a recipe's data, on the scene that ships and on what is made of it to be wrong."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.windows import Window
from typer.testing import CliRunner

from geodeploy.cli import app
from geodeploy.errors import LabelError, RecipeError
from geodeploy.train import check_data
from geodeploy.train.data import (
    TRAINING,
    VALIDATION,
    check_scaling,
    compute_statistics,
    open_scenes,
)
from geodeploy.train.findings import DataReport
from geodeploy.train.recipe import load_recipe
from geodeploy.train.swaps import correlation_of, swap_by_wavelength

SIX = ("blue", "green", "red", "nir", "swir16", "swir22")


def scenes(*tables: dict[str, Any]) -> list[str]:
    """An override that names these scenes, by default with the labels of the recipe."""
    texts = [
        "{" + ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in table.items()) + "}"
        for table in (
            {"image": "image.tif", "labels": "labels.tif", "split": "train"} | table for table in tables
        )
    ]
    return [f"data.scene=[{', '.join(texts)}]"]


def told(report: DataReport, severity: str, kind: str) -> list[str]:
    return [
        f"{item.where}: {item.message}"
        for item in report.findings
        if (item.severity, item.kind) == (severity, kind)
    ]


@pytest.fixture
def remake(recipe_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """The recipe's image in another file: other pixels, another profile, other names of bands."""

    def make(
        name: str,
        change: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
        *,
        names: Sequence[str | None] | None = None,
        **profile: Any,
    ) -> Path:
        with rasterio.open(recipe_file.parent / "image.tif") as source:
            pixels = change(source.read())
            size = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2]}
            profile = source.profile | size | {"dtype": pixels.dtype} | profile
            with rasterio.open(tmp_path / name, "w", **profile) as target:
                target.write(pixels)
                target.descriptions = names or source.descriptions
                target.scales, target.offsets = source.scales, source.offsets
        return tmp_path / name

    return make


def test_good_data_has_no_errors_and_its_labels_are_counted_by_split(recipe_file: Path) -> None:
    report = check_data(recipe_file)
    assert not report.errors
    assert not [item for item in report.findings if item.kind != "classes"]
    with open_scenes(load_recipe(recipe_file)) as (scene,):
        for position, item in enumerate(report.classes):
            for part, count in ((TRAINING, item.train), (VALIDATION, item.validation)):
                assert count == ((scene.codes == position) & (scene.part == part)).sum()
    (facts,) = report.scenes
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        pixels = image.read() * np.float64(2e-5) - 0.1
        assert facts.crs == image.crs.to_string()
    np.testing.assert_allclose(facts.means, pixels.mean(axis=(1, 2)), rtol=1e-3)
    assert (facts.height, facts.width, facts.nodata_share) == (117, 131, 0)
    assert facts.gsd_m == pytest.approx(30)


def test_all_that_is_wrong_is_told_at_once_and_the_command_exits_1(
    recipe_file: Path, remake: Callable[..., Path], tmp_path: Path
) -> None:
    whole = remake("cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with rasterio.open(recipe_file.parent / "labels.tif") as labels:
        values = labels.read()
        values[0, 5, 5] = 77
        with rasterio.open(tmp_path / "odd.tif", "w", **labels.profile) as target:
            target.write(values)
    wrong = scenes(
        {},
        {"image": tmp_path / "cut.tif"},
        {"image": "gone.tif"},
        {"image": remake("other.tif", lambda pixels: pixels[:, ::-1]), "labels": tmp_path / "odd.tif"},
        {"image": remake("same.tif"), "split": "validation"},
        {"image": remake("bright.tif", lambda pixels: pixels[:, :, ::-1]), "scale": 1000.0},
    )
    done = CliRunner().invoke(app, ["data", "check", str(recipe_file), "--set", *wrong, "--json"])
    assert done.exit_code == 1
    report = DataReport.model_validate_json(done.stdout)
    unreadable = told(report, "error", "unreadable")
    assert len(unreadable) == 2
    assert "data.scene.1 (cut.tif): " in unreadable[0]
    assert "gone.tif does not exist" in unreadable[1]
    assert "holds the value 77" in told(report, "error", "labels")[0]
    assert (
        "data.scene.4 (same.tif): holds the same pixels as data.scene.0"
        in (told(report, "error", "duplicate")[0])
    )
    assert "with data.scene.5.scale" in told(report, "error", "range")[0]
    text = CliRunner().invoke(app, ["data", "check", str(recipe_file), "--set", *wrong])
    assert text.exit_code == 1
    assert text.stdout.count("\nerror: ") == report.errors == 5
    assert all(len(line) < 500 for line in text.stdout.splitlines())


def test_warnings_alone_exit_0(recipe_file: Path) -> None:
    done = CliRunner().invoke(app, ["data", "check", str(recipe_file), "--set", *scenes({})])
    assert done.exit_code == 0
    assert "warning: no pixel validates" in done.stdout
    assert "0 errors" in done.stdout


def test_the_same_pixels_are_known_in_any_file_and_tell_within_a_split_less(
    recipe_file: Path, remake: Callable[..., Path]
) -> None:
    tiled = remake("tiled.tif", tiled=True, blockxsize=16, blockysize=32, compress="zstd")
    elsewhere = remake("moved.tif", transform=Affine(30, 0, 2e5, 0, -30, 5e6))
    other = remake("other.tif", lambda pixels: pixels + (np.indices(pixels.shape).sum(axis=0) == 9))
    for image, split, errors, warnings in (
        (tiled, "validation", 1, 0),
        (tiled, "test", 1, 0),
        (tiled, "blocks", 1, 0),
        (tiled, "train", 0, 1),
        (elsewhere, "train", 0, 1),
        (other, "validation", 1, 0),  # but for a few: a training refuses it too
        (other, "train", 0, 0),
    ):
        report = check_data(
            recipe_file,
            overrides=scenes({}, {"image": image, "split": split}),
        )
        assert len(told(report, "error", "duplicate")) == errors, (image, split)
        assert len(told(report, "warning", "duplicate")) == warnings, (image, split)


def test_common_ground_of_two_splits_is_told_and_touching_scenes_are_not(
    recipe_file: Path, remake: Callable[..., Path]
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        grid = image.transform
    for shift, found in ((100, ["24% of the smaller"]), (131, []), (-131, [])):
        moved = remake(
            "b.tif", lambda pixels: pixels + 1, transform=grid @ Affine.translation(shift, 0)
        )
        table = {"image": moved, "split": "validation", "labels": remake("none.tif")}
        report = check_data(recipe_file, overrides=scenes({}, table))
        ground = told(report, "warning", "ground")
        assert len(ground) == len(found)
        assert all(words in text for words, text in zip(found, ground, strict=True))


def swapped(one: int, other: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(pixels: np.ndarray) -> np.ndarray:
        order = list(range(len(pixels)))
        order[one], order[other] = other, one
        return pixels[order]

    return change


def test_bands_that_the_file_calls_otherwise_are_told(recipe_file: Path) -> None:
    report = check_data(recipe_file, overrides=scenes({"bands": ["3", "2", "1", "4", "5", "6"]}))
    texts = told(report, "warning", "bands")
    assert "blue is taken from band 3, which the file calls" in texts[0]
    assert "red is taken from band 1" in texts[1]
    assert not told(check_data(recipe_file, overrides=scenes({})), "warning", "bands")


def test_a_swap_with_infrared_shows_in_unnamed_bands(
    recipe_file: Path, remake: Callable[..., Path]
) -> None:
    unnamed = [None] * 6
    image = remake("swapped.tif", swapped(1, 4), names=unnamed)
    report = check_data(recipe_file, overrides=scenes({"image": image}))
    in_order, swap = told(report, "warning", "bands")
    assert "no names; taken in order" in in_order
    assert "green and swir16 swapped would fit better" in swap
    report = check_data(recipe_file, overrides=scenes({"image": remake("right.tif", names=unnamed)}))
    assert len(told(report, "warning", "bands")) == 1


def test_a_scene_unlike_all_others_is_told(recipe_file: Path, remake: Callable[..., Path]) -> None:
    def corner(row: int, col: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda pixels: pixels[:, row : row + 58, col : col + 65]

    tables = [
        {"image": remake(f"{row}{col}.tif", corner(row, col)), "labels": "none"}
        for row in (0, 58)
        for col in (0, 65)
    ]
    three = "data.bands=['blue', 'red', 'nir']"
    tables = [table | {"bands": ["1", "3", "4"]} for table in tables]
    good = check_data(recipe_file, overrides=[*scenes(*tables), three])
    assert not told(good, "warning", "bands")
    bad = {
        "image": remake(
            "bad.tif", lambda pixels: swapped(2, 3)(corner(20, 20)(pixels)), names=[None] * 6
        )
    }
    found = check_data(recipe_file, overrides=[*scenes(*tables, tables[0] | bad), three])
    assert [text.partition(":")[0] for text in told(found, "warning", "bands")] == ["data.scene.4"]


def test_real_scenes_in_their_order_raise_no_suspicion(real_scene: Path) -> None:
    with rasterio.open(real_scene) as image:
        pixels = image.read().reshape(6, -1).astype(np.float64)
    correlation = correlation_of(np.cov(pixels))
    assert swap_by_wavelength(correlation, SIX) is None
    assert swap_by_wavelength(correlation[:4, :4], SIX[:4]) is None
    found = 0
    for one, other in combinations(range(6), 2):
        order = list(range(6))
        order[one], order[other] = other, one
        found += swap_by_wavelength(correlation[np.ix_(order, order)], SIX) is not None
    assert found >= 6


def test_scales_nodata_crs_and_sizes_of_pixels_are_told(
    recipe_file: Path, remake: Callable[..., Path]
) -> None:
    dark = {"image": remake("dark.tif", lambda pixels: pixels[:, ::-1]), "scale": 0.01}
    glaring = remake(
        "glaring.tif", lambda pixels: np.where(pixels > 14_000, 100_000, pixels.astype(np.uint32))
    )
    half = remake(
        "half.tif",
        lambda pixels: np.where(np.arange(131) < 90, np.uint16(0), pixels),
        nodata=0,
        crs=None,
    )
    bare = remake("bare.tif", lambda pixels: np.where(np.arange(131) < 20, np.uint16(0), pixels))
    coarse = remake("coarse.tif", crs=CRS.from_epsg(32633), transform=Affine(60, 0, 5e5, 0, -60, 5e6))
    tables = [dark, {"image": glaring}, {"image": half}, {"image": coarse, "labels": "no"}]
    report = check_data(recipe_file, overrides=[*scenes(*tables), "data.gsd_m=30"])
    ranges = told(report, "warning", "range")
    assert "scene.0 (dark.tif): the mean of the brightest band is" in ranges[0]
    assert "scene.1 (glaring.tif): " in ranges[1]
    assert "lies outside -0.05 to 1.6" in ranges[1]
    assert "scene.2 (half.tif): 69% of the pixels hold no data" in told(report, "warning", "nodata")[0]
    assert "1 without a CRS (data.scene.2 (half.tif)), 3 projected" in told(report, "warning", "crs")[0]
    assert "2 CRSs: EPSG:326" in told(report, "note", "crs")[0]
    assert (
        "coarse.tif): has pixels of 60 m; data.gsd_m is 30"
        in (told(report, "warning", "resolution")[0])
    )
    report = check_data(recipe_file, overrides=scenes({"image": bare}))
    assert "15% of the pixels are 0 in all bands" in told(report, "warning", "nodata")[0]
    report = check_data(recipe_file, overrides=scenes(*tables))
    assert "pixels are of 30 m" in told(report, "note", "resolution")[0]


def test_a_class_that_cannot_be_learned_is_named(recipe_file: Path, tmp_path: Path) -> None:
    with rasterio.open(recipe_file.parent / "labels.tif") as labels:
        values = labels.read()
        values[values == 2] = 1
        with rasterio.open(tmp_path / "two.tif", "w", **labels.profile) as target:
            target.write(values)
    report = check_data(recipe_file, overrides=scenes({"labels": tmp_path / "two.tif"}))
    assert told(report, "warning", "classes")[1] == (
        ": no pixel to train on is cirrus: it cannot be learned."
    )
    assert report.classes[2].train == 0


def test_the_check_needs_no_torch(recipe_file: Path) -> None:
    code = (
        "import sys, geodeploy; "
        f"assert not geodeploy.check_data({str(recipe_file)!r}).errors; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scene_that_shares_pixels_with_one_of_another_split_is_an_error_as_in_a_training(
    recipe_file: Path, tmp_path: Path
) -> None:
    tables = []
    for name, left, split in (("west", 0, "train"), ("east", 60, "validation")):
        paths = {kind: tmp_path / f"{name}_{kind}.tif" for kind in ("image", "labels")}
        for kind, path in paths.items():
            with rasterio.open(recipe_file.parent / f"{kind}.tif") as whole:
                grid = whole.transform @ Affine.translation(left, 0)
                with rasterio.open(
                    path, "w", **whole.profile | {"width": 70, "transform": grid}
                ) as part:
                    part.write(whole.read(window=Window(left, 0, 70, 117)))
                    part.descriptions = whole.descriptions
                    part.scales, part.offsets = whole.scales, whole.offsets
        tables.append(paths | {"split": split})
    report = check_data(recipe_file, overrides=scenes(*tables))
    (message,) = told(report, "error", "duplicate")
    assert "scene.1 (east_image.tif): shares 1170 labelled pixels with data.scene.0 (west" in message
    assert not told(report, "warning", "ground")


def test_a_scene_twice_in_the_same_blocks_counts_twice_and_leaks_nothing(recipe_file: Path) -> None:
    report = check_data(recipe_file, overrides=scenes({"split": "blocks"}, {"split": "blocks"}))
    assert not report.errors
    assert "they count twice" in told(report, "warning", "duplicate")[0]


def test_a_crs_that_is_nowhere_on_earth_is_no_traceback(
    recipe_file: Path, remake: Callable[..., Path]
) -> None:
    site = CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')
    images = [remake("a.tif", crs=site), remake("b.tif", lambda pixels: pixels + 1, crs=site)]
    tables = [
        {"image": image, "labels": "labels.tif", "split": split}
        for image, split in zip(images, ("train", "validation"), strict=True)
    ]
    report = check_data(recipe_file, overrides=scenes(*tables))
    assert all('"site"' in (item.crs or "") for item in report.scenes)
    assert "100% of the smaller one" in told(report, "warning", "ground")[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda band: np.full_like(band, 9000), "Band 3 of data.bands has one value"),
        (lambda band: band // 100, "positive mean; red has -0.09"),
    ],
)
def test_bands_that_a_training_refuses_are_errors(
    recipe_file: Path, remake: Callable[..., Path], change: Callable[..., np.ndarray], words: str
) -> None:
    def spoil(pixels: np.ndarray) -> np.ndarray:
        return np.stack([change(band) if place == 2 else band for place, band in enumerate(pixels)])

    override = scenes({"image": remake("spoilt.tif", spoil), "split": "blocks"})
    assert words in told(check_data(recipe_file, overrides=override), "error", "bands")[0]
    recipe = load_recipe(recipe_file, override)
    with open_scenes(recipe) as opened, pytest.raises(RecipeError, match=words):
        check_scaling(recipe, compute_statistics(opened, 6))


def test_classes_that_clouds_or_teachers_bring_need_no_label(recipe_file: Path) -> None:
    def unlearned(*overrides: str) -> list[str]:
        report = check_data(recipe_file, overrides=["classes.1.value=7", "data.ignore=[1]", *overrides])
        return [text for text in told(report, "warning", "classes") if "cannot be learned" in text]

    assert len(unlearned()) == 1
    assert unlearned("augmentation.clouds={share=0.5, cloud=7}") == []
    assert unlearned("distillation.teachers=['teacher']") == []


def test_scenes_without_labels_are_left_out_without_a_teacher(
    recipe_file: Path, remake: Callable[..., Path]
) -> None:
    bare = f"data.scene=[{{image='image.tif', labels='labels.tif'}}, {{image='{remake('b.tif')}'"
    bare += ", split='train'}]"
    report = check_data(recipe_file, overrides=[bare])
    assert "has no labels: left out" in told(report, "note", "labels")[0]
    assert (len(report.scenes), report.errors) == (1, 0)
    report = check_data(recipe_file, overrides=[bare, "distillation.teachers=['teacher']"])
    assert (len(report.scenes), report.errors) == (2, 1)  # the same pixels


def test_labels_that_are_for_the_test_alone_are_none_even_with_a_teacher(recipe_file: Path) -> None:
    tables = "data.scene=[{image='image.tif', split='train'}, "
    tables += "{image='image.tif', labels='labels.tif', split='test'}]"
    override = [tables, "distillation.teachers=['teacher']"]
    assert told(check_data(recipe_file, overrides=override), "error", "classes") == [
        ": no pixel to train on or to validate on has a label."
    ]
    with pytest.raises(LabelError, match="No scene"), open_scenes(load_recipe(recipe_file, override)):
        pass
