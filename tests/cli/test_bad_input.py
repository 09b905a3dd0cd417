"""What a user may get wrong: one line that says what was found, what is needed and what to do."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.shutil import copy

from geodeploy.cli import main

Make = Callable[..., Any]
Command = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    status: int | str | None
    out: str
    err: str


@pytest.fixture
def geodeploy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """The command line, run in a folder; in this process, for the second that each new one takes."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    logger = logging.getLogger("geodeploy")
    level = logger.level

    def run(folder: Path, *arguments: object) -> Outcome:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["geodeploy", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        # From the file descriptors: what GDAL and ONNX Runtime print themselves counts too.
        return Outcome(ended.value.code, *capfd.readouterr())

    yield run
    logger.setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(make_model: Make, make_raster: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good scene and a good model, and many bad ones. Nothing may be added to it."""
    folder = tmp_path_factory.mktemp("place")
    random = np.random.default_rng(0)
    pixels = random.uniform(0, 0.5, (6, 600, 130)).astype(np.float32)
    make_raster(folder / "scene.tif", pixels[:, :100])
    make_raster(folder / "two.tif", pixels[:2, :9])
    make_raster(folder / "unknown.tif", pixels[:, :9], names=["a", "b", "c", "d", "e", "f"])
    make_raster(folder / "B5.tif", pixels[:, :9], names=["B2", "B3", "B4", "B5", "B6", "B7"])
    make_raster(folder / "unnamed.tif", np.concatenate([pixels] * 2)[:, :9], names=[])
    make_raster(folder / "bright.tif", (pixels * 10_000).astype(np.uint16))
    make_raster(folder / "whole.tif", pixels)
    copy(folder / "whole.tif", folder / "cog.tif", driver="COG", blocksize=128)
    content = (folder / "cog.tif").read_bytes()
    (folder / "cut.tif").write_bytes(content[: len(content) * 3 // 4])
    (folder / "head.tif").write_bytes(content[:100])
    (folder / "whole.tif").unlink()
    (folder / "cog.tif").unlink()
    (folder / "text.tif").write_text("once upon a time")
    (folder / "zero.tif").touch()
    os.mkfifo(folder / "pipe.tif")
    (folder / "folder.tif").mkdir()
    (folder / "there.tif").write_text("yesterday's map")

    make_model(folder / "model.onnx")
    make_model(folder / "mute.onnx", metadata=None)
    make_model(folder / "newer.onnx", metadata='{"spec_version": 2}')
    make_model(folder / "broken.onnx", metadata='{"spec_version": 1, "name": "x"}')
    make_model(folder / "shape.onnx", shape=(6, 4, 32))
    nan = [np.full((4, 6, 1, 1), np.nan, np.float32)]
    make_model(folder / "nan.onnx", weights=nan)
    (folder / "junk.onnx").write_bytes(b"\0junk" * 99)
    return folder


@pytest.mark.parametrize(
    ("arguments", "found", "advice"),
    [
        # Scenes.
        ("gone.tif", "gone.tif does not exist", "Check the path"),
        ("text.tif", "text.tif is not a raster", "GeoTIFF, COG, JP2, VRT or the like is needed"),
        ("zero.tif", "zero.tif is not a raster", "fetch it again"),
        ("head.tif", "head.tif is not a raster", "truncated: fetch it again"),
        ("cut.tif", "cut.tif: rows ", "damaged or truncated: fetch it again"),
        ("folder.tif", "folder.tif is a folder", "Name a raster file"),
        ("", "The name is empty", "Name the scene"),
        # Bands.
        ("two.tif", "two.tif has 2 bands (blue, green)", "Add the missing ones"),
        ("unknown.tif", "(a, b, c, d, e, f), among which blue is not found", "with --bands"),
        ("B5.tif", "B2 means different bands on different satellites", "Say with --bands"),
        ("unnamed.tif", "12 bands without names, the model needs 6: blue, ", "with --bands"),
        ("scene.tif --bands red,nir", "--bands names 2 (red, nir)", "the model needs 6: blue, "),
        ("scene.tif --bands blue,green,red,nir,swir16,12", "--bands 12: ", "the numbers 1 to 6"),
        ("scene.tif --bands=", "--bands names 0 (none)", "the model needs 6"),
        # Values.
        ("bright.tif", "holds values from", "Try --scale 0.0001"),
        ("scene.tif --scale 1000", "the model was made for -0.2 to 1.6", "--scale"),
        # Models.
        ("scene.tif -m gone.onnx", "The model gone.onnx does not exist", "`geodeploy export`"),
        ("scene.tif -m junk.onnx", "junk.onnx is not an ONNX model", "check that the file is whole"),
        ("scene.tif -m zero.tif", "zero.tif is not an ONNX model", "check that the file is whole"),
        ("scene.tif -m mute.onnx", "does not say which bands and classes", "mute.spec.json beside it"),
        ("scene.tif -m newer.onnx", "version 2, this program reads up to 1", "pip install -U"),
        ("scene.tif -m broken.onnx", "broken.onnx: the model description does not hold", "bands: "),
        ("scene.tif -m shape.onnx", "6, 32, 32]", "says (batch, 6, 64, 64). Mend the description"),
        ("scene.tif -m nan.onnx", "NaN or infinity for the tile at row 0, column 0", "Look at that"),
        ("scene.tif --device cuda", "The GPU was asked for", "--device cpu"),
        # Outputs.
        ("scene.tif -o gone/map.tif", "The folder gone does not exist", "mkdir -p gone"),
        ("scene.tif -o /proc/self/map.tif", "/proc/self cannot be written", "with -o"),
        ("scene.tif -o scene.tif --overwrite", "scene.tif is the input itself", "with -o"),
        ("scene.tif -o ./model.onnx --overwrite", "model.onnx is the input itself", "with -o"),
        ("scene.tif -o there.tif", "there.tif exists", "add --overwrite"),
        ("scene.tif -o pipe.tif --overwrite", "pipe.tif is a device, pipe or socket", "with -o"),
        ("scene.tif -o map.jp2", "map.jp2 would not be what its name says", ".tif or .tiff"),
        (f"scene.tif -o {'n' * 245}.tif", "has 249 bytes; 247 are the most", "a shorter one with -o"),
        (f"scene.tif -o {'n' * 2450}.tif", "has 2454 bytes; 247 are the most", "with -o"),
        ("scene.tif --preview y.jpg", "y.jpg would not be what its name says", "needs .png"),
        ("scene.tif --area map.tif.aux.xml", "the map's names of classes go", "another place"),
        ("scene.tif two.tif", "2 scenes need a folder that exists for -o", "none was given"),
        ("scene.tif ./scene.tif -o folder.tif", "Two scenes would both be mapped", "Rename one"),
        ("scene.tif gone.tif -o folder.tif", "gone.tif does not exist", "Check the path"),
        # Numbers.
        ("scene.tif --overlap -1", "--overlap -1: ", "greater than or equal to 0"),
        ("scene.tif --overlap 64", "overlap=64 px does not fit tile=64 px", "from 0 to 63"),
        ("scene.tif --batch 0", "--batch 0: ", "greater than 0"),
        ("scene.tif --scale 0", "--scale 0.0: ", "greater than 0"),
        ("scene.tif --scale nan", "--scale nan: ", ""),
        ("scene.tif --offset inf", "--offset inf: ", "finite number"),
        ("scene.tif --gsd wide", "--gsd wide: ", "metres above 0"),
        ("scene.tif --aoi gone.gpkg", "gone.gpkg is neither a file nor a box", "GeoJSON"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    place: Path, geodeploy: Command, arguments: str, found: str, advice: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    given = arguments.split() or [""]
    model = [] if "-m" in given else ["-m", "model.onnx"]
    output = [] if "-o" in given or "two.tif" in given[1:] else ["-o", "map.tif"]
    if "/proc/self" in arguments and not Path("/proc/self").is_dir():
        pytest.skip("this system has no /proc")
    outcome = geodeploy(place, "predict", *given, *model, *output, "--json")
    assert outcome.err.startswith("error: ")
    assert found in outcome.err
    assert advice in outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.status == 1
    assert outcome.out == ""
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("predict", "Missing argument 'SCENE...'"),
        ("predict scene.tif --blend soft", "'soft' is not one of 'cosine', 'flat', 'crop'"),
        ("predict scene.tif --overlap many", "Invalid value for '--overlap'"),
        ("predict scene.tif --tile 512", "No such option: --tile"),
        ("predict scene.tif --device tpu", "'tpu' is not one of"),
        ("export run --precision fp8", "'fp8' is not one of 'fp32', 'fp16'"),
        ("export run --to foo", "'foo' is not one of 'onnx', 'tensorrt'"),
        ("export run --profile foo", "'foo' is not"),
        ("predicct scene.tif", "No such command 'predicct'"),
    ],
)
def test_wrong_usage_is_told_with_status_2(
    place: Path, geodeploy: Command, arguments: str, complaint: str
) -> None:
    outcome = geodeploy(place, *arguments.split())
    assert outcome.status == 2
    assert complaint in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("share", ["nan", "-1", "inf"])
def test_a_tolerance_that_is_no_share_is_refused_before_any_work(
    place: Path, geodeploy: Command, share: str
) -> None:
    outcome = geodeploy(place, "verify", "gone", "model.onnx", "--bisect", "--tolerance", share)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: --tolerance {float(share)}: a share of 0 or more is needed")
    assert outcome.err.count("\n") == 1


def fresh(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "geodeploy", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("scene", "model"),
    [("cut.tif", "model.onnx"), ("scene.tif", "junk.onnx"), ("scene.tif", "nan.onnx")],
)
def test_a_process_of_its_own_says_no_more(place: Path, scene: str, model: str) -> None:
    before = set(place.rglob("*"))
    done = fresh(place, "predict", scene, "-m", model, "-o", "map.tif")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert set(place.rglob("*")) == before


def test_a_scene_without_crs_is_mapped_with_one_warning(
    place: Path, make_raster: Make, tmp_path: Path
) -> None:
    scene = make_raster(
        tmp_path / "bare.tif",
        np.full((6, 30, 30), 0.3, np.float32),
        crs=None,
        transform=rasterio.Affine.identity(),
    )
    done = fresh(tmp_path, "predict", scene, "-m", place / "model.onnx")
    assert done.returncode == 0
    assert done.stderr.startswith("bare.tif has no CRS")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "bare_map.tif").exists()


@pytest.mark.parametrize(
    "command",
    [("predict", "scene.tif", "-m", "base.onnx"), ("evaluate", "base.onnx", "scene.tif", "labels.tif"),
     ("verify", "run", "base.onnx")],
)  # fmt: skip
def test_of_two_adapters_none_is_silently_left_out(
    geodeploy: Command, tmp_path: Path, command: tuple[str, ...]
) -> None:
    both = ("--adapter", "flood.onnx_adapter", "--adapter", "cloud.onnx_adapter")
    done = geodeploy(tmp_path, *command, *both)
    assert done.status == 2
    assert "--adapter is given 2 times, and a base takes one at a time" in done.err
