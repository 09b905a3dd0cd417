"""Memory is a sum that can be told beforehand: held to what runs take, in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from geodeploy import PredictOptions, predict
from geodeploy.errors import MemoryLimitError

Make = Callable[..., Any]
Measure = Callable[..., tuple[int, int]]

BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")

# The same libraries and session as a run has, three batches of the run's size through it, and no more.
BARE = """
import sys
from pathlib import Path
import numpy as np
import geodeploy.predict
from geodeploy.machine import peak_memory_bytes
from geodeploy.runtime import open_session
session = open_session(Path(sys.argv[1]), device="cpu")
spec = session.spec
for _ in range(3):
    session.run(np.zeros((8, len(spec.bands), spec.tile, spec.tile), np.float32))
print(peak_memory_bytes())
"""
RUN = """
import sys, geodeploy
options = geodeploy.PredictOptions(overwrite=True, device="cpu")
report = geodeploy.predict(*sys.argv[1:], options=options)
print([report.peak_memory_bytes, report.planned_memory_bytes])
"""


def result(script: str, *arguments: object) -> Any:
    """What a fresh interpreter prints, as JSON."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory, make_model: Make, make_spec: Make) -> Measure:
    """Measured and planned bytes beyond the bare session, for a scene and so many classes."""
    place = tmp_path_factory.mktemp("memory")

    @cache
    def session(classes: int) -> tuple[Path, int]:
        spec = make_spec(values=range(classes), tile=224, overlap=32)
        path = make_model(place / f"{classes}.onnx", spec).path
        return path, result(BARE, path)

    def measured(scene: Path, classes: int) -> tuple[int, int]:
        model, bare = session(classes)
        peak, planned = result(RUN, scene, model, place / "map.tif")
        return peak - bare, planned

    return measured


def make_scene(
    path: Path, height: int, width: int, bands: Sequence[str], *, gsd: int = 10, **options: Any
) -> None:
    """A scene whose blocks are not written: they read as zeros, in memory like any other."""
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": height, "width": width, "count": len(bands), "dtype": "uint16",
        "crs": "EPSG:32616", "transform": Affine(gsd, 0, 4e5, 0, -gsd, 3e6), "tiled": True,
        "blockxsize": 256, "blockysize": 256, "sparse_ok": True,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile | options) as dataset:
        for index, name in enumerate(bands, 1):
            dataset.set_band_description(index, name)
        dataset.offsets = [0.1] * len(bands)


def check(taken: int, planned: int) -> None:
    assert taken < 2**30
    # The sum is of what may be held at once, and not all of it always is. Not in it are the libraries'
    # buffers, and what the allocator keeps.
    assert 0.6 * planned < taken < 1.25 * planned + 32 * 2**20, f"{taken / planned:.2f} of the plan"


@pytest.mark.parametrize(
    ("height", "width", "classes"),
    [(2600, 10980, 4), (1300, 10980, 20), (1300, 40000, 4), (1300, 40000, 20)],
)
def test_a_run_takes_what_was_planned_and_less_than_a_gibibyte(
    measure: Measure, tmp_path: Path, height: int, width: int, classes: int
) -> None:
    make_scene(tmp_path / "scene.tif", height, width, BANDS, interleave="pixel")
    check(*measure(tmp_path / "scene.tif", classes))


def test_a_run_takes_what_was_planned_over_bands_of_two_sizes_in_tall_blocks(
    measure: Measure, tmp_path: Path
) -> None:
    blocks = {"blockxsize": 1024, "blockysize": 1024}
    for name in BANDS[:4]:
        make_scene(tmp_path / f"{name}.tif", 4096, 10980, [name], **blocks)
    for name in BANDS[4:]:
        make_scene(tmp_path / f"{name}.tif", 2048, 5490, [name], gsd=20, **blocks)
    check(*measure(tmp_path, 4))


def test_a_run_takes_what_was_planned_of_a_file_that_is_one_block(
    measure: Measure, tmp_path: Path
) -> None:
    scene, blocks = tmp_path / "scene.tif", {"tiled": False, "blockysize": 3000, "sparse_ok": False}
    make_scene(scene, 3000, 3000, BANDS, interleave="pixel", compress="deflate", **blocks)
    check(*measure(scene, 4))


def test_a_batch_beyond_the_scene_takes_as_many_tiles_as_there_are(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    options = PredictOptions(batch=1_000_000)
    report = predict(small_scene, pointwise.path, tmp_path / "map.tif", options=options)
    assert report.batch == 2 * 3  # 100 x 130 pixels in tiles of 64 that share 16
    assert report.planned_memory_bytes < 2**27


def test_what_the_machine_cannot_hold_is_refused_before_any_work_and_the_batch_named(
    make_model: Make, make_spec: Make, tmp_path: Path
) -> None:
    make_scene(tmp_path / "scene.tif", 100_000, 100_000, BANDS)
    model = make_model(tmp_path / "m.onnx", make_spec(tile=224, overlap=32)).path
    options = PredictOptions(batch=1_000_000)
    with pytest.raises(
        MemoryLimitError, match=r"would take [\d.]+ GiB .*Take a --batch of less than 27"
    ):
        predict(tmp_path / "scene.tif", model, tmp_path / "map.tif", options=options)
    assert not (tmp_path / "map.tif").exists()


LIMITED = """
import resource, sys
from pathlib import Path
import rasterio
from rasterio.windows import Window
from geodeploy.dataset import reading
with rasterio.open(sys.argv[1]) as dataset:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**24,) * 2)
    try:
        with reading(sys.argv[1], Window(0, 0, 9, 9)):
            dataset.read(1, window=Window(0, 0, 9, 9))
    except MemoryError as error:
        print(repr(str(error)).replace("'", '"'))
"""


def test_a_block_that_finds_no_memory_is_not_the_files_fault(make_raster: Make, tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux says how much address space a process has")
    side = 8192  # one block of 64 MiB, of which 16 may be held
    make_raster(
        tmp_path / "scene.tif", np.ones((1, side, side), np.uint8), names=[], tiled=True,
        blockxsize=side, blockysize=side, compress="deflate",
    )  # fmt: skip
    assert result(LIMITED, tmp_path / "scene.tif") == "64 MiB more were asked for"
