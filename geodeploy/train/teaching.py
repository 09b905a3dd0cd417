"""What tuned models say of the scenes, for a student to learn from."""

# C band, K class, H row, W column

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from geodeploy.batches import cut_tiles, stack_tiles, whole_answers
from geodeploy.blend import cosine_weights
from geodeploy.errors import RecipeError
from geodeploy.raster import Raster
from geodeploy.runtime import Session, open_session
from geodeploy.spec import ModelSpec
from geodeploy.tiles import TileGrid
from geodeploy.train.data import TRAINING, LabelledScene
from geodeploy.train.limits import Limits
from geodeploy.train.recipe import Recipe

log = logging.getLogger(__name__)

_BATCH = 4


def check_teachers(recipe: Recipe) -> None:
    """Load each of the recipe's teachers once, before hours of work that would end with a wrong one.

    Raises:
        RecipeError: a teacher has other bands, units or classes than the recipe.
        ModelError, SpecError: a teacher cannot be loaded.
    """
    if recipe.distillation.teachers and recipe.task != "segmentation":
        raise RecipeError(
            f'Distillation is for task "segmentation", and this is "{recipe.task}": it has no teachers.'
        )
    for teacher in recipe.distillation.teachers:
        with _open_teacher(teacher, recipe):
            pass


def teach(
    scenes: Sequence[LabelledScene], recipe: Recipe, *, progress: bool = False
) -> list[LabelledScene]:
    """The ``scenes``, those to train on with the mean probabilities of the recipe's teachers.

    Every teacher maps every such scene once, in tiles that overlap by half and are blended as in
    `predict`: no pixel is judged from the edge of a tile alone. Memory: 8 bytes a class and pixel of
    one scene at a time, and one byte for each after that.

    Raises:
        As `check_teachers`.
    """
    teachers = recipe.distillation.teachers
    trains = [bool((scene.part == TRAINING).any()) for scene in scenes]
    with ExitStack() as stack:
        sessions = [stack.enter_context(_open_teacher(teacher, recipe)) for teacher in teachers]
        bar = tqdm(
            total=len(sessions) * sum(trains),
            unit="map",
            disable=not (progress and sys.stderr.isatty()),
            file=sys.stderr,
        )
        stack.enter_context(bar)
        taught = [
            _ask(sessions, scene, bar) if wanted else None
            for scene, wanted in zip(scenes, trains, strict=True)
        ]
    log.info("%s mapped %d scenes", " and ".join(path.name for path in teachers), sum(trains))
    return [replace(scene, taught=told) for scene, told in zip(scenes, taught, strict=True)]


def map_probabilities(
    session: Session, raster: Raster, limits: Limits | None = None
) -> NDArray[np.float32]:
    """What ``session`` says of every pixel of ``raster``, (K, H, W); 0 where it has no data.

    None is data outside of ``limits``.
    """
    spec = session.spec
    overlap = spec.tile // 2
    grid = TileGrid(raster.height, raster.width, spec.tile, overlap)
    weights = cosine_weights(spec.tile, overlap).astype(np.float32)
    total = np.zeros((len(spec.classes), raster.height, raster.width), np.float32)
    weighed = np.zeros((raster.height, raster.width), np.float32)
    stripes = (raster.read(window) for window in raster.stripes())
    if limits is not None:
        stripes = (limits.leave_out(stripe, raster) for stripe in stripes)
    for batch in stack_tiles(cut_tiles(stripes, grid.whole), raster, spec, size=_BATCH):
        found = whole_answers(session, batch)
        for tile, valid, place in batch.members:
            if place is None:
                continue
            height, width = valid.shape
            weight = np.outer(weights[:height], weights[:width]) * valid
            area = tile.window.toslices()
            total[:, *area] += found[place, :, :height, :width] * weight
            weighed[area] += weight
    return np.divide(total, weighed, out=total, where=weighed > 0)


def _ask(sessions: Sequence[Session], scene: LabelledScene, bar: Any) -> NDArray[np.uint8]:
    """The mean of what ``sessions`` say of every pixel, (K, H, W), 255 being certain."""
    total = map_probabilities(sessions[0], scene.raster, scene.limits)
    bar.update()
    for session in sessions[1:]:
        total += map_probabilities(session, scene.raster, scene.limits)
        bar.update()
    total *= 255 / len(sessions)
    # A softmax of lower precision may miss 0 and 1 by a hundredth.
    return np.clip(np.rint(total, out=total), 0, 255, out=total).astype(np.uint8)


@contextmanager
def _open_teacher(teacher: Path, recipe: Recipe) -> Iterator[Session]:
    """A teacher of the recipe's task, on its device, with the threads that training has."""
    session = open_session(
        teacher, device=recipe.training.device, threads=torch.get_num_threads(), batch=_BATCH
    )
    with closing(session):
        _check_same_task(teacher, session.spec, recipe)
        yield session


def _check_same_task(teacher: Path, spec: ModelSpec, recipe: Recipe) -> None:
    for what, known, wanted in (
        ("task", spec.task, recipe.task),
        ("bands", spec.band_names, list(recipe.data.bands)),
        ("units", spec.units, recipe.data.units),
        ("timesteps", spec.timesteps, recipe.model.timesteps),
        ("classes", spec.class_values, [item.value for item in recipe.classes]),
    ):
        if known != wanted:
            raise RecipeError(
                f"The teacher {teacher} has {what} {known}, the recipe has {wanted}. A student learns "
                "the same bands and classes as its teacher."
            )
