"""Whole numbers of 8 bits for real ones: in how large steps, and which stands for 0."""

import numpy as np
from numpy.typing import NDArray

Range = tuple[float, float]
"""Least and largest number of a value, 0 between them."""

_LEVEL = 255
_WEIGHT_LEVEL = 64
"""Largest weight. Processors without VNNI sum two products of 8 bits in 16, which end at 32767:
2 * 255 * 64 fits, so that the sums are the same everywhere."""


def range_of(values: NDArray[np.float32]) -> Range:
    """Of ``values``."""
    return min(0.0, float(values.min())), max(0.0, float(values.max()))


def steps_of(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """The size of a step from ``low`` to ``high``, and which of the numbers 0 to 255 stands for 0."""
    step = np.float32((high - low) / _LEVEL) or np.float32(1)
    return step, np.uint8(np.clip(np.rint(-low / step), 0, _LEVEL))


def weights_in_int8(
    values: NDArray[np.float32], axis: int, bias: NDArray[np.float64] | None = None, step: float = 1.0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Whole numbers for the weights ``values``, and the size of a step in each channel along ``axis``.

    A ``bias`` has steps of those times ``step``, and has to fit into 32 bits.
    """
    others = tuple(place for place in range(values.ndim) if place != axis)
    steps = np.abs(values).max(axis=others) / _WEIGHT_LEVEL
    if bias is not None:
        steps = np.maximum(steps, np.abs(bias) / (step * 2**30))
    steps = np.where(steps > 0, steps, 1).astype(np.float32)
    whole = np.rint(values / np.expand_dims(steps, others))
    return np.clip(whole, -_WEIGHT_LEVEL, _WEIGHT_LEVEL).astype(np.int8), steps


def rounded(values: NDArray[np.float32], limits: Range) -> NDArray[np.float32]:
    """``values`` as 256 steps between ``limits`` have them."""
    step, zero = steps_of(*limits)
    whole: NDArray[np.float32] = np.clip(np.rint(values / step) + zero, 0, _LEVEL) - np.float32(zero)
    return whole * step
