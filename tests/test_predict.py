import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnxruntime
import pytest
import rasterio
from affine import Affine
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio._env import get_gdal_config
from rasterio.crs import CRS
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from geodeploy import PredictOptions, predict, predict_scenes
from geodeploy.errors import GeodeployError, GridError, ModelError, OutputError, SourceError
from geodeploy.report import Report

Make = Callable[..., Any]
MakeRaster = Callable[..., Path]

SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]
BYTES = {"mean": 90.0, "valid_range": (0.0, 255.0)}
"""Of a model that takes 8-bit numbers as they are: whole numbers make no error in float32."""


def whole_scene(path: Path) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """All of a scene in the units of its tags, and where all its bands hold data, by rasterio alone."""
    with rasterio.open(path) as dataset:
        stored = dataset.read()
        valid = (dataset.read_masks() > 0).all(axis=0) & np.isfinite(stored).all(axis=0)
        column = (dataset.count, 1, 1)
        return stored * np.reshape(dataset.scales, column) + np.reshape(dataset.offsets, column), valid


def read_map(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def to_classes(scores: NDArray[np.float64], valid: NDArray[np.bool_], model: Any) -> NDArray[np.uint8]:
    values = np.array(model.spec.class_values, np.uint8)
    return np.where(valid, values[scores.argmax(axis=0)], 255)


def decided(scores: NDArray[np.float64], margin: float) -> NDArray[np.bool_]:
    """Where the best class is ahead of the second by more than ``margin``."""
    second, best = np.sort(scores, axis=0)[-2:]
    return best - second > margin


def as_bytes(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that draw many examples, each of which overwrites the one before."""
    return tmp_path_factory.mktemp("drawn")


# The promises: what the tiled map is, compared with the whole array.


def test_a_pointwise_model_maps_the_real_scene_as_it_would_the_whole_array(
    real_scene: Path, pointwise: Any, tmp_path: Path
) -> None:
    predict(real_scene, pointwise.path, tmp_path / "map.tif")
    pixels, valid = whole_scene(real_scene)
    scores = pointwise.on_the_whole(pixels)
    # float32 and float64 may differ on the best class only where two are equal to six digits.
    sure = decided(scores, 1e-5)
    assert sure.mean() > 0.999
    classes = read_map(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes[sure], to_classes(scores, valid, pointwise)[sure])


@given(
    height=st.one_of(st.integers(1, 200), st.sampled_from([1, 63, 64, 65])),
    width=st.one_of(st.integers(1, 200), st.sampled_from([1, 63, 64, 65])),
    overlap=st.integers(0, 50),
    blend=st.sampled_from(["cosine", "flat", "crop"]),
)
@example(height=1, width=300, overlap=16, blend="cosine")
@example(height=300, width=1, overlap=16, blend="cosine")
@example(height=130, width=131, overlap=0, blend="cosine")
@example(height=70, width=66, overlap=63, blend="crop")
def test_a_pointwise_model_maps_any_size_exactly_as_the_whole_array(
    make_model: Make,
    make_spec: Make,
    make_raster: MakeRaster,
    folder: Path,
    height: int,
    width: int,
    overlap: int,
    blend: Any,
) -> None:
    model = make_model(folder / "m.onnx", make_spec(SIX[:3], **BYTES), whole_numbers=True)
    scene = make_raster(folder / "scene.tif", as_bytes((3, height, width)), names=SIX)
    options = PredictOptions(overlap=overlap, blend=blend, overwrite=True)
    predict(scene, model.path, folder / "map.tif", options=options)
    judge = to_classes(model.on_the_whole(*whole_scene(scene)[:1]), np.True_, model)
    np.testing.assert_array_equal(read_map(folder / "map.tif"), judge)


@given(data=st.data(), kernels=st.sampled_from([(3,), (5,), (3, 3), (3, 3, 3)]))
def test_crop_equals_the_whole_array_where_the_model_looks_no_further_than_half_the_overlap(
    make_model: Make,
    make_spec: Make,
    make_raster: MakeRaster,
    folder: Path,
    data: st.DataObject,
    kernels: tuple[int, ...],
) -> None:
    radius = sum(side // 2 for side in kernels)
    tile = data.draw(st.sampled_from([16, 23]), "tile")
    overlap = data.draw(st.integers(2 * radius, tile - 1), "overlap")
    sizes = st.integers(tile, tile + 4 * (tile - overlap) + 1)
    height, width = data.draw(sizes, "height"), data.draw(sizes, "width")
    spec = make_spec(SIX[:2], (0, 1, 2), tile=tile, overlap=overlap, **BYTES)
    seed = data.draw(st.integers(0, 99), "seed")
    model = make_model(folder / "m.onnx", spec, kernels=kernels, whole_numbers=True, seed=seed)
    assert model.radius == radius
    scene = make_raster(folder / "scene.tif", as_bytes((2, height, width), seed) // 8, names=SIX)
    options = PredictOptions(blend="crop", overwrite=True)
    predict(scene, model.path, folder / "map.tif", options=options)
    # Sums stay below 2**24: float32 holds them exactly.
    scores = model.on_the_whole(*whole_scene(scene)[:1])
    assert np.abs(scores).max() < 2**24
    np.testing.assert_array_equal(read_map(folder / "map.tif"), to_classes(scores, np.True_, model))


def blended(
    pixels: NDArray[np.float64], valid: NDArray[np.bool_], model: Any, blend: str
) -> NDArray[np.float64]:
    """Probabilities (K, H, W): the model's own tiles, averaged in float64 over the whole array."""
    tile, overlap, (_, height, width) = model.spec.tile, model.spec.overlap, pixels.shape
    run = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"]).run
    fill = np.array([band.mean for band in model.spec.bands]).reshape(-1, 1, 1)
    filled = np.where(valid, pixels, fill).astype(np.float32)
    edge = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    line = np.sin(np.pi / 2 * np.minimum(edge / overlap, 1)) ** 2 if blend == "cosine" else edge * 0 + 1
    total = np.zeros((len(model.spec.classes), height, width))
    weights = np.zeros((height, width))

    def stands(length: int) -> range:
        return range(0, max(length - tile, 0) + tile - overlap, tile - overlap)

    for top, left in product(stands(height), stands(width)):
        row, col = min(top, max(height - tile, 0)), min(left, max(width - tile, 0))
        seen = filled[:, row : row + tile, col : col + tile]
        missing = [(0, 0), (0, tile - seen.shape[1]), (0, tile - seen.shape[2])]
        (logits,) = run(None, {"pixels": np.pad(seen, missing, mode="reflect")[np.newaxis]})
        probs = np.exp(logits[0].astype(np.float64) - logits[0].max(axis=0))
        probs /= probs.sum(axis=0)
        down, across = min(tile, height - top), min(tile, width - left)
        part = np.s_[top : top + down, left : left + across]
        weight = np.outer(line[:down], line[:across])
        total[:, *part] += (
            weight * probs[:, top - row : top - row + down, left - col : left - col + across]
        )
        weights[part] += weight
    return total / weights


@pytest.mark.parametrize("blend", ["cosine", "flat"])
@pytest.mark.parametrize("size", [(150, 170), (64, 200), (65, 63), (40, 90), (1, 150), (90, 3)])
def test_blending_equals_a_float64_blend_of_the_same_tiles_over_the_whole_array(
    make_model: Make,
    make_raster: MakeRaster,
    tmp_path: Path,
    size: tuple[int, int],
    blend: Any,
) -> None:
    # The layers' zero padding makes a tile's edge differ from its middle: overlapping tiles disagree.
    model = make_model(tmp_path / "model.onnx", kernels=(5, 5))
    stored = np.random.default_rng(2).uniform(0, 0.6, (6, *size)).astype(np.float32)
    stored[:, : size[0] // 4, : size[1] // 3] = np.nan
    scene = make_raster(tmp_path / "scene.tif", stored)
    predict(scene, model.path, tmp_path / "map.tif", options=PredictOptions(blend=blend))
    pixels, valid = whole_scene(scene)
    probs = blended(pixels, valid, model, blend)
    sure = decided(probs, 2e-5)  # each of two within 1e-5
    assert sure.mean() > 0.99
    classes = read_map(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes[sure], to_classes(probs, valid, model)[sure])


def test_the_real_scene_blends_as_the_judge_does_with_half_of_each_tile_shared(
    make_model: Make, make_spec: Make, real_scene: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model.onnx", make_spec(tile=96, overlap=60), kernels=(5, 5))
    predict(real_scene, model.path, tmp_path / "map.tif")
    pixels, valid = whole_scene(real_scene)
    probs = blended(pixels, valid, model, "cosine")
    sure = decided(probs, 2e-5)
    assert sure.mean() > 0.99
    classes = read_map(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes[sure], to_classes(probs, valid, model)[sure])


# What must change nothing.


@pytest.fixture(scope="module")
def clip(
    real_scene: Path, make_raster: MakeRaster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[NDArray[Any], dict[str, Any]]:
    """A piece of the real scene, larger than a stripe, and what its file says of it."""
    with rasterio.open(real_scene) as dataset:
        window = Window(40, 100, 211, 333)
        about = {
            "scales": dataset.scales,
            "offsets": dataset.offsets,
            "crs": dataset.crs,
            "transform": dataset.transform @ Affine.translation(window.col_off, window.row_off),
        }
        return dataset.read(window=window), about


@pytest.fixture(scope="module")
def reference(
    clip: Any, make_model: Make, make_raster: MakeRaster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, bytes]:
    """A model that looks around itself, a scene, and the bytes of its map with the defaults."""
    place = tmp_path_factory.mktemp("reference")
    model = make_model(place / "model.onnx", kernels=(3, 3))
    scene = make_raster(place / "scene.tif", clip[0], **clip[1])
    predict(scene, model.path, place / "map.tif")
    return model, scene, (place / "map.tif").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 1},
        {"batch": 3},
        {"batch": 1000},
        {"readers": 1},
        {"readers": 5},
        {"threads": 1},
        {"threads": 2, "batch": 5, "readers": 3},
    ],
)
def test_batches_readers_and_threads_change_no_byte_of_the_map(
    reference: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    model, scene, expected = reference
    predict(scene, model.path, tmp_path / "another.tif", options=PredictOptions(**options))
    assert (tmp_path / "another.tif").read_bytes() == expected


@pytest.mark.parametrize(
    "layout",
    [
        {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"},
        {"tiled": True, "blockxsize": 256, "blockysize": 256, "interleave": "pixel"},
        {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "lzw", "predictor": 2},
        {"tiled": True, "blockxsize": 16, "blockysize": 16, "interleave": "band"},
        {"tiled": False, "blockysize": 1},
        {"tiled": False, "blockysize": 100, "interleave": "pixel", "compress": "deflate"},
        {"tiled": False, "blockysize": 333},
        {"driver": "ENVI"},
    ],
)
def test_how_the_scene_lies_in_its_file_changes_no_byte_of_the_map(
    reference: Any,
    clip: Any,
    make_raster: MakeRaster,
    tmp_path: Path,
    layout: dict[str, Any],
) -> None:
    model, _, expected = reference
    scene = make_raster(tmp_path / "scene.tif", clip[0], **clip[1], **layout)
    predict(scene, model.path, tmp_path / "map.tif")
    assert (tmp_path / "map.tif").read_bytes() == expected


def test_a_scene_cut_short_has_the_map_of_the_whole_up_to_the_last_tile(
    clip: Any, make_raster: MakeRaster, reference: Any, tmp_path: Path
) -> None:
    model, scene, _ = reference
    predict(scene, model.path, tmp_path / "whole.tif")
    # Five strides of 48 and a tile: the last row of tiles of the cut is one of the whole's.
    cut = make_raster(tmp_path / "cut.tif", clip[0][:, : 5 * 48 + 64], **clip[1])
    predict(cut, model.path, tmp_path / "map.tif")
    rows = 5 * 48 + 48
    np.testing.assert_array_equal(
        read_map(tmp_path / "map.tif")[:rows], read_map(tmp_path / "whole.tif")[:rows]
    )


# Where there is no data.


def masked_scenes(make_raster: MakeRaster, path: Path, valid: NDArray[np.bool_], kind: str) -> Path:
    stored = np.random.default_rng(0).integers(1, 200, (3, *valid.shape))
    if kind == "nodata tag":
        return make_raster(path, np.where(valid, stored, 0).astype(np.uint8), nodata=0)
    if kind == "nodata tag in one band":
        stored[1][~valid] = -9999
        return make_raster(path, stored.astype(np.int16), nodata=-9999)
    if kind == "NaN":
        return make_raster(path, np.where(valid, stored, np.nan).astype(np.float64))
    if kind == "alpha":
        stored = np.concatenate([stored, valid[np.newaxis] * 255]).astype(np.uint8)
        return make_raster(path, stored, names=SIX[:3], photometric="rgb", alpha="yes")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal mask"):
        return make_raster(path, stored.astype(np.uint16), mask=valid)


@pytest.mark.parametrize(
    "kind",
    ["nodata tag", "nodata tag in one band", "NaN", "alpha", "internal mask", "mask beside the file"],
)
def test_the_map_is_nodata_where_the_scene_is_and_nowhere_else(
    make_model: Make, make_spec: Make, make_raster: MakeRaster, tmp_path: Path, kind: str
) -> None:
    model = make_model(tmp_path / "m.onnx", make_spec(SIX[:3], **BYTES), whole_numbers=True)
    valid = np.ones((150, 140), bool)
    valid[:100, :90] = False  # whole tiles
    valid[120:] &= np.random.default_rng(1).random((30, 140)) > 0.5  # and single pixels
    scene = masked_scenes(make_raster, tmp_path / "scene.tif", valid, kind)
    report = predict(scene, model.path, tmp_path / "map.tif")
    with rasterio.open(scene) as dataset:
        stored = dataset.read([1, 2, 3])
        judge = (dataset.read_masks([1, 2, 3]) > 0).all(axis=0) & np.isfinite(stored).all(axis=0)
    np.testing.assert_array_equal(judge, valid)
    classes = read_map(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes != 255, valid)
    expected = to_classes(model.on_the_whole(np.where(valid, stored, 0)), valid, model)
    np.testing.assert_array_equal(classes, expected)
    assert report.valid_pixels == valid.sum()
    assert report.nodata_pixels == (~valid).sum()


def test_tiles_without_data_cost_no_forward_pass_and_are_counted(
    pointwise: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = np.full((6, 400, 400), np.nan, np.float32)
    stored[:, 200:210, 300:310] = 0.3
    report = predict(make_raster(tmp_path / "scene.tif", stored), pointwise.path, tmp_path / "map.tif")
    stands = [*range(0, 336, 48), 336]  # tile 64, overlap 16
    windows = [stored[0, row : row + 64, col : col + 64] for row, col in product(stands, stands)]
    with_data = sum(bool(np.isfinite(window).any()) for window in windows)
    assert (report.tiles_run, report.tiles_skipped) == (with_data, len(windows) - with_data)
    assert report.valid_pixels == 100


def test_an_empty_scene_gives_an_empty_map_and_a_warning(
    pointwise: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "scene.tif", np.full((6, 90, 90), 7, np.uint8), nodata=7)
    report = predict(scene, pointwise.path, tmp_path / "map.tif")
    assert (read_map(tmp_path / "map.tif") == 255).all()
    assert report.tiles_run == report.valid_pixels == 0
    assert report.warnings == ("scene.tif holds no valid pixel: the whole map is nodata.",)
    assert all(item.share == 0 for item in report.classes)
    assert cog_validate(tmp_path / "map.tif")[0]


def test_what_lies_under_nodata_does_not_reach_the_pixels_beside_it(
    make_model: Make, make_raster: MakeRaster, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model.onnx", kernels=(3,))
    valid = np.random.default_rng(1).random((100, 100)) > 0.2
    stored = np.random.default_rng(2).uniform(0, 0.5, (6, 100, 100)).astype(np.float32)
    maps = []
    for under in (-3e38, 5.0):
        hidden = np.where(valid, stored, under).astype(np.float32)
        scene = make_raster(tmp_path / f"{under}.tif", hidden, mask=valid)
        predict(scene, model.path, tmp_path / f"{under}_map.tif")
        maps.append(read_map(tmp_path / f"{under}_map.tif"))
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "float32", "float64"])
def test_zero_is_data_in_any_type_of_number(
    make_model: Make, make_spec: Make, make_raster: MakeRaster, tmp_path: Path, dtype: str
) -> None:
    model = make_model(tmp_path / "m.onnx", make_spec(SIX[:3], **BYTES), whole_numbers=True)
    stored = (as_bytes((3, 80, 70)) // 2).astype(dtype)
    stored[:, :40] = 0
    scene = make_raster(tmp_path / "scene.tif", stored)
    report = predict(scene, model.path, tmp_path / "map.tif")
    assert report.nodata_pixels == 0
    judge = to_classes(model.on_the_whole(stored), np.True_, model)
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif"), judge)


# The map as a file.


def test_the_map_is_a_cog_on_the_scenes_grid_that_says_what_made_it(
    real_scene: Path, pointwise: Any, tmp_path: Path
) -> None:
    options = PredictOptions(overlap=20, blend="flat", scale=0.9, offset=0.01)
    report = predict(real_scene, pointwise.path, tmp_path / "map.tif", options=options)
    assert cog_validate(tmp_path / "map.tif") == (True, [], [])
    with rasterio.open(tmp_path / "map.tif") as made, rasterio.open(real_scene) as scene:
        assert (made.shape, made.crs, made.transform) == (scene.shape, scene.crs, scene.transform)
        assert made.nodata == 255
        assert set(np.unique(made.read(1))) <= {0, 1, 3, 4}
        colors = made.colormap(1)
        tags = made.tags()
    assert [colors[item.value][:3] for item in pointwise.spec.classes] == [
        item.rgb for item in pointwise.spec.classes
    ]
    expected = {
        "MODEL": "tiny",
        "MODEL_SHA256": report.model_sha256,
        "TILE": "64",
        "OVERLAP": "20",
        "BLEND": "flat",
        "SCENE_SIZE": "509 x 531",
        "CORNER": "0, 0",
        "BANDS": "1,2,3,4,5,6",
        "SCALE": "0.9",
        "OFFSET": "0.01",
        "CLASSES": "0 class 0; 1 class 1; 3 class 3; 4 class 4",
    }
    assert {key: tags[f"GEODEPLOY_{key}"] for key in expected} == expected
    assert not any(str(tmp_path) in value for value in tags.values())


@pytest.mark.parametrize(
    "transform",
    [
        Affine(30, 0, 4e5, 0, 30, 3e6),  # south up
        Affine(24, 18, 4e5, 18, -24, 3e6),  # rotated
        Affine(-30, 0, 4e5, 0, -30, 3e6),  # mirrored
        Affine(10, 0, 4e5, 0, -20, 3e6),  # oblong pixels
    ],
)
def test_any_grid_is_kept(
    pointwise: Any, make_raster: MakeRaster, tmp_path: Path, transform: Affine
) -> None:
    stored = np.random.default_rng(0).uniform(0, 0.5, (6, 70, 90)).astype(np.float32)
    scene = make_raster(tmp_path / "scene.tif", stored, transform=transform)
    report = predict(scene, pointwise.path, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.transform == transform
        assert dataset.crs == CRS.from_epsg(32616)
    whole = sum(item.area_m2 or 0 for item in report.classes)
    assert whole == pytest.approx(70 * 90 * abs(transform.determinant))


def test_a_scene_without_crs_is_mapped_with_a_warning(
    pointwise: Any, make_raster: MakeRaster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = np.full((6, 30, 30), 0.3, np.float32)
    scene = make_raster(tmp_path / "bare.tif", stored, crs=None, transform=Affine.identity())
    report = predict(scene, pointwise.path, tmp_path / "map.tif")
    (warning,) = report.warnings
    assert warning.startswith("bare.tif has no CRS")
    assert warning in caplog.messages
    assert all(item.area_m2 is None for item in report.classes)
    assert (tmp_path / "map.tif").exists()


def test_a_scene_of_another_resolution_is_mapped_with_a_warning(
    make_model: Make, make_spec: Make, small_scene: Path, tmp_path: Path
) -> None:
    for gsd_m, warned in ((30.0, False), (16.0, False), (14.0, True), (61.0, True), (None, False)):
        model = make_model(tmp_path / "model.onnx", make_spec(gsd_m=gsd_m))
        options = PredictOptions(overwrite=True)
        report = predict(small_scene, model.path, tmp_path / "map.tif", options=options)
        assert bool(report.warnings) is warned
    assert (
        "has pixels of 30 m"
        in predict(
            small_scene, make_model(tmp_path / "m.onnx", make_spec(gsd_m=10.0)).path, tmp_path / "x.tif"
        ).warnings[0]
    )


# The report.


def test_the_numbers_of_a_report_agree_with_the_map_and_with_each_other(
    clip: Any, pointwise: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored, about = clip
    stored = stored.copy()
    stored[:, 50:90] = 0
    scene = make_raster(tmp_path / "scene.tif", stored, nodata=0, **about)
    seen: list[tuple[int, int]] = []
    report = predict(
        scene,
        pointwise.path,
        tmp_path / "map.tif",
        progress=lambda done, whole: seen.append((done, whole)),
    )
    classes = read_map(tmp_path / "map.tif")
    assert (report.height, report.width) == classes.shape
    for item in report.classes:
        assert item.pixels == (classes == item.value).sum()
        assert item.area_m2 == pytest.approx(item.pixels * 900)
        assert item.share == pytest.approx(item.pixels / report.valid_pixels)
    assert report.valid_pixels == sum(item.pixels for item in report.classes)
    assert report.valid_pixels + report.nodata_pixels == classes.size
    assert report.tiles_run + report.tiles_skipped == 7 * 5  # 333 x 211 at 64 less 16
    assert report.pixels_per_s == pytest.approx(classes.size / report.seconds)
    assert 0 < report.peak_memory_bytes < 2**33
    assert all(0 <= share <= 1 for share in report.busy.model_dump().values())
    assert report.batch <= 8
    assert report.device == "cpu"
    assert seen == sorted(seen)
    assert seen[-1] == (333, 333)
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert str(tmp_path / "map.tif") in str(report)


# Several scenes, names, and what must not be touched.


def test_several_scenes_go_into_a_folder_and_each_is_as_if_it_were_alone(
    clip: Any, pointwise: Any, make_raster: MakeRaster, small_scene: Path, tmp_path: Path
) -> None:
    other = make_raster(tmp_path / "other.tif", clip[0], **clip[1])
    (tmp_path / "maps").mkdir()
    reports = predict_scenes([small_scene, other], pointwise.path, tmp_path / "maps")
    names = ["small_map.tif", "other_map.tif"]
    assert [report.map for report in reports] == [tmp_path / "maps" / name for name in names]
    for scene, name in zip((small_scene, other), names, strict=True):
        predict(scene, pointwise.path, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "maps" / name).read_bytes()


def test_without_a_name_the_map_lies_in_the_current_folder(
    pointwise: Any, small_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert predict(str(small_scene), str(pointwise.path)).map == Path("small_map.tif")
    assert Path("small_map.tif").exists()
    assert predict(small_scene, pointwise.path, tmp_path).map == tmp_path / "small_map.tif"


def test_what_cannot_be_named_or_written_is_refused_before_any_work(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    twin = tmp_path / "a" / "small.tif"
    twin.write_bytes(small_scene.read_bytes())
    maps = tmp_path / "maps"
    with pytest.raises(OutputError, match=r"2 scenes need a folder that exists.*none was given"):
        predict_scenes([small_scene, twin], pointwise.path)
    with pytest.raises(OutputError, match="maps is not a folder"):
        predict_scenes([small_scene, twin], pointwise.path, maps)
    maps.mkdir()
    with pytest.raises(OutputError, match=r"Two scenes would both be mapped to .*small_map\.tif"):
        predict_scenes([small_scene, twin], pointwise.path, maps)
    with pytest.raises(OutputError, match="is the input itself"):
        predict(small_scene, pointwise.path, small_scene, options=PredictOptions(overwrite=True))
    with pytest.raises(OutputError, match="is the input itself"):
        predict(small_scene, pointwise.path, pointwise.path, options=PredictOptions(overwrite=True))
    assert list(maps.iterdir()) == []


def test_of_several_scenes_none_is_mapped_when_one_cannot_be(
    pointwise: Any, make_raster: MakeRaster, small_scene: Path, tmp_path: Path
) -> None:
    few = make_raster(tmp_path / "few.tif", np.full((2, 9, 9), 0.1, np.float32))
    bright = make_raster(tmp_path / "bright.tif", np.full((6, 9, 9), 3000, np.uint16))
    (tmp_path / "maps").mkdir()
    for bad in (tmp_path / "gone.tif", few, bright):
        with pytest.raises(GeodeployError, match=bad.name):
            predict_scenes([small_scene, bad], pointwise.path, tmp_path / "maps")
    assert list((tmp_path / "maps").iterdir()) == []


def test_a_map_that_exists_is_kept_unless_it_is_to_be_replaced(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.tif").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"):
        predict(small_scene, pointwise.path, tmp_path / "map.tif")
    assert (tmp_path / "map.tif").read_text() == "old"
    options = PredictOptions(overwrite=True)
    predict(small_scene, pointwise.path, tmp_path / "map.tif", options=options)
    assert read_map(tmp_path / "map.tif").shape == (100, 130)


def test_an_overlap_that_does_not_fit_the_models_tile_is_refused(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    with pytest.raises(GridError, match=r"overlap=64 px .* from 0 to 63"):
        predict(small_scene, pointwise.path, tmp_path / "m.tif", options=PredictOptions(overlap=64))
    assert not (tmp_path / "m.tif").exists()


# When it goes wrong in the middle.


def test_a_model_that_returns_nan_is_told_of_with_the_tile_and_leaves_nothing(
    make_model: Make, small_scene: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m.onnx", weights=[np.full((4, 6, 1, 1), np.nan, np.float32)])
    (tmp_path / "maps").mkdir()
    with pytest.raises(ModelError, match="NaN or infinity for the tile at row 0, column 0"):
        predict(small_scene, model.path, tmp_path / "maps" / "map.tif")
    assert list((tmp_path / "maps").iterdir()) == []


def test_a_scene_that_breaks_off_in_the_middle_leaves_nothing(
    pointwise: Any, clip: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    whole = make_raster(tmp_path / "whole.tif", np.tile(clip[0], (1, 3, 1)), **clip[1])
    scene = tmp_path / "scene.tif"
    rasterio.shutil.copy(whole, scene, driver="COG", blocksize=128)  # its directory comes first
    scene.write_bytes(scene.read_bytes()[: -scene.stat().st_size // 8])
    (tmp_path / "maps").mkdir()
    with pytest.raises(SourceError, match=r"scene\.tif: rows .* cannot be read .*truncated"):
        predict(scene, pointwise.path, tmp_path / "maps" / "map.tif")
    assert list((tmp_path / "maps").iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_no_half_map(
    make_model: Make, make_raster: MakeRaster, tmp_path: Path, number: int, status: int
) -> None:
    model = make_model(tmp_path / "slow.onnx", kernels=(15, 15))
    scene = make_raster(tmp_path / "scene.tif", np.full((6, 3000, 1500), 0.3, np.float32))
    maps = tmp_path / "maps"
    maps.mkdir()
    command = [sys.executable, "-m", "geodeploy", "predict", scene, "-m", model.path]
    with subprocess.Popen(
        [*map(str, command), "-o", str(maps / "map.tif")], stdout=-1, stderr=-1, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while not list(maps.iterdir()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert list(maps.iterdir()) == []
    assert out == ""
    assert "nothing was left half-written" in err
    assert "Traceback" not in err


# What it costs.


def run_python(script: str, *arguments: object) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_height_of_the_scene(
    make_model: Make, make_spec: Make, tmp_path: Path
) -> None:
    script = "import sys, geodeploy; print(geodeploy.predict(*sys.argv[1:]).peak_memory_bytes)"
    model = make_model(tmp_path / "model.onnx", make_spec(("red", "nir"), tile=224, overlap=32))
    rows = np.random.default_rng(0).integers(5000, 20000, (2, 1000, 2048), dtype=np.uint16)
    peaks = []
    for height in (9000, 18000):  # scene and map of both are more than GDAL may keep
        scene = tmp_path / f"{height}.tif"
        with rasterio.open(
            scene,
            "w",
            driver="GTiff",
            height=height,
            width=2048,
            count=2,
            dtype="uint16",
            crs=CRS.from_epsg(32616),
            transform=Affine(30, 0, 4e5, 0, -30, 3e6),
        ) as dataset:
            for row in range(0, height, 1000):
                dataset.write(rows, window=Window(0, row, 2048, 1000))
            dataset.scales, dataset.offsets = [2e-5] * 2, [-0.1] * 2
        # The lesser of two: how the threads happen to meet moves a run's peak by several per cent.
        runs = []
        for _ in range(2):
            runs.append(run_python(script, scene, model.path, tmp_path / "map.tif"))
            (tmp_path / "map.tif").unlink()
        peaks.append(min(runs))
        scene.unlink()
    assert peaks[1] < 1.1 * peaks[0], f"{peaks} bytes"


def test_gdal_keeps_16_mib_of_blocks_while_a_scene_is_mapped(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    seen = []
    predict(
        small_scene,
        pointwise.path,
        tmp_path / "map.tif",
        progress=lambda *_: seen.append(get_gdal_config("GDAL_CACHEMAX")),
    )
    assert set(seen) == {16 * 2**20}  # GDAL's answer, in bytes


def test_it_runs_without_torch_and_without_what_only_training_needs(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    script = """
import json, sys
absent = {"torch", "peft", "timm", "pandas", "scipy", "transformers", "onnx", "accelerate"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import geodeploy
report = geodeploy.predict(*sys.argv[1:])
print(json.dumps([report.valid_pixels, sorted(absent & set(sys.modules))]))
"""
    valid_pixels, found = run_python(script, small_scene, pointwise.path, tmp_path / "map.tif")
    assert valid_pixels == 100 * 130
    assert found == []


def test_a_model_may_call_itself_and_its_classes_anything(
    make_model: Make, make_spec: Make, small_scene: Path, tmp_path: Path
) -> None:
    described = json.loads(make_spec().to_json())
    described["name"] = "odd \x00 name"
    described["classes"][0]["name"] = 'a<b> & "c" \x1f'
    model = make_model(tmp_path / "model.onnx", metadata=json.dumps(described)).path
    predict(small_scene, model, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as made:
        assert made.tags()["GEODEPLOY_MODEL"] == "odd ? name"
    assert cog_validate(tmp_path / "map.tif")[0]
    names = ElementTree.parse(tmp_path / "map.tif.aux.xml").findall(".//Category")
    assert names[0].text == 'a<b> & "c" ?'
