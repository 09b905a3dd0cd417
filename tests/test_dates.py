"""Models that take several dates of a place: `--earlier`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rasterio.windows import Window

from geodeploy import PredictOptions, predict, predict_scenes
from geodeploy.derived import DerivedOptions
from geodeploy.errors import ModelError, OutputError, SourceError
from geodeploy.raster import open_raster
from geodeploy.spec import METADATA_KEY, ModelSpec

Make = Callable[..., Any]
BANDS, DATES, TILE, CLASSES = ("red", "nir"), 3, 32, 4
GRID = Affine(10, 0, 600000, 0, -10, 5800000)
WEIGHTS = np.random.default_rng(3).normal(size=(CLASSES, len(BANDS), DATES)).astype(np.float32)


@pytest.fixture(params=["NCTHW", "NCHW"])
def model(request: pytest.FixtureRequest, make_spec: Make, tmp_path: Path) -> Path:
    """A graph that weighs each band of each date, pixel by pixel."""
    return make_dated(tmp_path / "dates.onnx", make_spec, layout=request.param)


def make_dated(path: Path, make_spec: Make, *, layout: str) -> Path:
    spec: ModelSpec = make_spec(
        BANDS, range(CLASSES), tile=TILE, overlap=8, seen=(0.05, 0.5), timesteps=DATES, layout=layout
    )
    planes = len(BANDS) * DATES
    if layout == "NCTHW":
        taken, weights = ["batch", len(BANDS), DATES, TILE, TILE], WEIGHTS[..., None, None]
    else:
        stacked = WEIGHTS.swapaxes(1, 2).reshape(CLASSES, planes)
        taken, weights = ["batch", planes, TILE, TILE], stacked[..., None, None]
    nodes = [helper.make_node("Conv", ["pixels", "weights"], ["found"])]
    if layout == "NCTHW":
        nodes.append(helper.make_node("Squeeze", ["found", "axis"], ["logits"]))
    else:
        nodes.append(helper.make_node("Identity", ["found"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "dates",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, taken)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES, TILE, TILE])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([2]), "axis")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(made, {METADATA_KEY: spec.to_json()})
    onnx.save(made, path)
    return path


@pytest.fixture
def dates(tmp_path: Path, make_raster: Make) -> list[Path]:
    """The same place three times, of which the second is larger and the third lacks a corner."""
    random = np.random.default_rng(1)
    found = []
    for number, (pad, shape) in enumerate(((0, (70, 90)), (5, (80, 100)), (0, (70, 90)))):
        pixels = random.integers(600, 4500, (2, *shape)).astype(np.uint16)
        if number == 2:
            pixels[:, :10, :20] = 0
        place = GRID @ Affine.translation(-pad, -pad)
        found.append(
            make_raster(
                tmp_path / f"date{number}.tif", pixels, names=BANDS, transform=place, nodata=0,
                scales=[1e-4] * 2,
            )
        )  # fmt: skip
    return found


def expected(dates: list[Path]) -> NDArray[np.uint8]:
    """The whole arrays, in float64."""
    stack = []
    for path in dates:
        with rasterio.open(path) as dataset:
            col, row = (round(value) for value in ~dataset.transform @ (GRID.c, GRID.f))
            stack.append(dataset.read()[:, row : row + 70, col : col + 90])
    pixels = np.stack(stack, axis=1).astype(np.float64)
    logits = np.tensordot(WEIGHTS.astype(np.float64), pixels, axes=[[1, 2], [0, 1]])
    valid = (pixels > 0).all(axis=(0, 1))
    return np.where(valid, logits.argmax(axis=0), 255).astype(np.uint8)


def test_the_map_is_of_all_dates_on_the_grid_of_the_last(
    model: Path, dates: list[Path], tmp_path: Path
) -> None:
    *earlier, last = dates
    for runtime in ("onnxruntime", "openvino"):
        options = PredictOptions(earlier=tuple(earlier), runtime=runtime, overwrite=True)
        report = predict(last, model, tmp_path / "map.tif", options=options)
        with rasterio.open(tmp_path / "map.tif") as mapped:
            np.testing.assert_array_equal(mapped.read(1), expected(dates))
            assert mapped.transform == GRID
        assert report.unseen is not None
        names = [f"{band} of date {date}" for date in (1, 2, 3) for band in BANDS]
        assert [share.band for share in report.unseen] == names


@pytest.mark.parametrize("gsd_m", [5, 20])
def test_the_grid_is_that_of_the_last_date_whatever_the_pixels_of_the_others(
    make_raster: Make, tmp_path: Path, gsd_m: int
) -> None:
    earlier, last = tmp_path / "earlier.tif", tmp_path / "last.tif"
    side = 1400 // gsd_m
    ramp = np.add.outer(np.arange(side), np.arange(side)).astype(np.uint16) * gsd_m  # in metres
    place = GRID @ Affine.translation(-20, -20) @ Affine.scale(gsd_m / 10)
    make_raster(earlier, ramp[np.newaxis], names=["red"], transform=place)
    make_raster(last, np.ones((1, 70, 90), np.uint16), names=["red"], transform=GRID)
    with open_raster(last, earlier=[earlier], band_names=["red"]) as raster:
        assert (raster.transform, raster.height, raster.width) == (GRID, 70, 90)
        pixels, valid = raster.read_pixels(Window(0, 0, 90, 70))
    assert valid.all()
    centres = np.add.outer(np.arange(70), np.arange(90)) * 10 + 2 * (200 + 10 / 2 - gsd_m / 2)
    np.testing.assert_allclose(pixels[0], centres, atol=1)  # a linear ramp stays one


def test_dates_are_named_one_by_one_on_the_command_line(
    model: Path, dates: list[Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "geodeploy", "predict", dates[2], "-m", model]
    command += ["-o", tmp_path / "map.tif", "--earlier", dates[0], "--earlier", dates[1]]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with rasterio.open(tmp_path / "map.tif") as mapped:
        np.testing.assert_array_equal(mapped.read(1), expected(dates))


def test_the_order_of_the_dates_counts(model: Path, dates: list[Path], tmp_path: Path) -> None:
    first, second, last = dates
    predict(last, model, tmp_path / "map.tif", options=PredictOptions(earlier=(second, first)))
    with rasterio.open(tmp_path / "map.tif") as mapped:
        np.testing.assert_array_equal(mapped.read(1), expected([second, first, last]))
        assert (mapped.read(1) != expected(dates)).any()


@pytest.mark.parametrize("change", ["order", "content"])
def test_parts_made_of_other_dates_are_not_gone_on_with(
    model: Path, dates: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    def stop(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    first, second, last = dates
    output, options = tmp_path / "map.tif", PredictOptions(earlier=(first, second))
    with pytest.raises(KeyboardInterrupt):
        predict(last, model, output, options=options, progress=stop)
    if change == "order":
        options = PredictOptions(earlier=(second, first))
    else:
        with rasterio.open(second, "r+") as dataset:
            dataset.write(dataset.read()[:, ::-1])
    predict(last, model, output, options=options)
    assert "starting afresh" in caplog.text
    with rasterio.open(output) as mapped:
        np.testing.assert_array_equal(mapped.read(1), expected([*options.earlier, last]))


def test_too_few_dates_and_too_many_are_refused(
    model: Path, dates: list[Path], pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    output = tmp_path / "map.tif"
    few = PredictOptions(earlier=(dates[0],))
    with pytest.raises(SourceError, match=r"takes 3 dates of a place, found 2 dates\. Name all but"):
        predict(dates[2], model, output, options=few)
    with pytest.raises(SourceError, match=r"takes 1 date of a place, found 2 dates\. Leave out"):
        predict(small_scene, pointwise.path, output, options=few)
    with pytest.raises(SourceError, match="one by one"):
        predict_scenes([dates[1], dates[2]], model, tmp_path, options=few)
    assert not output.exists()


def test_an_earlier_date_is_never_written_over(model: Path, dates: list[Path], tmp_path: Path) -> None:
    options = PredictOptions(earlier=tuple(dates[:2]), overwrite=True)
    before = dates[0].read_bytes()
    with pytest.raises(OutputError, match="date0"):
        predict(dates[2], model, dates[0], options=options)
    assert dates[0].read_bytes() == before


def test_nor_is_it_by_what_is_made_of_the_map(model: Path, dates: list[Path], tmp_path: Path) -> None:
    picture = dates[0].rename(tmp_path / "earlier.png")  # GDAL looks into a file, not at its name
    before = picture.read_bytes()
    options = PredictOptions(
        earlier=(picture, dates[1]), overwrite=True, derived=DerivedOptions(preview=picture)
    )
    with pytest.raises(OutputError, match=r"earlier\.png is the input itself"):
        predict(dates[2], model, tmp_path / "map.tif", options=options)
    assert picture.read_bytes() == before


def test_a_model_of_several_dates_is_scored_on_them(
    model: Path, dates: list[Path], make_raster: Make, tmp_path: Path
) -> None:
    truth = expected(dates)[np.newaxis]
    labels = make_raster(tmp_path / "labels.tif", truth, names=["class"], transform=GRID, nodata=255)
    command = [sys.executable, "-m", "geodeploy", "evaluate", model, dates[2], labels, "--json"]
    command += ["--earlier", dates[0], "--earlier", dates[1]]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"] == 1


def test_another_place_is_no_earlier_date(
    model: Path, dates: list[Path], make_raster: Make, tmp_path: Path
) -> None:
    far = make_raster(
        tmp_path / "far.tif", np.full((2, 70, 90), 2000, np.uint16), names=BANDS,
        transform=GRID @ Affine.translation(500, 0), scales=[1e-4] * 2,
    )  # fmt: skip
    with pytest.raises(SourceError, match="another place"):
        predict(dates[2], model, options=PredictOptions(earlier=(far, dates[1])))


def test_a_graph_without_an_axis_for_dates_is_told_so(
    make_spec: Make, dates: list[Path], tmp_path: Path
) -> None:
    model = make_dated(tmp_path / "dates.onnx", make_spec, layout="NCTHW")
    made = onnx.load(model)
    text = made.metadata_props[0].value.replace('"layout": "NCTHW"', '"layout": "NCHW"')
    assert text != made.metadata_props[0].value
    made.metadata_props[0].value = text
    onnx.save(made, model)
    with pytest.raises(ModelError, match='Write "layout": "NCTHW"'):
        predict(dates[2], model, options=PredictOptions(earlier=tuple(dates[:2])))
