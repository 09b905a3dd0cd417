"""Scores against judges of their own: counts by hand over the map that predict wrote."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.warp import reproject

from geodeploy.errors import LabelError, OutputError, SourceError
from geodeploy.evaluate import evaluate
from geodeploy.predict import predict

UTM16 = rasterio.CRS.from_epsg(32616)


def write_labels(
    path: Path, values: np.ndarray, *, transform: Affine, crs: object = UTM16, nodata: int | None = None
) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1,
        dtype=values.dtype, crs=crs, transform=transform, nodata=nodata,
    ) as dataset:  # fmt: skip
        dataset.write(values, 1)
    return path


@pytest.fixture
def scored(tmp_path: Path, pointwise: object, real_scene: Path) -> tuple[np.ndarray, Affine]:
    """The map of the real scene, and its transform."""
    predict(real_scene, pointwise.path, tmp_path / "judge.tif")
    with rasterio.open(tmp_path / "judge.tif") as mapped:
        return mapped.read(1), mapped.transform


def test_scores_are_those_counted_by_hand_over_the_map(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    random = np.random.default_rng(0)
    truth = np.where(random.random(values.shape) < 0.3, random.choice([0, 1, 3], values.shape), values)
    truth = truth.astype(np.uint8)
    truth[:40] = 255
    scores = evaluate(
        pointwise.path, real_scene, write_labels(tmp_path / "labels.tif", truth, transform=transform)
    )
    seen = truth != 255
    assert scores.ignored == int((~seen).sum())
    assert scores.accuracy == pytest.approx((truth == values)[seen].mean(), abs=1e-12)
    ious = []
    for score in scores.classes:
        both = ((truth == score.value) & (values == score.value) & seen).sum()
        either = (((truth == score.value) | (values == score.value)) & seen).sum()
        if either:
            ious.append(both / either)
            assert score.iou == pytest.approx(ious[-1], abs=1e-12)
        else:
            assert score.iou is None
        assert score.pixels == ((truth == score.value) & seen).sum()
    assert scores.miou == pytest.approx(np.mean(ious), abs=1e-12)
    assert np.sum(scores.confusion) == seen.sum()


def test_labels_on_another_grid_are_taken_at_the_nearest_pixel(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    coarse_transform = transform @ Affine.translation(100, 90) @ Affine.scale(3.0)
    coarse = np.random.default_rng(1).choice([0, 1, 3, 4], (70, 80)).astype(np.uint8)
    found = evaluate(
        pointwise.path,
        real_scene,
        write_labels(tmp_path / "coarse.tif", coarse, transform=coarse_transform),
    )
    judge = np.full(values.shape, 255, np.uint8)
    reproject(
        coarse, judge, src_transform=coarse_transform, src_crs=UTM16, dst_transform=transform,
        dst_crs=UTM16, dst_nodata=255, resampling=Resampling.nearest,
    )  # fmt: skip
    seen = judge != 255
    assert seen.sum() == 70 * 80 * 9
    assert found.ignored == (~seen).sum()
    assert found.accuracy == pytest.approx((judge == values)[seen].mean(), abs=1e-12)


def test_labels_in_another_crs_are_brought_to_the_scene(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    west, north = transform.c, transform.f
    bounds = rasterio.warp.transform_bounds(UTM16, "EPSG:4326", west, north - 9000, west + 9000, north)
    step = 0.0003
    size = int((bounds[3] - bounds[1]) / step), int((bounds[2] - bounds[0]) / step)
    degrees = np.full(size, 3, np.uint8)
    path = write_labels(
        tmp_path / "degrees.tif",
        degrees,
        transform=Affine(step, 0, bounds[0], 0, -step, bounds[3]),
        crs=rasterio.CRS.from_epsg(4326),
    )
    found = evaluate(pointwise.path, real_scene, path)
    assert 85_000 < values.size - found.ignored < 95_000  # 9 km x 9 km of 30 m pixels, tilted a little


def test_the_nodata_tag_is_ignored_unless_it_is_a_class(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    truth = np.full(values.shape, 3, np.uint8)
    truth[:100] = 77
    plain = write_labels(tmp_path / "plain.tif", truth, transform=transform, nodata=77)
    assert evaluate(pointwise.path, real_scene, plain).ignored == 100 * values.shape[1]
    listed = write_labels(tmp_path / "listed.tif", truth % 74, transform=transform, nodata=3)
    assert evaluate(pointwise.path, real_scene, listed).ignored == 0


@pytest.mark.parametrize("shift", [0, 0.5])
def test_what_a_mask_hides_is_not_scored(
    tmp_path: Path,
    pointwise: object,
    real_scene: Path,
    scored: tuple[np.ndarray, Affine],
    shift: float,
) -> None:
    values, transform = scored
    truth = np.full(values.shape, 3, np.uint8)
    truth[:100] = 77  # which is no class: nobody is to look under the mask
    grid = transform @ Affine.translation(shift, 0)
    path = write_labels(tmp_path / "masked.tif", truth, transform=grid)
    with rasterio.open(path, "r+") as labels:
        labels.write_mask(truth != 77)
    assert evaluate(pointwise.path, real_scene, path).ignored == 100 * values.shape[1]


def test_an_unknown_label_value_is_named(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    truth = np.full(values.shape, 9, np.uint8)
    path = write_labels(tmp_path / "odd.tif", truth, transform=transform)
    with pytest.raises(
        LabelError, match=r"odd\.tif holds the value 9, which is none of the classes.*ignore"
    ):
        evaluate(pointwise.path, real_scene, path)


def test_labels_of_another_place_are_refused(
    tmp_path: Path, pointwise: object, real_scene: Path
) -> None:
    elsewhere = write_labels(
        tmp_path / "far.tif", np.zeros((50, 50), np.uint8), transform=Affine(30, 0, 0, 0, -30, 0)
    )
    with pytest.raises(LabelError, match="nothing can be scored"):
        evaluate(pointwise.path, real_scene, elsewhere)
    no_crs = write_labels(
        tmp_path / "nowhere.tif",
        np.zeros((50, 50), np.uint8),
        transform=Affine(30, 0, 0, 0, -30, 0),
        crs=None,
    )
    with pytest.raises(LabelError, match="no CRS to bring them together"):
        evaluate(pointwise.path, real_scene, no_crs)


def test_json_keys_and_a_picture_of_the_matrix(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    path = write_labels(tmp_path / "labels.tif", values, transform=transform)
    picture = tmp_path / "matrix.png"
    scores = json.loads(evaluate(pointwise.path, real_scene, path, picture=picture).model_dump_json())
    assert set(scores) == {"miou", "accuracy", "classes", "confusion", "ignored"}
    assert set(scores["classes"][0]) == {
        "name", "value", "iou", "f1", "precision", "recall", "pixels",
    }  # fmt: skip
    assert scores["accuracy"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_labels_of_many_bands_or_fractions_are_refused(
    tmp_path: Path, pointwise: object, real_scene: Path, make_raster: Callable[..., Path]
) -> None:
    path = make_raster(tmp_path / "float.tif", np.zeros((1, 20, 20), np.float32), names=[None])
    with pytest.raises(LabelError, match="whole numbers"):
        evaluate(pointwise.path, real_scene, path)


def test_a_class_that_the_file_calls_nodata_ends_where_the_labels_end(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    corner = np.full((50, 40), 3, np.uint8)
    path = write_labels(tmp_path / "corner.tif", corner, transform=transform, nodata=3)
    assert evaluate(pointwise.path, real_scene, path).ignored == values.size - 50 * 40


def test_labels_that_break_off_are_told(
    tmp_path: Path, pointwise: object, real_scene: Path, scored: tuple[np.ndarray, Affine]
) -> None:
    values, transform = scored
    noise = np.random.default_rng(0).choice([0, 1, 3], values.shape).astype(np.uint8)
    path = write_labels(tmp_path / "whole.tif", noise, transform=transform)
    rasterio.shutil.copy(path, tmp_path / "cut.tif", driver="COG", blocksize=128)
    with (tmp_path / "cut.tif").open("r+b") as file:
        file.truncate(file.seek(0, 2) * 2 // 3)
    with pytest.raises(SourceError, match=r"cut\.tif: rows .* cannot be read .*truncated"):
        evaluate(pointwise.path, real_scene, tmp_path / "cut.tif")


def test_a_picture_in_the_place_of_an_input_is_refused(
    tmp_path: Path, pointwise: object, real_scene: Path
) -> None:
    with pytest.raises(OutputError, match=r"is the input itself.*--picture"):
        evaluate(pointwise.path, real_scene, real_scene, picture=real_scene)
