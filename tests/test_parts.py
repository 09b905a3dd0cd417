"""What a run that ends early keeps, and that going on from there changes nothing."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio._err import CPLE_OutOfMemoryError
from rasterio.errors import RasterioIOError
from rasterio.shutil import copy

from geodeploy import PredictOptions, Report, evaluate, predict, predict_scenes
from geodeploy.engine import map_scene
from geodeploy.errors import MemoryLimitError, ModelError, OutputError, SourceError
from geodeploy.parts import Journal, missing_regions, plan_parts, settle
from geodeploy.runtime import Session, open_session
from geodeploy.tiles import TileGrid

Make = Callable[..., Any]
MakeRaster = Callable[..., Path]

TWO = ("red", "nir")
DONE = "map.tif is done: the same job made it."
PARTS = 12
HEIGHT, WIDTH = 528 * PARTS, 100
"""With tile 64 and overlap 16 a part is 11 rows of tiles of 48 pixels each."""


@dataclass(frozen=True)
class Job:
    """A scene of twelve parts, a cheap model that looks around itself, and the map of a quiet run."""

    scene: Path
    model: Path
    report: Report
    map: bytes
    names: bytes

    def predict(self, output: Path, **more: Any) -> Report:
        return predict(self.scene, self.model, output, **more)

    def check(self, output: Path, *, another: bool = False) -> None:
        """That the map is that of a quiet run, and all that is left; with ``another`` of a copy."""
        assert output.read_bytes() == self.map
        names = output.with_name(output.name + ".aux.xml").read_bytes()
        if another:  # whose map remembers another job
            assert without_note(names) == without_note(self.names)
        else:
            assert names == self.names
        assert not folder_of(output).exists()


def without_note(names: bytes) -> bytes:
    """An ``.aux.xml`` but for what it tells of the job."""
    return re.sub(rb"<Metadata domain=.GEODEPLOY_JOURNAL.*</Metadata>", b"", names, flags=re.DOTALL)


def make_job(
    place: Path, height: int, make_model: Make, make_spec: Make, make_raster: MakeRaster
) -> Job:
    pixels = np.random.default_rng(4).uniform(0, 0.6, (2, height, WIDTH)).astype(np.float32)
    pixels[:, 400:1200, :70] = np.nan
    scene = make_raster(place / "scene.tif", pixels, names=TWO)
    model = make_model(place / "model.onnx", make_spec(TWO, seen=(0.005, 0.595)), kernels=(3, 3)).path
    report = predict(scene, model, place / "map.tif")
    made = [(place / name).read_bytes() for name in ("map.tif", "map.tif.aux.xml")]
    return Job(scene, model, report, *made)


@pytest.fixture(scope="module")
def job(
    make_model: Make,
    make_spec: Make,
    make_raster: MakeRaster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), HEIGHT, make_model, make_spec, make_raster)


@pytest.fixture(scope="module")
def short_job(
    make_model: Make,
    make_spec: Make,
    make_raster: MakeRaster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """One of two parts."""
    return make_job(tmp_path_factory.mktemp("short"), 600, make_model, make_spec, make_raster)


def folder_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def noted(output: Path) -> list[int]:
    """The parts that the journal tells of, in the order they were made; a torn line tells of none."""
    journal = folder_of(output) / "journal.jsonl"
    if not journal.exists():
        return []
    lines = journal.read_text().split("\n")[:-1]
    return [line["part"] for line in map(json.loads, lines) if "part" in line]


class Enough(BaseException):
    """Ends a run as a signal would."""


def stop_after(parts: int) -> Callable[[int, int], None]:
    """For `predict` as its ``progress``: it is told of each part."""
    done: list[int] = []

    def told(rows: int, _: int) -> None:
        done.append(rows)
        if len(done) == parts:
            raise Enough

    return told


def begin(job: Job, output: Path, parts: int, **more: Any) -> None:
    with pytest.raises(Enough):
        job.predict(output, progress=stop_after(parts), **more)
    assert noted(output) == list(range(parts))


# Killed.

FORKS = """
import json, os, random, signal, sys
import onnxruntime, geodeploy.predict
from geodeploy.cli import main
try:
    import matplotlib.figure, geodeploy.vectors
except ImportError:
    pass

def count(last):
    seen = [0]
    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            if ".part" in str(arguments[0]):
                seen[0] += 1
                if seen[0] == last:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return seen

if hasattr(os, "sched_setaffinity"):
    # ONNX Runtime's threads wait for one another by spinning, which takes long on busy cores.
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
while line := sys.stdin.readline():
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        sys.stdin.readline()  # until then its number stays its own, even if it has ended
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    seen = count(asked["last"])
    sys.argv[1:] = asked["arguments"]
    try:
        main()
    except SystemExit as done:
        print(seen[0], file=sys.stderr)
        sys.stdout.flush()
        os._exit(done.code)  # ONNX Runtime would wait for a thread that the fork has lost
"""
"""Forks a process for each command, which saves the second that imports take. Before its ``last``-th
step in the folder of the parts, or of a draft, (to create, write, rename, remove) the process kills
itself."""


class Forks:
    """Runs the command line in processes that may be killed."""

    def __init__(self, process: subprocess.Popen[str], place: Path) -> None:
        self._process = process
        self._place = place

    def start(self, *arguments: object, last: int = 0) -> int:
        """The process of `geodeploy` with ``arguments``."""
        names = {name: str(self._place / name) for name in ("out", "err")}
        asked = {"arguments": list(map(str, arguments)), "last": last, **names}
        child = self._ask(json.dumps(asked))
        assert child > 1
        return child

    def wait(self) -> int:
        """Its status, as `subprocess` has it."""
        return self._ask("")

    def run(self, *arguments: object, last: int = 0) -> int:
        self.start(*arguments, last=last)
        return self.wait()

    @property
    def out(self) -> str:
        return (self._place / "out").read_text()

    @property
    def err(self) -> str:
        return (self._place / "err").read_text().rpartition("\n")[0].rpartition("\n")[0]

    @property
    def steps(self) -> int:
        """That the last process made in the folder of the parts."""
        return int((self._place / "err").read_text().split()[-1])

    def _ask(self, line: str) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    place = tmp_path_factory.mktemp("forks")
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Forks(process, place)
        assert process.stdin
        process.stdin.close()


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that is in memory, where there is one: on a busy disk each sync takes a while."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_killed_at_twenty_random_moments_the_same_command_ends_with_the_same_bytes(
    job: Job, forks: Forks, memory_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    output = memory_path / "map.tif"
    command = ["predict", job.scene, "-m", job.model, "-o", output, "--json"]
    begun = time.monotonic()
    assert forks.run(*command) == 0, forks.err
    whole_s = time.monotonic() - begun
    job.check(output)
    kills = 0
    kept: dict[int, int] = {}
    made: list[int] = []
    output.unlink()
    while kills < 20:
        process = forks.start(*command)
        time.sleep(draw.uniform(0, whole_s))
        os.kill(process, signal.SIGKILL)
        status = forks.wait()
        kills += status == -signal.SIGKILL
        if not output.exists():
            assert status == -signal.SIGKILL, forks.err
            parts = noted(output)
            assert len(set(parts)) == len(parts)
            files = {int(file.stem[5:]): file for file in folder_of(output).glob("part-*.tif")}
            # What was kept before is the very file; of what was made since, one may be lost at most.
            assert {number: files[number].stat().st_mtime_ns for number in kept} == kept
            assert set(parts) >= kept.keys()
            assert len(files.keys() - set(parts)) <= 1
            made.append(len(parts) - len(kept))
            kept = {number: files[number].stat().st_mtime_ns for number in parts}
            continue
        if status == -signal.SIGKILL:
            assert forks.run(*command) == 0, forks.err
            assert DONE in forks.err
        else:
            assert status == 0, forks.err
            assert json.loads(forks.out)["pixels_kept"] == len(kept) * 528 * WIDTH
        job.check(output)
        output.unlink()
        kept = {}
    assert forks.run(*command) == 0, forks.err
    assert json.loads(forks.out)["pixels_kept"] == len(kept) * 528 * WIDTH
    job.check(output)
    print(f"parts made before each kill: {made}")


def test_killed_before_any_step_on_the_disk_the_same_command_ends_with_the_same_bytes(
    short_job: Job, forks: Forks, memory_path: Path
) -> None:
    output = memory_path / "map.tif"
    command = ["predict", short_job.scene, "-m", short_job.model, "-o", output]
    assert forks.run(*command) == 0
    steps = forks.steps
    assert steps > 20, steps
    for last in range(1, steps + 1):
        for file in memory_path.iterdir():
            file.unlink()
        assert forks.run(*command, last=last) == -signal.SIGKILL
        assert not output.exists() or output.read_bytes() == short_job.map
        before, whole = noted(output), output.exists()
        assert forks.run(*command) == 0, forks.err
        if forks.err != DONE:
            assert not whole
            assert forks.err == (
                f"Going on with map.tif: {len(before)} of 2 parts done." if before else ""
            )
        short_job.check(output)


def test_killed_while_several_rasters_are_made_and_moved_all_end_with_the_same_bytes(
    short_job: Job, forks: Forks, memory_path: Path
) -> None:
    output, quiet = memory_path / "map.tif", memory_path / "quiet.tif"
    beside = PredictOptions(confidence=True, probabilities=True, disagreement=True)
    expected = [short_job.map, *(
        path.read_bytes() for path in short_job.predict(quiet, options=beside).beside
    )]  # fmt: skip
    places = [output, *(memory_path / f"map_{name}.tif" for name in beside.beside)]
    command = ["predict", short_job.scene, "-m", short_job.model, "-o", output]
    command += [f"--{name}" for name in beside.beside]
    assert forks.run(*command) == 0, forks.err
    steps = forks.steps
    for last in [*range(1, steps - 14, 5), *range(steps - 14, steps + 1)]:
        for place in places:
            place.unlink(missing_ok=True)
        assert forks.run(*command, last=last) == -signal.SIGKILL
        assert forks.run(*command) == 0, forks.err
        assert [place.read_bytes() for place in places] == expected
        short_job.check(output, another=True)


@pytest.fixture
def all_made_of_it(
    short_job: Job, forks: Forks, memory_path: Path
) -> tuple[list[object], dict[Path, bytes], int]:
    """A command that makes of its map all that can be made, its files, and its steps on the disk."""
    pytest.importorskip("pyogrio", reason="the extra vector is not installed")
    asked = ["--polygons", ".gpkg", "--area", ".csv", "--preview", ".png"]
    asked += ["--stac", "--acquired", "2020-06-01"]
    command = ["predict", short_job.scene, "-m", short_job.model, "-o", memory_path / "map.tif", *asked]
    assert forks.run(*command) == 0, forks.err
    files = {file: file.read_bytes() for file in memory_path.iterdir()}
    assert {file.name for file in files} == {
        "map.tif", "map.tif.aux.xml", "map.gpkg", "map.csv", "map.png", "map.stac.json"
    }  # fmt: skip
    return command, files, forks.steps


def test_killed_at_any_step_from_the_map_to_the_last_of_what_is_made_of_it_all_is_made(
    all_made_of_it: tuple[list[object], dict[Path, bytes], int], forks: Forks, memory_path: Path
) -> None:
    command, files, steps = all_made_of_it
    whole = 0
    for last in range(steps, 0, -1):
        for file in memory_path.iterdir():
            file.unlink()
        assert forks.run(*command, last=last) == -signal.SIGKILL
        if not (memory_path / "map.tif").exists():
            break
        whole += 1
        assert forks.run(*command) == 0, forks.err
        assert DONE in forks.err
        assert {file: file.read_bytes() for file in memory_path.iterdir()} == files
    # Four files are made in folders of their own and noted, then the map remembers its job.
    assert whole > 4 * 4


def test_killed_at_random_moments_all_that_is_made_of_the_map_has_the_same_bytes(
    all_made_of_it: tuple[list[object], dict[Path, bytes], int], forks: Forks, memory_path: Path
) -> None:
    command, files, _ = all_made_of_it
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    kills = 0
    while kills < 8:
        for file in memory_path.iterdir():
            file.unlink()
        begun = time.monotonic()
        process = forks.start(*command)
        while not (memory_path / "map.tif").exists():
            assert time.monotonic() < begun + 60
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 1))
        os.kill(process, signal.SIGKILL)
        kills += forks.wait() == -signal.SIGKILL
        assert forks.run(*command) == 0, forks.err
        assert {file: file.read_bytes() for file in memory_path.iterdir()} == files


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_parts_and_says_so(
    make_model: Make,
    make_spec: Make,
    job: Job,
    forks: Forks,
    tmp_path: Path,
    number: int,
    status: int,
) -> None:
    slow = make_model(tmp_path / "slow.onnx", make_spec(TWO), kernels=(15, 15)).path
    output = tmp_path / "map.tif"
    command = ["predict", job.scene, "-m", slow, "-o", output, "--json"]
    process = forks.start(*command)
    deadline = time.monotonic() + 60
    while len(noted(output)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, number)
    assert forks.wait() == status
    parts = noted(output)
    assert 2 <= len(parts) < PARTS
    assert forks.err.splitlines() == [
        f"map.tif: {len(parts)} of {PARTS} parts kept; the same command goes on from there.",
        "Stopped; nothing was left half-written.",
    ]
    assert forks.out == ""
    assert {file.name for file in folder_of(output).iterdir()} == {
        "lock",
        "journal.jsonl",
        *(f"part-{part:05}.tif" for part in parts),
    }
    assert forks.run(*command) == 0
    assert forks.err == f"Going on with map.tif: {len(parts)} of {PARTS} parts done."
    assert json.loads(forks.out)["pixels_kept"] == len(parts) * 528 * WIDTH
    assert not folder_of(output).exists()


# Going on.


def test_a_run_that_goes_on_does_only_what_is_missing_and_says_so(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "map.tif"
    begin(job, output, 7)
    assert caplog.messages == ["map.tif: 7 of 12 parts kept; the same command goes on from there."]
    caplog.clear()
    rows: list[int] = []
    with caplog.at_level("INFO"):
        report = job.predict(output, progress=lambda done, _: rows.append(done))
    assert caplog.messages == ["Going on with map.tif: 7 of 12 parts done."]
    assert rows == [528 * part for part in range(8, 13)]
    # Five parts of eleven rows of two tiles, and the row above them that reaches into the first.
    assert report.tiles_run == (5 * 11 + 1) * 2
    assert report.pixels_kept == 7 * 528 * WIDTH
    assert "58% of it kept from a run that was stopped" in str(report)
    numbers = {"classes", "unseen", "valid_pixels", "nodata_pixels", "warnings"}
    assert report.model_dump(include=numbers) == job.report.model_dump(include=numbers)
    job.check(output)


@given(data=st.data())
def test_what_is_missing_is_asked_for_in_as_few_regions_as_there_are_gaps(data: st.DataObject) -> None:
    grid = TileGrid(3000, 900, 128, data.draw(st.sampled_from([0, 20, 64, 100])))
    parts = plan_parts(grid, columns=data.draw(st.integers(300, 1000)))
    done = data.draw(st.sets(st.sampled_from([part.number for part in parts])))
    regions = list(missing_regions(grid, parts, done))
    asked = [part.number for _, run in regions for part in run]
    assert asked == [part.number for part in parts if part.number not in done]
    gaps = [
        part
        for part in parts
        if part.number not in done and (part.number - 1 in done or part.rows.start == 0)
    ]
    assert len(regions) == len(gaps)
    for region, run in regions:
        assert region.window.height == sum(part.window.height for part in run)
        assert {part.window.col_off for part in run} == {region.window.col_off}
        assert {part.window.width for part in run} == {region.window.width}


@given(
    sizes=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    tile=st.integers(1, 300),
    columns=st.integers(1, 4000),
    data=st.data(),
)
def test_the_parts_cover_the_map_once_and_no_panel_is_too_wide(
    sizes: tuple[int, int], tile: int, columns: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile * 3 // 4))
    grid = TileGrid(*(max(size * tile // 300, 1) for size in sizes), tile, overlap)
    parts = plan_parts(grid, columns=columns)
    visits = np.zeros((grid.height, grid.width), np.uint8)
    for part in parts:
        visits[part.window.toslices()] += 1
        if len(part.cols) > 1:
            assert grid.part(part.rows, part.cols).source.width <= columns
        # The lowest parts end where the raster does; a last tile may settle a whole tile's rows.
        assert part.window.height <= 512 + 2 * tile
    assert (visits == 1).all()
    assert [part.number for part in parts] == list(range(len(parts)))


@pytest.mark.parametrize("torn", [1, 20, 200])
def test_a_torn_last_line_costs_that_part_alone(job: Job, tmp_path: Path, torn: int) -> None:
    output = tmp_path / "map.tif"
    begin(job, output, 4)
    journal = folder_of(output) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[: -1 - torn])
    report = job.predict(output)
    assert report.pixels_kept == 3 * 528 * WIDTH
    job.check(output)


@pytest.mark.parametrize("damage", ["gone", "cut", "altered", "empty"])
def test_a_part_that_is_damaged_is_made_again(
    job: Job, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "map.tif"
    begin(job, output, 4)
    part = folder_of(output) / "part-00001.tif"
    content = bytearray(part.read_bytes())
    if damage == "gone":
        part.unlink()
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    else:
        part.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    caplog.clear()
    report = job.predict(output)
    assert caplog.messages == [
        "Parts of map.tif that were done are missing or damaged, and made again: 1."
    ]
    assert report.pixels_kept == 3 * 528 * WIDTH
    job.check(output)


@pytest.mark.parametrize(
    "content", [b"", b"\0\xff\xfe", b"[]\n", b'{"work": 1}\n', b'{"job": 3}\n', b"{"]
)
def test_a_journal_that_cannot_be_read_starts_afresh_and_says_so(
    short_job: Job, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "map.tif"
    begin(short_job, output, 1)
    (folder_of(output) / "journal.jsonl").write_bytes(content)
    caplog.clear()
    assert short_job.predict(output).pixels_kept == 0
    assert caplog.messages == ["The journal of map.tif cannot be read: starting afresh."]
    short_job.check(output)


def test_what_changes_no_byte_goes_on(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    begin(job, output, 2, options=PredictOptions(batch=3, readers=1, threads=1))
    begin_again = PredictOptions(batch=16, readers=3, threads=2, device="cpu", bands=TWO)
    statistics = job.scene.with_name("scene.tif.aux.xml")  # as a viewer leaves them
    statistics.write_text(
        '<PAMDataset><PAMRasterBand band="1"><Metadata><MDI key="STATISTICS_MEAN">1</MDI></Metadata>'
        "</PAMRasterBand></PAMDataset>"
    )
    report = job.predict(output, options=begin_again)
    statistics.unlink()
    assert report.pixels_kept == 2 * 528 * WIDTH
    job.check(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model", "model"),
        ("scene", "state of the scene"),
        ("behind a VRT", "state of the scene"),
        ("another scene", "scene, another state of the scene"),
        ("description", "model, another description of the model"),
        ("overlap", "--overlap, another division into parts"),
        ("blend", "--blend"),
        ("bands", "--bands"),
        ("scale", "scale"),
        ("offset", "offset"),
        ("confidence", "--confidence"),
    ],
)
def test_what_changes_the_map_starts_afresh_and_is_named(
    job: Job,
    make_model: Make,
    make_spec: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
    said: str,
) -> None:
    scene, model, output = tmp_path / "scene.tif", job.model, tmp_path / "map.tif"
    shutil.copy2(job.scene, scene)
    asked = scene
    if change == "behind a VRT":
        asked = tmp_path / "scene.vrt"
        copy(scene, asked, driver="VRT")
    with pytest.raises(Enough):
        predict(asked, model, output, progress=stop_after(2))
    options: dict[str, Any] = {
        "overlap": {"overlap": 10},
        "blend": {"blend": "flat"},
        "bands": {"bands": ("nir", "red")},
        "scale": {"scale": 0.5},
        "offset": {"offset": 0.01},
        "confidence": {"confidence": True},
    }.get(change, {})
    if change == "another scene":
        asked = scene.rename(tmp_path / "other.tif")
        os.utime(asked, (0, 0))
    elif change in {"scene", "behind a VRT"}:
        os.utime(scene)
    elif change in {"model", "description"}:
        spec = make_spec(TWO, seen=(0.005, 0.595) if change == "model" else (0.1, 0.2))
        model = make_model(tmp_path / "new.onnx", spec, kernels=(3, 3), seed=1).path
    caplog.clear()
    report = predict(asked, model, output, options=PredictOptions(**options))
    assert f"map.tif was begun with another {said}: starting afresh." in caplog.messages
    assert report.pixels_kept == 0
    quiet = tmp_path / "quiet.tif"
    predict(asked, model, quiet, options=PredictOptions(**options))
    assert output.read_bytes() == quiet.read_bytes()
    assert not folder_of(output).exists()


def test_a_map_that_exists_stays_until_the_new_one_is_whole(job: Job, tmp_path: Path) -> None:
    output, overwrite = tmp_path / "map.tif", PredictOptions(overwrite=True)
    output.write_text("the map of yesterday")
    for parts in (3, 5):
        with pytest.raises(Enough):
            job.predict(output, options=overwrite, progress=stop_after(parts))
        assert output.read_text() == "the map of yesterday"
    assert noted(output) == list(range(8))
    with pytest.raises(OutputError, match="--overwrite"):
        job.predict(output)
    assert noted(output) == list(range(8))
    report = job.predict(output, options=overwrite)
    assert report.pixels_kept == 8 * 528 * WIDTH
    job.check(output)


# Several scenes.


@dataclass(frozen=True)
class Several:
    """Three scenes with one map, and the command that maps them."""

    scenes: list[Path]
    maps: Path
    command: list[object]

    @property
    def outputs(self) -> list[Path]:
        return [self.maps / f"{scene.stem}_map.tif" for scene in self.scenes]


@pytest.fixture
def several(short_job: Job, memory_path: Path) -> Several:
    scenes = [memory_path / f"{name}.tif" for name in "abc"]
    for scene in scenes:
        shutil.copy2(short_job.scene, scene)
    maps = memory_path / "maps"
    maps.mkdir()
    command = ["predict", *scenes, "-m", short_job.model, "-o", maps]
    return Several(scenes, maps, [*command, "--area", ".csv", "--json"])


def test_several_scenes_killed_in_the_second_go_on_with_the_same_command(
    several: Several, short_job: Job, forks: Forks
) -> None:
    first, second, third = several.outputs
    assert forks.run(*several.command) == 0, forks.err
    steps = forks.steps
    tables = [output.with_suffix(".csv").read_bytes() for output in several.outputs]
    assert len(list(several.maps.iterdir())) == 9
    for last in (steps // 3, steps * 5 // 12):
        for file in several.maps.iterdir():
            file.unlink()
        assert forks.run(*several.command, last=last) == -signal.SIGKILL
        assert first.exists()
        assert not third.exists()
        assert folder_of(second).exists()
        made = first.stat().st_mtime_ns, first.stat().st_ino
        assert forks.run(*several.command) == 0, forks.err
        assert "a_map.tif is done: the same job made it." in forks.err
        assert (first.stat().st_mtime_ns, first.stat().st_ino) == made
        reports = json.loads(forks.out)
        assert [report["tiles_run"] > 0 for report in reports[::2]] == [False, True]
        assert reports[0]["pixels_kept"] == 600 * WIDTH
        for name in ("classes", "unseen", "holes", "warnings", "valid_pixels"):
            assert reports[0][name] == reports[2][name]
        for output, table in zip(several.outputs, tables, strict=True):
            short_job.check(output, another=True)
            assert output.with_suffix(".csv").read_bytes() == table
    before = {file: file.stat().st_mtime_ns for file in several.maps.glob("*.[tc]*[fv]")}
    assert forks.run(*several.command) == 0, forks.err
    assert forks.err.count("is done: the same job made it.") == 3
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("map", r"a_map.tif exists. Choose"),
        ("table", r"a_map.csv exists. Choose"),
        ("option", r"a_map.tif exists, and was made with another --blend"),
        ("scene", r"a_map.tif exists, and was made with another state of the scene"),
    ],
)
def test_what_is_no_work_of_the_same_job_is_refused_and_not_touched(
    several: Several, short_job: Job, change: str, said: str
) -> None:
    options: dict[str, Any] = {"derived": {"area": ".csv"}}

    def run() -> None:
        predict_scenes(
            several.scenes,
            short_job.model,
            several.maps,
            options=PredictOptions(**options),
            progress=stop_after(3),  # in the second scene
        )

    with pytest.raises(Enough):
        run()
    first = several.outputs[0]
    if change == "option":
        options["blend"] = "flat"
    elif change == "scene":
        os.utime(several.scenes[0])
    else:
        (first if change == "map" else first.with_suffix(".csv")).write_text("not ours")
    before = {file: file.read_bytes() for file in several.maps.rglob("*") if file.is_file()}
    with pytest.raises(OutputError, match=said):
        run()
    after = {file: file.read_bytes() for file in several.maps.rglob("*") if file.is_file()}
    if change == "map":  # whose journal went
        before = {file: text for file, text in before.items() if file.parent != folder_of(first)}
    assert after == before
    options["overwrite"] = True
    with pytest.raises(Enough):
        run()


def test_a_scene_that_cannot_be_mapped_is_left_out_on_demand_and_made_later(
    several: Several, short_job: Job, forks: Forks
) -> None:
    second = several.scenes[1]
    content = second.read_bytes()
    second.write_bytes(content[:100])
    assert forks.run(*several.command) == 1
    assert list(several.maps.iterdir()) == []
    assert forks.run(*several.command, "--on-error", "skip") == 3
    reports = json.loads(forks.out)
    assert [report["scene"] for report in reports] == [str(scene) for scene in several.scenes]
    assert ["error" in report for report in reports] == [False, True, False]
    assert f"{second} is left out: {reports[1]['error']}" in forks.err
    second.write_bytes(content)
    assert forks.run(*several.command, "--on-error", "skip") == 0, forks.err
    assert [report["tiles_run"] > 0 for report in json.loads(forks.out)] == [False, True, False]
    for output in several.outputs:
        short_job.check(output, another=True)


def test_a_command_that_left_a_scene_out_leaves_no_folder_and_maps_no_good_scene_again(
    several: Several, short_job: Job, forks: Forks
) -> None:
    several.scenes[1].write_bytes(b"no raster")
    skipping = [*several.command, "--on-error", "skip"]
    assert forks.run(*skipping) == 3
    made = {file: file.stat().st_mtime_ns for file in several.maps.iterdir()}
    assert sorted(file.name for file in made) == [
        f"{name}_map.{kind}" for name in "ac" for kind in ("csv", "tif", "tif.aux.xml")
    ]
    # With the bad scene still there, and without it.
    without = [each for each in several.command if each != several.scenes[1]]
    for command, status in ((skipping, 3), (without, 0)):
        assert forks.run(*command) == status
        reports = [report for report in json.loads(forks.out) if "error" not in report]
        assert [(report["was_there"], report["tiles_run"]) for report in reports] == [(True, 0)] * 2
        found = {file: file.stat().st_mtime_ns for file in several.maps.iterdir()}
        assert {file: found[file] for file in made if file.suffix != ".xml"} == {
            file: time for file, time in made.items() if file.suffix != ".xml"
        }
        assert found.keys() == made.keys()


@pytest.mark.parametrize(("error", "kept"), [(SourceError, False), (KeyboardInterrupt, True)])
def test_parts_go_where_the_scene_is_left_out_for_good_and_stay_where_the_run_is_stopped(
    tmp_path: Path, error: type[BaseException], kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "map.tif"

    def begin_and_fail() -> None:
        with Journal(output, {"job": "any"}, parts=2, useless_after=(SourceError,)) as journal:
            journal.save(0, {"part": b"whole"}, {})
            raise error

    with pytest.raises(error):
        begin_and_fail()
    assert folder_of(output).exists() == kept
    assert bool(caplog.messages) == kept


def test_where_no_scene_can_be_mapped_the_command_fails(several: Several, forks: Forks) -> None:
    for scene in several.scenes:
        scene.write_bytes(b"no raster")
    assert forks.run(*several.command, "--on-error", "skip") == 1
    assert len(json.loads(forks.out)) == 3
    assert list(several.maps.iterdir()) == []


# The same command again.


def test_a_map_that_the_same_job_made_is_done_and_its_report_says_so(
    short_job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "map.tif"
    first = short_job.predict(output)
    assert not first.was_there
    before = output.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        again = short_job.predict(output)
    assert caplog.messages == [DONE]
    assert again.was_there
    assert "made by the same job before: nothing was mapped" in str(again)
    assert "stopped" not in str(again)
    numbers = {"classes", "unseen", "valid_pixels", "nodata_pixels", "warnings"}
    assert again.model_dump(include=numbers) == first.model_dump(include=numbers)
    assert output.stat().st_mtime_ns == before
    short_job.check(output)
    anew = short_job.predict(output, options=PredictOptions(overwrite=True))
    assert (anew.was_there, anew.pixels_kept) == (False, 0)
    assert output.stat().st_mtime_ns > before
    short_job.check(output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("option", "map.tif exists, and was made with another --blend"),
        ("scene", "map.tif exists, and was made with another state of the scene"),
        ("map", "map.tif exists. Choose"),
        ("note", "map.tif exists. Choose"),
        ("names", "map.tif exists. Choose"),
    ],
)
def test_a_finished_map_of_another_job_or_none_is_refused_and_not_touched(
    short_job: Job, tmp_path: Path, change: str, said: str
) -> None:
    scene, output = tmp_path / "scene.tif", tmp_path / "map.tif"
    names = output.with_name("map.tif.aux.xml")
    shutil.copy2(short_job.scene, scene)
    predict(scene, short_job.model, output)
    if change == "scene":
        os.utime(scene)
    elif change == "map":
        output.write_bytes(output.read_bytes() + b"\0")
    elif change == "note":
        names.write_bytes(names.read_bytes().replace(b"moving", b"moved!"))
    elif change == "names":
        names.unlink()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    options = PredictOptions(blend="flat" if change == "option" else "cosine")
    with pytest.raises(OutputError, match=said):
        predict(scene, short_job.model, output, options=options)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_finished_map_tells_nobody_where_its_scene_lay(short_job: Job, tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    short_job.predict(output)
    told = output.read_bytes() + output.with_name("map.tif.aux.xml").read_bytes()
    assert b"GEODEPLOY_JOURNAL" in told
    for path in (short_job.scene.parent, short_job.model.parent, tmp_path):
        assert str(path).encode() not in told


# Two at once.


def test_a_second_run_of_the_same_map_is_refused_in_one_line(short_job: Job, tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    refused: list[str] = []

    def second(_: int, __: int) -> None:
        with pytest.raises(OutputError) as error:
            short_job.predict(tmp_path / "." / "map.tif")
        refused.append(str(error.value))

    assert short_job.predict(output, progress=second).pixels_kept == 0
    assert len(refused) == 2
    assert refused[0] == (
        f"{output} is being written by another run. Wait for it, or choose another place with -o."
    )
    short_job.check(output)


def test_a_folder_is_held_by_one_at_a_time_however_often_it_comes_and_goes(tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    inside: list[int] = []
    turns = [0] * 4

    def work(worker: int) -> None:
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            try:
                with Journal(output, {"worker": "any"}, parts=2) as journal:
                    inside.append(worker)
                    assert inside == [worker]
                    journal.save(0, {"part": b"whole"}, {})
                    assert (journal.folder / "part").read_bytes() == b"whole"
                    inside.remove(worker)
                    journal.remove()
                turns[worker] += 1
            except OutputError:
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
    assert sum(turns) > 20
    assert list(tmp_path.iterdir()) == []


# Where the folder of the parts cannot be what it should.


def test_a_folder_that_leads_elsewhere_is_not_touched(short_job: Job, tmp_path: Path) -> None:
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "map.tif"
    elsewhere.mkdir()
    (elsewhere / "dear").write_text("me")
    folder_of(output).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="cannot be written"):
        short_job.predict(output)
    assert [file.name for file in elsewhere.iterdir()] == ["dear"]


def test_only_what_a_finished_run_left_is_cleared(short_job: Job, tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    begin(short_job, output, 1)
    settle(output)
    assert noted(output) == [0]  # no map, so not finished
    output.write_text("a map of before")
    settle(output)
    assert noted(output) == [0]  # a run with --overwrite that was stopped
    journal = folder_of(output) / "journal.jsonl"
    with journal.open("a") as lines:
        lines.write('{"moving": {"names": "map.tif.aux.xml", "class.tif": "map.tif"}}\n')
    (folder_of(output) / "class.tif").write_text("moved late")  # the names were moved before
    settle(output)
    assert output.read_text() == "moved late"
    assert not folder_of(output).exists()
    settle(output)


# What goes wrong in the middle.


def test_nan_in_a_later_tile_ends_the_run_with_its_place_and_keeps_the_parts(
    make_model: Make,
    make_spec: Make,
    make_raster: MakeRaster,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pixels = np.full((2, 2000, WIDTH), 0.3, np.float32)
    pixels[0, 1500, 90] = 3e38
    scene = make_raster(tmp_path / "scene.tif", pixels, names=TWO)
    model = make_model(
        tmp_path / "m.onnx", make_spec(TWO), weights=[np.full((4, 2, 1, 1), 5, np.float32)]
    )
    output = tmp_path / "map.tif"
    with pytest.raises(ModelError, match="NaN or infinity for the tile at row 1440, column 36"):
        predict(scene, model.path, output)
    assert noted(output) == [0, 1]
    assert caplog.messages == ["map.tif: 2 of 4 parts kept; the same command goes on from there."]
    assert not output.exists()


def test_a_scene_that_breaks_off_keeps_the_parts_and_goes_on_once_it_is_whole_again(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene, output, quiet = tmp_path / "scene.tif", tmp_path / "map.tif", tmp_path / "quiet.tif"
    copy(job.scene, scene, driver="COG", blocksize=128, overviews="none")
    predict(scene, job.model, quiet)
    whole, times = scene.read_bytes(), scene.stat()
    middle = len(whole) * 42 // 100  # not where the range of the values is sampled
    # Not a bit of its size or time changes, as when a disk has a bad sector.
    scene.write_bytes(whole[:middle] + b"\xff" * 30_000 + whole[middle + 30_000 :])
    os.utime(scene, ns=(times.st_atime_ns, times.st_mtime_ns))
    threads = threading.active_count()
    with pytest.raises(SourceError, match=r"scene\.tif: rows .* cannot be read"):
        predict(scene, job.model, output)
    assert threading.active_count() == threads
    parts = noted(output)
    assert 1 <= len(parts) < PARTS
    assert caplog.messages[-1].startswith(f"map.tif: {len(parts)} of 12 parts kept;")
    scene.write_bytes(whole)
    os.utime(scene, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert predict(scene, job.model, output).pixels_kept == len(parts) * 528 * WIDTH
    assert output.read_bytes() == quiet.read_bytes()


class Scarce(np.ndarray[Any, Any]):
    """What a model answers; the thread that blends finds no memory to work on it."""

    def __array_ufunc__(self, ufunc: Any, method: str, *given: Any, **more: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise MemoryError("Unable to allocate 1 GiB")
        plain = [np.asarray(each) for each in given]
        if "out" in more:
            more["out"] = tuple(np.asarray(each) for each in more["out"])
        return getattr(ufunc, method)(*plain, **more)


class Short:
    """A session that finds no memory in its 20th batch, or whose answer then finds none."""

    def __init__(self, session: Session, stage: str) -> None:
        self._session, self._stage, self._runs = session, stage, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, pixels: Any) -> Any:
        self._runs += 1
        if self._runs == 20 and self._stage == "model":
            raise MemoryError("Unable to allocate 1 GiB")
        found = self._session.run(pixels)
        return found.view(Scarce) if self._runs == 20 and self._stage == "blending" else found


class ShortDataset:
    """A raster that GDAL finds no memory to decode from its 3000th row on."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._dataset.close()

    def read(self, *given: Any, window: Any, **more: Any) -> Any:
        if window.row_off >= 3000 and window.height > 64:  # not where the range of values is sampled
            cause = CPLE_OutOfMemoryError(3, 2, "rasterblock.cpp, 1: cannot allocate 1073741824 bytes")
            raise RasterioIOError("Read failed") from cause
        return self._dataset.read(*given, window=window, **more)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("stage", ["reading", "model", "blending"])
def test_a_run_without_memory_ends_at_once_in_one_true_line_and_goes_on_later(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, on_error: Any
) -> None:
    output, options = tmp_path / "map.tif", PredictOptions(on_error=on_error, device="cpu")
    opened = rasterio.open

    def short_open(name: Any, *given: Any, **more: Any) -> Any:
        dataset = opened(name, *given, **more)
        return ShortDataset(dataset) if Path(name) == job.scene else dataset

    threads = threading.active_count()
    session = Short(open_session(job.model), stage)
    with monkeypatch.context() as patched:
        if stage == "reading":
            patched.setattr("rasterio.open", short_open)
        with pytest.raises(MemoryLimitError) as caught:
            map_scene(job.scene, session, output, options, None)
    session.close()
    assert threading.active_count() == threads
    asked = "1024 MiB more were asked for" if stage == "reading" else "Unable to allocate 1 GiB"
    told = str(caught.value)
    assert told.startswith(f"Memory ran out while scene.tif was mapped ({asked}). "), told
    assert re.search(r"\d+ MiB were planned beyond the model's own", told), told
    assert "Take a --batch of less than 8, which changes no byte of the map" in told
    assert "\n" not in told
    parts = noted(output)
    assert 1 <= len(parts) < PARTS
    assert job.predict(output, options=options).pixels_kept == len(parts) * 528 * WIDTH
    job.check(output)


def test_a_model_that_asks_for_more_than_there_is_is_told_as_want_of_memory(
    short_job: Job, make_model: Make, make_spec: Make, tmp_path: Path, forks: Forks
) -> None:
    import onnx

    model = onnx.load(make_model(tmp_path / "m.onnx", make_spec(TWO)).path)
    # The greatest of the first pixel of a tile, four times ten to the sixteen bytes of it.
    nodes = [
        onnx.helper.make_node("ReduceMax", ["pixels"], ["one"], keepdims=0),
        onnx.helper.make_node("Expand", ["one", "many"], ["all"]),
        onnx.helper.make_node("ReduceMax", ["all"], ["max"], keepdims=0),
        onnx.helper.make_node("Add", ["fewer", "max"], ["logits"]),
    ]
    model.graph.node[-1].output[0] = "fewer"
    model.graph.node.extend(nodes)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.array([10**8, 10**8], np.int64), "many")
    )
    onnx.save(model, tmp_path / "m.onnx")
    output = tmp_path / "map.tif"
    command = ["predict", short_job.scene, "-m", tmp_path / "m.onnx", "-o", output]
    for skip in ([], ["--on-error", "skip"]):
        assert forks.run(*command, "--runtime", "onnxruntime", *skip) == 1
        asked = "38146972656 MiB more were asked for"
        assert f"error: Memory ran out while scene.tif was mapped ({asked}). " in forks.err
        assert len(forks.err.splitlines()) == 1
        assert not folder_of(output).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemError])
def test_a_run_that_ends_while_its_parts_are_joined_has_no_more_tiles_to_run(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    output = tmp_path / "map.tif"

    def half(_: Path, target: Path, **__: Any) -> None:
        target.write_bytes(job.map[:1000])
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("geodeploy.cog.rasterio_copy", half)
        with pytest.raises(OutputError if error is SystemError else error):
            job.predict(output)
    assert noted(output) == list(range(PARTS))
    assert not output.exists()
    report = job.predict(output)
    assert (report.tiles_run, report.tiles_skipped) == (0, 0)
    assert report.pixels_kept == HEIGHT * WIDTH
    job.check(output)


def test_parts_that_nobody_could_go_on_with_are_not_spoken_of(
    job: Job, make_raster: MakeRaster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = make_raster(tmp_path / "labels.tif", np.zeros((1, HEIGHT, WIDTH), np.uint8), names=[None])
    with pytest.raises(Enough):
        evaluate(job.model, job.scene, labels, progress=stop_after(2))
    assert caplog.messages == []


FULL = """
import json, subprocess, sys
from pathlib import Path

disk, bytes_, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", disk], check=True)
def run():
    done = subprocess.run(command, capture_output=True, text=True)
    files = {file.name: file.read_bytes().hex() for file in Path(disk).rglob("*") if file.is_file()}
    return done.returncode, done.stderr, files
first = run()
subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
print(json.dumps([first, run()]))
"""
"""Maps to a disk of so many bytes, and again when it has grown."""


@pytest.fixture(scope="module")
def own_disks() -> list[str]:
    """What to put before a command that may mount disks of its own, where the system lets one."""
    command = ["unshare", "-Urm"]
    probe = [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if (
        not shutil.which("unshare")
        or subprocess.run(probe, capture_output=True, check=False).returncode
    ):
        pytest.skip("no disk can be mounted here without root")
    return command


@pytest.mark.parametrize("step", ["first part", "parts", "join"])
def test_a_full_disk_is_told_and_the_same_command_goes_on_when_there_is_room(
    job: Job, own_disks: list[str], tmp_path: Path, step: str
) -> None:
    page = 4096
    held = {"first part": 2 * page, "parts": len(job.map) // 2, "join": len(job.map) * 3 // 2}[step]
    command = [sys.executable, "-m", "geodeploy", "predict", job.scene, "-m", job.model]
    done = subprocess.run(
        [
            *own_disks,
            sys.executable,
            "-c",
            FULL,
            tmp_path,
            str(held),
            *command,
            "-o",
            tmp_path / "map.tif",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (status, err, files), (status_then, err_then, files_then) = json.loads(done.stdout)
    assert status == 1
    *kept, error = err.splitlines()
    assert error.startswith("error: ")
    assert "map.tif cannot be written" in error
    parts = sum(name.startswith("part-") for name in files)
    assert {"first part": parts == 0, "parts": 0 < parts < PARTS, "join": parts == PARTS}[step]
    if parts:
        assert kept[-1] == f"map.tif: {parts} of 12 parts kept; the same command goes on from there."
        assert files.keys() == {"lock", "journal.jsonl", *(f"part-{n:05}.tif" for n in range(parts))}
        assert err_then == f"Going on with map.tif: {parts} of 12 parts done.\n"
    else:
        assert (kept, files, err_then) == ([], {}, "")
    assert status_then == 0
    assert {name: bytes.fromhex(content) for name, content in files_then.items()} == {
        "map.tif": job.map,
        "map.tif.aux.xml": job.names,
    }


LIMITED = """
import resource, sys
from geodeploy.cli import main
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.mark.parametrize("step", ["first part", "join"])
def test_a_file_that_may_not_grow_is_told_as_a_full_disk_is(
    job: Job, tmp_path: Path, step: str
) -> None:
    limit = {"first part": 3000, "join": len(job.map) * 2 // 3}[step]
    command = [sys.executable, "-c", LIMITED, str(limit), "predict", job.scene, "-m", job.model]
    output = tmp_path / "map.tif"
    done = subprocess.run([*command, "-o", output], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "map.tif cannot be written" in done.stderr.splitlines()[-1]
    assert noted(output) == list(range(PARTS if step == "join" else 0))
    assert not output.exists()
    job.predict(output)
    job.check(output)


# However it is cut.


@settings(max_examples=15)
@given(
    data=st.data(),
    overlap=st.one_of(st.integers(0, 15), st.sampled_from([0, 15])),
    blend=st.sampled_from(["cosine", "flat", "crop"]),
    panel_bytes=st.integers(1, 60_000),
    part_rows=st.integers(1, 100),
    batch=st.integers(1, 40),
)
def test_panels_parts_batches_threads_and_blocks_change_no_byte_of_the_map(
    make_model: Make,
    make_spec: Make,
    make_raster: MakeRaster,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    overlap: int,
    blend: Any,
    panel_bytes: int,
    part_rows: int,
    batch: int,
) -> None:
    place = tmp_path_factory.mktemp("cut")
    height, width = data.draw(st.integers(1, 60), "height"), data.draw(st.integers(1, 60), "width")
    pixels = np.random.default_rng(height).uniform(0, 0.6, (2, height, width)).astype(np.float32)
    pixels[:, : height // 3, width // 2 :] = np.nan
    spec = make_spec(TWO, tile=16, overlap=overlap, seen=(0.1, 0.5))
    model = make_model(place / "model.onnx", spec, kernels=(3, 3)).path
    scene = make_raster(place / "scene.tif", pixels, names=TWO)
    beside = {"confidence": True, "probabilities": True, "disagreement": overlap and blend != "crop"}
    options = PredictOptions(blend=blend, batch=64, **beside)
    whole = predict(scene, model, place / "whole.tif", options=options)
    side = data.draw(st.sampled_from([16, 32]), "block")
    scene = make_raster(
        place / "blocks.tif", pixels, names=TWO, tiled=True, blockxsize=side, blockysize=side
    )
    options = PredictOptions(
        blend=blend,
        batch=batch,
        readers=data.draw(st.integers(1, 4), "readers"),
        threads=data.draw(st.integers(1, 3), "threads"),
        **beside,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("geodeploy.engine.PANEL_BYTES", panel_bytes)
        patched.setattr("geodeploy.parts.ROWS", part_rows)
        patched.setattr("geodeploy.raster._STRIPE_ROWS", data.draw(st.integers(1, 64), "stripe"))
        stop = data.draw(st.integers(1, 20), "stop")
        try:
            predict(scene, model, place / "cut.tif", options=options, progress=stop_after(stop))
        except Enough:
            cut = predict(scene, model, place / "cut.tif", options=options)
            assert cut.unseen == whole.unseen
            assert cut.classes == whole.classes
    for ending in (".tif", *(f"_{name}.tif" for name in options.beside)):
        assert (place / f"cut{ending}").read_bytes() == (place / f"whole{ending}").read_bytes()
