"""Majority in a square, small regions to their neighbours: bands of rows of a class map in and out.

Each function takes bands of rows from the top and gives bands of the same rows; it holds a few hundred
rows more than it gives, as many as a pixel's answer can depend on, so the result is that of the whole
map at once. Nodata stays, and nothing becomes nodata.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from pydantic import AfterValidator

_ROWS = 512
"""Given at a time, at least."""
_PASSES = 3
"""Of the sieve: a region whose neighbours are all small waits until one of them has grown."""
MOST_PIXELS = 1000
"""Of the sieve; it holds six times as many rows."""
MOST_SIDE = 255
"""Of the square, whose pixels are counted in 16 bits."""

Bands = Iterable[NDArray[np.uint8]]


def _odd(side: int) -> int:
    if side % 2 == 0:
        raise ValueError(f"needs an odd number of pixels, found {side}")
    return side


Side = Annotated[int, Ge(3), Le(MOST_SIDE), AfterValidator(_odd)]
"""Of the square whose majority a pixel takes, in pixels."""
Size = Annotated[int, Ge(2), Le(MOST_PIXELS)]
"""Of the smallest region that stays, in pixels."""


def smooth_bands(bands: Bands, side: Side, *, nodata: int | None) -> Iterator[NDArray[np.uint8]]:
    """Each pixel takes the class that most pixels of the square around it have.

    The square has ``side`` pixels and ends at the map's edge; nodata has no vote. Of classes with as
    many votes the pixel's own wins, else the one with the smaller value.
    """
    for values, inner in _with_context(bands, side // 2, rows=_ROWS):
        yield _majority(values, inner, side // 2, nodata)


def sieve_bands(bands: Bands, size: Size, *, nodata: int | None) -> Iterator[NDArray[np.uint8]]:
    """Regions of fewer than ``size`` pixels take the class with which they share the longest border.

    A region is pixels of one class that share sides. Only neighbours that are not small themselves
    count, as in GDAL's sieve, which takes the largest instead; of equal borders the smaller class value
    wins. A region without such a neighbour waits for the next of three passes; where everything is
    small it stays: smooth first. Nodata is no neighbour.
    """
    for _ in range(_PASSES):
        bands = _sieve_once(bands, size, nodata)
    yield from bands


def sieve_reach(size: int) -> int:
    """How far away, in pixels, what `sieve_bands` makes of a pixel may depend on what there is."""
    return _PASSES * 2 * size


def _sieve_once(bands: Bands, size: int, nodata: int | None) -> Iterator[NDArray[np.uint8]]:
    # A small region reaches less than its size beyond the rows that are given, and so does each of its
    # small neighbours beyond it.
    rows = -(-2 * size // _ROWS) * _ROWS
    for values, inner in _with_context(bands, 2 * size, rows=rows):
        _fill_small(values, size, nodata)
        yield values[inner]


def _with_context(bands: Bands, margin: int, *, rows: int) -> Iterator[tuple[NDArray[np.uint8], slice]]:
    """The map, ``rows`` at a time, each with up to ``margin`` rows more above and below.

    Yields an array of its own, and where in it the rows lie that it is about.
    """
    held: NDArray[np.uint8] | None = None
    above = 0
    for band in bands:
        held = band if held is None else np.concatenate([held, band])
        while len(held) >= above + rows + margin:
            yield held[: above + rows + margin].copy(), slice(above, above + rows)
            kept = min(above + rows, margin)
            held, above = held[above + rows - kept :], kept
    if held is not None and len(held) > above:
        yield held.copy(), slice(above, len(held))


def _majority(
    values: NDArray[np.uint8], inner: slice, reach: int, nodata: int | None
) -> NDArray[np.uint8]:
    own = values[inner]
    best, most = own.copy(), np.zeros(own.shape, np.uint16)
    of_own = np.zeros(own.shape, np.uint16)
    padded = np.pad(values, reach)
    rows = slice(inner.start, inner.stop + 2 * reach)
    inside = np.pad(np.ones(values.shape, bool), reach)[rows]
    for value in np.unique(values).tolist():
        if value == nodata:
            continue
        votes = _square_sums((padded[rows] == value) & inside, 2 * reach + 1)
        more = votes > most
        best[more] = value
        most[more] = votes[more]
        of_own[own == value] = votes[own == value]
    keep = of_own == most
    if nodata is not None:
        keep |= own == nodata
    return np.where(keep, own, best)


def _square_sums(here: NDArray[np.bool_], side: int) -> NDArray[np.uint16]:
    """How many are True in each square of ``side``, (h - side + 1, w - side + 1)."""
    height, width = here.shape[0] - side + 1, here.shape[1] - side + 1
    down = np.zeros((height, here.shape[1]), np.uint16)
    for row in range(side):
        down += here[row : row + height]
    sums = np.zeros((height, width), np.uint16)
    for col in range(side):
        sums += down[:, col : col + width]
    return sums


def _fill_small(values: NDArray[np.uint8], size: int, nodata: int | None) -> None:
    """Give the small regions of ``values`` (h, w) to their neighbours, in place.

    A run is what one row has of one class side by side. There are far fewer runs than pixels.
    """
    height, width = values.shape
    begins = np.ones((height, width), bool)
    np.not_equal(values[:, 1:], values[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=values.size)
    classes = values.ravel()[starts]

    # Where either of two rows begins a run, a stretch begins along which both keep theirs.
    stretches = np.flatnonzero(begins[:-1] | begins[1:])
    upper = np.searchsorted(starts, stretches, side="right") - 1
    lower = np.searchsorted(starts, stretches + width, side="right") - 1
    shared = np.diff(stretches, append=(height - 1) * width)
    del begins
    same = classes[upper] == classes[lower]
    region = _connected(len(starts), upper[same], lower[same])

    pixels = np.bincount(region, weights=lengths)
    small = (pixels[region] < size) & (classes != nodata if nodata is not None else True)
    large = (pixels[region] >= size) & (classes != nodata if nodata is not None else True)
    if not small.any():
        return
    beside = np.flatnonzero(starts[1:] % width)  # runs with another one to their right
    ones = np.concatenate([upper[~same], lower[~same], beside, beside + 1])
    others = np.concatenate([lower[~same], upper[~same], beside + 1, beside])
    borders = np.concatenate([shared[~same], shared[~same], np.ones(2 * len(beside), np.int64)])
    count = small[ones] & large[others]
    pairs, place = np.unique(
        region[ones[count]] * 256 + classes[others[count]].astype(np.int64), return_inverse=True
    )
    length = np.bincount(place, weights=borders[count], minlength=len(pairs))
    regions, candidates = pairs // 256, pairs % 256
    order = np.lexsort((candidates, -length, regions))
    winners, first = np.unique(regions[order], return_index=True)
    becomes = np.full(len(starts), -1)
    becomes[winners] = candidates[order][first]

    changed = np.flatnonzero(becomes[region] >= 0)
    ends = np.cumsum(lengths[changed])
    where = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
        starts[changed] - ends + lengths[changed], lengths[changed]
    )
    values.ravel()[where] = np.repeat(becomes[region[changed]], lengths[changed])


def _connected(count: int, ones: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of ``count`` things the smallest of those that the pairs join it to."""
    roots = np.arange(count)
    while len(ones):
        first, second = roots[ones], roots[others]
        apart = first != second
        ones, others = ones[apart], others[apart]
        first, second = first[apart], second[apart]
        np.minimum.at(roots, np.maximum(first, second), np.minimum(first, second))
        while True:
            further = roots[roots]
            if np.array_equal(further, roots):
                break
            roots = further
    return roots
