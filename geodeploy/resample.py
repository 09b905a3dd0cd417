"""Bring pixels of one size onto a grid of another, the same pixels however it is cut. No I/O."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Axis:
    """How pixels along one axis of a grid lie among those of a source.

    The edge of pixel ``i`` of the grid is at ``shift + step * i``, in source pixels.
    """

    step: float
    shift: float
    length: int
    """Pixels of the source."""

    def covered(self, start: int, stop: int) -> tuple[int, int]:
        """The pixels from ``start`` to ``stop`` of the grid that lie on the source, edge to edge."""
        first = int(np.ceil(-self.shift / self.step - 1e-6))
        last = int(np.floor((self.length - self.shift) / self.step + 1e-6))
        first = min(max(start, first), stop)
        return first, max(first, min(stop, last))

    def needed(self, start: int, stop: int) -> tuple[int, int]:
        """The first source pixel, and one past the last, that the grid's pixels are made of."""
        first = int(np.floor(self._centre(start) - self._radius))
        last = int(np.ceil(self._centre(stop - 1) + self._radius)) + 1
        return max(first, 0), min(last, self.length)

    def taps(self, start: int, stop: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The source pixels (taps, n) that each pixel of the grid is made of, and their weights.

        The weights are those of linear interpolation; where the grid is coarser than the source they
        widen with it, so that every source pixel counts. They hang on the grid's pixel number alone.
        """
        centre = self._centre(np.arange(start, stop))
        first = np.floor(centre - self._radius).astype(np.intp) + 1
        places = first + np.arange(int(np.ceil(2 * self._radius)))[:, np.newaxis]
        weights = np.maximum(1 - np.abs(places - centre) / self._radius, 0)
        weights[(places < 0) | (places >= self.length)] = 0
        weights /= weights.sum(axis=0)
        return np.clip(places, 0, self.length - 1), weights.astype(np.float32)

    def nearest(self, start: int, stop: int) -> NDArray[np.intp]:
        """The source pixel in which the centre of each pixel of the grid lies."""
        centre = np.floor(self._centre(np.arange(start, stop)) + 0.5 + 1e-9).astype(np.intp)
        inside: NDArray[np.intp] = np.clip(centre, 0, self.length - 1)
        return inside

    def within(self, first: int, count: int, start: int, stop: int) -> tuple[int, int]:
        """The pixels from ``start`` to ``stop`` whose nearest source pixel is one of ``count`` from
        ``first`` on.
        """
        nearest = self.nearest(start, stop)
        begin, end = np.searchsorted(nearest, [first, first + count])
        return start + int(begin), start + int(end)

    @property
    def _radius(self) -> float:
        return max(self.step, 1.0)

    def _centre(self, place: Any) -> Any:
        """Where the centre of the grid's pixel lies, counted from the centre of the source's first."""
        return self.shift + self.step * (place + 0.5) - 0.5


def resample(
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    rows: Axis,
    cols: Axis,
    *,
    corner: tuple[int, int],
    window: tuple[slice, slice],
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values and valid pixels of ``window`` of the grid, linear in both directions.

    A pixel is valid where the source pixel under its centre is; what is not valid has no weight.

    Args:
        values: (h, w) of the source, the pixels that `Axis.needed` names.
        valid: The same shape.
        rows: Of the grid among the source's.
        cols: The same for columns.
        corner: The source row and column of ``values[0, 0]``.
        window: Rows and columns of the grid, which lie on the source.
    """
    down, across = window
    row_taps = rows.taps(down.start, down.stop), corner[0]
    col_taps = cols.taps(across.start, across.stop), corner[1]
    nearest = np.ix_(
        rows.nearest(down.start, down.stop) - corner[0],
        cols.nearest(across.start, across.stop) - corner[1],
    )
    if valid.all():
        mixed = _mix(values.astype(np.float32), row_taps, col_taps)
        kept = np.ones(mixed.shape, bool)
    else:
        weight = _mix(valid.astype(np.float32), row_taps, col_taps)
        mixed = _mix(np.where(valid, values, 0).astype(np.float32), row_taps, col_taps)
        kept = valid[nearest] & (weight > 0)
        np.divide(mixed, weight, out=mixed, where=kept)
    if values.dtype.kind in "iu":
        info = np.iinfo(values.dtype)
        mixed = np.clip(np.rint(mixed), info.min, info.max)
    return mixed.astype(values.dtype), kept


_Taps = tuple[tuple[NDArray[np.intp], NDArray[np.float32]], int]


def _mix(values: NDArray[np.float32], rows: _Taps, cols: _Taps) -> NDArray[np.float32]:
    (places, weights), corner = cols
    within = np.clip(places - corner, 0, values.shape[1] - 1)
    across = sum(values[:, place] * weight for place, weight in zip(within, weights, strict=True))
    (places, weights), corner = rows
    within = np.clip(places - corner, 0, values.shape[0] - 1)
    both = sum(
        np.asarray(across)[place] * weight[:, np.newaxis]
        for place, weight in zip(within, weights, strict=True)
    )
    return np.asarray(both, np.float32)
