"""What is left out of a map with ``on_error="skip"``, and that all else is as it would be."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio._err import CPLE_OutOfMemoryError
from rasterio.errors import RasterioIOError
from rasterio.shutil import copy

from geodeploy import PredictOptions, Report, predict
from geodeploy.errors import ModelError, SourceError
from geodeploy.holes import rectangles
from geodeploy.raster import open_raster
from geodeploy.resample import Axis
from geodeploy.tiles import TileGrid

Make = Callable[..., Any]
MakeRaster = Callable[..., Path]

TWO = ("red", "nir")
SKIP = PredictOptions(on_error="skip")
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
STRIPED = {"blockysize": 16, "compress": "zstd"}


def block_bytes(path: Path, row: int, col: int) -> range:
    """Where a block of a GeoTIFF lies in the file; of its first band, where each has its own."""
    with rasterio.open(path) as dataset:
        offset, size = (
            int(dataset.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=1))
            for what in ("OFFSET", "SIZE")
        )
    return range(offset, offset + size)


def break_blocks(path: Path, blocks: Iterable[tuple[int, int]]) -> None:
    """Make blocks, by row and column, undecodable; neither the file's size nor its time changes."""
    times = path.stat()
    places = [block_bytes(path, *block) for block in blocks]
    with path.open("r+b") as file:
        for place in places:
            file.seek(place.start)
            file.write(b"\xff" * len(place))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def read_map(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def painted(report: Report) -> NDArray[np.bool_]:
    """Where the report says that holes are, which share no pixel."""
    holes = np.zeros((report.height, report.width), int)
    for hole in report.holes:
        holes[hole.row : hole.row + hole.height, hole.column : hole.column + hole.width] += 1
    assert holes.max(initial=0) <= 1
    return holes > 0


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 0.6, (2, height, width)).astype(np.float32)


@pytest.fixture(scope="module")
def model(make_model: Make, make_spec: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tile 64, overlap 16; it looks around itself."""
    place = tmp_path_factory.mktemp("model") / "model.onnx"
    return make_model(place, make_spec(TWO), kernels=(3, 3)).path


@pytest.fixture(scope="module")
def loud_model(make_model: Make, make_spec: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tile 64, overlap 16; each pixel for itself, and infinite where the scene is very bright."""
    weights = [np.array([[50, -20], [-5, 60]], np.float32).reshape(2, 2, 1, 1)]
    place = tmp_path_factory.mktemp("model") / "loud.onnx"
    return make_model(place, make_spec(TWO, (3, 7)), weights=weights)


# What cannot be read.


@pytest.mark.parametrize(
    ("layout", "shape", "blocks"),
    [
        (TILED, (64, 64), [(0, 0), (2, 1), (2, 2), (9, 4)]),
        (TILED | {"interleave": "band"}, (64, 64), [(5, 3)]),
        (STRIPED, (16, 300), [(1, 0), (20, 0), (21, 0)]),
    ],
)
def test_blocks_that_cannot_be_read_are_nodata_and_the_rest_is_as_if_the_scene_said_so(
    model: Path,
    make_raster: MakeRaster,
    tmp_path: Path,
    layout: Any,
    shape: tuple[int, int],
    blocks: list[tuple[int, int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = noise(600, 300)
    scene = make_raster(tmp_path / "scene.tif", stored, names=TWO, **layout)
    break_blocks(scene, blocks)
    for row, col in blocks:
        stored[:, row * shape[0] : (row + 1) * shape[0], col * shape[1] : (col + 1) * shape[1]] = np.nan
    quiet = predict(make_raster(tmp_path / "q.tif", stored, names=TWO), model, tmp_path / "judge.tif")
    with pytest.raises(SourceError, match=r"scene\.tif: rows .* cannot be read"):
        predict(scene, model, tmp_path / "map.tif")
    caplog.clear()
    report = predict(scene, model, tmp_path / "map.tif", options=SKIP)
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif"), read_map(tmp_path / "judge.tif"))
    np.testing.assert_array_equal(painted(report), np.isnan(stored[0]))
    lost = int(np.isnan(stored[0]).sum())
    assert report.hole_pixels == report.nodata_pixels == lost
    assert report.classes == quiet.classes
    assert not report.is_whole
    assert report.tiles_failed == 0
    causes = list(dict.fromkeys(hole.cause for hole in report.holes))
    assert all(cause.startswith("scene.tif cannot be read (") for cause in causes)
    assert [message for message in caplog.messages if "Left out" in message] == [
        f"{cause}. Left out as nodata, as is what else fails so." for cause in causes
    ]
    failed = f"{lost} pixels in {len(report.holes)} holes, 0 tiles failed: {'; '.join(causes)}"
    assert failed in str(report)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags()["GEODEPLOY_HOLES"] == str(lost)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_scene_that_ends_early_is_mapped_as_far_as_it_goes(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    make_raster(tmp_path / "plain.tif", noise(900, 300), names=TWO)
    scene = tmp_path / "scene.tif"  # its directory comes first
    copy(tmp_path / "plain.tif", scene, driver="COG", blocksize=128, overviews="none")
    end = block_bytes(scene, 4, 1).start
    predict(scene, model, tmp_path / "whole.tif")
    with scene.open("r+b") as file:
        file.truncate(end + 100)
    report = predict(scene, model, tmp_path / "map.tif", options=SKIP)
    holes = painted(report)
    assert holes[512:640, 128:].all()
    assert holes[640:].all()
    assert report.hole_pixels == holes.sum() == 128 * 172 + 260 * 300
    near = holes.copy()
    near[512 - 2 :] = True  # two layers of three pixels see the mean in place of what is gone
    whole, classes = read_map(tmp_path / "whole.tif"), read_map(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes[~near], whole[~near])
    assert (classes[holes] == 255).all()
    assert (classes[~holes] != 255).all()


def test_a_hole_in_a_band_with_larger_pixels_is_that_of_its_own_block(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    fine, coarse = noise(400, 300)[:1], noise(200, 150, seed=1)[:1]
    maps = []
    for name, broken in (("scene", True), ("judge", False)):
        folder = tmp_path / name
        folder.mkdir()
        make_raster(folder / "red.tif", fine, names=["red"], **TILED)
        twice = Affine(60, 0, 200_000, 0, -60, 4_300_000)
        if not broken:
            coarse[:, 64:128, 64:128] = np.nan
        nir = make_raster(folder / "nir.tif", coarse, names=["nir"], transform=twice, **TILED)
        if broken:
            break_blocks(nir, [(1, 1)])
        maps.append(tmp_path / f"{name}.tif")
        report = predict(folder, model, maps[-1], options=SKIP)
        if broken:
            (hole,) = report.holes
            assert (hole.row, hole.column, hole.height, hole.width) == (128, 128, 128, 128)
            assert hole.cause.startswith("nir.tif cannot be read")
        else:
            assert report.is_whole
    np.testing.assert_array_equal(*map(read_map, maps))


@given(
    step=st.floats(0.2, 5),
    shift=st.floats(-30, 30),
    first=st.integers(0, 60),
    count=st.integers(1, 40),
)
def test_the_pixels_within_a_stretch_are_those_whose_nearest_lies_in_it(
    step: float, shift: float, first: int, count: int
) -> None:
    axis = Axis(step, shift, 100)
    start, stop = axis.covered(0, 300)
    judge = [
        pixel
        for pixel in range(start, stop)
        if first <= axis.nearest(pixel, pixel + 1)[0] < first + count
    ]
    assert list(range(*axis.within(first, count, start, stop))) == judge


def test_a_machine_without_memory_is_not_the_scenes_fault(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "scene.tif", noise(100, 100), names=TWO)

    class Exhausted:
        block_shapes = ((64, 64),)

        def read(self, *_: object, **__: object) -> None:
            raise RasterioIOError("Read failed") from CPLE_OutOfMemoryError(3, 2, "no memory")

    with open_raster(scene, band_names=TWO, skip=True) as raster:
        window = next(raster.stripes())
        with pytest.raises(MemoryError):
            raster.layers[0].read(Exhausted(), window, skip=True)


# What the model does not answer.


def test_where_the_model_returns_no_number_other_tiles_answer_as_far_as_they_reach(
    loud_model: Any, make_raster: MakeRaster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = noise(200, 300)
    judge = loud_model.on_the_whole(stored).argmax(axis=0)
    stored[:, 80, 80] = stored[:, 100, 200] = stored[:, 10, 299] = 3e38
    stored[:, 70, 70] = np.nan
    scene = make_raster(tmp_path / "scene.tif", stored, names=TWO)
    with pytest.raises(ModelError, match="NaN or infinity for the tile"):
        predict(scene, loud_model.path, tmp_path / "map.tif")
    report = predict(scene, loud_model.path, tmp_path / "map.tif", options=SKIP)
    holes = painted(report)
    answered, failed = np.zeros_like(holes), 0
    for tile in TileGrid(200, 300, 64, 16):
        if np.nanmax(stored[0][tile.window.toslices()]) < 1:
            answered[tile.rows.begin : tile.rows.stop, tile.cols.begin : tile.cols.stop] = True
        else:
            failed += 1
    np.testing.assert_array_equal(holes, ~answered)
    assert holes[64:96, 64:96].all()  # what the tile at 48, 48 shares with none
    assert report.tiles_failed == failed > 5
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif") == 255, holes | np.isnan(stored[0]))
    classes = np.array([3, 7])[judge]
    there = ~holes & ~np.isnan(stored[0])
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif")[there], classes[there])
    assert report.hole_pixels == holes.sum() - 1  # one of them is nodata in the scene
    assert {hole.cause for hole in report.holes} == {"The model returned NaN or infinity"}
    assert sum("Left out" in message for message in caplog.messages) == 1


def test_a_tile_whose_neighbours_cover_all_of_it_leaves_no_hole_but_is_told_of(
    loud_model: Any, make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = noise(200, 300)
    judge = np.array([3, 7])[loud_model.on_the_whole(stored).argmax(axis=0)]
    stored[:, 0, 0] = stored[:, 31, 200] = 3e38
    scene = make_raster(tmp_path / "scene.tif", stored, names=TWO)
    options = PredictOptions(on_error="skip", overlap=60)  # a tile begins every fourth pixel
    report = predict(scene, loud_model.path, tmp_path / "map.tif", options=options)
    holes = painted(report)
    expected = np.zeros_like(holes)
    expected[0:4, 0:4] = True  # only the first tile is there
    expected[0:32, 200:204] = True  # other tiles end before column 200, or begin at row 32, column 204
    np.testing.assert_array_equal(holes, expected)
    assert report.tiles_failed == 1 + 8 * 16
    np.testing.assert_array_equal(read_map(tmp_path / "map.tif")[~holes], judge[~holes])


@pytest.mark.parametrize("cause", ["scene", "model"])
def test_of_an_area_only_its_own_holes_count(
    loud_model: Any, make_raster: MakeRaster, tmp_path: Path, cause: str
) -> None:
    stored = noise(300, 300)
    if cause == "model":
        stored[:, 80, 80] = 3e38
    scene = make_raster(tmp_path / "scene.tif", stored, names=TWO, **TILED)
    if cause == "scene":
        break_blocks(scene, [(1, 1)])
    whole = predict(scene, loud_model.path, tmp_path / "whole.tif", options=SKIP)
    # Rows 70 to 170, columns 50 to 90 of pixels of 30 metres.
    box = f"{200_000 + 50 * 30},{4_300_000 - 170 * 30},{200_000 + 90 * 30},{4_300_000 - 70 * 30}"
    options = PredictOptions(on_error="skip", aoi=f"{box}@EPSG:32616")
    report = predict(scene, loud_model.path, tmp_path / "map.tif", options=options)
    np.testing.assert_array_equal(painted(report), painted(whole)[70:170, 50:90])
    assert report.hole_pixels == painted(report).sum() > 0
    np.testing.assert_array_equal(
        read_map(tmp_path / "map.tif"), read_map(tmp_path / "whole.tif")[70:170, 50:90]
    )


@given(data=st.data())
def test_the_rectangles_hold_each_pixel_once(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    codes = random.integers(0, data.draw(st.integers(1, 4)), (height, width)).astype(np.uint16)
    again = np.zeros_like(codes)
    for row, col, down, across, code in rectangles(codes):
        part = again[row : row + down, col : col + across]
        assert code
        assert part.shape == (down, across)
        assert (part == 0).all()
        part[:] = code
    np.testing.assert_array_equal(again, codes)
    assert len(list(rectangles(np.ones((5, 5), np.uint16)))) == 1


# Going on.


class Enough(BaseException):
    """Ends a run as a signal would."""


def stop(*_: object) -> None:
    raise Enough


def test_holes_of_parts_that_are_kept_are_told_of_and_made_again_without_skip(
    model: Path, make_raster: MakeRaster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "map.tif"
    scene = make_raster(tmp_path / "scene.tif", noise(1600, 300), names=TWO, **TILED)
    predict(scene, model, tmp_path / "whole.tif")
    content, times = scene.read_bytes(), scene.stat()
    break_blocks(scene, [(3, 1), (20, 2)])
    quiet = predict(scene, model, tmp_path / "quiet.tif", options=SKIP)

    def begin() -> None:
        output.unlink(missing_ok=True)
        with pytest.raises(Enough):
            predict(scene, model, output, options=SKIP, progress=stop)
        caplog.clear()

    begin()
    report = predict(scene, model, output, options=SKIP)
    assert report.pixels_kept == 528 * 300
    assert report.holes == quiet.holes
    assert len(report.holes) == 2
    assert output.read_bytes() == (tmp_path / "quiet.tif").read_bytes()
    begin()
    scene.write_bytes(content)
    os.utime(scene, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert predict(scene, model, output).is_whole
    assert caplog.messages == ["Parts of map.tif that have holes are made again: 0."]
    assert output.read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_without_a_hole_skip_changes_no_byte(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "scene.tif", noise(200, 300), names=TWO)
    predict(scene, model, tmp_path / "map.tif")
    assert predict(scene, model, tmp_path / "skip.tif", options=SKIP).is_whole
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "skip.tif").read_bytes()


# The command.


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "geodeploy", "predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_exits_3_and_lists_the_holes(
    model: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "scene.tif", noise(600, 300), names=TWO, **TILED)
    break_blocks(scene, [(3, 1)])
    command = [scene, "-m", model, "-o", tmp_path / "map.tif", "--json"]
    assert run(*command).returncode == 1
    assert run(*command, "--on-error", "stop").returncode == 1
    assert not (tmp_path / "map.tif").exists()
    done = run(*command, "--on-error", "skip")
    assert done.returncode == 3
    (hole,) = json.loads(done.stdout)["holes"]
    assert {name: hole[name] for name in ("row", "column", "height", "width", "pixels")} == {
        "row": 192, "column": 64, "height": 64, "width": 64, "pixels": 64 * 64
    }  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.startswith("scene.tif cannot be read (")
