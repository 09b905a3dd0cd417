"""Label values and the positions of the classes they stand for."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import LabelError
from geodeploy.spec import NODATA, SegmentationClass

IGNORED = NODATA
"""The position given to pixels without loss and score."""


def ignored_values(
    classes: Sequence[SegmentationClass], ignore: Iterable[int], nodata: float | None
) -> set[int]:
    """The label values that carry no loss and no score.

    They are the recipe's ``ignore``, the file's ``nodata`` and 255, unless listed as a class.
    """
    values = {*ignore, NODATA}
    if nodata is not None and float(nodata).is_integer():
        values.add(int(nodata))
    return values - {item.value for item in classes}


def class_positions(
    labels: NDArray[np.integer],
    classes: Sequence[SegmentationClass],
    ignored: set[int],
    *,
    source: str,
) -> NDArray[np.uint8]:
    """The position among ``classes`` of each label, `IGNORED` for the ignored ones.

    Raises:
        LabelError: a value is neither a class nor ignored; the message lists those found.
    """
    values, where = np.unique(labels, return_inverse=True)
    known = {item.value: position for position, item in enumerate(classes)}
    unknown = [int(value) for value in values if value not in known and value not in ignored]
    if unknown:
        listed = ", ".join(f"{item.value} {item.name}" for item in classes)
        raise LabelError(
            f"{source} holds the value{'s' if len(unknown) > 1 else ''} {_several(unknown)}, which "
            f"{'are' if len(unknown) > 1 else 'is'} none of the classes ({listed}). Add "
            f"{'them' if len(unknown) > 1 else 'it'} to the recipe's classes or to its `ignore`, or "
            "write 255 in the labels there."
        )
    lookup = np.array([known.get(int(value), IGNORED) for value in values], np.uint8)
    return lookup[where].reshape(labels.shape)


def _several(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"
