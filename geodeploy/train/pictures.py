"""Pictures of a training: its curves, and predictions beside labels."""

# C band, K class, T target, H row, W column

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from geodeploy.labels import IGNORED
from geodeploy.pictures import NO_CLASS_COLOR, add_legend, coloured, true_colour
from geodeploy.scores import MultilabelScores, RegressionScores, Scores
from geodeploy.spec import NODATA, ModelSpec, SegmentationClass, default_color
from geodeploy.train.report import Checkup

SHOWN = 24
"""Scenes in the picture of the split."""
_SIDE = 300
"""Pixels along the longer side of one of them."""
_PART_COLORS = {
    "not used": "#ebebeb",
    "training": "#4477aa",
    "validation": "#ee6677",
    "test": "#ccbb44",
}
"""In the order of `geodeploy.train.data`."""


def draw_curves(
    path: Path, losses: Sequence[float], history: Sequence[Checkup], best: int, spec: ModelSpec
) -> None:
    """Write the loss of every step, and the scores of every validation, as PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(losses) + 1)
    left.plot(steps, losses, color="#bbbbbb", linewidth=0.8, label="each step")
    left.plot(
        [check.step for check in history],
        [check.loss for check in history],
        color="#004488",
        marker="o",
        markersize=3,
        label="mean since the last validation",
    )
    left.set(xlabel="step", ylabel="training loss")
    left.legend(frameon=False)
    scored = [(check.step, check.scores) for check in history if check.scores is not None]
    if scored:
        steps = np.array([step for step, _ in scored])
        found = [scores for _, scores in scored]
        if spec.whole_tiles:
            _draw_precisions(
                right, steps, [scores for scores in found if isinstance(scores, MultilabelScores)], spec
            )
        elif spec.classes:
            _draw_ious(right, steps, [scores for scores in found if isinstance(scores, Scores)], spec)
        else:
            _draw_errors(
                right, steps, [scores for scores in found if isinstance(scores, RegressionScores)], spec
            )
        right.axvline(best, color="#bbbbbb", linestyle=":", label="kept")
        right.legend(frameon=False, fontsize="small")
    else:
        right.text(0.5, 0.5, "no validation pixels", ha="center", transform=right.transAxes)
    right.set(xlabel="step")
    figure.savefig(path, dpi=110)


def _draw_ious(axis: Any, steps: NDArray[np.int64], scores: Sequence[Scores], spec: ModelSpec) -> None:
    for position, item in enumerate(spec.classes):
        _draw_line(axis, steps, [found.classes[position].iou for found in scores], item)
    _draw_mean(axis, steps, [found.miou for found in scores])
    axis.set(ylabel="validation IoU", ylim=(0, 1))


def _draw_precisions(
    axis: Any, steps: NDArray[np.int64], scores: Sequence[MultilabelScores], spec: ModelSpec
) -> None:
    for position, item in enumerate(spec.classes):
        _draw_line(axis, steps, [found.labels[position].average_precision for found in scores], item)
    _draw_mean(axis, steps, [found.mean_average_precision for found in scores])
    axis.set(ylabel="validation average precision", ylim=(0, 1.02))


def _draw_line(
    axis: Any, steps: NDArray[np.int64], scores: Sequence[float | None], item: SegmentationClass
) -> None:
    axis.plot(
        steps,
        list(map(_number, scores)),
        color=item.color,
        linewidth=1.2,
        path_effects=[withStroke(linewidth=2.6, foreground="#555555")] if _is_light(item) else [],
        label=item.name,
    )


def _draw_mean(axis: Any, steps: NDArray[np.int64], scores: Sequence[float | None]) -> None:
    axis.plot(steps, list(map(_number, scores)), color="black", linewidth=2, label="mean")


def _draw_errors(
    axis: Any, steps: NDArray[np.int64], scores: Sequence[RegressionScores], spec: ModelSpec
) -> None:
    for position, target in enumerate(spec.targets):
        errors = [_number(found.targets[position].relative_rmse) for found in scores]
        axis.plot(steps, errors, color=default_color(position), linewidth=2, label=target.name)
    axis.set(ylabel="validation RMSE, in standard deviations of the labels", ylim=(0, None))


def draw_predictions(
    path: Path,
    pixels: NDArray[np.float32],
    labels: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    spec: ModelSpec,
) -> None:
    """Write tiles (N, C, H, W) in true colour, their labels and what was predicted, as PNG.

    Labels and predictions are (N, H, W) positions of classes, 255 where there is no label.
    """
    count = len(pixels)
    figure = Figure(figsize=(8.4, 2.8 * count + 0.5), layout="constrained")
    axes = figure.subplots(count, 3, squeeze=False)
    # One below the other they are stretched alike.
    stacked = np.concatenate(pixels, axis=1)
    shown = true_colour(stacked, spec.band_names, np.ones(stacked.shape[1:], bool))
    values = np.full(256, NODATA, np.uint8)
    values[: len(spec.classes)] = spec.class_values
    for row, true in enumerate(np.split(shown, count)):
        maps = (coloured(values[positions[row]], spec.classes) for positions in (labels, predicted))
        for axis, picture in zip(axes[row], (true, *maps), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("#bbbbbb")  # a white class ends where the picture does
    for axis, title in zip(axes[0], ("true colour", "labels", "prediction"), strict=True):
        axis.set_title(title)
    names = [item.name for item in spec.classes]
    add_legend(figure, spec.classes, names, other="no label" if (labels == IGNORED).any() else None)
    figure.savefig(path, dpi=90)


def draw_values(
    path: Path,
    pixels: NDArray[np.float32],
    labels: NDArray[np.float32],
    predicted: NDArray[np.float32],
    spec: ModelSpec,
) -> None:
    """Write tiles (N, C, H, W) in true colour, labels (N, T, H, W) and what was predicted, as PNG.

    A row for each tile and target; one target has one scale of colours in all of them.
    """
    count = len(pixels)
    rows = count * len(spec.targets)
    figure = Figure(figsize=(9.6, 2.8 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    stacked = np.concatenate(pixels, axis=1)
    shown = true_colour(stacked, spec.band_names, np.ones(stacked.shape[1:], bool))
    for place, target in enumerate(spec.targets):
        known = labels[:, place][np.isfinite(labels[:, place])]
        low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
        lines = axes[place * count : (place + 1) * count]
        for number, (line, true) in enumerate(zip(lines, np.split(shown, count), strict=True)):
            line[0].imshow(true, interpolation="nearest")
            for axis, values in zip(line[1:], (labels, predicted), strict=True):
                drawn = axis.imshow(values[number, place], vmin=low, vmax=high, interpolation="nearest")
                axis.set_facecolor(NO_CLASS_COLOR)
            for axis in line:
                axis.set(xticks=[], yticks=[])
        figure.colorbar(drawn, ax=lines[:, 2], label=str(target), extend="both")
    for axis, title in zip(axes[0], ("true colour", "labels", "prediction"), strict=True):
        axis.set_title(title)
    figure.savefig(path, dpi=90)


def draw_labels(
    path: Path,
    pixels: NDArray[np.float32],
    labels: NDArray[np.uint8],
    predicted: NDArray[np.float32],
    spec: ModelSpec,
) -> None:
    """Write tiles (N, C, H, W) in true colour, each beside its classes' probabilities (N, K), as PNG.

    Bars of the classes that ``labels`` (N, K) say the tile shows are filled, those of others are not;
    where nobody knows they are pale.
    """
    count, classes = len(pixels), len(spec.classes)
    figure = Figure(figsize=(8.4, max(2.8, 0.25 * classes) * count + 0.5), layout="constrained")
    axes = figure.subplots(count, 2, squeeze=False)
    stacked = np.concatenate(pixels, axis=1)
    shown = true_colour(stacked, spec.band_names, np.ones(stacked.shape[1:], bool))
    for (left, right), true, truth, found in zip(
        axes, np.split(shown, count), labels, predicted, strict=True
    ):
        left.imshow(true, interpolation="nearest")
        left.set(xticks=[], yticks=[])
        for place, item in enumerate(spec.classes):
            right.barh(
                place,
                found[place],
                facecolor=item.color if truth[place] == 1 else "none",
                edgecolor="#bbbbbb" if truth[place] == IGNORED else "#555555",
            )
        right.axvline(0.5, color="#bbbbbb", linestyle=":")
        right.set(xlim=(0, 1), yticks=range(classes), yticklabels=spec.outputs)
        right.invert_yaxis()
    for axis, title in zip(
        axes[0], ("true colour", "probability (filled: in the labels)"), strict=True
    ):
        axis.set_title(title)
    figure.savefig(path, dpi=90)


def draw_split(
    path: Path, areas: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]], *, of: int
) -> None:
    """Write what each pixel of the first scenes is for, as PNG.

    ``areas`` are the scenes' names, parts (H, W) and which pixels have a label, ``of`` the number of
    all scenes. Pixels without a label are pale.
    """
    columns = min(len(areas), 4)
    rows = -(-len(areas) // columns)
    figure = Figure(figsize=(3 * columns, 3.2 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    table = np.array([to_rgb(color) for color in _PART_COLORS.values()])
    for axis, (name, part, labelled) in zip(axes, areas, strict=False):
        step = max(1, -(-max(part.shape) // _SIDE))
        seen = np.s_[::step, ::step]
        shown = table[part[seen]]
        axis.imshow(np.where(labelled[seen][..., np.newaxis], shown, 0.7 + 0.3 * shown))
        axis.set_title(name, fontsize="small")
    for axis in axes:
        axis.set_axis_off()
    if of > len(areas):
        figure.suptitle(f"{len(areas)} of {of} scenes")
    figure.legend(
        handles=[Patch(facecolor=color, label=name) for name, color in _PART_COLORS.items()],
        loc="outside lower center",
        ncols=len(_PART_COLORS),
        frameon=False,
    )
    figure.savefig(path, dpi=90)


def _number(score: float | None) -> float:
    return float("nan") if score is None else score


def _is_light(item: SegmentationClass) -> bool:
    """Whether a thin line of its colour is lost on white."""
    red, green, blue = item.rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue > 190  # brightness by ITU-R BT.601, of 255
