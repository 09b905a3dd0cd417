"""Several processes train what one would have trained, and end together."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geodeploy.errors import GeodeployError, ProcessError, RecipeError
from geodeploy.spec import ModelSpec
from geodeploy.train import loop, train
from geodeploy.train.augment import training_batches
from geodeploy.train.checkpoint import Checkpoint
from geodeploy.train.data import open_scenes
from geodeploy.train.processes import run_in_processes
from geodeploy.train.recipe import load_recipe

LONG = ("training.steps=9", "training.validate_every=3", "training.batch=4", "training.lovasz=1")
"""Three losses over a decoder with batch normalisation: nothing is a sum over tiles."""

KILLED = """
import os, signal, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""
"""One is killed, and the other would wait for it."""


def same_weights(one: Path, other: Path) -> None:
    names = {path.name for path in one.glob("*.safetensors")}
    assert names == {path.name for path in other.glob("*.safetensors")}
    for name in names:
        torch.testing.assert_close(load_file(one / name), load_file(other / name), rtol=0, atol=1e-5)


class StoppedError(Exception):
    """In place of a kill."""


def test_two_processes_go_on_where_one_stopped_and_find_the_weights_that_one_finds(
    recipe_file: Path, tmp_path: Path, tune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoint.write

    def stopping(*arguments: object) -> None:
        write(*arguments)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", stopping)
        with pytest.raises(StoppedError):
            train(recipe_file, tmp_path / "run", overrides=LONG, resume=True)
    done = subprocess.run(
        [
            sys.executable, "-m", "geodeploy", "train", str(recipe_file), "-o", "run", "--resume",
            "--processes", "2", *(part for key in LONG for part in ("--set", key)),
        ],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    _, begun, *steps = done.stderr.splitlines()
    assert begun == "Going on after step 3 of 9."
    assert [line.split(":")[0] for line in steps] == ["step 6 of 9", "step 9 of 9"]
    assert done.stdout.count("RUN: run") == 1
    assert "on 2 times cpu" in done.stdout
    assert not (tmp_path / ".run.resume.safetensors").exists()
    same_weights(tune(*LONG), tmp_path / "run")


def test_the_answer_is_that_of_the_first_process() -> None:
    assert run_in_processes(3, partial(os.getenv, "RANK")) == "0"


@pytest.mark.parametrize(
    ("work", "error", "words"),
    [
        (partial(ModelSpec.read, Path("gone.json")), GeodeployError, r"gone\.json"),
        (partial(os._exit, 3), ProcessError, "Process [12] of 2 was ended by exit code 3"),
        (partial(int, "one"), RuntimeError, "ValueError: invalid literal"),
        (partial(exec, KILLED), ProcessError, "Process 2 of 2 was ended by SIGKILL"),
    ],
    ids=["told", "vanished", "crashed", "killed"],
)
def test_what_goes_wrong_in_a_process_is_raised_here_once(
    work: Callable[[], object], error: type[Exception], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=words):
        run_in_processes(2, work)
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_cannot_be_shared_evenly_is_refused_by_its_key(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three:
        num_processes = 3

    monkeypatch.setattr(loop, "_accelerator", lambda training: Three())
    gone = ["data.scene.0.image=gone.tif", "training.batch=4"]
    with pytest.raises(RecipeError, match="4 tiles cannot be shared evenly by 3 processes; take"):
        train(recipe_file, tmp_path / "run", overrides=gone)


def test_tiles_are_the_same_however_a_batch_is_shared(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.batch=4"])
    mean = np.full(6, 0.2, np.float32)
    with open_scenes(recipe) as scenes:
        whole = next(training_batches(scenes, recipe, mean))
        for share in (slice(0, 2), slice(2, 4)):
            part = next(training_batches(scenes, recipe, mean, share=share))
            assert torch.equal(part.pixels, whole.pixels[share])
            assert torch.equal(part.labels, whole.labels[share])
            assert part.sampler == whole.sampler
