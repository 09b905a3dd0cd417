"""The training loop: steps, validations, and the best weights found."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from geodeploy.ahead import read_ahead
from geodeploy.errors import ModelError, ProcessError, RecipeError
from geodeploy.machine import Stopwatch
from geodeploy.scores import AnyScores
from geodeploy.train.adapters import allocate_ranks
from geodeploy.train.augment import Batch, training_batches
from geodeploy.train.checkpoint import Checkpoint, Progress
from geodeploy.train.data import TRAINING, VALIDATION, LabelledScene, has_labels
from geodeploy.train.goals import goal_of
from geodeploy.train.method_options import Full
from geodeploy.train.methods import layer_rates, warn_of_size
from geodeploy.train.model import TunedModel
from geodeploy.train.norms import share_norms
from geodeploy.train.processes import is_first
from geodeploy.train.recipe import Recipe, Training
from geodeploy.train.report import Checkup
from geodeploy.train.validation import validate

log = logging.getLogger(__name__)

_VALIDATIONS = 8
"""In a run whose recipe names no ``validate_every``."""
_MODEL, _BEST, _OPTIMIZER, _RANKS = "model.", "best.", "optimizer.", "ranks."
"""What tensors of a checkpoint belong to."""
_ACCELERATE = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


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
    waiting: float
    """Share of the training's time, validation left out, in which no window was ready."""
    device: str
    processes: int
    """That shared every batch."""


def fit(
    model: TunedModel,
    scenes: Sequence[LabelledScene],
    recipe: Recipe,
    *,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Fit:
    """Train ``model`` and leave in it, on the CPU, the weights that validated best.

    Without validation pixels those are the last step's. ``progress`` shows a bar on a terminal. The
    state is written to ``checkpoint`` at every validation, and one that is there already is gone on
    from, to the same weights.

    Of several processes each takes its share of every batch, and all end with the same weights, those
    that one process would have found. The first alone writes and shows.

    Raises:
        RecipeError: the device cannot compute in ``training.precision``.
        ModelError: the loss is no number any more.
        ProcessError: the processes do not see the same checkpoint.
    """
    training = recipe.training
    steps = count_steps(training, scenes, recipe.model.tile)
    every = training.validate_every or max(steps // _VALIDATIONS, 1)
    mean = model.mean.numpy().ravel()
    learner = Learner(model, scenes, recipe, steps)
    rates = learner.rates
    validates = any(has_labels(scene, recipe, VALIDATION) for scene in scenes)

    def check(step: int) -> Checkup:
        scores = _validate(model, learner.answer, scenes, recipe, mean) if validates else None
        loss = float(np.mean(losses[history[-1].step if history else 0 :]))
        return Checkup(step=step, loss=loss, lr=max(rates.at(step)), scores=scores)

    losses: list[float] = []
    history: list[Checkup] = []
    best_state: dict[str, Tensor] = {}
    best, done, sampler = 0, 0, None
    learning, waiting = Stopwatch(), Stopwatch()
    start = time.perf_counter()
    if checkpoint is not None and (found := checkpoint.read()):
        past, tensors = found
        losses, history, best = list(past.losses), list(past.history), past.best
        done, sampler, start = past.step, past.sampler, start - past.seconds
        learning.seconds, waiting.seconds = past.busy, past.waited
        best_state = pick(tensors, _BEST)
        learner.restore(past.learner, tensors)
        log.info("Going on after step %d of %d.", done, steps)
    learner.check_all_begin_after(done)
    bar = tqdm(
        total=steps,
        initial=done,
        unit="step",
        disable=not (progress and sys.stderr.isatty()),
        file=sys.stderr,
    )
    drawn = training_batches(scenes, recipe, mean, sampler=sampler, share=learner.share(training.batch))
    with bar, closing(read_ahead(next, repeat(drawn), workers=1, ahead=2)) as batches:
        for step in range(done + 1, steps + 1):
            if training.patience and rates.stale >= training.patience:
                break
            with waiting:
                step_batches = list(islice(batches, training.accumulate))
            with learning:
                losses.append(learner.learn(step_batches, step))
            if step % every == 0 or step == steps:
                history.append(check(step))
                # Where there is no bar, a log file for instance, a line now and then.
                log.log(
                    logging.INFO if bar.disable else logging.DEBUG,
                    _line(history[-1], steps, step * training.windows / learning.seconds),
                )
                if history[-1].is_scored:
                    rates.note(history[-1].quality)
                if not best_state or history[-1].beats(history[best]):
                    best, best_state = len(history) - 1, tuned_state(model)
                if checkpoint is not None:
                    facts, tensors = learner.state()
                    past = Progress(
                        recipe=checkpoint.recipe,
                        learned_from=checkpoint.learned_from,
                        step=step,
                        losses=tuple(losses),
                        history=tuple(history),
                        best=best,
                        seconds=time.perf_counter() - start,
                        busy=learning.seconds,
                        waited=waiting.seconds,
                        learner=facts,
                        sampler=step_batches[-1].sampler,
                    )
                    if is_first():
                        checkpoint.write(past, tensors | prefixed(best_state, _BEST))
            bar.set_postfix(
                _facts(losses, history, step * training.windows / learning.seconds), refresh=False
            )
            bar.update()
    model.cpu().eval().load_state_dict(best_state, strict=False)
    return Fit(
        losses=losses,
        history=history,
        best=history[best],
        seconds=time.perf_counter() - start,
        images_per_s=len(losses) * training.windows / learning.seconds,
        waiting=waiting.seconds / (learning.seconds + waiting.seconds),
        device=learner.device,
        processes=learner.processes,
    )


def check_training(model: TunedModel, recipe: Recipe) -> None:
    """Refuse what the training of ``model`` would stumble over, before any data are read.

    A method that trains more than full tuning is told of. The model comes back in eval mode.

    Raises:
        RecipeError: the device cannot compute in ``training.precision``, the layers have no order for
            ``method.layer_decay``, one tile is too little to normalise over, or the processes cannot
            share a batch evenly.
    """
    processes, batch = _accelerator(recipe.training).num_processes, recipe.training.batch
    if batch % processes:
        raise RecipeError(
            f"training.batch: {batch} tiles cannot be shared evenly by {processes} processes; take a "
            f"multiple of {processes}, or other --processes."
        )
    warn_of_size(model.counts(), recipe.method)
    build_optimizer(model, recipe)
    model.train()
    norms = [item for item in model.modules() if isinstance(item, _BatchNorm) and item.training]
    model.eval()
    if recipe.training.batch > 1 or not norms:
        return
    pixels: list[int] = []
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0][0, 0].numel()))
        for norm in norms
    ]
    side = recipe.model.tile
    with torch.no_grad():
        model(torch.zeros(1, recipe.planes, side, side))
    for hook in hooks:
        hook.remove()
    if min(pixels) == 1:
        raise RecipeError(
            "training.batch: the network normalises maps of one pixel over the batch, and 1 tile has "
            "no statistics; take 2 or more, or a larger model.tile."
        )


class Learner:
    """The network that is trained, and all that changes it from step to step."""

    def __init__(
        self, model: TunedModel, scenes: Sequence[LabelledScene], recipe: Recipe, steps: int
    ) -> None:
        training = recipe.training
        self._accelerator = _accelerator(training)
        self.device = str(self._accelerator.device)
        self.processes, self._number = self._accelerator.num_processes, self._accelerator.process_index
        self._model = model.to(self._accelerator.device)
        if self.processes > 1:
            share_norms(model)
        if self._number:
            torch.manual_seed(recipe.seed + self._number)  # what is dropped here is not dropped there
        self._clip = training.clip
        self._optimizer = self._accelerator.prepare(build_optimizer(model, recipe))
        self._ranks = allocate_ranks(model.backbone, recipe.method, steps)
        self._loss = goal_of(recipe).loss(scenes, model)
        self.rates = Rates(training, steps, [group["lr"] for group in self._optimizer.param_groups])

    def share(self, batch: int) -> slice:
        """Which tiles of each batch are this process's."""
        size = batch // self.processes
        return slice(self._number * size, (self._number + 1) * size)

    def check_all_begin_after(self, step: int) -> None:
        """Refuse to go on if another process has found another step.

        Raises:
            ProcessError: names the steps.
        """
        steps = self._accelerator.gather(torch.tensor([step], device=self._accelerator.device))
        if len(set(steps.tolist())) > 1:
            raise ProcessError(
                f"The processes would go on after different steps, {steps.tolist()}: the folder of the "
                "RUN must be one that all of them see."
            )

    def answer(self, pixels: Tensor) -> Tensor:
        """As `forward`, in every process, each of which computes its share."""
        if self.processes == 1:
            return self.forward(pixels)
        share = -(-len(pixels) // self.processes)
        # The last ones may have none left, and take the last tile again.
        tiles = torch.arange(share * self.processes).clamp(max=len(pixels) - 1)
        outputs = self.forward(pixels[tiles[self._number * share :][:share]])
        whole: Tensor = self._accelerator.gather(outputs)
        return whole[: len(pixels)]

    def forward(self, pixels: Tensor) -> Tensor:
        """The model's outputs (B, K, H, W) in float32."""
        with self._accelerator.autocast():
            outputs: Tensor = self._model(pixels.to(self._accelerator.device))
        return outputs.float()

    def learn(self, batches: Sequence[Batch], step: int) -> float:
        """Take one step, which counts from 1, by the mean of the batches' losses; that mean.

        Raises:
            ModelError: the loss is no number any more.
        """
        for group, rate in zip(self._optimizer.param_groups, self.rates.at(step), strict=True):
            group["lr"] = rate
        self._model.train()
        found = 0.0
        for batch in batches:
            loss = self._loss_of(batch)
            found += _finite(loss.item(), step) / len(batches)
            if self._ranks:
                loss = loss + self._ranks.penalty() / self.processes
            self._accelerator.backward(loss / len(batches))
        if self.processes > 1:
            self._add_gradients()
        self._accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        if self._ranks:
            self._ranks.allocate(step)
        self._optimizer.zero_grad()
        return found

    def _loss_of(self, batch: Batch) -> Tensor:
        device = self._accelerator.device
        outputs, labels = self.forward(batch.pixels), batch.labels.to(device)
        taught = None if batch.taught is None else batch.taught.to(device)
        if self.processes > 1:
            # A mean over labelled pixels, Dice and Lovasz are no sums over tiles: each process computes
            # the loss of the whole batch, and its gradient by the outputs of its own tiles.
            parts = list(self._accelerator.gather(outputs.detach()).chunk(self.processes))
            parts[self._number] = outputs
            outputs, labels = torch.cat(parts), self._accelerator.gather(labels)
            taught = None if taught is None else self._accelerator.gather(taught)
        return self._loss(outputs, labels, taught)

    def _add_gradients(self) -> None:
        """Make each gradient the sum of those of all processes."""
        gradients = [item.grad for item in self._model.parameters() if item.grad is not None]
        summed = self._accelerator.reduce(torch.cat([item.flatten() for item in gradients]), "sum")
        for gradient, part in zip(
            gradients, summed.split([item.numel() for item in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the next step depends on: what goes into JSON, and tensors by name.

        Every process must come here together.
        """
        moments = self._optimizer.state_dict()["state"]
        tensors = prefixed(tuned_state(self._model), _MODEL)
        tensors |= {
            f"{_OPTIMIZER}{number}.{name}": value
            for number, found in moments.items()
            for name, value in found.items()
        }
        tensors["rng.cpu"] = self._of_all(torch.get_rng_state())
        if torch.cuda.is_available():
            tensors["rng.cuda"] = self._of_all(torch.cuda.get_rng_state())
        facts = {"rates": self.rates.state(), "scaler": {}, "ranks": None}
        if self._accelerator.scaler is not None:
            facts["scaler"] = self._accelerator.scaler.state_dict()
        if self._ranks:
            facts["ranks"], found = self._ranks.state()
            tensors |= prefixed(found, _RANKS)
        return facts, tensors

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._model.load_state_dict(pick(tensors, _MODEL), strict=False)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in pick(tensors, _OPTIMIZER).items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        known = self._optimizer.state_dict()
        self._optimizer.load_state_dict(known | {"state": moments})
        self.rates.restore(facts["rates"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(facts["scaler"])
        if self._ranks:
            self._ranks.restore(facts["ranks"], pick(tensors, _RANKS))
        torch.set_rng_state(self._own(tensors["rng.cpu"]))
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._own(tensors["rng.cuda"]))

    def _of_all(self, state: Tensor) -> Tensor:
        """The ``state`` (n,) of each process, (processes, n)."""
        states: Tensor = self._accelerator.gather(state[None].to(self._accelerator.device))
        return states.cpu()

    def _own(self, states: Tensor) -> Tensor:
        """This process's of the ``states``, which may be those of other numbers of processes."""
        return states[self._number % len(states)].clone()


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same under longer names."""
    return {prefix + name: value for name, value in tensors.items()}


def pick(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those that `prefixed` gave this prefix, under their own names."""
    return {
        name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
    }


def _accelerator(training: Training) -> Accelerator:
    # Accelerate keeps its settings for the whole process; the last training's are not this one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    local = os.environ.get("LOCAL_RANK")
    # One of several processes without a GPU would train by itself if it were not told to take the CPU.
    cpu = training.device == "cpu" or (local is not None and not torch.cuda.is_available())
    if not cpu and local is not None and int(local) >= torch.cuda.device_count():
        raise RecipeError(
            f"Process {int(local) + 1} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}. Take as many --processes, or training.device = cpu."
        )
    device = PartialState(cpu=cpu).device
    if training.precision == "fp16" and device.type == "cpu":
        raise RecipeError(
            "training.precision = fp16 needs a GPU, and this run is on the CPU. Take bf16 or fp32."
        )
    return Accelerator(cpu=cpu, mixed_precision=_ACCELERATE[training.precision])


def count_steps(training: Training, scenes: Sequence[LabelledScene], tile: int) -> int:
    """Steps of the run: as the recipe says, or those that see the training area ``epochs`` times."""
    if training.steps is not None:
        return training.steps
    pixels = sum(int((scene.part == TRAINING).sum()) for scene in scenes)
    windows = max(pixels / tile**2, 1)
    return max(math.ceil((training.epochs or 1) * windows / training.windows), 1)


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

    def note(self, quality: float) -> None:
        """Take in what one validation found, the greater the better."""
        if quality > self._best:
            self._best, self.stale = quality, 0
            return
        self.stale += 1
        if self.stale % self._training.plateau_patience == 0:
            self._halvings += 1

    def state(self) -> dict[str, float]:
        """What validations have left here."""
        return {"best": max(self._best, -1e300), "stale": self.stale, "halvings": self._halvings}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take back what `state` gave."""
        self._best = state["best"]
        self.stale, self._halvings = int(state["stale"]), int(state["halvings"])


def _cosine(done: float, halvings: int) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _plateau(done: float, halvings: int) -> float:
    return 0.5**halvings


SCHEDULES: dict[str, Callable[[float, int], float]] = {"cosine": _cosine, "plateau": _plateau}
"""Factors on the learning rate, from the share of the steps done and the plateaus met."""


def _line(found: Checkup, steps: int, images_per_s: float) -> str:
    score = "" if found.scores is None else f", validation {found.scores.headline}"
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
) -> AnyScores:
    model.eval()
    with torch.inference_mode():
        return validate(
            forward,
            scenes,
            goal_of(recipe),
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
    return {
        "loss": f"{np.mean(losses[-10:]):.3f}",
        "validation": scores.headline if scores else "-",
        "images/s": f"{images_per_s:.1f}",
    }
