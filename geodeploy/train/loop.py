"""The training loop: steps, validations, and the best weights found."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

from geodeploy.ahead import read_ahead
from geodeploy.errors import ModelError, RecipeError
from geodeploy.scores import Scores
from geodeploy.train.adapters import allocate_ranks
from geodeploy.train.augment import Batch, training_batches
from geodeploy.train.data import (
    TRAINING,
    VALIDATION,
    LabelledScene,
    class_shares,
)
from geodeploy.train.losses import build_loss
from geodeploy.train.method_options import Full
from geodeploy.train.methods import layer_rates
from geodeploy.train.model import TunedModel
from geodeploy.train.recipe import Recipe, Training
from geodeploy.train.validation import validate

log = logging.getLogger(__name__)

_VALIDATIONS = 8
"""In a run whose recipe names no ``validate_every``."""
_ACCELERATE = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


class Checkup(BaseModel):
    """What one validation found."""

    model_config = ConfigDict(frozen=True)

    step: int
    loss: float
    """Mean of the training loss since the last one."""
    lr: float
    scores: Scores | None
    """None in a run without validation pixels."""

    @property
    def miou(self) -> float:
        """For comparisons: below every real one where there is none."""
        found = self.scores.miou if self.scores else None
        return -1.0 if found is None else found


@dataclass(frozen=True, slots=True)
class Fit:
    """What a training did."""

    losses: list[float]
    """Of every step."""
    history: list[Checkup]
    best: Checkup
    """The one whose weights the model holds now."""
    seconds: float
    images_per_s: float
    """Training tiles a second, validation left out."""
    device: str


def fit(
    model: TunedModel, scenes: Sequence[LabelledScene], recipe: Recipe, *, progress: bool = False
) -> Fit:
    """Train ``model`` and leave in it, on the CPU, the weights that validated best.

    Without validation pixels those are the last step's. ``progress`` shows a bar on a terminal.

    Raises:
        RecipeError: the device cannot compute in ``training.precision``.
        ModelError: the loss is no number any more.
    """
    training = recipe.training
    steps = count_steps(training, scenes, recipe.model.tile)
    every = training.validate_every or max(steps // _VALIDATIONS, 1)
    mean = model.mean.numpy().ravel()
    learner = Learner(model, scenes, recipe, steps)
    rates = learner.rates
    validates = any(scene.count(VALIDATION) for scene in scenes)

    def check(step: int) -> Checkup:
        scores = _validate(model, learner.forward, scenes, recipe, mean) if validates else None
        recent = losses[history[-1].step if history else 0 :]
        return Checkup(step=step, loss=float(np.mean(recent)), lr=max(rates.at(step)), scores=scores)

    losses: list[float] = []
    history: list[Checkup] = []
    best: Checkup | None = None
    best_state: dict[str, Tensor] = {}
    start, busy = time.perf_counter(), 0.0
    bar = tqdm(
        total=steps, unit="step", disable=not (progress and sys.stderr.isatty()), file=sys.stderr
    )
    drawn = repeat(training_batches(scenes, recipe, mean))
    with bar, closing(read_ahead(next, drawn, workers=1, ahead=2)) as batches:
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            began = time.perf_counter()
            losses.append(learner.learn(batch, step))
            busy += time.perf_counter() - began
            if step % every == 0 or step == steps:
                history.append(check(step))
                # Where there is no bar, a log file for instance, a line now and then.
                log.log(
                    logging.INFO if bar.disable else logging.DEBUG,
                    _line(history[-1], steps, step * training.batch / busy),
                )
                if validates:
                    rates.note(history[-1].miou)
                if best is None or not validates or history[-1].miou > best.miou:
                    best, best_state = history[-1], tuned_state(model)
            bar.set_postfix(_facts(losses, history, step * training.batch / busy), refresh=False)
            bar.update()
            if training.patience and rates.stale >= training.patience:
                break
    assert best is not None  # the last step is always checked
    model.cpu().load_state_dict(best_state, strict=False)
    model.eval()
    return Fit(
        losses=losses,
        history=history,
        best=best,
        seconds=time.perf_counter() - start,
        images_per_s=len(losses) * training.batch / busy,
        device=learner.device,
    )


class Learner:
    """The network that is trained, and all that changes it from step to step."""

    def __init__(
        self, model: TunedModel, scenes: Sequence[LabelledScene], recipe: Recipe, steps: int
    ) -> None:
        training = recipe.training
        self._accelerator = _accelerator(training)
        self.device = str(self._accelerator.device)
        self._model = model.to(self._accelerator.device)
        self._clip = training.clip
        self._optimizer = self._accelerator.prepare(build_optimizer(model, recipe))
        self._ranks = allocate_ranks(model.backbone, recipe.method, steps)
        self._loss = build_loss(
            training,
            class_shares(scenes, len(recipe.classes)),
            distillation=recipe.distillation.weight,
        )
        self.rates = Rates(training, steps, [group["lr"] for group in self._optimizer.param_groups])

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K, H, W) in float32."""
        with self._accelerator.autocast():
            logits: Tensor = self._model(pixels.to(self._accelerator.device))
        return logits.float()

    def learn(self, batch: Batch, step: int) -> float:
        """Take one step, which counts from 1; its loss.

        Raises:
            ModelError: the loss is no number any more.
        """
        device = self._accelerator.device
        for group, rate in zip(self._optimizer.param_groups, self.rates.at(step), strict=True):
            group["lr"] = rate
        self._model.train()
        loss = self._loss(
            self.forward(batch.pixels),
            batch.codes.to(device),
            None if batch.taught is None else batch.taught.to(device),
        )
        found = _finite(loss.item(), step)
        self._accelerator.backward(loss + self._ranks.penalty() if self._ranks else loss)
        self._accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        if self._ranks:
            self._ranks.allocate(step)
        self._optimizer.zero_grad()
        return found


def _accelerator(training: Training) -> Accelerator:
    # Accelerate keeps its settings for the whole process; the last training's are not this one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    device = PartialState(cpu=training.device == "cpu").device
    if training.precision == "fp16" and device.type == "cpu":
        raise RecipeError(
            "training.precision = fp16 needs a GPU, and this run is on the CPU. Take bf16 or fp32."
        )
    return Accelerator(cpu=training.device == "cpu", mixed_precision=_ACCELERATE[training.precision])


def count_steps(training: Training, scenes: Sequence[LabelledScene], tile: int) -> int:
    """Steps of the run: as the recipe says, or those that see the training area ``epochs`` times."""
    if training.steps is not None:
        return training.steps
    pixels = sum(int((scene.part == TRAINING).sum()) for scene in scenes)
    windows = max(pixels / tile**2, 1)
    return max(math.ceil((training.epochs or 1) * windows / training.batch), 1)


def build_optimizer(model: TunedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over what is trainable, the decoder at its own rate; vectors are not decayed."""
    training, method = recipe.training, recipe.method
    factors = layer_rates(model.backbone, method.layer_decay if isinstance(method, Full) else 1.0)
    rates = [
        *((item, training.lr * factors[name]) for name, item in model.backbone.named_parameters()),
        *((item, training.lr_head or training.lr) for item in model.decoder.parameters()),
    ]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for item, rate in rates:
        if item.requires_grad:
            groups.setdefault((rate, item.ndim > 1), []).append(item)
    return torch.optim.AdamW(
        {"params": items, "lr": rate, "weight_decay": training.weight_decay if decayed else 0.0}
        for (rate, decayed), items in groups.items()
    )


class Rates:
    """The learning rate of each group at each step, and how long nothing got better."""

    def __init__(self, training: Training, steps: int, highest: Sequence[float]) -> None:
        self.stale = 0
        """Validations since the last better one."""
        self._training = training
        self._steps = steps
        self._highest = list(highest)
        self._best = -math.inf
        self._halvings = 0

    def at(self, step: int) -> list[float]:
        """One rate a group at ``step``, which counts from 1."""
        factor = SCHEDULES[self._training.schedule](
            min(max(step - self._training.warmup, 0) / max(self._steps - self._training.warmup, 1), 1),
            self._halvings,
        )
        climb = min(step / self._training.warmup, 1.0) if self._training.warmup else 1.0
        return [rate * climb * factor for rate in self._highest]

    def note(self, miou: float) -> None:
        """Take in the mean IoU of one validation."""
        if miou > self._best:
            self._best, self.stale = miou, 0
            return
        self.stale += 1
        if self.stale % self._training.plateau_patience == 0:
            self._halvings += 1


def _cosine(done: float, halvings: int) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _plateau(done: float, halvings: int) -> float:
    return 0.5**halvings


SCHEDULES: dict[str, Callable[[float, int], float]] = {"cosine": _cosine, "plateau": _plateau}
"""Factors on the learning rate, from the share of the steps done and the plateaus met."""


def _line(found: Checkup, steps: int, images_per_s: float) -> str:
    score = "" if found.scores is None else f", validation mIoU {found.miou:.3f}"
    return f"step {found.step} of {steps}: loss {found.loss:.3f}{score}, {images_per_s:.1f} images/s"


def tuned_state(model: TunedModel) -> dict[str, Tensor]:
    """A copy of all that training changes: trainable parameters, and buffers such as BatchNorm's."""
    return {name: value.detach().cpu().clone() for name, value in _changing(model)}


def _changing(model: TunedModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    yield from model.named_buffers()


def _validate(
    model: TunedModel,
    forward: Callable[[Tensor], Tensor],
    scenes: Sequence[LabelledScene],
    recipe: Recipe,
    mean: NDArray[np.float32],
) -> Scores:
    model.eval()
    with torch.inference_mode():
        return validate(
            forward,
            scenes,
            recipe.classes,
            tile=recipe.model.tile,
            overlap=recipe.model.overlap,
            batch=recipe.training.batch,
            mean=mean,
        )


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss is {loss} at step {step}: training has diverged. Lower training.lr, or take "
            "training.precision = fp32."
        )
    return loss


def _facts(losses: list[float], history: list[Checkup], images_per_s: float) -> dict[str, str]:
    scores = history[-1].scores if history else None
    miou = scores.miou if scores else None
    return {
        "loss": f"{np.mean(losses[-10:]):.3f}",
        "mIoU": "-" if miou is None else f"{miou:.3f}",
        "images/s": f"{images_per_s:.1f}",
    }
