"""Read NetCDF, Zarr and xarray's arrays as GDAL's rasters are read, and map an array to an array.

GDAL has drivers for both formats, but loses where a NetCDF file of plain CF coordinates lies, and does
not read Zarr 3. Hence xarray, with rioxarray for what lies where.
"""

import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.errors import RasterioIOError
from rasterio.windows import Window

from geodeploy.asset import Asset, Source
from geodeploy.attributes import band_factors, band_names, fill_value, place, spatial_axes
from geodeploy.dates import choose_dates, time_axis
from geodeploy.errors import OutputError, SourceError, first_line, require
from geodeploy.spec import NODATA

if TYPE_CHECKING:
    from geodeploy.predict import PredictOptions

PREFIX = "xarray:"
"""Begins the names of arrays: ``xarray:FILE::VARIABLE::``, or ``xarray:NUMBER`` for one in memory. The
number of a date may stand at their ends."""
_ADVICE = {
    "xarray.Dataset": "Make one of its variables: dataset.to_dataarray('band').",
    "numpy.ndarray": "Name its axes: xarray.DataArray(values, dims=('band', 'y', 'x')).",
}
"""How an array is made of what is none, by its type's name."""
_held: dict[str, Any] = {}
_numbers = itertools.count()


def is_store(path: Path) -> bool:
    """Whether ``path`` is called as NetCDF files are, or is a Zarr store."""
    if path.is_dir():
        return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata"))
    return path.is_file() and path.suffix.lower() in (".nc", ".nc4", ".cdf")


def store_sources(path: Path, dates: Sequence[str] = (), most: int = 1) -> list[Source]:
    """The variables of the store that can be bands, by their names: a source for each date.

    Args:
        path: A NetCDF file or a Zarr store.
        dates: Those wanted; none means all there are.
        most: How many dates a model takes.

    Raises:
        SourceError: it cannot be read, no variable lies on a regular grid, or a date is not there.
    """
    with _opened(path) as store:
        names = [
            name
            for name, array in store.data_vars.items()
            if array.ndim >= 2 and array.dtype.kind in "biufc" and spatial_axes(array)
        ]
        if not names:
            raise SourceError(
                f"{path} has no variable on a grid of x and y, or of latitude and longitude."
            )
        if dates and not any(time_axis(store[name]) for name in names):
            raise SourceError(f"{path} has no dates to choose from: leave out --date.")
        variables: list[list[list[Asset]]] = []
        left_out: dict[str, SourceError] = {}
        for name in names:
            try:
                variables.append(_assets(store, path, name, dates, most))
            except SourceError as error:  # the model may not need it
                left_out[str(name)] = error
    if not variables:
        raise next(iter(left_out.values()))
    without = f", {', '.join(left_out)} left out," if left_out else ""
    hints = (path.name, str(store.attrs.get("platform", "")))
    # What has no time is the same at every date.
    return [
        Source(
            path.name,
            [asset for each in variables for asset in each[date % len(each)]],
            hints,
            without,
            lost=left_out,
        )
        for date in range(max(map(len, variables)))
    ]


def _assets(store: Any, path: Path, name: Any, dates: Sequence[str], most: int) -> list[list[Asset]]:
    """The bands of one variable at each of its dates."""
    what, found = f"{path.name}: {name}", []
    for date in choose_dates(store[name], what, dates, most):
        dataset = ArrayDataset(store[name], what, date=date)
        own = [label or None for label in dataset.descriptions]
        labels = [str(name)] if dataset.count == 1 else own
        place = "" if date is None else date
        found.append(
            [
                Asset(f"{PREFIX}{path}::{name}::{place}", label, number)
                for number, label in enumerate(labels, 1)
            ]
        )
    return found


def held_names(path: Path, dates: Sequence[str], most: int) -> list[Path]:
    """What the array that is held as ``path`` is called at each of the dates that are meant.

    Raises:
        SourceError: a date is not there, or there are more than a model takes.
    """
    chosen = choose_dates(_held[str(path)], "The array", dates, most)
    if dates and chosen == [None]:
        raise SourceError("The array has no dates to choose from: leave out --date.")
    return [path if date is None else Path(f"{path}::{date}") for date in chosen]


def is_held(path: Path) -> bool:
    """Whether `held` gave this name."""
    return str(path) in _held


def open_array(name: str) -> "ArrayDataset":
    """What `store_sources` and `held` call ``name``."""
    own, _, date = name.partition("::")
    if own in _held:
        return ArrayDataset(_held[own], "The array", date=int(date) if date else None)
    if "::" not in name:
        raise SourceError(f"{name} is an array that nobody holds any more.")
    path, variable, date = name.removeprefix(PREFIX).rsplit("::", 2)
    store = _open_store(Path(path))
    return ArrayDataset(
        store[variable],
        f"{Path(path).name}: {variable}",
        store.close,
        date=int(date) if date else None,
        files=[path],
    )


@contextmanager
def held(array: Any) -> Iterator[Path]:
    """A name by which ``array`` can be opened for a while."""
    name = f"{PREFIX}{next(_numbers)}"
    _held[name] = array
    try:
        yield Path(name)
    finally:
        del _held[name]


def predict_array(
    array: Any, model: Path | str | None = None, *, options: "PredictOptions | None" = None
) -> Any:
    """The map of an `xarray.DataArray`, as another.

    It runs as `predict` does, reading window by window: an array of dask's is never computed whole.

    Args:
        array: (band, y, x), with the bands' names in the coordinate ``band`` or in ``long_name``, and
            with a CRS and a nodata value where `rio` finds them.
        model: As for `predict`.
        options: As for `predict`, but without ``derived``: the map is no file.

    Returns:
        (y, x) of class values, with CF's ``flag_values`` and ``flag_meanings``. Where rasters beside it
        are asked for, an `xarray.Dataset` with it as ``class``, and with them: float32 from 0 to 1, NaN
        for nodata, ``probabilities`` (class_name, y, x). Of a model of quantities, an `xarray.Dataset`
        with each, in its units; the disagreement of ``height`` is ``height_disagreement``. Of a model
        that answers for whole tiles, (class_name, y, x) of probabilities, NaN for nodata, on the coarse
        grid of the tiles.

    Raises:
        GeodeployError: what `predict` raises.
    """
    require("xarray", ["xarray", "rioxarray"])
    import rioxarray  # noqa: F401  # gives arrays their `rio`
    import xarray

    from geodeploy.derived import DerivedOptions
    from geodeploy.predict import predict

    if not isinstance(array, xarray.DataArray):
        raise SourceError(
            f"predict_array takes an xarray.DataArray, found {_type(array)}. "
            + _ADVICE.get(_type(array), _ADVICE["numpy.ndarray"])
        )
    if options is not None and options.derived != DerivedOptions():
        raise OutputError(
            "The map of an array is no file, beside which what options.derived asks for would lie. "
            "Leave it out, or write the map first: rio.to_raster, then geodeploy.area and its like."
        )
    with tempfile.TemporaryDirectory(prefix="geodeploy-") as folder, held(array) as scene:
        report = predict(scene, model, Path(folder) / "map.tif", options=options)
        with rasterio.open(report.map) as dataset:
            stored, transform, crs = dataset.read(), dataset.transform, dataset.crs
        if report.labels:
            probabilities = _shares(report.map)
        beside = {path.stem.removeprefix("map_"): _shares(path) for path in report.beside}
    dims = spatial_axes(array) or ("y", "x")
    coords = _coordinates(array, dims, stored.shape[1:], transform)

    def lying(values: NDArray[Any], fill: float, **attrs: Any) -> Any:
        made = xarray.DataArray(values, dims=dims, coords=coords, attrs=attrs).rio.write_nodata(fill)
        return made if crs is None else made.rio.write_crs(crs).rio.write_transform(transform)

    if report.targets:
        every = {"": stored} | {f"_{kind}": distances for kind, distances in beside.items()}
        return xarray.Dataset(
            {
                target.name + kind: lying(planes[place], math.nan, units=target.unit)
                for kind, planes in every.items()
                for place, target in enumerate(report.targets)
            }
        )
    if report.labels:
        names = [label.name for label in report.labels]
        return xarray.concat(
            [lying(plane, math.nan) for plane in probabilities],
            xarray.DataArray(names, dims="class_name", name="class_name"),
        ).rename("probabilities")
    mapped = lying(
        stored[0],
        NODATA,
        flag_values=np.array([item.value for item in report.classes], np.uint8),
        flag_meanings=" ".join(item.name.replace(" ", "_") for item in report.classes),
    ).rename("class")
    if not beside:
        return mapped
    found = mapped.to_dataset()
    for kind, shares in beside.items():
        if kind == "probabilities":
            found["class_name"] = [item.name for item in report.classes]
            found[kind] = (("class_name", *dims), shares)
        else:
            found[kind] = (dims, shares[0])
    return found


def _type(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _coordinates(
    array: Any, dims: tuple[str, str], shape: tuple[int, int], transform: Affine
) -> dict[str, Any]:
    """Of the rows and columns of a map of ``array``, which may be a part of it or resampled."""
    if shape == tuple(array.sizes[dim] for dim in dims):
        return {dim: array[dim] for dim in dims if dim in array.coords}
    if transform.b or transform.d:  # rows and columns have none of their own
        return {}
    rows, cols = (np.arange(length) + 0.5 for length in shape)
    return {dims[0]: transform.f + transform.e * rows, dims[1]: transform.c + transform.a * cols}


def _shares(path: Path) -> NDArray[np.float32]:
    """What a raster beside the map means, (bands, y, x), NaN for nodata."""
    with rasterio.open(path) as dataset:
        stored = dataset.read(masked=True)
        scale = np.float32(dataset.scales[0])
    shares: NDArray[np.float32] = stored.astype(np.float32).filled(np.nan) * scale
    return shares


class ArrayDataset:
    """An array behind that part of a rasterio dataset's face which reading a scene looks at.

    Args:
        array: (y, x) or (band, y, x); other dimensions may have one place only.
        name: For messages.
        close: Called when this is closed.
        date: The place along its time, for an array that has one.
    """

    alpha: Sequence[int] = ()
    gcps: tuple[list[Any], None] = ([], None)
    driver = "xarray"

    def __init__(
        self,
        array: Any,
        name: str,
        close: Any = None,
        *,
        date: int | None = None,
        files: Sequence[str] = (),
    ) -> None:
        if array.dtype.kind not in "iufc":
            raise SourceError(
                f"{name} holds {array.dtype}; a model takes numbers. Give it the values as they were "
                "measured, such as array.astype('float32')."
            )
        axes = spatial_axes(array)
        if axes is None:
            raise SourceError(f"{name} does not lie on a grid of x and y: {', '.join(array.dims)}.")
        self._close = close
        fill = fill_value(array, name)  # `rio` forgets it when places are chosen
        if date is not None:
            array = array.isel({time_axis(array): date})
        many = [dim for dim in array.dims if dim not in axes and array.sizes[dim] > 1]
        if len(many) > 1:
            sizes = ", ".join(f"{array.sizes[dim]} of {dim}" for dim in many)
            raise SourceError(f"{name} has {sizes}. Choose one first; a scene has bands, y and x.")
        band = next((dim for dim in array.dims if dim not in axes and dim in many), None)
        band = band or next((dim for dim in array.dims if dim == "band"), None)
        extra = [dim for dim in array.dims if dim not in axes and dim != band]
        array = array.isel(dict.fromkeys(extra, 0))
        # An axis for a single band is put in after reading: xarray would read everything for it.
        self._array = array.transpose(*axes) if band is None else array.transpose(band, *axes)
        self._alone = band is None
        self.height, self.width = self._array.shape[-2:]
        self.count = 1 if self._alone else self._array.shape[0]
        self.crs, self.transform = place(array, axes, name)
        self.descriptions = band_names(array, band, self.count, name)
        self.dtypes = (str(array.dtype),) * self.count
        self.nodatavals = (fill,) * self.count
        bands = array, band, self.count, name
        self.scales = band_factors(*bands, one="scale_factor", each="scales", without=1)
        self.offsets = band_factors(*bands, one="add_offset", each="offsets", without=0)
        self.mask_flag_enums = ([MaskFlags.all_valid],) * self.count
        self.colorinterp = (ColorInterp.undefined,) * self.count
        self.indexes = tuple(range(1, self.count + 1))
        chunks = {dim: max(sizes) for dim, sizes in array.chunksizes.items()}  # what dask computes
        chunks = chunks or array.encoding.get("preferred_chunks") or {}
        self.block_shapes = [(int(chunks.get(axes[0], 1)), int(chunks.get(axes[1], self.width)))]
        self.interleaving = Interleaving.band
        self.files = list(files)
        self.subdatasets: list[str] = []

    def __enter__(self) -> "ArrayDataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file behind it."""
        if self._close:
            self._close()

    def tags(self) -> dict[str, str]:
        """The attributes that are text."""
        return {key.upper(): text for key, text in self._array.attrs.items() if isinstance(text, str)}

    def read(
        self, indexes: int | Sequence[int], *, window: Window, out_dtype: Any = None
    ) -> NDArray[Any]:
        """Bands by their 1-based numbers in a window.

        Raises:
            RasterioIOError: the store is damaged there, as rasterio would say it.
        """
        places = [index - 1 for index in ([indexes] if isinstance(indexes, int) else indexes)]
        part = window.toslices() if self._alone else (places, *window.toslices())
        try:
            read = np.asarray(self._array[part].values)
        except MemoryError:
            raise
        except Exception as error:  # each store and codec has errors of its own
            raise RasterioIOError(first_line(error)) from error
        if self._alone:
            read = np.stack([read] * len(places))
        read = read[0] if isinstance(indexes, int) else read
        return read if out_dtype is None else read.astype(out_dtype)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    store = _open_store(path)
    try:
        yield store
    finally:
        store.close()


def _open_store(path: Path) -> Any:
    require("xarray", ["xarray", "rioxarray"])
    import rioxarray  # noqa: F401
    import xarray

    try:
        # Stored values, with their scale and offset as attributes: half the memory of masked floats.
        return xarray.open_dataset(
            path,
            engine="zarr" if path.is_dir() else None,
            # Gathered metadata save requests, not looks into a folder; without them xarray warns.
            backend_kwargs={"consolidated": False} if path.is_dir() else None,
            mask_and_scale=False,
            decode_coords="all",
            decode_times=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # each store has errors of its own
        raise SourceError(f"{path} cannot be opened by xarray ({first_line(error)}).") from error
