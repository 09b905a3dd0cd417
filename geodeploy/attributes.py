"""What the coordinates and attributes of an array say: where it lies, and what its values mean.

The conventions are CF's and those of rioxarray, whose `rio` knows most of them.
"""

import math
from typing import Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS

from geodeploy.errors import SourceError, first_line


def spatial_axes(array: Any) -> tuple[str, str] | None:
    """The names of the dimensions that run down and across, if it has them."""
    from rioxarray.exceptions import MissingSpatialDimensionError

    try:
        return array.rio.y_dim, array.rio.x_dim
    except MissingSpatialDimensionError:
        return ("lat", "lon") if {"lat", "lon"} <= set(array.dims) else None


def place(array: Any, axes: tuple[str, str], name: str) -> tuple[CRS | None, Affine]:
    """CRS and transform: of the centres of its pixels, or, where those do not tell, of ``rio``.

    Raises:
        SourceError: the grid is irregular, or CRS or transform cannot be read; ``name`` says of what.
    """
    told = all(dim in array.coords and array.sizes[dim] > 1 for dim in axes)
    try:
        crs, transform = array.rio.crs, None if told else array.rio.transform()
    except Exception as error:  # rasterio, pyproj and affine have errors of their own
        raise SourceError(
            f"{name}: its CRS or transform cannot be read ({first_line(error)}). Write it anew: "
            "rio.write_crs, rio.write_transform."
        ) from error
    if transform is None:
        transform = _of_centres(array, axes, name)
    elif transform == Affine.identity():
        return None, transform
    elif not _is_its_own(array, transform):
        raise SourceError(
            f"{name} was cut out of a turned raster, and has the transform of the whole. Give it its "
            "own first, with rio.write_transform."
        )
    degrees = str(array[axes[1]].attrs.get("units", "")).startswith("degree")
    if crs is None and (degrees or axes[1] in ("lon", "longitude")):
        crs = CRS.from_epsg(4326)  # what CF means by plain latitude and longitude, near enough
    return crs and CRS.from_user_input(crs), transform


def _of_centres(array: Any, axes: tuple[str, str], name: str) -> Affine:
    edges, steps = [], []
    for dim in axes:
        centres = array[dim].values.astype(np.float64)
        step = (centres[-1] - centres[0]) / (len(centres) - 1)
        if not np.allclose(np.diff(centres), step, rtol=1e-3, atol=0):
            raise SourceError(
                f"{name} lies on an irregular grid: its {dim} does not go in even steps. Bring it to a "
                "regular one first."
            )
        edges.append(centres[0] - step / 2)
        steps.append(step)
    return Affine(steps[1], 0, edges[1], 0, steps[0], edges[0])


def _is_its_own(array: Any, transform: Affine) -> bool:
    """Whether ``transform`` is that of the centres in ``xc`` and ``yc``, which turned rasters have."""
    if not {"xc", "yc"} <= set(array.coords):
        return True
    height, width = array["xc"].shape
    last = transform @ (width - 0.5, height - 0.5)
    noted = [float(array[dim][place, place]) for place in (0, -1) for dim in ("xc", "yc")]
    pixel = math.sqrt(abs(transform.determinant))
    return np.allclose(noted, [*(transform @ (0.5, 0.5)), *last], rtol=0, atol=pixel / 100)


def band_names(array: Any, band: str | None, count: int, name: str) -> tuple[str | None, ...]:
    """Those that the coordinate ``band`` or ``long_name`` gives to its ``count`` bands."""
    if band in array.coords and array[band].dtype.kind in "UOST":
        return tuple(map(str, np.atleast_1d(array[band].values)))
    names = _of_each_band(array, band, count, name, "long_name")
    return (None,) * count if names is None else tuple(map(str, names))


def band_factors(
    array: Any, band: str | None, count: int, name: str, *, one: str, each: str, without: float
) -> tuple[float, ...]:
    """The scale or offset of each band: the attribute ``each``, or ``one`` for all, or ``without``.

    Raises:
        SourceError: it is no number, or not of these bands.
    """
    if each not in array.attrs:
        return (_number(array.attrs.get(one, without), one, name),) * count
    values = _of_each_band(array, band, count, name, each)
    if values is None:
        raise SourceError(f"{name} has {count} bands, and its {each} are not of those. Mend them.")
    return tuple(_number(value, each, name) for value in values)


def _of_each_band(array: Any, band: str | None, count: int, name: str, key: str) -> list[Any] | None:
    """The values of an attribute that has one for each band; None without such a one.

    Where bands were chosen from an array of rioxarray's it still has all, and the bands their numbers.
    """
    if isinstance(array.attrs.get(key), (str, type(None))):
        return None
    values: list[Any] = np.atleast_1d(array.attrs[key]).tolist()
    all_numbers = list(range(1, len(values) + 1))
    numbers = np.atleast_1d(array[band].values).tolist() if band in array.coords else []
    if len(values) != count:
        chosen = numbers and set(numbers) <= set(all_numbers)
        return [values[number - 1] for number in numbers] if chosen else None
    if sorted(numbers) == all_numbers != numbers:
        raise SourceError(
            f"{name} has the bands {', '.join(map(str, numbers))}; whether its {key} has that order or "
            "theirs is not known. Name the bands in the coordinate band."
        )
    return values


def fill_value(array: Any, name: str) -> float | None:
    """The value that stands for no data, as ``rio`` finds it.

    Raises:
        SourceError: it is no number.
    """
    try:
        return None if array.rio.nodata is None else float(array.rio.nodata)
    except OverflowError:  # rioxarray wants a number that the array's own type holds exactly
        keys = ("_FillValue", "missing_value", "fill_value", "nodata", "nodatavals")
        return _number(next(array.attrs[key] for key in keys if key in array.attrs), "nodata", name)
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"{name}: its fill value is no single number ({first_line(error)}). Mend it."
        ) from error


def _number(value: Any, key: str, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{name}: its {key}, {value!r}, is no single number. Mend it.") from error
