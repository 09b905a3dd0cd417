"""Pictures for people: a scene beside its map, a confusion matrix. PNG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.bands import common_names
from geodeploy.dataset import open_dataset
from geodeploy.scores import Scores
from geodeploy.spec import NODATA, SegmentationClass

_SIDE = 1000
_LEGEND_COLUMNS = 5
"""Pixels along the longer side of a drawn scene; the raster is read decimated to it."""

NO_CLASS_COLOR = "#ebebeb"
"""For pixels without data or label. Not white: that is what clouds are."""


def true_colour(
    pixels: NDArray[np.floating], band_names: Sequence[str | None], valid: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Red, green and blue (H, W, 3) from 0 to 1 of pixels (C, H, W), stretched between percentiles.

    Without those three bands the first three stand in, or the first one alone as grey.
    """
    names = list(band_names)
    if {"red", "green", "blue"} <= set(names):
        shown = pixels[[names.index(name) for name in ("red", "green", "blue")]]
    else:
        shown = pixels[[0, 1, 2] if len(pixels) >= 3 else [0, 0, 0]]
    image = shown.transpose(1, 2, 0).astype(np.float32)
    valid = valid & np.isfinite(image).all(axis=2)
    if valid.any():
        # One stretch for all three, so that grey clouds stay grey.
        low, high = np.percentile(image[valid], [1, 99])
        image = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.where(valid[:, :, np.newaxis], image, np.float32(1))


def coloured(values: NDArray[np.uint8], classes: Sequence[SegmentationClass]) -> NDArray[np.uint8]:
    """Red, green and blue (H, W, 3) of class ``values`` (H, W); what is no class is light grey."""
    table = np.full((256, 3), tuple(bytes.fromhex(NO_CLASS_COLOR[1:])), np.uint8)
    for item in classes:
        table[item.value] = item.rgb
    return table[values]


def draw_map(scene: Path, mapped: Path, classes: Sequence[SegmentationClass], output: Path) -> None:
    """Draw the scene beside its map, with a legend that gives each class's share."""
    with open_dataset(scene) as dataset:
        step = max(1, -(-max(dataset.height, dataset.width) // _SIDE))
        shape = (-(-dataset.height // step), -(-dataset.width // step))
        pixels = dataset.read(out_shape=(dataset.count, *shape)).astype(np.float32)
        names = common_names(dataset.descriptions)
        names = [name or given for name, given in zip(names, dataset.descriptions, strict=True)]
    with open_dataset(mapped) as dataset:
        values = dataset.read(1, out_shape=shape, window=Window(0, 0, dataset.width, dataset.height))
    figure, axes = _figure(columns=2, width=12, height=6 * shape[0] / shape[1] + 1)
    axes[0].imshow(true_colour(pixels, names, values != NODATA))
    axes[0].set_title(scene.name)
    axes[1].imshow(coloured(values, classes))
    axes[1].set_title(mapped.name)
    for axis in axes:
        axis.set_axis_off()
    data = max(int((values != NODATA).sum()), 1)
    shares = [f"{item.name}  {(values == item.value).sum() / data:.1%}" for item in classes]
    add_legend(figure, classes, shares, other="no data" if (values == NODATA).any() else None)
    _save(figure, output)


def draw_confusion(scores: Scores, output: Path) -> None:
    """Draw the confusion matrix: shares of each row, labels down and map across."""
    counts = np.array(scores.confusion, float)
    rows = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    names = [item.name for item in scores.classes]
    side = 2.5 + 0.9 * len(names)
    figure, (axis,) = _figure(columns=1, width=side + 1, height=side)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("map")
    axis.set_ylabel("labels")
    for row, col in np.ndindex(*counts.shape):
        colour = "white" if share[row, col] > 0.5 else "black"
        axis.text(col, row, f"{share[row, col]:.1%}", ha="center", va="center", color=colour)
    if scores.miou is not None and scores.accuracy is not None:
        axis.set_title(f"mean IoU {scores.miou:.3f}, accuracy {scores.accuracy:.3f}")
    _save(figure, output)


def add_legend(
    figure: Any,
    classes: Sequence[SegmentationClass],
    names: Sequence[str],
    *,
    other: str | None = None,
) -> Any:
    """A legend of colours and ``names`` below the pictures, as wide as they are if it can be.

    ``other`` names what is no class. Returns the box that the legend takes, in pixels.
    """
    from matplotlib.patches import Patch

    entries = [(item.color, name) for item, name in zip(classes, names, strict=True)]
    if other is not None:
        entries.append((NO_CLASS_COLOR, other))
    handles = [Patch(facecolor=color, edgecolor="grey", label=name) for color, name in entries]
    for columns in range(min(len(entries), _LEGEND_COLUMNS), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False
        )
        figure.draw_without_rendering()  # only then is its width known
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            return box
        legend.remove()
    raise ValueError("a legend of nothing")


def _figure(*, columns: int, width: float, height: float) -> tuple[Any, Sequence[Any]]:
    # Not pyplot: it keeps every figure and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, output: Path) -> None:
    figure.savefig(output, format="png", dpi=110)
