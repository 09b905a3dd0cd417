"""A training's state on disk, to go on from after a kill: one safetensors file, JSON in its header."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geodeploy.errors import ModelError, OutputError, RecipeError, first_line
from geodeploy.parts import differences, identify
from geodeploy.train.data import LabelledScene
from geodeploy.train.recipe import Recipe, recipe_text
from geodeploy.train.report import Checkup

log = logging.getLogger(__name__)

_KEY = "geodeploy"


class Progress(BaseModel):
    """What a training has come to, as far as it is no tensor."""

    model_config = ConfigDict(frozen=True)

    recipe: str
    """sha256 of the recipe as run."""
    learned_from: dict[str, str] = {}
    """What tells one state of the data and weights that the recipe names from another."""
    step: int
    """The last one taken."""
    losses: tuple[float, ...]
    history: tuple[Checkup, ...]
    best: int
    """Position in ``history`` of the weights to keep."""
    seconds: float
    busy: float
    """Seconds of training, validation left out."""
    waited: float
    """Seconds in which no window was ready to train on."""
    learner: dict[str, Any]
    """What the learner wants back, besides tensors."""
    sampler: dict[str, Any]
    """State of the generator that draws windows."""


def _what_is_learned_from(
    recipe: Recipe, scenes: Sequence[LabelledScene], weights_sha256: str | None
) -> dict[str, str]:
    """What tells one state of all that ``recipe`` names from another, by the words for the user."""
    images, labels = hashlib.sha256(), hashlib.sha256()
    for scene in scenes:
        images.update(f"{scene.raster.name} {scene.state} ".encode())
        shown = None if scene.tiles is None else scene.tiles.shown
        for array in (scene.codes, scene.part, scene.values, shown):
            if array is not None:
                labels.update(np.ascontiguousarray(array).data)
    return {
        "state of the images": images.hexdigest(),
        "state of the labels": labels.hexdigest(),
        "file of weights": weights_sha256 or "",
        "state of the teachers": identify(map(str, recipe.distillation.teachers))[1],
    }


class Checkpoint:
    """The file beside a RUN folder to come; gone once the RUN is there.

    It is of one ``recipe``, the ``scenes`` that it names as they are, and one file of weights.
    """

    def __init__(
        self, run: Path, recipe: Recipe, scenes: Sequence[LabelledScene], weights_sha256: str | None
    ) -> None:
        self.path = run.absolute().with_name(f".{run.name}.resume.safetensors")
        self.recipe = hashlib.sha256(recipe_text(recipe).encode()).hexdigest()
        self.learned_from = _what_is_learned_from(recipe, scenes, weights_sha256)

    def write(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replace what was there, whole or not at all."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            save_file(
                {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
                beside,
                metadata={_KEY: progress.model_dump_json()},
            )
            beside.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self.path} cannot be written ({first_line(error)}).") from error
        finally:
            beside.unlink(missing_ok=True)

    def read(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """What was written last; None if nothing was, or from what is not as it was then.

        Raises:
            ModelError: the file is broken.
            RecipeError: it is of another recipe.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                progress = Progress.model_validate_json(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValidationError) as error:
            raise ModelError(
                f"{self.path} cannot be read ({first_line(error)}). Remove it to start again."
            ) from error
        if progress.recipe != self.recipe:
            raise RecipeError(
                f"{self.path} is of a training with another recipe. Give that one to go on with it, "
                "or remove the file to start again."
            )
        if progress.learned_from != self.learned_from:
            changed = differences(progress.learned_from, self.learned_from)
            log.warning("%s was begun with %s: starting afresh.", self.path, changed)
            return None
        return progress, tensors

    def remove(self) -> None:
        """The training is done."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
