"""Open a scene as one raster with the model's bands, in the model's units, read by many threads."""

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from geodeploy.bands import common_names, landsat_number, match_bands
from geodeploy.errors import RangeError, SourceError
from geodeploy.spec import Band

log = logging.getLogger(__name__)

_ALPHA = ColorInterp.alpha


@dataclass(frozen=True, slots=True)
class Stripe:
    """Whole rows of the raster as they lie in the file, with the pixels that hold data."""

    row: int
    """Of the raster, the stripe's first."""
    stored: NDArray[Any]
    """(C, rows, width) in the file's own type: half to a quarter of what float32 would take."""
    valid: NDArray[np.bool_]
    """(rows, width), True where every band holds data."""


@dataclass(slots=True)
class Raster:
    """The model's bands of an open file. Close it, or use `open_raster`, after all readers are done.

    Any thread may read: each gets its own dataset handle, as GDAL asks for.
    """

    path: Path
    indexes: list[int]
    """1-based numbers of the model's bands in the file."""
    height: int
    width: int
    crs: CRS | None
    transform: Affine
    block_rows: int
    """Rows of the file's own blocks."""
    dtype: np.dtype[Any]
    nodata: list[float | None]
    """Of each of the model's bands."""
    masked: bool
    """Whether an alpha band or a mask says which pixels hold data."""
    bands_masked: bool
    """Whether bands have masks of their own, as in a VRT."""
    scales: NDArray[np.float32]
    """(C, 1, 1): what stored values are multiplied with."""
    offsets: NDArray[np.float32]
    """(C, 1, 1): what is added then."""
    is_bare: bool
    """Whether neither the file nor the user gives a scale or an offset."""
    notes: list[str]
    """What the user should know about how the file was read."""
    _local: threading.local = field(default_factory=threading.local)
    _handles: list[Any] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    def stripes(self, rows: int = 256) -> Iterator[Window]:
        """Windows of whole rows, about ``rows`` high, that cut no block of the file in two."""
        step = self.block_rows * max(1, round(rows / self.block_rows))
        for row in range(0, self.height, step):
            yield Window(0, row, self.width, min(step, self.height - row))

    def read(self, window: Window) -> Stripe:
        """The stored values and the valid pixels of ``window``.

        Raises:
            SourceError: the file breaks off or cannot be decoded there.
        """
        with reading(self.path, window):
            dataset = self._dataset()
            stored = self._stored(dataset, window)
            valid = self._valid(dataset, stored, window)
        return Stripe(window.row_off, stored, valid)

    def read_pixels(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``window`` in the spec's units, float32 (C, h, w), and the valid pixels (h, w).

        Pixels that are not valid hold anything, NaN too.
        """
        stripe = self.read(window)
        return self.to_units(stripe.stored), stripe.valid

    def to_units(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored values (C, h, w) in the spec's units."""
        pixels = stored.astype(np.float32)
        if not (self.scales == 1).all():
            pixels *= self.scales
        if self.offsets.any():
            pixels += self.offsets
        return pixels

    def close(self) -> None:
        """Close every thread's handle. No thread may be reading."""
        with self._lock:
            for dataset in self._handles:
                dataset.close()
            self._handles.clear()

    def _dataset(self) -> Any:
        dataset = getattr(self._local, "dataset", None)
        if dataset is None:
            dataset = _open_quietly(self.path)
            self._local.dataset = dataset
            with self._lock:
                self._handles.append(dataset)
        return dataset

    def _stored(self, dataset: Any, window: Window) -> NDArray[Any]:
        if len({dataset.dtypes[index - 1] for index in self.indexes}) == 1:
            return np.asarray(dataset.read(self.indexes, window=window))
        # rasterio reads bands of several types, as a VRT may stack them, only one by one.
        return np.stack([dataset.read(i, window=window, out_dtype=self.dtype) for i in self.indexes])

    def _valid(self, dataset: Any, stored: NDArray[Any], window: Window) -> NDArray[np.bool_]:
        valid = np.ones(stored.shape[1:], bool)
        for values, nodata in zip(stored, self.nodata, strict=True):
            if stored.dtype.kind == "f":
                valid &= np.isfinite(values)
            if nodata is not None and not math.isnan(nodata):
                valid &= values != nodata
        if self.masked:
            valid &= dataset.dataset_mask(window=window) > 0
        if self.bands_masked:
            valid &= (dataset.read_masks(self.indexes, window=window) > 0).all(axis=0)
        return valid


@contextmanager
def open_raster(
    path: Path,
    *,
    band_names: Sequence[str],
    select: Sequence[str] | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Iterator[Raster]:
    """The bands ``band_names`` of the raster at ``path``, in that order.

    Args:
        path: Any raster file that GDAL reads.
        band_names: The model's bands, by STAC common name.
        select: Names or 1-based numbers of the file's bands, in the model's order.
        scale: What values are multiplied with after the file's own scale and offset tags.
        offset: What is added then.

    Raises:
        SourceError: the file is missing or not a raster.
        BandError: its bands are not those of the model.
    """
    raster = _open(path, band_names, select, scale, offset)
    try:
        yield raster
    finally:
        raster.close()


def _open(
    path: Path,
    band_names: Sequence[str],
    select: Sequence[str] | None,
    scale: float,
    offset: float,
) -> Raster:
    with open_dataset(path) as dataset:
        # GDAL marks the fourth band of any four 8-bit bands as alpha: near infrared, more often than
        # not. A band with a name of its own, or one that --bands asks for, is data.
        alpha = {
            index
            for index, meaning in enumerate(dataset.colorinterp, 1)
            if meaning == _ALPHA and not common_names([dataset.descriptions[index - 1]])[0]
        }
        usable = [index for index in dataset.indexes if select is not None or index not in alpha]
        tags = dataset.tags()
        positions, notes = match_bands(
            [dataset.descriptions[index - 1] or None for index in usable],
            band_names,
            source=path.name
            if len(usable) == dataset.count
            else f"{path.name} without its alpha band {', '.join(map(str, sorted(alpha)))}",
            landsat=landsat_number(path.name, tags.get("SPACECRAFT_ID", ""), tags.get("PLATFORM", "")),
            select=select,
        )
        indexes = [usable[position - 1] for position in positions]
        if dataset.crs is None:
            notes.append(
                f"{path.name} has no CRS: the map will have none either, and no areas in square metres."
            )
        chosen = [index - 1 for index in indexes]
        types = [np.dtype(dataset.dtypes[index]) for index in chosen]
        if any(kind.kind == "c" for kind in types):
            raise SourceError(
                f"{path.name} holds complex numbers; a model takes real ones. Convert it first, "
                "to intensity for instance."
            )
        alpha -= set(indexes)
        flags = {flag for index in chosen for flag in dataset.mask_flag_enums[index]}
        file_scales = np.array([dataset.scales[index] for index in chosen], np.float64)
        file_offsets = np.array([dataset.offsets[index] for index in chosen], np.float64)
        shape = (len(chosen), 1, 1)
        return Raster(
            path=path,
            indexes=indexes,
            height=dataset.height,
            width=dataset.width,
            crs=dataset.crs,
            transform=dataset.transform,
            block_rows=max(rows for rows, _ in dataset.block_shapes),
            dtype=np.result_type(*types),
            nodata=[dataset.nodatavals[index] for index in chosen],
            masked=bool(alpha) or (MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags),
            bands_masked=not all(dataset.mask_flag_enums[index] for index in chosen),
            scales=(file_scales * scale).astype(np.float32).reshape(shape),
            offsets=(file_offsets * scale + offset).astype(np.float32).reshape(shape),
            is_bare=(scale, offset) == (1, 0) and {*file_scales, *file_offsets} <= {0, 1},
            notes=notes,
        )


@contextmanager
def open_dataset(path: Path) -> Iterator[Any]:
    """A rasterio dataset, or a SourceError that says what is wrong with ``path``."""
    # With a colon it may be a subdataset, such as NETCDF:file.nc:name: GDAL knows whether it is there.
    if ":" not in str(path) and not str(path).startswith("/vsi") and not path.exists():
        raise SourceError(f"{path} does not exist. Check the path; a raster file is needed.")
    try:
        dataset = _open_quietly(path)
    except RasterioError as error:
        if path.is_dir():
            raise SourceError(f"{path} is a folder; a raster file is needed.") from error
        raise SourceError(
            f"{path} is not a raster that GDAL {rasterio.__gdal_version__} can open "
            f"({_reason(error)}). A whole GeoTIFF, COG, JP2, VRT or the like is needed; if this was "
            "one, it is damaged or truncated: fetch it again."
        ) from error
    with dataset:
        if dataset.count == 0:
            raise SourceError(
                f"{path} has no bands of its own, only subdatasets. Name one: "
                f"{(dataset.subdatasets or ['none found'])[0]}."
            )
        yield dataset


@contextmanager
def reading(path: Path, window: Window) -> Iterator[None]:
    """Make what GDAL raises while ``window`` of ``path`` is read a SourceError."""
    try:
        yield
    except RasterioError as error:
        raise SourceError(
            f"{path}: rows {window.row_off} to {window.row_off + window.height} cannot be "
            f"read ({_reason(error)}). The file is damaged or truncated: fetch it again."
        ) from error


_OPENING = threading.Lock()


def _open_quietly(path: Path) -> Any:
    # A raster without georeference is normal here and told to the user once, as a warning of ours.
    # Python's warning filters belong to the whole process, hence the lock.
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path)


_EIGHT_BITS = 1 / 255
_GUESSES = (
    (1e-4, 0.0, "Sentinel-2 L1C and L2A before 2022, HLS"),
    (2.75e-5, -0.2, "Landsat Collection 2 Level 2"),
    (2e-5, -0.1, "Landsat Level 1"),
    (_EIGHT_BITS, 0.0, "8-bit imagery"),
    (0.01, 0.0, "percent"),
)
_SAMPLE_SIDE = 5
_SAMPLE_PIXELS = 48


def check_range(raster: Raster, bands: Sequence[Band]) -> None:
    """Refuse a scene whose values cannot be in the model's units.

    Looks at 25 small windows spread over the raster: a sample, so that a scene of any size is checked
    in a moment. A band fails when more than half of its valid pixels lie outside its ``valid_range``.

    Raises:
        RangeError: names the values seen and, where one fits, the flags that would mend it.
    """
    sample = _sample(raster)
    if sample.shape[1] == 0:
        return
    low = np.array([band.valid_range[0] for band in bands])[:, np.newaxis]
    high = np.array([band.valid_range[1] for band in bands])[:, np.newaxis]
    outside = ((sample < low) | (sample > high)).mean(axis=1)
    worst = int(outside.argmax())
    if outside[worst] <= 0.5:
        return
    seen = np.percentile(sample[worst], [2, 98])
    advice = "Say how to turn the file's values into the model's units with --scale and --offset."
    means = np.array([band.mean for band in bands])
    # A scale in the file's own tags or from the user is not doubted: guesses are for bare numbers.
    for scale, offset, kind in _GUESSES if raster.is_bare else ():
        if (scale == _EIGHT_BITS) != (raster.dtype.itemsize == 1):
            continue
        scaled = sample * scale + offset
        inside = (((scaled < low) | (scaled > high)).mean(axis=1) <= 0.5).all()
        # Nearly black is within most ranges too, and is what too small a scale makes of any scene.
        if inside and (np.percentile(scaled, 98, axis=1) > means / 4).any():
            offset_flag = f" --offset {offset:g}" if offset else ""
            advice = f"Try --scale {scale:.6g}{offset_flag} ({kind})."
            break
    raise RangeError(
        f"{raster.name}: band {bands[worst].name} holds values from {seen[0]:.4g} to {seen[1]:.4g}, "
        f"the model was made for {bands[worst].valid_range[0]:g} to {bands[worst].valid_range[1]:g}. "
        f"{advice}"
    )


def _sample(raster: Raster) -> NDArray[np.float32]:
    """Valid pixels (C, n) from windows spread evenly over the raster."""
    height, width = min(_SAMPLE_PIXELS, raster.height), min(_SAMPLE_PIXELS, raster.width)
    parts = []
    for row in np.unique(np.linspace(0, raster.height - height, _SAMPLE_SIDE).astype(int)):
        for col in np.unique(np.linspace(0, raster.width - width, _SAMPLE_SIDE).astype(int)):
            pixels, valid = raster.read_pixels(Window(int(col), int(row), width, height))
            parts.append(pixels[:, valid])
    return np.concatenate(parts, axis=1)


def ground_sample_distance_m(crs: CRS | None, transform: Affine) -> float | None:
    """Metres a pixel, from the area of a pixel; None unless the CRS is projected."""
    if crs is None or not crs.is_projected:
        return None
    _, factor = crs.linear_units_factor
    return math.sqrt(abs(transform.determinant)) * float(factor)


def _reason(error: BaseException) -> str:
    """GDAL's own words: the deepest cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".")
