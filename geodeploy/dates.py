"""The dates of an array: which axis they run along, and which of them are asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from geodeploy.attributes import spatial_axes
from geodeploy.errors import SourceError, first_line


def time_axis(array: Any) -> str | None:
    """The dimension that runs through time, if there is one: by its name or by CF's attributes."""
    axes = spatial_axes(array) or ()
    for dim in array.dims:
        attrs = array[dim].attrs if dim in array.coords else {}
        dated = dim in array.coords and array[dim].dtype.kind == "M"
        said = attrs.get("standard_name") == "time" or attrs.get("axis") == "T"
        if dim not in axes and (dim == "time" or dated or said or " since " in str(attrs.get("units"))):
            return str(dim)
    return None


def read_dates(array: Any, axis: str, name: str) -> list[str]:
    """Every place along ``axis`` in ISO 8601, as short as it can be; numbers from 1 without a calendar.

    Raises:
        SourceError: the times cannot be read; ``name`` says of what.
    """
    if axis not in array.coords:
        return [str(number) for number in range(1, array.sizes[axis] + 1)]
    import xarray

    try:
        times = xarray.decode_cf(xarray.Dataset(coords={axis: array[axis].variable}))[axis].values
    except Exception as error:  # calendars and units have errors of their own
        raise SourceError(
            f"{name}: its {axis} cannot be read as dates ({first_line(error)})."
        ) from error
    if times.dtype.kind == "M":
        return [str(text) for text in _without_midnight(np.datetime_as_string(times, unit="s"))]
    if times.dtype.kind == "O":  # of a calendar that is not ours
        return _without_midnight([time.isoformat() for time in times])
    return [str(time) for time in times]


def choose_dates(array: Any, name: str, wanted: Sequence[str], most: int) -> list[int | None]:
    """The places along the time of ``array`` that are meant, oldest first; None without such an axis.

    Args:
        array: An `xarray.DataArray`.
        name: Of the array, for messages.
        wanted: Dates as in ``2024-05-31``, or as much of their beginning as tells one from the others.
            None means all there are.
        most: How many dates a model takes.

    Raises:
        SourceError: a date is not there, or means several; or none is wanted, and there are more.
    """
    axis = time_axis(array)
    if axis is None:
        return [None]
    dates = read_dates(array, axis, name)
    order = np.argsort(array[axis].values, kind="stable").tolist()
    if wanted:
        chosen = {_find(date, dates, name) for date in wanted}
        return [place for place in order if place in chosen]
    if len(dates) not in (1, most):
        raise SourceError(
            f"{name} has {len(dates)} dates, {dates[order[0]]} to {dates[order[-1]]}. Choose "
            f"{'one' if most == 1 else most} with --date, such as --date {dates[order[-1]]}."
        )
    return [*order]


def _find(date: str, dates: Sequence[str], name: str) -> int:
    found = [place for place, text in enumerate(dates) if text == date]
    found = found or [place for place, text in enumerate(dates) if text.startswith(date)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SourceError(
            f"{name} has {len(found)} dates that begin with {date}: {_some(dates, found)}. Say more of "
            "the one you mean."
        )
    raise SourceError(f"{name} has nothing of {date}. It has {_some(dates, range(len(dates)))}.")


def _some(dates: Sequence[str], places: Sequence[int]) -> str:
    told = [dates[place] for place in places]
    return ", ".join(told) if len(told) <= 6 else f"{', '.join(told[:3])}, ... {told[-1]}"


def _without_midnight(texts: Any) -> list[str]:
    """Days alone, where no time of the day is told."""
    alone = all(str(text).endswith("T00:00:00") for text in texts)
    return [str(text)[:10] if alone else str(text) for text in texts]
