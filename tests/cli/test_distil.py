import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Any]
SHORT = ("--set", "training.steps=2", "--set", "method.name=full", "--set", "training.validate_every=1")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, make_model: Make, make_spec: Make) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    make_model(path, make_spec(values=(0, 1, 2), tile=32, overlap=8))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "geodeploy", "distil", *map(str, arguments)]


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, cwd=folder, env=ONE_THREAD
    )


def test_help_says_what_a_teacher_is(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    for words in ("RECIPE.toml", "--teacher", "--set", "--json", "several are averaged"):
        assert words in done.stdout


def test_json_is_the_report_and_the_log_says_what_was_mapped(
    recipe_file: Path, tmp_path: Path, teacher: Path
) -> None:
    arguments = ("--teacher", teacher, "--teacher", teacher, "-o", "run", "--json")
    done = run(tmp_path, recipe_file, *arguments, *SHORT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["run"] == "run"
    assert report["metrics"]["steps"] == 2
    assert (tmp_path / "run" / "head.safetensors").exists()
    assert "teacher.onnx and teacher.onnx mapped 1 scene" in done.stderr


def test_a_teacher_that_is_missing_is_one_line_and_leaves_nothing(
    recipe_file: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, recipe_file, "-o", "run", "--teacher", "gone")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: The model ")
    assert "gone does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_distillation_that_is_stopped_leaves_nothing(
    recipe_file: Path, tmp_path: Path, teacher: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    arguments = (recipe_file, "--teacher", teacher, "-o", runs / "run", *SHORT[2:])
    more = ("--set", "training.steps=100000", "--json")
    with subprocess.Popen(
        command(*arguments, *more), stdout=-1, stderr=-1, text=True, env=ONE_THREAD
    ) as process:
        assert process.stderr is not None
        begun = time.monotonic()
        for line in process.stderr:  # until it trains
            if line.startswith("step 1 of"):
                break
        assert process.poll() is None, f"ended after {time.monotonic() - begun:.0f} s"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "nothing was left half-written" in err
    assert "Traceback" not in err
    assert list(runs.iterdir()) == []
