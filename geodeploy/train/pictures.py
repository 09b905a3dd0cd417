"""Pictures of a training: its curves, and predictions beside labels."""

# C band, H row, W column

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from geodeploy.labels import IGNORED
from geodeploy.spec import ModelSpec
from geodeploy.train.loop import Checkup

_UNLABELLED = "#ebebeb"


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
            linewidth=1,
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
    right.set_facecolor("#d8d8d8")  # classes may be white or black
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
    shown = _true_colour(pixels, spec.band_names)
    for row in range(count):
        for axis, picture in zip(
            axes[row],
            (shown[row], _coloured(labels[row], spec), _coloured(predicted[row], spec)),
            strict=True,
        ):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("true colour", "labels", "prediction"), strict=True):
        axis.set_title(title)
    handles = [
        Patch(facecolor=item.color, edgecolor="#888888", label=item.name) for item in spec.classes
    ]
    if (labels == IGNORED).any():
        handles.append(Patch(facecolor=_UNLABELLED, edgecolor="#888888", label="no label"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    figure.savefig(path, dpi=90)


def _iou(check: Checkup, position: int) -> float:
    found = check.scores.classes[position].iou if check.scores else None
    return float("nan") if found is None else found


def _coloured(positions: NDArray[np.uint8], spec: ModelSpec) -> NDArray[np.uint8]:
    table = np.full((256, 3), list(bytes.fromhex(_UNLABELLED[1:])), np.uint8)
    table[: len(spec.classes)] = [item.rgb for item in spec.classes]
    coloured: NDArray[np.uint8] = table[positions]
    return coloured


def _true_colour(pixels: NDArray[np.float32], bands: Sequence[str]) -> NDArray[np.uint8]:
    """(N, H, W, 3), stretched alike in all tiles; the first bands where one of the three is missing."""
    rgb = ("red", "green", "blue")
    if set(rgb) <= set(bands):
        indexes = [bands.index(band) for band in rgb]
    else:
        indexes = [min(number, len(bands) - 1) for number in range(3)]
    chosen = pixels[:, indexes]
    low, high = np.percentile(chosen, [2, 98], axis=(0, 2, 3), keepdims=True)
    stretched = np.clip((chosen - low) / np.maximum(high - low, 1e-9), 0, 1)
    shown: NDArray[np.uint8] = (stretched.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    return shown
