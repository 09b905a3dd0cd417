"""Scores of a map against labels: classes by a confusion matrix, quantities by sums of errors.

What whole tiles show is scored by counts of each probability.

Pure arithmetic.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from geodeploy.labels import IGNORED
from geodeploy.products import SCALE
from geodeploy.spec import SegmentationClass, Target
from geodeploy.tally import Moments


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

    @property
    def pixels(self) -> int:
        """That were scored."""
        return sum(map(sum, self.confusion))

    @property
    def quality(self) -> float:
        """One number to choose by, the greater the better."""
        return -math.inf if self.miou is None else self.miou

    @property
    def headline(self) -> str:
        """The score that is chosen by, in a word."""
        return f"mIoU {_three(self.miou).strip()}"

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


class TargetScore(BaseModel):
    """How far one quantity of the map is from its labels, in its unit. None without a label."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    unit: str
    rmse: float | None
    """Root of the mean squared error."""
    mae: float | None
    """Mean absolute error."""
    bias: float | None
    """Mean of map less label."""
    r2: float | None
    """Share of the labels' variance that the map explains: 1 less squared errors over squared distances
    of the labels from their mean, below 0 where the mean would be the better map. None where the labels
    are all one number."""
    std: float | None
    """Standard deviation of the labels."""
    pixels: int
    """That have a label, and data."""

    @property
    def relative_rmse(self) -> float | None:
        """The RMSE in standard deviations of the labels: so quantities of several units compare."""
        return self.rmse if self.rmse is None or not self.std else self.rmse / self.std


class RegressionScores(BaseModel):
    """The scores of a map of quantities over all labelled pixels."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    targets: tuple[TargetScore, ...]
    ignored: int
    """Pixels without any label, or without data in the scene."""

    @property
    def pixels(self) -> int:
        """That were scored for one target or more, at the least."""
        return max(item.pixels for item in self.targets)

    @property
    def quality(self) -> float:
        """One number to choose by, the greater the better: less the mean relative RMSE."""
        errors = [item.relative_rmse for item in self.targets if item.relative_rmse is not None]
        return -sum(errors) / len(errors) if errors else -math.inf

    @property
    def headline(self) -> str:
        """The scores that are chosen by, in a word."""
        told = (f"{item.name} {_four(item.rmse)} {item.unit}".rstrip() for item in self.targets)
        return f"RMSE {', '.join(told)}"

    def __str__(self) -> str:
        titles = f"{'target':<16} {'unit':<8} {'RMSE':>9} {'MAE':>9} {'bias':>9} {'R2':>6} pixels"
        lines = [
            f"{item.name:<16} {item.unit:<8} {_four(item.rmse):>9} {_four(item.mae):>9} "
            f"{_four(item.bias):>9} {_three(item.r2)} {item.pixels}"
            for item in self.targets
        ]
        return "\n".join([titles, *lines, f"{self.ignored} pixels ignored"])


class LabelScore(BaseModel):
    """How well one class was found in tiles as a whole."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    value: int
    average_precision: float | None
    """Mean of the precision over the recall that each threshold adds (the area under the steps of the
    curve of the two). None without a tile that shows it."""
    f1: float | None
    """At a probability of 0.5, as precision and recall are. None where it is nowhere."""
    precision: float | None
    recall: float | None
    positives: int
    """Tiles that show it."""
    tiles: int
    """Tiles of which it is known whether they show it."""


class MultilabelScores(BaseModel):
    """The scores of what whole tiles show."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    mean_average_precision: float | None
    """Over the classes that some tile shows."""
    micro_f1: float | None
    """Of all decisions at 0.5, whatever their class."""
    macro_f1: float | None
    """The mean over the classes that the labels or the map have."""
    labels: tuple[LabelScore, ...]
    ignored: int
    """Tiles of which nothing is known, or without data."""

    @property
    def pixels(self) -> int:
        """Of the coarse map, those that were scored for one class or more, at the least."""
        return max(item.tiles for item in self.labels)

    @property
    def quality(self) -> float:
        """One number to choose by, the greater the better."""
        found = self.mean_average_precision
        return -math.inf if found is None else found

    @property
    def headline(self) -> str:
        """The score that is chosen by, in a word."""
        return f"mAP {_three(self.mean_average_precision).strip()}"

    def __str__(self) -> str:
        lines = [f"{'class':<24} {'AP':>6} {'F1':>6} {'prec.':>6} {'recall':>6} shown in"]
        lines += [
            f"{item.name:<24} {_three(item.average_precision)} {_three(item.f1)} "
            f"{_three(item.precision)} {_three(item.recall)} {item.positives} of {item.tiles}"
            for item in self.labels
        ]
        lines.append(
            f"mean AP {_three(self.mean_average_precision).strip()}, micro F1 "
            f"{_three(self.micro_f1).strip()}, macro F1 {_three(self.macro_f1).strip()}, "
            f"{self.ignored} tiles ignored"
        )
        return "\n".join(lines)


AnyScores = Scores | RegressionScores | MultilabelScores


class ScoreCount(Protocol):
    """What scores follow from, added up piece by piece."""

    def add(self, labels: NDArray[Any], found: NDArray[Any]) -> None:
        """Take in the ``labels`` of some pixels and what was ``found`` there, both (planes, ...)."""
        ...

    def scores(self) -> AnyScores:
        """Of all that was taken in."""
        ...


class ClassCount:
    """A confusion matrix that grows. Pieces are positions of classes, `IGNORED` where there is none."""

    def __init__(self, classes: Sequence[SegmentationClass]) -> None:
        self._classes = classes
        self._counts = np.zeros((len(classes),) * 2, np.int64)
        self._ignored = 0

    def add(self, labels: NDArray[Any], found: NDArray[Any]) -> None:
        """Take in positions, both of one shape."""
        scored = (labels != IGNORED) & (found != IGNORED)
        self._ignored += int(scored.size - scored.sum())
        self._counts += confusion_matrix(labels[scored], found[scored], len(self._classes))

    def scores(self) -> Scores:
        """Of all that was taken in."""
        return Scores.from_confusion(self._counts, self._classes, ignored=self._ignored)


class ErrorCount:
    """Sums of the errors of each quantity. Pieces are numbers (T, ...), NaN where there is none."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._labels = [Moments() for _ in targets]
        self._errors = [Moments() for _ in targets]
        self._absolute = [0.0 for _ in targets]
        self._ignored = 0

    def add(self, labels: NDArray[Any], found: NDArray[Any]) -> None:
        """Take in quantities, both (T, ...)."""
        scored = np.isfinite(labels) & np.isfinite(found)
        self._ignored += int((~scored.any(axis=0)).sum())
        for place, known in enumerate(scored):
            truth = labels[place][known].astype(np.float64)
            errors = found[place][known].astype(np.float64) - truth
            self._labels[place] += Moments.of(truth)
            self._errors[place] += Moments.of(errors)
            self._absolute[place] += float(np.abs(errors).sum())

    def scores(self) -> RegressionScores:
        """Of all that was taken in."""
        sums = zip(self._targets, self._labels, self._errors, self._absolute, strict=True)
        return RegressionScores(
            targets=tuple(map(_score, *zip(*sums, strict=True))), ignored=self._ignored
        )


class LabelCount:
    """For each class, how many tiles that show it, and that do not, have each probability.

    Pieces are (K, ...): 1, 0 or `IGNORED`, and probabilities as maps store them, in steps of `SCALE`.
    """

    def __init__(self, classes: Sequence[SegmentationClass]) -> None:
        self._classes = classes
        self._counts = np.zeros((len(classes), 2, IGNORED), np.int64)
        self._ignored = 0

    def add(self, labels: NDArray[Any], found: NDArray[Any]) -> None:
        """Take in labels and stored probabilities, both (K, ...)."""
        scored = (labels != IGNORED) & (found != IGNORED)
        self._ignored += int((~scored.any(axis=0)).sum())
        for counts, known, truth, stored in zip(self._counts, scored, labels, found, strict=True):
            np.add.at(counts, (truth[known], stored[known]), 1)

    def scores(self) -> MultilabelScores:
        """Of all that was taken in."""
        half = round(0.5 / SCALE)
        hits = self._counts[:, 1, half:].sum(axis=1)
        shown, found = self._counts[:, 1].sum(axis=1), self._counts[:, :, half:].sum(axis=(1, 2))
        precisions = [_average_precision(*counts) for counts in self._counts]
        labels = tuple(
            LabelScore(
                name=item.name,
                value=item.value,
                average_precision=precision,
                f1=_ratio(2 * hit, row + column),
                # As of segmentation: one that is only in the labels is found with no precision.
                precision=_ratio(hit, column) if column else (0.0 if row else None),
                recall=_ratio(hit, row) if row else (0.0 if column else None),
                positives=int(row),
                tiles=int(counts.sum()),
            )
            for item, counts, precision, hit, row, column in zip(
                self._classes, self._counts, precisions, hits, shown, found, strict=True
            )
        )
        return MultilabelScores(
            mean_average_precision=_mean(precisions),
            micro_f1=_ratio(2 * hits.sum(), shown.sum() + found.sum()),
            macro_f1=_mean([item.f1 for item in labels]),
            labels=labels,
            ignored=self._ignored,
        )


def _average_precision(absent: NDArray[np.int64], shown: NDArray[np.int64]) -> float | None:
    """Of tiles without and with the class, counted by their probability, the least first."""
    hits, found = np.cumsum(shown[::-1]), np.cumsum((absent + shown)[::-1])
    if not hits[-1]:
        return None
    return float((shown[::-1] * hits / np.maximum(found, 1)).sum() / hits[-1])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _score(target: Target, labels: Moments, errors: Moments, absolute: float) -> TargetScore:
    pixels = labels.valid
    if not pixels:
        absent = dict.fromkeys(("rmse", "mae", "bias", "r2", "std"))
        return TargetScore(name=target.name, unit=target.unit, pixels=0, **absent)
    squares = errors.squares + pixels * errors.mean**2
    return TargetScore(
        name=target.name,
        unit=target.unit,
        rmse=math.sqrt(squares / pixels),
        mae=absolute / pixels,
        bias=errors.mean,
        r2=1 - squares / labels.squares if labels.squares else None,
        std=labels.deviation,
        pixels=pixels,
    )


def _ratio(part: int, whole: int) -> float | None:
    return float(part) / float(whole) if whole else None


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _three(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.3f}"
