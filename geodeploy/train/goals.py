"""What the task of a recipe changes in a training: the loss, what outputs say, how it is scored."""

# B batch, K class, T target, P plane: one of classes, one a target or label; H row, W column

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from geodeploy.labels import IGNORED
from geodeploy.products import SCALE
from geodeploy.scores import ClassCount, ErrorCount, LabelCount, ScoreCount
from geodeploy.train.data import LabelledScene, LabelledTile, class_shares, tile_shares
from geodeploy.train.losses import (
    Loss,
    build_label_loss,
    build_loss,
    build_value_loss,
    positive_weights,
)
from geodeploy.train.model import TunedModel
from geodeploy.train.recipe import Recipe


class Goal(Protocol):
    """What a training aims at."""

    planes: int
    """P, of answers and labels."""
    absent: float
    """Stands where there is no answer or label."""
    dtype: str
    """Of answers and labels."""
    whole_tiles: bool
    """Whether a tile has one answer, (P,) in place of (P, H, W)."""

    def loss(self, scenes: Sequence[LabelledScene], model: TunedModel) -> Loss:
        """What is made small, of the model's outputs, labels and what teachers say."""
        ...

    def answers(self, outputs: Tensor) -> NDArray[Any]:
        """What outputs (B, K, H, W) say of each pixel, (B, P, H, W)."""
        ...

    def labels(self, tile: LabelledTile) -> NDArray[Any]:
        """What the answers are held against, (P, H, W)."""
        ...

    def count(self) -> ScoreCount:
        """Takes in labels and answers, and scores them."""
        ...


class ClassGoal:
    """The class of each pixel."""

    planes, dtype, whole_tiles = 1, "uint8", False
    absent: float = IGNORED

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def loss(self, scenes: Sequence[LabelledScene], model: TunedModel) -> Loss:
        """The recipe's sum of losses over logits and codes."""
        recipe = self._recipe
        shares = class_shares(scenes, len(recipe.classes))
        return build_loss(recipe.training, shares, distillation=recipe.distillation.weight)

    def answers(self, outputs: Tensor) -> NDArray[Any]:
        """The position of the greatest logit."""
        positions: NDArray[np.uint8] = (
            outputs.argmax(dim=1, keepdim=True).cpu().numpy().astype(np.uint8)
        )
        return positions

    def labels(self, tile: LabelledTile) -> NDArray[Any]:
        """The positions of the tile's classes."""
        return tile.codes[np.newaxis]

    def count(self) -> ScoreCount:
        """A confusion matrix."""
        return ClassCount(self._recipe.classes)


class ValueGoal:
    """Quantities at each pixel."""

    dtype, whole_tiles = "float32", False
    absent: float = np.nan

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.planes = len(recipe.targets)

    def loss(self, scenes: Sequence[LabelledScene], model: TunedModel) -> Loss:
        """The recipe's sum of losses over errors in standard deviations of the labels."""
        assert model.value_std is not None
        return build_value_loss(self._recipe.training, model.value_std)

    def answers(self, outputs: Tensor) -> NDArray[Any]:
        """The outputs themselves."""
        values: NDArray[np.float32] = outputs.cpu().numpy()
        return values

    def labels(self, tile: LabelledTile) -> NDArray[Any]:
        """The tile's values."""
        assert tile.values is not None
        return tile.values

    def count(self) -> ScoreCount:
        """Sums of errors."""
        return ErrorCount(self._recipe.targets)


class LabelGoal:
    """Which classes a tile shows."""

    dtype, whole_tiles = "uint8", True
    absent: float = IGNORED

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.planes = len(recipe.classes)

    def loss(self, scenes: Sequence[LabelledScene], model: TunedModel) -> Loss:
        """Binary cross-entropy over logits and labels."""
        network, training = self._recipe.model, self._recipe.training
        shown, absent = tile_shares(scenes, network.tile, network.overlap)
        return build_label_loss(positive_weights(training.class_weights, shown, absent))

    def answers(self, outputs: Tensor) -> NDArray[Any]:
        """Probabilities as maps store them, (B, K)."""
        stored: NDArray[np.uint8] = (outputs.sigmoid() / SCALE).round().cpu().numpy().astype(np.uint8)
        return stored

    def labels(self, tile: LabelledTile) -> NDArray[Any]:
        """What the tile shows."""
        assert tile.shown is not None
        return tile.shown

    def count(self) -> ScoreCount:
        """Of each probability."""
        return LabelCount(self._recipe.classes)


GOALS: dict[str, type[ClassGoal] | type[ValueGoal] | type[LabelGoal]] = {
    "segmentation": ClassGoal,
    "regression": ValueGoal,
    "multilabel": LabelGoal,
}
"""By the recipe's word for the task."""


def goal_of(recipe: Recipe) -> Goal:
    """What ``recipe`` aims at."""
    return GOALS[recipe.task](recipe)
