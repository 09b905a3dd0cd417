import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geodeploy.errors import ModelError, RecipeError, SourceError
from geodeploy.train import train
from geodeploy.train.augment import Batch, training_batches
from geodeploy.train.loop import Rates, count_steps
from geodeploy.train.recipe import Training

PYRAMID = [
    "model.backbone=light", "model.options={channels=[4, 4, 4, 4, 4]}",
    "model.decoder_channels=[4, 4, 4, 4]", "method.name=full",
]  # fmt: skip


def rates(**settings: object) -> Rates:
    return Rates(Training(**{"steps": 100, "warmup": 10} | settings), 100, [1.0, 0.1])


def test_cosine_climbs_to_the_highest_rate_and_falls_to_zero() -> None:
    cosine = rates()
    assert cosine.at(1) == pytest.approx([0.1, 0.01])
    assert cosine.at(10) == pytest.approx([1.0, 0.1])
    assert cosine.at(55)[0] == pytest.approx(0.5)
    assert cosine.at(100) == pytest.approx([0, 0], abs=1e-12)


def test_plateau_halves_after_validations_that_were_no_better() -> None:
    plateau = rates(schedule="plateau", plateau_patience=2)
    seen = []
    for miou in (0.5, 0.6, 0.6, 0.5, 0.7, 0.6, 0.6, 0.6, 0.6):
        plateau.note(miou)
        seen.append(plateau.at(50)[0])
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert plateau.stale == 4


def test_epochs_count_windows_of_the_training_area(recipe_file: Path) -> None:
    from geodeploy.train.data import TRAINING, open_scenes
    from geodeploy.train.recipe import load_recipe

    with open_scenes(load_recipe(recipe_file)) as scenes:
        pixels = int((scenes[0].part == TRAINING).sum())
        assert count_steps(Training(epochs=3, batch=2), scenes, 32) == math.ceil(3 * pixels / 32**2 / 2)
        twice = Training(epochs=3, batch=2, accumulate=2)
        assert count_steps(twice, scenes, 32) == math.ceil(3 * pixels / 32**2 / 4)
        assert count_steps(Training(steps=7), scenes, 32) == 7


def test_training_stops_early_when_nothing_gets_better(recipe_file: Path, tmp_path: Path) -> None:
    # With no step to speak of, the second validation is no better than the first.
    report = train(
        recipe_file,
        tmp_path / "run",
        overrides=[
            "training.steps=50", "training.patience=2", "training.lr=1e-12",
            "training.validate_every=1", "method.name=linear", "training.schedule=plateau",
        ],
    )  # fmt: skip
    assert report.metrics.steps < 50


def test_a_loss_that_is_no_number_is_an_error(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"diverged\. Lower training\.lr"):
        train(
            recipe_file,
            tmp_path / "run",
            overrides=["training.lr=1e30", "training.clip=1e30", "training.steps=30"],
        )
    assert list(tmp_path.iterdir()) == []


def test_a_few_steps_make_the_loss_smaller(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["training.steps=30", "training.validate_every=10", "training.lr=1e-2"]
    history = train(recipe_file, tmp_path / "run", overrides=overrides).metrics.history
    assert history[-1].loss < 0.9 * history[0].loss


def test_waiting_for_data_is_told_apart_from_computing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*given: Any, **more: Any) -> Iterator[Batch]:
        for batch in training_batches(*given, **more):
            time.sleep(0.7)  # far longer than a step of a tiny network
            yield batch

    short = ["training.steps=3", "training.validate_every=3"]
    prompt = train(recipe_file, tmp_path / "prompt", overrides=short).metrics
    monkeypatch.setattr(sys.modules["geodeploy.train.loop"], "training_batches", late)
    report = train(recipe_file, tmp_path / "late", overrides=short)
    assert 0 <= prompt.waiting < report.metrics.waiting
    assert report.metrics.waiting > 0.5
    assert f"{report.metrics.waiting:.1%} of the time waiting for data" in str(report)


def test_fp16_on_a_cpu_is_an_error_that_names_what_to_take(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training\.precision = fp16 .* Take bf16 or fp32\."):
        train(recipe_file, tmp_path / "run", overrides=["training.precision=fp16"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_trains_in_bf16_too(recipe_file: Path, tune: Callable[..., Path]) -> None:
    assert (tune("training.precision=bf16") / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.tile=33"], "model.tile: 33 is no multiple of the patch"),
        (["method.targets=['attn.x']"], "no linear layer attn.x"),
        pytest.param(
            ["training.precision=fp16", "training.device=auto"],
            "training.precision = fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        ([*PYRAMID, "method.layer_decay=0.5"], "method.layer_decay: needs a network of timm"),
        ([*PYRAMID, "model.decoder_channels=[4]"], "model.decoder_channels: light has 5 levels"),
        ([*PYRAMID, "training.batch=1"], "training.batch: the network normalises maps of one pixel"),
        (
            ["model.options.patch_size=32", "model.decoder=fcn", "training.batch=1"],
            "training.batch: the network normalises maps of one pixel",
        ),
    ],
)
def test_what_the_recipe_has_wrong_is_told_before_any_image_is_read(
    recipe_file: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    gone = "data.scene.0.image=gone.tif"
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        train(recipe_file, tmp_path / "run", overrides=[gone, *overrides])
    assert "\n" not in str(caught.value)


def test_a_batch_of_one_tile_is_no_mistake_where_nothing_is_normalised_over_it(
    recipe_file: Path, tmp_path: Path
) -> None:
    for more in (["model.decoder=linear"], []):  # without a normalisation, and with one of many pixels
        one_tile = ["data.scene.0.image=gone.tif", "training.batch=1", *more]
        with pytest.raises(SourceError, match=r"gone\.tif does not exist"):
            train(recipe_file, tmp_path / "run", overrides=one_tile)
