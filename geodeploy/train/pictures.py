"""Pictures of a training: its curves, and predictions beside labels."""

# C band, H row, W column

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from geodeploy.labels import IGNORED
from geodeploy.pictures import add_legend, coloured, true_colour
from geodeploy.spec import NODATA, ModelSpec, SegmentationClass
from geodeploy.train.validation import Checkup


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
    scored = [check for check in history if check.scores is not None]
    for position, item in enumerate(spec.classes):
        right.plot(
            [check.step for check in scored],
            [_iou(check, position) for check in scored],
            color=item.color,
            linewidth=1.2,
            path_effects=[withStroke(linewidth=2.6, foreground="#555555")] if _is_light(item) else [],
            label=item.name,
        )
    if scored:
        right.plot(
            [check.step for check in scored],
            [check.miou for check in scored],
            color="black",
            linewidth=2,
            label="mean",
        )
        right.axvline(best, color="#bbbbbb", linestyle=":", label="kept")
        right.legend(frameon=False, fontsize="small")
    else:
        right.text(0.5, 0.5, "no validation pixels", ha="center", transform=right.transAxes)
    right.set(xlabel="step", ylabel="validation IoU", ylim=(0, 1))
    figure.savefig(path, dpi=110)


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


def _iou(check: Checkup, position: int) -> float:
    found = check.scores.classes[position].iou if check.scores else None
    return float("nan") if found is None else found


def _is_light(item: SegmentationClass) -> bool:
    """Whether a thin line of its colour is lost on white."""
    red, green, blue = item.rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue > 190  # brightness by ITU-R BT.601, of 255
