"""What lies outside what the model saw in training is counted and said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geodeploy import PredictOptions, predict
from geodeploy.batches import cut_tiles
from geodeploy.parts import Part, missing_regions, plan_parts
from geodeploy.raster import Raster, open_raster
from geodeploy.report import Report, UnseenShare
from geodeploy.spec import ModelSpec
from geodeploy.tiles import TileGrid
from geodeploy.unseen import UnseenCount, sum_unseen

Make = Callable[..., Any]
MakeRaster = Callable[..., Path]

TWO = ("red", "nir")
SEEN = (0.1, 0.5)


@pytest.fixture(scope="module")
def model(make_model: Make, make_spec: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes red and nir, and saw 0.1 to 0.5 of both."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return make_model(path, make_spec(TWO, seen=SEEN, tile=128, overlap=16)).path


def inside(height: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(*SEEN, (2, height, width)).astype(np.float32)


def shares(report: Report) -> dict[str, tuple[float, float]]:
    assert report.unseen is not None
    return {item.band: (item.below, item.above) for item in report.unseen}


def counted(
    raster: Raster, spec: ModelSpec, grid: TileGrid, *, columns: int, done: set[int]
) -> dict[int, list[int] | None]:
    """What is counted of each part, those that are ``done`` in a run before the others."""
    parts, sums = plan_parts(grid, columns=columns), {}
    before: list[list[Part]] = [[part] for part in parts if part.number in done]
    single = [(grid.part(part.rows, part.cols), [part]) for (part,) in before]
    for region, missing in [*single, *missing_regions(grid, parts, done)]:
        count = UnseenCount(raster, spec.bands, region)
        for cut in cut_tiles(map(raster.read, raster.stripes(region.source)), region):
            assert count.add(cut) is cut
        for part in missing:
            sums[part.number] = count.take(part.window)
    assert sums.keys() == {part.number for part in parts}
    return sums


def total(spec: ModelSpec, sums: dict[int, list[int] | None]) -> tuple[UnseenShare, ...]:
    found = sum_unseen(spec.bands, list(sums.values()))
    assert found is not None
    return found


def test_a_scene_like_the_training_is_mapped_in_silence(
    model: Path, make_raster: MakeRaster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = predict(
        make_raster(tmp_path / "s.tif", inside(100, 130), names=TWO), model, tmp_path / "m.tif"
    )
    assert shares(report) == {"red": (0, 0), "nir": (0, 0)}
    assert report.warnings == ()
    assert caplog.messages == []
    assert "hardly seen" not in str(report)
    with rasterio.open(tmp_path / "m.tif") as made:
        assert made.tags()["GEODEPLOY_UNSEEN"] == "red 0.0%, nir 0.0%"


@pytest.mark.parametrize(("value", "side"), [(0.7, "above"), (0.02, "below")])
@pytest.mark.parametrize("size", [(100, 130), (1100, 1000)])  # counted whole, and sampled
def test_a_tenth_outside_in_one_band_is_said_with_band_share_side_and_range(
    model: Path,
    make_raster: MakeRaster,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    value: float,
    side: str,
    size: tuple[int, int],
) -> None:
    pixels = inside(*size)
    pixels[1][np.random.default_rng(2).random(size) < 0.1] = value
    report = predict(make_raster(tmp_path / "s.tif", pixels, names=TWO), model, tmp_path / "m.tif")
    place = ("below", "above").index(side)
    # The judge counts every pixel; a sample of 22 000 is within four standard errors of it.
    judge = float((pixels[1] == np.float32(value)).mean())
    found = shares(report)
    assert found["red"] == (0, 0)
    assert found["nir"][1 - place] == 0
    assert found["nir"][place] == pytest.approx(judge, abs=1e-9 if size == (100, 130) else 0.008)
    (warning,) = report.warnings
    assert caplog.messages == [warning]
    assert "\n" not in warning
    needed = f"nir {found['nir'][place]:.1%} {side} (seen 0.1 to 0.5)"
    assert warning.startswith("s.tif holds values that the model hardly ever saw in training")
    assert needed in warning
    assert "red" not in warning
    assert "look at the map with care" in warning.lower()
    assert f"hardly seen in training: {needed}" in str(report)
    assert Report.model_validate_json(report.model_dump_json()) == report
    with rasterio.open(tmp_path / "m.tif") as made:
        assert made.tags()["GEODEPLOY_UNSEEN"] == f"red 0.0%, nir {found['nir'][place]:.1%}"


def test_both_sides_and_several_bands_come_in_one_line(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    pixels = inside(100, 100)
    pixels[0, :5], pixels[0, 50:60], pixels[1, :50] = 0.0, 1.0, 1.2
    report = predict(make_raster(tmp_path / "s.tif", pixels, names=TWO), model, tmp_path / "m.tif")
    (warning,) = report.warnings
    assert "red 5.0% below and 10.0% above (seen 0.1 to 0.5), nir 50.0% above (seen" in warning


def test_a_hundredth_outside_is_counted_and_no_cause_for_alarm(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    pixels = inside(100, 100)
    pixels[0, 40] = 0.9
    report = predict(make_raster(tmp_path / "s.tif", pixels, names=TWO), model, tmp_path / "m.tif")
    assert shares(report)["red"] == (0, 0.01)
    assert report.warnings == ()
    assert "hardly seen" not in str(report)


@pytest.mark.parametrize("kind", ["NaN", "nodata tag", "mask"])
def test_pixels_without_data_do_not_count(
    model: Path, make_raster: MakeRaster, tmp_path: Path, kind: str
) -> None:
    pixels = inside(100, 100)
    pixels[0, 90:, :50] = 0.9  # a tenth of the half that is valid
    valid = np.zeros((100, 100), bool)
    valid[:, :50] = True
    under = {"NaN": np.nan, "nodata tag": -9999, "mask": 3e38}[kind]
    about = {"nodata tag": {"nodata": -9999}, "mask": {"mask": valid}}.get(kind, {})
    stored = np.where(valid, pixels, np.float32(under))
    report = predict(
        make_raster(tmp_path / "s.tif", stored, names=TWO, **about), model, tmp_path / "m.tif"
    )
    assert shares(report) == {"red": (0, pytest.approx(0.1)), "nir": (0, 0)}


def test_what_lies_under_nodata_may_be_more_than_float32_holds(
    make_spec: Make, make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = inside(20, 20).astype(np.float64)
    stored[:, :10] = -1.7e308
    scene = make_raster(tmp_path / "s.tif", stored, names=TWO, nodata=-1.7e308)
    spec = make_spec(TWO, seen=SEEN)
    with open_raster(scene, band_names=TWO) as raster:
        sums = counted(raster, spec, TileGrid(20, 20, 16, 4), columns=20, done=set())
    assert all(item.share == 0 for item in total(spec, sums))
    assert np.sum(list(sums.values()), axis=0).tolist() == [20 * 10, 0, 0, 0, 0]


def test_a_scene_without_a_valid_pixel_has_nothing_outside(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "s.tif", np.full((2, 40, 40), np.nan, np.float32), names=TWO)
    report = predict(scene, model, tmp_path / "m.tif")
    assert shares(report) == {"red": (0, 0), "nir": (0, 0)}
    assert len(report.warnings) == 1


def test_a_model_that_does_not_know_what_it_saw_says_nothing(
    pointwise: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "s.tif", np.full((6, 50, 50), 1.5, np.float32))
    report = predict(scene, pointwise.path, tmp_path / "m.tif")
    assert report.unseen is None
    assert report.warnings == ()
    assert "hardly seen" not in str(report)
    with rasterio.open(tmp_path / "m.tif") as made:
        assert made.tags()["GEODEPLOY_UNSEEN"] == "unknown"


def test_a_band_whose_range_is_not_known_is_left_out(
    make_model: Make, make_spec: Make, make_raster: MakeRaster, tmp_path: Path
) -> None:
    spec = make_spec(TWO, seen=SEEN)
    red, nir = spec.bands
    spec = spec.model_copy(update={"bands": (red.model_copy(update={"seen": None}), nir)})
    model = make_model(tmp_path / "model.onnx", spec)
    pixels = inside(50, 50) + np.float32(1)
    report = predict(make_raster(tmp_path / "s.tif", pixels, names=TWO), model.path, tmp_path / "m.tif")
    assert shares(report) == {"nir": (0, 1)}


def test_the_units_are_the_models_and_the_last_bits_of_a_saturated_sensor_do_not_matter(
    make_model: Make, make_spec: Make, make_raster: MakeRaster, tmp_path: Path
) -> None:
    top = float(np.nextafter(np.float32(3929 * 1e-4), np.float32(0)))
    model = make_model(tmp_path / "model.onnx", make_spec(TWO, seen=(0.05, top)))
    stored = np.full((2, 60, 60), 3929, np.uint16)  # all of it saturated
    stored[1, :30] = 3940
    report = predict(
        make_raster(tmp_path / "s.tif", stored, names=TWO, scales=[1e-4] * 2),
        model.path,
        tmp_path / "m.tif",
    )
    assert shares(report) == {"red": (0, 0), "nir": (0, 0.5)}


# What must change nothing: a raster large enough to be sampled.

HEIGHT, WIDTH = 1201, 901


@pytest.fixture(scope="module")
def large(
    make_raster: MakeRaster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, NDArray[np.float32]]:
    pixels = inside(HEIGHT, WIDTH)
    pixels[1, 200:460, 100:700] = 0.8
    pixels[:, 700:, :150] = np.nan
    return make_raster(tmp_path_factory.mktemp("large") / "s.tif", pixels, names=TWO), pixels


def judged(pixels: NDArray[np.float32]) -> float:
    """The share of nir above, on every seventh row and column of the whole array."""
    sample = pixels[:, ::7, ::7]
    return float((sample[1] > 0.6).sum() / np.isfinite(sample[1]).sum())


@pytest.mark.parametrize(
    "options", [{}, {"overlap": 0}, {"overlap": 100, "blend": "crop"}, {"batch": 3, "readers": 1}]
)
def test_tiles_batches_and_readers_change_nothing(
    model: Path,
    large: tuple[Path, NDArray[np.float32]],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    scene, pixels = large
    report = predict(scene, model, tmp_path / "m.tif", options=PredictOptions(**options))
    assert shares(report) == {"red": (0, 0), "nir": (0, judged(pixels))}
    assert judged(pixels) == pytest.approx(
        np.nanmean(np.where(pixels[1] > 0.6, 1, pixels[1] * 0)), abs=0.005
    )


@settings(max_examples=10)
@given(data=st.data(), tile=st.sampled_from([100, 223, 512, 1000]))
def test_how_the_scene_is_cut_and_what_was_done_before_change_nothing(
    make_spec: Make, large: tuple[Path, NDArray[np.float32]], data: st.DataObject, tile: int
) -> None:
    scene, pixels = large
    grid = TileGrid(HEIGHT, WIDTH, tile, data.draw(st.integers(0, tile * 3 // 4), "overlap"))
    columns = data.draw(st.integers(1, 2 * WIDTH), "columns")
    count = len(plan_parts(grid, columns=columns))
    done = data.draw(st.sets(st.integers(0, count - 1), max_size=4), "done")
    spec = make_spec(TWO, seen=SEEN)
    with open_raster(scene, band_names=TWO) as raster:
        red, nir = total(spec, counted(raster, spec, grid, columns=columns, done=done))
    assert (red.below, red.above, nir.below, nir.above) == (0, 0, 0, judged(pixels))
