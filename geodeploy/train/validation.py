"""Score a network on all labelled validation pixels, each counted once."""

# B batch, C band, K class, H row, W column

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from geodeploy.labels import IGNORED
from geodeploy.scores import Scores, confusion_matrix
from geodeploy.spec import SegmentationClass
from geodeploy.train.data import (
    TEST,
    VALIDATION,
    LabelledScene,
    LabelledTile,
    labelled_places,
    read_tile,
)
from geodeploy.train.recipe import Recipe


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


def validate(
    forward: Callable[[Tensor], Tensor],
    scenes: Sequence[LabelledScene],
    classes: Sequence[SegmentationClass],
    *,
    tile: int,
    overlap: int,
    batch: int,
    mean: NDArray[np.float32],
    part: int = VALIDATION,
) -> Scores:
    """The scores of ``forward`` over one ``part`` of all scenes, in one confusion matrix.

    Tiles stand at the grid's places and are cut in the middle of their overlap, without blending: quick
    to run, and close below what predict reaches.
    """
    counts = np.zeros((len(classes), len(classes)), np.int64)
    scored = 0
    for scene in scenes:
        predicted = np.full(scene.codes.shape, IGNORED, np.uint8)
        codes = np.full(scene.codes.shape, IGNORED, np.uint8)
        places = labelled_places(scene, tile, overlap, part=part)
        tiles = (read_tile(scene, place, tile, mean, part=part) for place in places)
        for group in _batched(tiles, batch):
            pixels_BCHW = torch.from_numpy(np.stack([item.pixels for item in group]))
            positions_BHW = forward(pixels_BCHW).argmax(dim=1).to(torch.uint8).cpu().numpy()
            for item, positions_HW in zip(group, positions_BHW, strict=True):
                _keep_inner(predicted, positions_HW, item, overlap)
                _keep_inner(codes, item.codes, item, overlap)
        for row in range(0, len(codes), tile):  # counting takes many times the bytes of what it counts
            truth, guess = codes[row : row + tile], predicted[row : row + tile]
            known = truth != IGNORED
            scored += int(known.sum())
            counts += confusion_matrix(truth[known], guess[known], len(classes))
    area = sum(int((scene.part == part).sum()) for scene in scenes)
    return Scores.from_confusion(counts, classes, ignored=area - scored)


def score_held_out(
    model: nn.Module,
    scenes: Sequence[LabelledScene],
    recipe: Recipe,
    *,
    mean: NDArray[np.float32],
    device: str,
) -> dict[str, Scores]:
    """The scores of ``model`` on each region that is for the test, by its name; computed on ``device``.

    The model comes back on the CPU, in eval mode.
    """
    regions: dict[str, list[LabelledScene]] = {}
    for scene in scenes:
        if scene.count(TEST):
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
                recipe.classes,
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


def _keep_inner(
    canvas: NDArray[np.uint8], values: NDArray[np.uint8], item: LabelledTile, overlap: int
) -> None:
    """Write a tile's values, save those that an earlier tile knows better, onto ``canvas``."""
    rows, cols = item.place.rows, item.place.cols
    top = rows.begin + (overlap // 2 if rows.begin else 0)
    left = cols.begin + (overlap // 2 if cols.begin else 0)
    canvas[top : rows.stop, left : cols.stop] = values[
        top - rows.start : rows.stop - rows.start, left - cols.start : cols.stop - cols.start
    ]


def _batched(items: Iterator[LabelledTile], size: int) -> Iterator[list[LabelledTile]]:
    group: list[LabelledTile] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
