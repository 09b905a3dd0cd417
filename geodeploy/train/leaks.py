"""Refuse a training that would be scored on pixels that it has learned from."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from geodeploy.errors import LabelError
from geodeploy.labels import IGNORED
from geodeploy.raster import Raster
from geodeploy.train.data import TEST, TRAINING, VALIDATION, LabelledScene
from geodeploy.train.weights import file_sha256

_SIDE = 256
"""Pixels along the window in which two scenes are compared."""


def check_leaks(scenes: Sequence[LabelledScene]) -> None:
    """Look for labelled pixels that train in one scene and are scored in another.

    They are on the same spot of the ground, or of files of the same bytes, and hold the same values:
    the same place on another day is no leak. Pixels are read only where scenes lie over one another.

    Raises:
        LabelError: names the two.
    """
    for learned, scored in _neighbours(scenes):
        if pixels := shared_pixels(learned, scored):
            raise LabelError(
                f"{learned.raster.name} and {scored.raster.name} share {pixels} labelled pixels, which "
                "would be trained on in the one and scored in the other. Give both one split, or cut "
                "them apart."
            )


def shared_pixels(learned: LabelledScene, scored: LabelledScene) -> int:
    """How many labelled pixels train in the one and are scored in the other; 0 if values differ."""
    windows = common_windows(learned.raster, scored.raster)
    if windows is None:
        return 0
    one, other = windows
    both = learned.codes_of(one, TRAINING) != IGNORED
    both &= np.isin(scored.part[other.toslices()], (VALIDATION, TEST))
    both &= scored.codes[other.toslices()] != IGNORED
    if not both.any():
        return 0
    # What they hold around the first such pixel tells whether it is the same image.
    row = int(np.argmax(both.any(axis=1)))
    col = int(np.argmax(both[row]))
    height, width = min(_SIDE, one.height - row), min(_SIDE, one.width - col)
    pixels, again = (
        scene.raster.read_pixels(Window(window.col_off + col, window.row_off + row, width, height))[0]
        for scene, window in ((learned, one), (scored, other))
    )
    known = both[row : row + height, col : col + width]
    same = np.abs(pixels[:, known] - again[:, known]) <= 1e-6 + 1e-5 * np.abs(again[:, known])
    return int(both.sum()) if same.all(axis=0).mean() > 0.5 else 0


def common_windows(one: Raster, other: Raster) -> tuple[Window, Window] | None:
    """Where in the one and where in the other the same pixels of the ground are.

    None where there are none, or pixels of the two do not coincide.
    """
    among = ~one.transform @ other.transform
    row, col = round(among.f), round(among.c)
    linear = np.array([among.a - 1, among.b, among.d, among.e - 1]) * max(other.height, other.width)
    if np.abs([*linear, among.f - row, among.c - col]).max() > 0.1:
        return None
    top, left = max(row, 0), max(col, 0)
    height = min(one.height, row + other.height) - top
    width = min(one.width, col + other.width) - left
    if height <= 0 or width <= 0:
        return None
    return Window(left, top, width, height), Window(left - col, top - row, width, height)


def _neighbours(scenes: Sequence[LabelledScene]) -> Iterator[tuple[LabelledScene, LabelledScene]]:
    """Pairs, one that trains and one that is scored, of the same files or over one another."""
    groups: dict[str, list[LabelledScene]] = defaultdict(list)
    systems: dict[str, str] = {}
    nowhere = [scene for scene in scenes if scene.raster.crs is None]
    names = _names_by_content({layer.path for scene in nowhere for layer in scene.raster.layers})
    for scene in scenes:
        groups[_ground(scene, systems, names)].append(scene)
    for members in groups.values():
        boxes = np.array([scene.raster.bounds for scene in members])
        training = np.array([bool((scene.part == TRAINING).any()) for scene in members])
        for number, scored in enumerate(members):
            if not np.isin(scored.part, (VALIDATION, TEST)).any():
                continue
            for other in np.flatnonzero(meeting(boxes, boxes[number]) & training):
                if other != number:
                    yield members[other], scored


def meeting(boxes: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of ``boxes`` (N, 4), each left, bottom, right, top, overlap ``box``."""
    overlap = np.all((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2]), axis=1)
    return np.asarray(overlap)


def _names_by_content(paths: Collection[str]) -> dict[str, str]:
    """One name for all files of the same bytes; of what is no file, such as a URL, its own."""
    sizes = {path: Path(path).stat().st_size for path in paths if Path(path).is_file()}
    several = Counter(sizes.values())
    return {
        path: file_sha256(Path(path)) if several[sizes.get(path, -1)] > 1 else path for path in paths
    }


def _ground(scene: LabelledScene, systems: dict[str, str], names: Mapping[str, str]) -> str:
    """What scenes on the same ground share: their CRS, in one of the ways it is written.

    ``systems`` are the ways so far, and which stands for each. Without a CRS it is their files, by
    ``names`` that copies share.
    """
    crs = scene.raster.crs
    if crs is None:
        return " ".join(names[layer.path] for layer in scene.raster.layers)
    own = str(crs.to_wkt())
    if own not in systems:
        # One CRS is written in many ways: with its code or without, by names of GDAL or of others.
        systems[own] = next((wkt for wkt in systems.values() if CRS.from_wkt(wkt) == crs), own)
    return systems[own]
