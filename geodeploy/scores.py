"""Scores of a class map against labels, all from one confusion matrix. Pure arithmetic."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from geodeploy.spec import SegmentationClass


def confusion_matrix(
    labels: NDArray[np.integer], predictions: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:
    """Counts (classes, classes), labels down and predictions across.

    Both arrays hold positions 0..classes-1, of one shape; leave ignored pixels out beforehand.
    """
    pairs = labels.astype(np.int64).ravel() * classes + predictions.ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


class ClassScore(BaseModel):
    """How well one class was found. None where neither the labels nor the map have it."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: int
    iou: float | None
    f1: float | None
    precision: float | None
    recall: float | None
    pixels: int
    """Labelled pixels of this class."""


class Scores(BaseModel):
    """The scores of a map over all labelled pixels."""

    model_config = ConfigDict(frozen=True)

    miou: float | None
    """Mean IoU of the classes that the labels or the map have."""
    accuracy: float | None
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Pixels, labels down and predictions across, in the order of ``classes``."""
    ignored: int
    """Pixels without a label, with an ignored one, or without data in the scene."""

    @classmethod
    def from_confusion(
        cls,
        counts: NDArray[np.int64],
        classes: Sequence[SegmentationClass],
        *,
        ignored: int = 0,
    ) -> Self:
        """The scores that follow from ``counts`` (K, K), labels down and predictions across."""
        hits = np.diagonal(counts)
        labelled, mapped = counts.sum(axis=1), counts.sum(axis=0)
        scored = tuple(
            ClassScore(
                name=item.name,
                value=item.value,
                iou=_ratio(hit, row + column - hit),
                f1=_ratio(2 * hit, row + column),
                # A class that is only in the labels has recall 0 and no precision of its own: 0
                # keeps it in the mean, None is for classes that are nowhere.
                precision=_ratio(hit, column) if column else (0.0 if row else None),
                recall=_ratio(hit, row) if row else (0.0 if column else None),
                pixels=int(row),
            )
            for item, hit, row, column in zip(classes, hits, labelled, mapped, strict=True)
        )
        ious = [score.iou for score in scored if score.iou is not None]
        return cls(
            miou=sum(ious) / len(ious) if ious else None,
            accuracy=_ratio(int(hits.sum()), int(counts.sum())),
            classes=scored,
            confusion=tuple(tuple(int(count) for count in row) for row in counts),
            ignored=ignored,
        )

    def __str__(self) -> str:
        lines = [f"{'class':<16} {'value':>5} {'IoU':>6} {'F1':>6} {'prec.':>6} {'recall':>6} pixels"]
        lines += [
            f"{score.name:<16} {score.value:>5} {_three(score.iou)} {_three(score.f1)} "
            f"{_three(score.precision)} {_three(score.recall)} {score.pixels}"
            for score in self.classes
        ]
        lines.append(
            f"mean IoU {_three(self.miou).strip()}, accuracy {_three(self.accuracy).strip()}, "
            f"{self.ignored} pixels ignored"
        )
        return "\n".join(lines)


def _ratio(part: int, whole: int) -> float | None:
    return float(part) / float(whole) if whole else None


def _three(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.3f}"
