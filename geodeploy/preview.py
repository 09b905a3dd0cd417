"""A small picture of a class map with its legend, from the map's overviews."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geodeploy.classmap import ClassMap, open_class_map
from geodeploy.dataset import reading
from geodeploy.errors import OutputError
from geodeploy.pictures import add_legend, coloured
from geodeploy.spec import SegmentationClass
from geodeploy.writer import Told, check_output, followed, replacing

PNG = (".png",)
_SIDE = 1000
_DPI = 110
_LEGEND_WIDTH = 440
"""What a legend may take beside a narrow map."""
_GAP = 8
"""Around the legend."""


def write_preview(
    source: Path | str,
    output: Path | str,
    *,
    side: int = _SIDE,
    overwrite: bool = False,
    told: Told | None = None,
) -> Path:
    """Draw the class map at ``source`` to ``output``, a PNG, with a legend of names and shares.

    Args:
        source: A class map; its overviews are read, so that a map of any size is drawn at once.
        output: Where the picture goes.
        side: Pixels along the map's longer side in the picture; the legend comes below them.
        overwrite: Replace a file that exists.
        told: Hears of the picture before it is moved there.

    Raises:
        OutputError: ``output`` cannot or must not be written.
        SourceError: the map is missing, or no class map.
    """
    output = followed(Path(output))
    check_output(output, [Path(source)], overwrite=overwrite, flag="--preview", suffixes=PNG)
    if side < 1:
        raise OutputError(f"{output}: a picture of side={side} pixels is none. Take 1 or more.")
    with open_class_map(source) as opened:
        values = _decimated(opened, side)
        data = np.ones(values.shape, bool) if opened.nodata is None else values != opened.nodata
        found = np.unique(values[data]).tolist()
        listed = sorted({item.value for item in opened.named} | set(found))
        classes = [opened.item(value) for value in listed]
        tall = _height_of_a_pixel(opened)
    try:
        with replacing(output, told) as draft:
            _draw(np.where(data, values, np.uint8(255)), classes, tall, side, draft)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror}).") from error
    return output


def _decimated(source: ClassMap, side: int) -> NDArray[np.uint8]:
    step = max(1.0, max(source.height, source.width) / side)
    shape = (max(1, round(source.height / step)), max(1, round(source.width / step)))
    with reading(source.path, source.whole):
        values: NDArray[np.uint8] = source.dataset.read(1, out_shape=shape)
    return values


def _height_of_a_pixel(source: ClassMap) -> float:
    """In widths of a pixel, on the ground."""
    grid = source.transform
    ratio = math.hypot(grid.b, grid.e) / math.hypot(grid.a, grid.d)
    if source.crs is None or not source.crs.is_geographic:
        return ratio
    middle = (grid.f + grid.e * source.height / 2) * float(source.crs.units_factor[1])
    return ratio / max(math.cos(middle), 0.1)  # at the poles a map in degrees is no picture


def _draw(
    values: NDArray[np.uint8], classes: list[SegmentationClass], tall: float, side: int, path: Path
) -> None:
    # Not pyplot: it keeps every figure and looks for a screen.
    from matplotlib.figure import Figure

    height, width = values.shape[0] * tall, float(values.shape[1])
    pixel = side / max(height, width)
    height, width = max(round(height * pixel), 1), max(round(width * pixel), 1)
    known = {item.value for item in classes}
    none = ~np.isin(values, list(known))
    data = max(int((~none).sum()), 1)
    names = [f"{item.name}  {_percent((values == item.value).sum() / data)}" for item in classes]
    whole = max(width, _LEGEND_WIDTH)
    figure = Figure(figsize=(whole / _DPI, (height + whole) / _DPI), dpi=_DPI)
    legend = add_legend(figure, classes, names, other="no data" if none.any() else None)
    # The map has its pixels, whatever the legend takes; letters are as large in every picture.
    whole, below = max(whole, math.ceil(legend.width)), math.ceil(legend.height + 2 * _GAP)
    figure.set_size_inches((whole + 0.5) / _DPI, (below + height + 0.5) / _DPI)  # drawn in whole pixels
    axis = figure.add_axes(
        (
            (whole - width) // 2 / whole,
            below / (below + height),
            width / whole,
            height / (below + height),
        )
    )
    axis.imshow(coloured(values, classes), aspect="auto", interpolation="nearest")
    axis.set_axis_off()
    # Without matplotlib's version in the file, the same map gives the same bytes.
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _percent(share: float) -> str:
    """Of a picture: no more digits than it can tell."""
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"
