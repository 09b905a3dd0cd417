import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

HEAVY = ["rasterio", "torch", "pydantic", "onnxruntime", "numpy", "matplotlib", "dask"]
COMMANDS = ["data", "train", "distil", "evaluate", "export", "predict", "inspect", "doctor", "demo"]
Make = Callable[..., Any]


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "geodeploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def cpu_s(*arguments: str) -> float:
    """Processor time of a fresh interpreter, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_costs_less_than_three_tenths_of_a_second_beyond_the_interpreter() -> None:
    bare = min(cpu_s("-c", "pass") for _ in range(3))
    assert min(cpu_s("-m", "geodeploy", "--help") for _ in range(3)) - bare < 0.3


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = f"""
import sys
sys.argv[1:] = {arguments!r}
from geodeploy.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print("imported:", *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Typer itself takes pydantic for a command's options, where it finds it.
    assert set(done.stderr.split()) - {"pydantic"} == {"imported:"}
    assert "pydantic" not in done.stderr or arguments != ["--help"]
    assert "Usage: " in done.stdout


def test_every_command_is_listed_and_says_what_it_does() -> None:
    out = run("-h").stdout
    for name in COMMANDS:
        assert f"  {name} " in out
    assert run().returncode == 2  # no command at all is wrong usage, with the help


def test_the_version_is_that_of_the_distribution() -> None:
    assert run("--version").stdout == f"geodeploy {version('geodeploy-eo')}\n"


def test_the_command_and_the_module_are_the_same() -> None:
    (script,) = entry_points(group="console_scripts", name="geodeploy")
    assert script.value == "geodeploy.cli:main"


def test_json_is_one_document_on_stdout_and_nothing_else_is(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    done = run("predict", small_scene, "-m", pointwise.path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["map"] == "small_map.tif"
    assert report["tiles_run"] == 6
    assert {item["name"] for item in report["classes"]} == {f"class {n}" for n in (0, 1, 3, 4)}
    assert done.stderr == ""


def test_the_report_is_text_for_people_without_json(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    done = run("predict", small_scene, "-m", pointwise.path, cwd=tmp_path)
    assert done.stdout.startswith("small_map.tif: 100 x 130 pixels in ")
    assert "class 4" in done.stdout
    assert "km²" in done.stdout


def test_several_scenes_give_a_list_of_reports(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "twin.tif"
    twin.write_bytes(small_scene.read_bytes())
    arguments = [small_scene, twin, "-m", pointwise.path, "-o", ".", "--json"]
    done = run("predict", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [Path(report["map"]).name for report in json.loads(done.stdout)] == [
        "small_map.tif",
        "twin_map.tif",
    ]


def test_options_reach_the_run(pointwise: Any, small_scene: Path, tmp_path: Path) -> None:
    options = "--overlap 20 --blend crop --batch 3 --device cpu --scale 0.5 --offset 0.1 --json"
    bands = "blue, green,red,4,5,swir22"
    command = ["predict", small_scene, "-m", pointwise.path, "--bands", bands, *options.split()]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["overlap"], report["blend"], report["batch"]) == (20, "crop", 3)
    others = [*command, "--overlap", "10"]
    assert run(*others, cwd=tmp_path).returncode == 1  # the map exists
    assert run(*others, "--overwrite", cwd=tmp_path).returncode == 0


def test_progress_is_shown_on_a_terminal_only(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "geodeploy", "predict", small_scene, "-m", pointwise.path]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "100 %" in shown
    assert b"%\r" not in done.stdout
    assert b"[#" not in done.stdout


def test_output_that_nobody_reads_any_more_is_no_traceback(
    pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "geodeploy", "predict", small_scene, "-m", pointwise.path]
    done = subprocess.run(
        list(map(str, command)),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    os.close(writer)
    assert done.stderr == ""
    assert (tmp_path / "small_map.tif").exists()


# The Python side of the same verbs.


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "imports",
    [
        "import geodeploy",
        "import geodeploy.predict",
        "import geodeploy.predict, geodeploy.raster, geodeploy.tiles",
        "from geodeploy.predict import PredictOptions; import geodeploy",
        "import geodeploy; from geodeploy import predict; import geodeploy.predict",
        "from geodeploy.predict import predict as same; import geodeploy; "
        "assert geodeploy.predict is same",
    ],
)
def test_predict_is_the_function_whichever_way_it_was_imported(imports: str) -> None:
    done = python(f"{imports}; import types; assert type(geodeploy.predict) is types.FunctionType")
    assert done.returncode == 0, done.stderr


def test_every_promised_name_is_there_and_is_no_module() -> None:
    script = (
        "import geodeploy, types\n"
        "for name in geodeploy.__all__:\n"
        "    assert not isinstance(getattr(geodeploy, name), types.ModuleType), name\n"
        "try: geodeploy.nothing\n"
        "except AttributeError as error: print(error)"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'geodeploy' has no attribute 'nothing'\n"


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = python(f"import geodeploy, sys; print(set({HEAVY!r}) & set(sys.modules))")
    assert done.stdout == "set()\n"


def test_memory_that_runs_out_is_one_line() -> None:
    script = """
import sys
from geodeploy.cli import app, main
app.command("hungry")(lambda: bytes(2**62))
sys.argv[1:] = ["hungry"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: Memory ran out. Give the command more, or less to do.\n"
