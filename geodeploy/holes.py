"""Where a map has no class because the scene could not be read or the model gave no answer."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window, intersect

from geodeploy.aoi import Area
from geodeploy.blend import Block
from geodeploy.raster import Stripe
from geodeploy.report import Hole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Gap:
    """A rectangle of the raster that was not computed, all of it or where ``gone`` says so."""

    window: Window
    cause: str
    gone: NDArray[np.bool_] | None = None
    valid: NDArray[np.bool_] | None = None
    """Where the scene is known to hold data; None where it could not be read."""


class Holes:
    """The holes of a map as they are found, to be taken part by part.

    Each cause is logged once.

    Args:
        area: What is mapped of the raster; None for all of it.
    """

    def __init__(self, area: Area | None) -> None:
        self._area = area
        self._gaps: list[_Gap] = []
        self._failed: list[tuple[int, int]] = []
        self._causes: set[str] = set()
        self._fault = ""

    def watch(self, stripes: Iterable[Stripe]) -> Iterator[Stripe]:
        """The ``stripes``; what could not be read of them is noted."""
        for stripe in stripes:
            for loss in stripe.losses:
                self._tell(loss.cause)
                self._gaps.append(_Gap(loss.window, loss.cause))
            yield stripe

    def without(self, block: Block, fault: str | None) -> Block:
        """``block``, valid only where a tile has answered.

        ``fault`` is what is wrong with the answer for the tile that settles it.
        """
        if fault is not None:
            self._tell(fault)
            self._fault = fault
            self._failed.append((block.row, block.col))
        if block.answered is None:
            return block
        height, width = block.valid.shape
        window = Window(block.col, block.row, width, height)
        # A tile next to this one may be the one that failed: models seldom fail in several ways.
        self._gaps.append(_Gap(window, self._fault, ~block.answered, block.valid))
        return replace(block, valid=block.valid & block.answered, answered=None)

    def take(self, part: Window, settling: Window) -> tuple[list[Hole], int]:
        """The holes of ``part`` of the map, and how many of the tiles that settle ``settling`` failed.

        What lies above the end of ``part`` is forgotten.
        """
        rows, cols = settling.toranges()
        inside = [row in range(*rows) and col in range(*cols) for row, col in self._failed]
        gaps = [gap for gap in self._gaps if intersect(gap.window, part)]
        end = part.row_off + part.height
        self._gaps = [gap for gap in self._gaps if gap.window.row_off + gap.window.height > end]
        self._failed = [place for place, taken in zip(self._failed, inside, strict=True) if not taken]
        return (self._holes(part, gaps) if gaps else []), sum(inside)

    def _holes(self, part: Window, gaps: list[_Gap]) -> list[Hole]:
        causes = list(dict.fromkeys(gap.cause for gap in gaps))
        codes = np.zeros((part.height, part.width), np.uint16)
        lost = np.zeros(codes.shape, bool)
        for gap in gaps:
            window = gap.window.intersection(part)
            here = _within(window, part)
            gone = codes[here] == 0
            if gap.gone is not None:
                gone &= gap.gone[_within(window, gap.window)]
            codes[here][gone] = 1 + causes.index(gap.cause)
            if gap.valid is not None:
                gone &= gap.valid[_within(window, gap.window)]
            lost[here] |= gone
        if self._area:
            lost &= self._area.inside(part)
        corner = self._area.window if self._area else Window(0, 0, 0, 0)
        return [
            Hole(
                row=part.row_off - corner.row_off + row,
                column=part.col_off - corner.col_off + col,
                height=height,
                width=width,
                pixels=pixels,
                cause=causes[code - 1],
            )
            for row, col, height, width, code in rectangles(codes)
            if (pixels := int(lost[row : row + height, col : col + width].sum()))
        ]

    def _tell(self, cause: str) -> None:
        if cause not in self._causes:
            self._causes.add(cause)
            log.warning("%s. Left out as nodata, as is what else fails so.", cause)


def rectangles(codes: NDArray[np.uint16]) -> Iterator[tuple[int, int, int, int, int]]:
    """Rectangles (row, col, height, width, code) that hold each pixel of ``codes`` but 0 once."""
    begun: dict[tuple[int, int, int], int] = {}
    for row, line in enumerate([*codes, np.zeros_like(codes[0])]):
        edges = [0, *(np.flatnonzero(line[1:] != line[:-1]) + 1).tolist(), len(line)]
        runs = {(col, stop, int(line[col])) for col, stop in itertools.pairwise(edges)}
        for run in sorted(begun.keys() - runs):
            col, stop, code = run
            first = begun.pop(run)
            yield first, col, row - first, stop - col, code
        for run in runs - begun.keys():
            if run[2]:
                begun[run] = row


def _within(window: Window, whole: Window) -> tuple[slice, slice]:
    """``window`` in an array of ``whole``."""
    row, col = window.row_off - whole.row_off, window.col_off - whole.col_off
    return slice(row, row + window.height), slice(col, col + window.width)
