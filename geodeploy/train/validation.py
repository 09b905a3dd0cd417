"""Score a network on all labelled validation pixels or tiles, each counted once."""

# B batch, C band, K class, H row, W column

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geodeploy.scores import AnyScores
from geodeploy.train.data import (
    TEST,
    VALIDATION,
    LabelledScene,
    LabelledTile,
    has_labels,
    labelled_places,
    read_tile,
)
from geodeploy.train.goals import Goal, goal_of
from geodeploy.train.recipe import Recipe


def validate(
    forward: Callable[[Tensor], Tensor],
    scenes: Sequence[LabelledScene],
    goal: Goal,
    *,
    tile: int,
    overlap: int,
    batch: int,
    mean: NDArray[np.float32],
    part: int = VALIDATION,
) -> AnyScores:
    """The scores of ``forward`` over one ``part`` of all scenes, each pixel or whole tile counted once.

    Tiles stand at the grid's places and are cut in the middle of their overlap, without blending: quick
    to run, and close below what predict reaches.
    """
    count = goal.count()
    for scene in scenes:
        places = labelled_places(scene, tile, overlap, part=part)
        tiles = (read_tile(scene, place, tile, mean, part=part) for place in places)
        if goal.whole_tiles:
            for group in _batched(tiles, batch):
                answers_BP = goal.answers(forward(_stacked(group)))
                count.add(np.stack([goal.labels(item) for item in group], axis=1), answers_BP.T)
            continue
        shape = (goal.planes, *scene.codes.shape)
        found, labels = (np.full(shape, goal.absent, goal.dtype) for _ in range(2))
        for group in _batched(tiles, batch):
            answers_BPHW = goal.answers(forward(_stacked(group)))
            for item, answers_PHW in zip(group, answers_BPHW, strict=True):
                _keep_inner(found, answers_PHW, item, overlap)
                _keep_inner(labels, goal.labels(item), item, overlap)
        for row in range(0, shape[1], tile):  # counting takes many times the bytes of what it counts
            rows = np.s_[row : row + tile]
            here = scene.part[rows] == part
            count.add(labels[:, rows][:, here], found[:, rows][:, here])
    return count.scores()


def score_held_out(
    model: nn.Module,
    scenes: Sequence[LabelledScene],
    recipe: Recipe,
    *,
    mean: NDArray[np.float32],
    device: str,
) -> dict[str, AnyScores]:
    """The scores of ``model`` on each region that is for the test, by its name; computed on ``device``.

    The model comes back on the CPU, in eval mode.
    """
    regions: dict[str, list[LabelledScene]] = {}
    for scene in scenes:
        if has_labels(scene, recipe, TEST):
            regions.setdefault(scene.region, []).append(scene)
    model.eval().to(device if regions else "cpu")

    def forward(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels.to(device))
        return logits

    with torch.inference_mode():
        found = {
            region: validate(
                forward,
                members,
                goal_of(recipe),
                tile=recipe.model.tile,
                overlap=recipe.model.overlap,
                batch=recipe.training.batch,
                mean=mean,
                part=TEST,
            )
            for region, members in regions.items()
        }
    model.cpu()
    return found


def _keep_inner(canvas: NDArray[Any], values: NDArray[Any], item: LabelledTile, overlap: int) -> None:
    """Write a tile's values (P, tile, tile) onto ``canvas``, save what an earlier one knows better."""
    rows, cols = item.place.rows, item.place.cols
    top = rows.begin + (overlap // 2 if rows.begin else 0)
    left = cols.begin + (overlap // 2 if cols.begin else 0)
    canvas[:, top : rows.stop, left : cols.stop] = values[
        :, top - rows.start : rows.stop - rows.start, left - cols.start : cols.stop - cols.start
    ]


def _stacked(group: Sequence[LabelledTile]) -> Tensor:
    return torch.from_numpy(np.stack([item.pixels for item in group]))


def _batched(items: Iterator[LabelledTile], size: int) -> Iterator[list[LabelledTile]]:
    group: list[LabelledTile] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
