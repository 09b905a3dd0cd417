"""Whole numbers of 8 bits for real ones: in how large steps, and which stands for 0."""

import numpy as np
from numpy.typing import NDArray

Range = tuple[float, float]
"""Least and largest number of a value, 0 between them."""

_WEIGHT_LEVEL = 64
"""Largest weight. Processors without VNNI sum two products of 8 bits in 16, which end at 32767:
2 * 255 * 64 fits, so that the sums are the same everywhere. ONNX Runtime takes signed values there for
unsigned ones, with 128 more."""


def range_of(values: NDArray[np.float32]) -> Range:
    """Of ``values``."""
    return min(0.0, float(values.min())), max(0.0, float(values.max()))


def steps_of(low: float, high: float, *, signed: bool) -> tuple[np.float32, np.uint8 | np.int8]:
    """The size of a step from ``low`` to ``high``, and which number stands for 0.

    That is one of 0 to 255; where ``signed``, of -128 to 127, it is 0 itself.
    """
    if signed:
        return np.float32(max(-low, high) / 127) or np.float32(1), np.int8(0)
    step = np.float32((high - low) / 255) or np.float32(1)
    return step, np.uint8(np.clip(np.rint(-low / step), 0, 255))


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


def rounded(values: NDArray[np.float32], limits: Range, *, signed: bool) -> NDArray[np.float32]:
    """``values`` as the steps between ``limits`` have them."""
    step, zero = steps_of(*limits, signed=signed)
    ends = np.iinfo(zero.dtype)
    offset = np.float32(zero)
    whole: NDArray[np.float32] = np.clip(np.rint(values / step) + offset, ends.min, ends.max) - offset
    return whole * step
