"""Do the borders between tiles show in a class map? Changes of class at them against those beside them.

Two neighbouring pixels have one class or two. Over all pairs across a line between two columns, or two
rows, that is a rate. Where tiles are joined badly it is raised on the lines where one tile begins or
ends. How much it varies by itself is what the same lines show when all of them are moved aside by 1, 2,
3 ... pixels together: the same landscape, as many pairs, no border. Hence a robust z-score,

    (rate - median of the moved) / (1.4826 x their median absolute deviation)
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from geodeploy.blend import Blend
from geodeploy.classmap import ClassMap, open_class_map
from geodeploy.errors import ModelError
from geodeploy.tiles import TileGrid

THRESHOLD = 5.0
"""A z from which borders show. Lines of real maps where no tile ends have stayed below 4."""
_REACH = 48
"""Pixels that lines are moved aside at most: further off lies another landscape."""
_BLOCK = 256
"""Sides of a source's own blocks are multiples of it; that lossy ones show is not the tiles' doing."""
_FEWEST_LINES = 2
_FEWEST_MOVES = 16
_TAGS = ("TILE", "OVERLAP", "SCENE_SIZE", "CORNER", "BLEND")


class Seams(BaseModel):
    """How the borders between the tiles of a map stand out."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    lines: int
    """Borders that were looked at, between columns and between rows together."""
    at_borders: float | None
    """Share of the pairs of pixels across a border that differ in class; of the kind of line with the
    greatest z. None without lines."""
    elsewhere: float | None
    """The same beside the borders, the median of the moved lines."""
    z: float | None
    """How far the one is from the other, in robust standard deviations. None where there are too few
    lines to say."""
    visible: bool | None
    """Whether ``z`` reaches `THRESHOLD`."""

    def __str__(self) -> str:
        if self.z is None:
            return f"too few to say ({self.lines} lines)"
        verdict = "they show" if self.visible else "no seams"
        return (
            f"{verdict}: {self.at_borders:.2%} of neighbours differ there, {self.elsewhere:.2%} beside "
            f"them (z {self.z:.1f} over {self.lines} lines; they show from {THRESHOLD:g})"
        )


def measure_seams(path: Path | str) -> Seams:
    """How the tiles' borders stand out in the map at ``path``, which `predict` made.

    Reads the map in bands of rows. Pixels without data have no part in it.

    Raises:
        ModelError: the map does not say on which tiles it was made.
        SourceError: it is missing, damaged, or no class map.
    """
    with open_class_map(path) as source:
        tiling = _tiling(source)
        changes = count_changes(source)
    return compare_borders(changes, tiling)


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles that a map was made on."""

    grid: TileGrid
    """Of the scene."""
    blend: Blend
    corner: tuple[int, int]
    """Column and row of the scene that the map begins with."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """From the beginning of a tile, the lines at which something may jump.

        ``crop`` goes over from one tile to the next in the middle of the overlap. In a ``flat`` mean a
        tile appears and disappears at once, at the overlap's two ends. ``cosine`` should have no jump;
        one would be where its weights begin, are equal, or end.
        """
        overlap = self.grid.overlap
        of_blend = {
            "crop": (overlap // 2,),
            "flat": (0, overlap),
            "cosine": (0, overlap // 2, overlap),
        }
        return tuple(sorted(set(of_blend[self.blend])))


@dataclass(frozen=True, slots=True)
class Changes:
    """Pairs of neighbouring pixels in one direction: those across each line, from the map's edge on."""

    pairs: NDArray[np.int64]
    """(length,) With data on both sides of line ``n``, which lies before pixel ``n``."""
    changed: NDArray[np.int64]
    """(length,) Those that differ."""


def count_changes(source: ClassMap) -> tuple[Changes, Changes]:
    """Between the columns of a class map, and between its rows."""
    across, down = (
        Changes(np.zeros(length, np.int64), np.zeros(length, np.int64))
        for length in (source.width, source.height)
    )
    last: NDArray[np.uint8] | None = None
    for row, values in source.bands():
        differ, both = _pairs(values[:, :-1], values[:, 1:], source.nodata)
        across.pairs[1:] += both.sum(axis=0)
        across.changed[1:] += differ.sum(axis=0)
        upper = values[:-1] if last is None else np.concatenate([last, values[:-1]])
        lower = values[1:] if last is None else values
        differ, both = _pairs(upper, lower, source.nodata)
        lines = slice(row + (last is None), row + len(values))
        down.pairs[lines] = both.sum(axis=1)
        down.changed[lines] = differ.sum(axis=1)
        last = values[-1:]
    return across, down


def _pairs(
    one: NDArray[np.uint8], other: NDArray[np.uint8], nodata: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pairs hold two classes, and which hold data twice."""
    both = np.ones(one.shape, bool) if nodata is None else (one != nodata) & (other != nodata)
    return (one != other) & both, both


def compare_borders(changes: tuple[Changes, Changes], tiling: Tiling) -> Seams:
    """How the borders stand out, of the kind of line that does so most."""
    found = [_compare(changes, tiling, offset) for offset in tiling.offsets]
    return max(found, key=lambda seams: -np.inf if seams.z is None else seams.z)


def _compare(changes: tuple[Changes, Changes], tiling: Tiling, offset: int) -> Seams:
    """How the lines at ``offset`` from the beginning of each tile stand out."""
    grid = tiling.grid
    reach = min(_REACH, grid.stride // 2)
    moves = np.arange(-reach, reach + 1)
    pairs, changed = np.zeros(len(moves), np.int64), np.zeros(len(moves), np.int64)
    count = 0
    for along, spans, first in zip(changes, (grid.cols, grid.rows), tiling.corner, strict=True):
        lines = np.array([span.begin for span in spans[1:]], np.int64) + offset
        if grid.stride % _BLOCK:
            lines = lines[lines % _BLOCK > 0]
        lines -= first
        # Those too near to the map's edge to be moved are left out: every move has the same lines.
        lines = lines[(lines - reach >= 1) & (lines + reach < len(along.pairs))]
        moved = lines[:, np.newaxis] + moves
        pairs += along.pairs[moved].sum(axis=0)
        changed += along.changed[moved].sum(axis=0)
        count += int((along.pairs[lines] > 0).sum())
    rates = changed / np.maximum(pairs, 1)
    elsewhere = pairs > 0
    for other in tiling.offsets:
        elsewhere &= (offset + moves - other) % grid.stride != 0
    if not pairs[reach]:
        return Seams(lines=0, at_borders=None, elsewhere=None, z=None, visible=None)
    at_borders = float(rates[reach])
    if count < _FEWEST_LINES or elsewhere.sum() < _FEWEST_MOVES:
        return Seams(lines=count, at_borders=at_borders, elsewhere=None, z=None, visible=None)
    beside = rates[elsewhere]
    median = float(np.median(beside))
    # No less than what mere counting varies by: in a map of few changes the deviation may be zero.
    guess = (median * pairs[reach] + 1) / (pairs[reach] + 2)
    counting = math.sqrt(guess * (1 - guess) / pairs[reach])
    deviation = max(1.4826 * float(np.median(np.abs(beside - median))), counting)
    z = (at_borders - median) / deviation
    return Seams(lines=count, at_borders=at_borders, elsewhere=median, z=z, visible=z >= THRESHOLD)


def _tiling(source: ClassMap) -> Tiling:
    tags = source.dataset.tags()
    found = [tags.get(f"GEODEPLOY_{name}", "") for name in _TAGS]
    numbers = [int(number) for text in found[:-1] for number in re.findall(r"\d+", text)]
    if len(numbers) != 6 or found[-1] not in get_args(Blend):
        raise ModelError(f"{source.path} does not say on which tiles it was made. Map the scene again.")
    tile, overlap, height, width, row, col = numbers
    return Tiling(TileGrid(height, width, tile, overlap), found[-1], corner=(col, row))
