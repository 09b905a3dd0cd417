"""A training that was stopped goes on to the weights it would have had."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rasterio
import torch
from safetensors.torch import load_file, save_file

from geodeploy.errors import ModelError, RecipeError
from geodeploy.train import train
from geodeploy.train.backbone import build_backbone
from geodeploy.train.checkpoint import Checkpoint
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import load_run

LONG = ("training.steps=24", "training.validate_every=2", "training.schedule=plateau")
CHECKPOINT = ".run.resume.safetensors"


def same_weights(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_killed_and_gone_on_with_has_the_weights_of_an_undisturbed_one(
    recipe_file: Path, tmp_path: Path, tune: Callable[..., Path]
) -> None:
    undisturbed = tune(*LONG)
    sets = [part for key in LONG for part in ("--set", key)]
    command = [sys.executable, "-m", "geodeploy", "train", str(recipe_file), "-o", "run", "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *sets], cwd=tmp_path, env=environment)
    until = time.monotonic() + 300
    while not (tmp_path / CHECKPOINT).exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run").exists()

    again = subprocess.run(
        [*command, *sets], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "Going on after step" in again.stderr
    same_weights(undisturbed, tmp_path / "run")
    assert not (tmp_path / CHECKPOINT).exists()


class StoppedError(Exception):
    """In place of a kill, in this process."""


@pytest.mark.parametrize(
    "method",
    [
        ("method.name=lora", "method.dropout=0.2"),  # draws from PyTorch's generator
        ("method.name=adalora", "method.init_r=6", "method.target_r=3"),
        ("method.name=pissa", "training.accumulate=2"),
        ("method.name=vit_adapter", "method.channels=4", "model.decoder_channels=[8, 8, 8]"),
    ],
    ids=lambda method: method[0],
)
def test_whatever_a_method_keeps_between_steps_is_kept(
    recipe_file: Path,
    tmp_path: Path,
    tune: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    method: tuple[str, ...],
) -> None:
    overrides = ("training.steps=8", "training.validate_every=2", *method)
    written = []
    write = Checkpoint.write

    def stopping(*arguments: object) -> None:
        write(*arguments)
        written.append(1)
        if len(written) == 2:
            raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", stopping)
        with pytest.raises(StoppedError):
            train(recipe_file, tmp_path / "run", overrides=overrides, resume=True)
    report = train(recipe_file, tmp_path / "run", overrides=overrides, resume=True)
    assert report.metrics.steps == 8
    assert [check.step for check in report.metrics.history] == [2, 4, 6, 8]
    same_weights(tune(*overrides), tmp_path / "run")


def change_image(folder: Path) -> None:
    with rasterio.open(folder / "image.tif", "r+") as image:
        image.write(image.read()[:, ::-1])


def change_labels(folder: Path) -> None:
    with rasterio.open(folder / "labels.tif", "r+") as labels:
        labels.write(labels.read()[:, ::-1])


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "vit.safetensors")
    tensors["pos_embed"] += 0.5
    save_file(tensors, folder / "vit.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_image, "another state of the images"),
        (change_labels, "another state of the labels"),
        (change_weights, "another file of weights"),
    ],
)
def test_a_training_whose_data_or_weights_have_changed_since_starts_afresh_and_says_so(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    told: str,
) -> None:
    folder = tmp_path / "data"
    recipe_file = Path(shutil.copytree(recipe_file.parent, folder)) / recipe_file.name
    recipe = load_recipe(recipe_file)
    vit = build_backbone(recipe.model, recipe.data.bands).encoder
    save_file(vit.state_dict(), folder / "vit.safetensors")
    weights = f"model.weights={folder / 'vit.safetensors'}"
    overrides = ("training.steps=4", "training.validate_every=2", weights)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "remove", lambda self: None)
        train(recipe_file, tmp_path / "first", overrides=overrides, resume=True)
    (tmp_path / ".first.resume.safetensors").rename(tmp_path / CHECKPOINT)
    change(folder)
    train(recipe_file, tmp_path / "run", overrides=overrides, resume=True)
    assert f"{CHECKPOINT} was begun with {told}: starting afresh." in caplog.text
    assert "Going on" not in caplog.text
    train(recipe_file, tmp_path / "undisturbed", overrides=overrides)
    same_weights(tmp_path / "undisturbed", tmp_path / "run")
    # What the network normalises by is what the description says.
    run = load_run(tmp_path / "run")
    torch.testing.assert_close(run.model.mean.ravel(), torch.tensor([b.mean for b in run.spec.bands]))


def test_a_checkpoint_of_another_recipe_or_a_broken_one_is_refused(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "remove", lambda self: None)
        train(recipe_file, tmp_path / "run", overrides=["training.steps=1"], resume=True)
    (tmp_path / "run").rename(tmp_path / "first")
    with pytest.raises(RecipeError, match="is of a training with another recipe"):
        train(recipe_file, tmp_path / "run", overrides=["training.steps=2"], resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"junk")
    with pytest.raises(ModelError, match="Remove it to start again"):
        train(recipe_file, tmp_path / "run", overrides=["training.steps=1"], resume=True)
    # Nobody asks for it without the flag.
    train(recipe_file, tmp_path / "run", overrides=["training.steps=1"])
