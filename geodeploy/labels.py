"""Label values, and the classes or quantities that they stand for."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import MaskFlags

from geodeploy.errors import LabelError
from geodeploy.spec import NODATA, Presence, SegmentationClass, Target

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


def stored_positions(
    labels: Any,
    stored: Any,
    classes: Sequence[SegmentationClass],
    ignore: Iterable[int],
    *,
    source: str,
) -> NDArray[np.uint8]:
    """As `class_positions`, of what was read from the open raster ``labels``.

    ``stored`` is masked by numpy where the file has no data. Of that, a mask counts in any case, a
    nodata tag unless it is the value of a class.

    Raises:
        LabelError: as `class_positions`.
    """
    ignored = ignored_values(classes, ignore, labels.nodata)
    if MaskFlags.per_dataset not in labels.mask_flag_enums[0]:
        return class_positions(stored.data, classes, ignored, source=source)
    seen = ~np.ma.getmaskarray(stored)
    positions = np.full(stored.shape, IGNORED, np.uint8)
    positions[seen] = class_positions(stored.data[seen], classes, ignored, source=source)
    return positions


def present_classes(
    positions: NDArray[np.uint8], classes: int, presence: Presence, *, inside: float = 1.0
) -> NDArray[np.uint8]:
    """Which classes a tile shows: (classes,) of 1 and 0, or `IGNORED` where nobody knows.

    ``positions`` (h, w) are those of the class of each pixel, `IGNORED` without a label; ``inside`` is
    the share of them that the raster has.
    """
    counts = np.bincount(positions.ravel(), minlength=256)[:classes]
    labelled = int(counts.sum())
    if not labelled or labelled < presence.labelled * positions.size * inside:
        return np.full(classes, IGNORED, np.uint8)
    return (counts / labelled >= presence.share).astype(np.uint8)


def _several(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown} and {len(values) - 8} more"


def target_bands(labels: Any, targets: Sequence[Target], *, source: str) -> list[int]:
    """The numbers of the bands of an open raster that hold the ``targets``: by name, or in order.

    In order where the bands have no names, and where there is one alone.

    Raises:
        LabelError: it has neither all names nor as many bands, or several bands of other names.
    """
    names = [target.name for target in targets]
    found = list(labels.descriptions)
    if set(names) <= set(found):
        return [found.index(name) + 1 for name in names]
    known = ", ".join(name or "unnamed" for name in found)
    if labels.count != len(names):
        raise LabelError(
            f"{source} has {labels.count} band(s) ({known}); one for each of {', '.join(names)} is "
            "needed, by that name or in that order."
        )
    others = [
        f"{name} where {wanted} is expected"
        for name, wanted in zip(found, names, strict=True)
        if name not in (None, "", wanted)
    ]
    if others and len(names) > 1:
        raise LabelError(
            f"{source} has the band {others[0]}: which is which cannot be told. Name the targets as "
            f"the bands are named ({known}), or the bands as the targets."
        )
    return list(range(1, len(names) + 1))


def target_values(
    stored: Any,
    targets: Sequence[Target],
    ignore: Iterable[int],
    *,
    scales: Sequence[float],
    offsets: Sequence[float],
    source: str,
) -> NDArray[np.float32]:
    """The quantities (T, h, w) in their units, NaN where there is none.

    Args:
        stored: Those bands, masked by numpy where the file has no data.
        targets: What the bands are.
        ignore: Stored values that are no label.
        scales: Of the file's tags.
        offsets: Of the file's tags.
        source: Named in errors.

    Raises:
        LabelError: a value lies outside the target's valid range.
    """
    numbers: NDArray[np.float64] = stored.astype(np.float64).filled(np.nan)
    numbers[np.isin(numbers, list(ignore)) | np.isinf(numbers)] = np.nan
    column = (-1, 1, 1)
    scaled = numbers * np.reshape(scales, column) + np.reshape(offsets, column)
    values: NDArray[np.float32] = scaled.astype(np.float32)
    for target, band in zip(targets, values, strict=True):
        low, high = target.valid_range or (-np.inf, np.inf)
        wrong = (band < low) | (band > high)
        if wrong.any():
            raise LabelError(
                f"{source} holds {band[wrong][0]:g} {target.unit}".rstrip()
                + f" of {target.name}, whose "
                f"valid_range is {low:g} to {high:g}. Mark such pixels as nodata, add the value to "
                "`ignore`, or widen the range."
            )
    return values
