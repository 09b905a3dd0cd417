"""Refuse a training that would be scored on pixels that it has learned from."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from rasterio.windows import Window

from geodeploy.errors import LabelError
from geodeploy.labels import IGNORED
from geodeploy.train.data import TEST, TRAINING, VALIDATION, LabelledScene

_SIDE = 256
"""Pixels along the window in which two scenes are compared."""


def check_leaks(scenes: Sequence[LabelledScene]) -> None:
    """Look for labelled pixels that train in one scene and are scored in another.

    They are on the same spot of the ground, or of the same file, and hold the same values: the same
    place on another day is no leak. Pixels are read only where scenes lie over one another.

    Raises:
        LabelError: names the two.
    """
    for learned, scored in _neighbours(scenes):
        shift = _shift(learned, scored)
        if shift is not None and (pixels := _shared(learned, scored, *shift)):
            raise LabelError(
                f"{learned.raster.name} and {scored.raster.name} share {pixels} labelled pixels, which "
                "would be trained on in the one and scored in the other. Give both one split, or cut "
                "them apart."
            )


def _neighbours(scenes: Sequence[LabelledScene]) -> Iterator[tuple[LabelledScene, LabelledScene]]:
    """Pairs, one that trains and one that is scored, of the same files or over one another."""
    groups: dict[str, list[LabelledScene]] = defaultdict(list)
    for scene in scenes:
        crs = scene.raster.crs
        groups[_files(scene) if crs is None else crs.to_wkt()].append(scene)
    for members in groups.values():
        boxes = np.array([_bounds(scene) for scene in members])
        training = np.array([bool((scene.part == TRAINING).any()) for scene in members])
        for number, scored in enumerate(members):
            if not np.isin(scored.part, (VALIDATION, TEST)).any():
                continue
            near = (boxes[:, :2] < boxes[number, 2:]).all(1) & (boxes[:, 2:] > boxes[number, :2]).all(1)
            for other in np.flatnonzero(near & training):
                if other != number:
                    yield members[other], scored


def _files(scene: LabelledScene) -> str:
    return " ".join(str(layer.path) for layer in scene.raster.layers)


def _bounds(scene: LabelledScene) -> tuple[float, float, float, float]:
    raster = scene.raster
    corners = [
        raster.transform @ corner
        for corner in ((0, 0), (raster.width, 0), (0, raster.height), (raster.width, raster.height))
    ]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _shift(one: LabelledScene, other: LabelledScene) -> tuple[int, int] | None:
    """Row and column in ``one`` of the corner of ``other``; None where their pixels do not coincide."""
    among = ~one.raster.transform @ other.raster.transform
    row, col = round(among.f), round(among.c)
    size = max(other.raster.height, other.raster.width)
    linear = np.array([among.a - 1, among.b, among.d, among.e - 1]) * size
    if np.abs([*linear, among.f - row, among.c - col]).max() > 0.1:
        return None
    return row, col


def _shared(learned: LabelledScene, scored: LabelledScene, row: int, col: int) -> int:
    """How many labelled pixels train in the one and are scored in the other; 0 if values differ."""
    top, left = max(row, 0), max(col, 0)
    height = min(learned.raster.height, row + scored.raster.height) - top
    width = min(learned.raster.width, col + scored.raster.width) - left
    if height <= 0 or width <= 0:
        return 0
    one, other = Window(left, top, width, height), Window(left - col, top - row, width, height)
    trains = learned.codes_of(one, TRAINING) != IGNORED
    both = trains & np.isin(scored.part[other.toslices()], (VALIDATION, TEST))
    both &= scored.codes[other.toslices()] != IGNORED
    if not both.any():
        return 0
    # What they hold around the first such pixel tells whether it is the same image.
    first = int(np.argmax(both.any(axis=1)))
    start = int(np.argmax(both[first]))
    rows, cols = min(_SIDE, height - first), min(_SIDE, width - start)
    pixels, valid = learned.raster.read_pixels(Window(left + start, top + first, cols, rows))
    again, present = scored.raster.read_pixels(
        Window(other.col_off + start, other.row_off + first, cols, rows)
    )
    known = valid & present & both[first : first + rows, start : start + cols]
    same = np.abs(pixels[:, known] - again[:, known]) <= 1e-6 + 1e-5 * np.abs(again[:, known])
    alike = same.all(axis=0)
    return int(both.sum()) if alike.size and alike.mean() > 0.5 else 0
