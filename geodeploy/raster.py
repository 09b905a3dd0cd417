"""Open a scene as one raster with the model's bands, in the model's units, read by many threads."""

import logging
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import Interleaving, MaskFlags
from rasterio.windows import Window

from geodeploy.asset import Asset, Source
from geodeploy.bands import common_names, count_bands, landsat_number, match_bands
from geodeploy.blockrows import Loss, Pixels
from geodeploy.dataset import open_dataset, open_quietly, reading
from geodeploy.errors import GridError, RangeError, SourceError
from geodeploy.layer import Grid, Layer
from geodeploy.resample import Axis
from geodeploy.source import alpha_bands, find_sources
from geodeploy.spec import Band

log = logging.getLogger(__name__)

_STRIPE_ROWS = 256
_WIDE, _WIDE_ROWS = 16384, 64
"""Of a raster with so many columns stripes are flatter, where the blocks let them: panels, which would
decode blocks that are as wide as the file more than once, are for wider ones yet."""
_LARGE_BLOCK = 64 * 2**20
"""Bytes from which on a block that was decoded is not kept for the next reading."""


@dataclass(frozen=True, slots=True)
class Stripe:
    """Rows of the raster, or of a panel of it, as they lie in the file, and which pixels hold data."""

    row: int
    """Of the raster, the stripe's first."""
    col: int
    stored: NDArray[Any]
    """(C, rows, width) in the file's own type: half to a quarter of what float32 would take."""
    valid: NDArray[np.bool_]
    """(rows, width), True where every band holds data."""
    losses: Sequence[Loss] = ()
    """What could not be read, and is not valid."""


@dataclass(slots=True)
class Raster:
    """The model's bands of a scene. Close it, or use `open_raster`, after all readers are done.

    Any thread may read: each gets its own dataset handles, as GDAL asks for.
    """

    name: str
    """The scene's, for messages."""
    layers: list[Layer]
    """The files in which the bands lie; one, unless the scene comes in several."""
    indexes: list[int]
    """1-based numbers of the model's bands among those of the scene."""
    height: int
    width: int
    crs: CRS | None
    transform: Affine
    stripe_rows: int
    """Rows of a stripe: about 256, and whole blocks of the files that lie on the raster's own grid."""
    dtype: np.dtype[Any]
    scales: NDArray[np.float32]
    """(C, 1, 1): what stored values are multiplied with."""
    offsets: NDArray[np.float32]
    """(C, 1, 1): what is added then."""
    is_bare: bool
    """Whether neither the file nor the user gives a scale or an offset."""
    notes: list[str]
    """What the user should know about how the scene was read."""
    band_notes: list[str]
    """Those about its bands."""
    dates: int = 1
    """Whose bands these are, date by date, the oldest first."""
    skip: bool = False
    """Whether what cannot be read is left out as not valid."""
    keep_open: bool = True
    """Whether files stay open from one reading to the next. A process may hold a thousand or so, and
    each keeps the block that it decoded last."""
    _local: threading.local = field(default_factory=threading.local)
    _handles: list[Any] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The box around the raster in its CRS: left, bottom, right, top."""
        corners = [
            self.transform @ corner
            for corner in ((0, 0), (self.width, 0), (0, self.height), (self.width, self.height))
        ]
        xs, ys = zip(*corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def stripes(self, within: Window | None = None) -> Iterator[Window]:
        """Windows from edge to edge of ``within`` that cut no row of the files' blocks in two.

        None is the whole raster.
        """
        whole = within or Window(0, 0, self.width, self.height)
        row, end = whole.row_off, whole.row_off + whole.height
        while row < end:
            after = min((row // self.stripe_rows + 1) * self.stripe_rows, end)
            yield Window(whole.col_off, row, whole.width, after - row)
            row = after

    def files(self) -> list[str]:
        """What GDAL reads for the raster, the files behind a VRT too, by GDAL's names."""
        return [file for number in range(len(self.layers)) for file in self._dataset(number).files]

    def read(self, window: Window) -> Stripe:
        """The stored values and the valid pixels of ``window``.

        Raises:
            SourceError: the file breaks off or cannot be decoded there, and ``skip`` is not set.
        """
        if len(self.layers) == 1:
            return Stripe(window.row_off, window.col_off, *self._read_layer(0, window))
        shape = (int(window.height), int(window.width))
        stored = np.empty((len(self.indexes), *shape), self.dtype)
        valid = np.ones(shape, bool)
        losses: list[Loss] = []
        for number, layer in enumerate(self.layers):
            stored[layer.places], present, lost = self._read_layer(number, window)
            valid &= present
            losses += lost
        return Stripe(window.row_off, window.col_off, stored, valid, losses)

    def read_pixels(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``window`` in the spec's units, float32 (C, h, w), and the valid pixels (h, w).

        Pixels that are not valid hold anything, NaN too.
        """
        stripe = self.read(window)
        return self.to_units(stripe.stored), stripe.valid

    def to_units(
        self, stored: NDArray[Any], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Stored values (C, h, w) in the spec's units; in ``out`` where it is given."""
        pixels = np.empty(stored.shape, np.float32) if out is None else out
        pixels[...] = stored
        if not (self.scales == 1).all():
            pixels *= self.scales
        if self.offsets.any():
            pixels += self.offsets
        return pixels

    def close(self) -> None:
        """Close every thread's handles. No thread may be reading."""
        with self._lock:
            for dataset in self._handles:
                dataset.close()
            self._handles.clear()

    def _read_layer(self, number: int, window: Window) -> Pixels:
        layer = self.layers[number]
        with reading(layer.path, window):
            if self.keep_open:
                return layer.read(self._dataset(number), window, skip=self.skip)
            with open_quietly(layer.path) as dataset:
                return layer.read(dataset, window, skip=self.skip)

    def _dataset(self, number: int) -> Any:
        datasets: dict[int, Any] = self._local.__dict__.setdefault("datasets", {})
        if number not in datasets:
            datasets[number] = open_quietly(self.layers[number].path)
            with self._lock:
                self._handles.append(datasets[number])
        return datasets[number]


@contextmanager
def open_raster(
    path: Path,
    *,
    earlier: Sequence[Path] = (),
    dates: Sequence[str] = (),
    timesteps: int = 1,
    band_names: Sequence[str],
    select: Sequence[str] | None = None,
    scale: float | Sequence[float] = 1.0,
    offset: float | Sequence[float] = 0.0,
    gsd_m: float | None = None,
    skip: bool = False,
) -> Iterator[Raster]:
    """The bands ``band_names`` of the scene at ``path``, in that order, on one grid.

    The grid is that of the scene's band with the smallest pixels, or one of ``gsd_m`` from the same
    corner; bands on another grid are resampled to it as they are read, linearly.

    Args:
        path: What `find_sources` takes: a raster file, or several that make a scene.
        earlier: The same place at earlier dates, whose bands come first, date by date.
        dates: Those to take of a scene that holds several; none means all.
        timesteps: How many such a scene may have then.
        band_names: The model's bands, by STAC common name.
        select: Names or 1-based numbers of the scene's bands, in the model's order; of a file that
            holds several dates as bands, those of all ``timesteps``, the oldest date's first.
        scale: What values are multiplied with after the file's own scale and offset tags; one number,
            or one a band in model order.
        offset: What is added then.
        gsd_m: Metres a pixel; None for those of the scene.
        skip: Whether blocks that cannot be read are left out as not valid.

    Raises:
        SourceError: a file is missing or not a raster, or the files do not fit together.
        GridError: the scene has no pixels of ``gsd_m``.
        BandError: the bands are not those of the model.
    """
    with_alpha = select is not None
    sources = [
        source for date in earlier for source in find_sources(date, with_alpha=with_alpha)
    ] + find_sources(path, dates=dates, most=timesteps, with_alpha=with_alpha)
    chosen = [select] * len(sources)
    if select and len(sources) == 1 and len(select) == timesteps * len(band_names):
        sources *= timesteps
        chosen = [select[at : at + len(band_names)] for at in range(0, len(select), len(band_names))]
    raster = _open(list(zip(sources, chosen, strict=True)), band_names, scale, offset, gsd_m)
    raster.skip = skip
    try:
        yield raster
    finally:
        raster.close()


def _open(
    sources: Sequence[tuple[Source, Sequence[str] | None]],
    band_names: Sequence[str],
    scale: float | Sequence[float],
    offset: float | Sequence[float],
    gsd_m: float | None,
) -> Raster:
    chosen: list[Asset] = []
    indexes: list[int] = []
    band_notes: list[str] = []
    for source, select in sources:
        if select is None:
            _check_lost(source, band_names)
        found, said = match_bands(
            [asset.name for asset in source.assets],
            band_names,
            source=source.name + source.left_out,
            landsat=landsat_number(*source.hints),
            known=[asset.common_name for asset in source.assets],
            select=select,
        )
        chosen += [source.assets[index - 1] for index in found]
        indexes += found
        band_notes += said
    times, plus = np.resize(scale, len(chosen)), np.resize(offset, len(chosen))
    opened = [
        _open_layer(path, [(place, asset) for place, asset in enumerate(chosen) if asset.path == path])
        for path in dict.fromkeys(asset.path for asset in chosen)
    ]
    last = len(chosen) - len(band_names)  # the earlier dates' places come before it
    grids = [layer.grid for layer, _, _ in opened if max(layer.places) >= last]
    grid = min(grids, key=lambda grid: abs(grid.transform.determinant))
    if gsd_m is not None:
        grid = _with_gsd(grid, gsd_m, source.name)
    placed = [(layer, _axes(layer, grid, source.name)) for layer, _, _ in opened]
    stripe_rows = _stripe_rows(placed, grid.width)
    layers = [layer.onto(*axes, stripe_rows) if axes else layer for layer, axes in placed]
    file_scales, file_offsets = np.ones(len(chosen)), np.zeros(len(chosen))
    for layer, scales, offsets in opened:
        file_scales[layer.places], file_offsets[layer.places] = scales, offsets
    notes = [*band_notes]
    if grid.crs is None:
        notes.append(
            f"{source.name} has no CRS: the map will have none either, and no areas in square metres."
        )
    largest = max(layers, key=lambda layer: layer.block_bytes)
    if largest.block_bytes >= _LARGE_BLOCK:
        notes.append(
            f"{Path(largest.path).name} is stored in blocks of {largest.block_bytes / 2**20:.0f} MiB, "
            "each of which is decoded as a whole: more memory and time. Store it in smaller ones: "
            "gdal_translate -of COG."
        )
    shape = (len(chosen), 1, 1)
    gains, added = file_scales * times, file_offsets * times + plus
    _check_units(source.name, gains, added)
    return Raster(
        name=source.name,
        layers=layers,
        indexes=indexes,
        height=grid.height,
        width=grid.width,
        crs=grid.crs,
        transform=grid.transform,
        stripe_rows=stripe_rows,
        dtype=np.result_type(*(layer.dtype for layer in layers)),
        scales=gains.astype(np.float32).reshape(shape),
        offsets=added.astype(np.float32).reshape(shape),
        is_bare=bool((times == 1).all() and not plus.any()) and {*file_scales, *file_offsets} <= {0, 1},
        notes=notes,
        band_notes=band_notes,
        dates=len(sources),
        keep_open=max(layer.block_bytes for layer in layers) < _LARGE_BLOCK,
    )


def _check_units(name: str, scales: NDArray[np.float64], offsets: NDArray[np.float64]) -> None:
    """Refuse scales and offsets, of tags and options, that leave nothing of the pixels."""
    largest = np.finfo(np.float32).max
    for what, values in (("a scale", scales), ("an offset", offsets)):
        wrong = ~(np.abs(values) < largest)  # NaN too
        if values is scales:
            wrong |= values == 0
        if wrong.any():
            raise SourceError(
                f"{name}: {what} of {values[wrong][0]:g}, by the file's tags and the options, leaves "
                f"nothing of its pixels. Mend the tags (gdal_edit.py) or the options."
            )


def _check_lost(source: Source, band_names: Sequence[str]) -> None:
    """Raise why a band that is needed is none."""
    names = list(source.lost)
    for name, common in zip(names, common_names(names), strict=True):
        if {name, common} & set(band_names):
            raise source.lost[name]


def _open_layer(
    path: str, chosen: Sequence[tuple[int, Asset]]
) -> tuple[Layer, list[float], list[float]]:
    """How the ``chosen`` bands, each with its place among the model's, lie in the file at ``path``.

    With the layer come the scale and the offset of each of its bands.
    """
    with open_dataset(path) as dataset:
        assets = [asset for _, asset in chosen]
        indexes = [asset.index for asset in assets]
        beyond = next((asset for asset in assets if asset.index > dataset.count), None)
        if beyond is not None:
            raise SourceError(
                f"{Path(path).name} has {count_bands(dataset.count)}, but its STAC item says that "
                f"{beyond.name} is band {beyond.index}. Name the file itself, with --bands."
            )
        types = [np.dtype(dataset.dtypes[index - 1]) for index in indexes]
        if any(kind.kind == "c" for kind in types):
            raise SourceError(
                f"{Path(path).name} holds complex numbers; a model takes real ones. Convert it first, "
                "to intensity for instance."
            )
        if dataset.crs is None and dataset.gcps[0]:
            raise SourceError(
                f"{Path(path).name} lies on the ground by {len(dataset.gcps[0])} control points alone. "
                "Rectify it first: gdalwarp -tps (or -order 1) in.tif out.tif."
            )
        alpha = sorted(set(alpha_bands(dataset)) - set(indexes))
        flags = [dataset.mask_flag_enums[index - 1] for index in indexes]
        every_flag = {flag for of_band in flags for flag in of_band}
        layer = Layer(
            path=path,
            indexes=indexes,
            places=[place for place, _ in chosen],
            dtype=np.result_type(*types),
            one_type=len({dataset.dtypes[index - 1] for index in (*indexes, *alpha)}) == 1,
            nodata=[
                dataset.nodatavals[asset.index - 1] if asset.nodata is None else asset.nodata
                for asset in assets
            ],
            alpha=alpha,
            masked=MaskFlags.per_dataset in every_flag and MaskFlags.alpha not in every_flag,
            bands_masked=not all(flags),
            grid=Grid(dataset.crs, dataset.transform, dataset.height, dataset.width),
            block_rows=max(rows for rows, _ in dataset.block_shapes),
            block_bytes=_block_bytes(dataset),
            is_vrt=dataset.driver == "VRT",
        )
        scales = [
            dataset.scales[asset.index - 1] if asset.scale is None else asset.scale for asset in assets
        ]
        offsets = [
            dataset.offsets[asset.index - 1] if asset.offset is None else asset.offset
            for asset in assets
        ]
        return layer, scales, offsets


def _block_bytes(dataset: Any) -> int:
    pixels: int = max(rows * cols for rows, cols in dataset.block_shapes)
    sizes = [np.dtype(kind).itemsize for kind in dataset.dtypes]
    each: int = sum(sizes) if dataset.interleaving == Interleaving.pixel else max(sizes)
    return pixels * each


_FINEST = 100
"""A pixel cut into more than this squared is a slip of the unit, and a map that would never end."""


def _with_gsd(grid: Grid, gsd_m: float, scene: str) -> Grid:
    """The same corner and, but for the last pixels, the same extent in square pixels of ``gsd_m``."""
    if grid.crs is None or not grid.crs.is_projected:
        raise GridError(
            f"{scene} is in {grid.crs or 'no CRS'}, where pixels have no size in metres: --gsd needs a "
            "projected CRS. Bring it to one first (gdalwarp -t_srs)."
        )
    _, metres = grid.crs.linear_units_factor
    across = gsd_m / (math.hypot(grid.transform.a, grid.transform.d) * metres)
    down = gsd_m / (math.hypot(grid.transform.b, grid.transform.e) * metres)
    height, width = (
        math.floor(length / factor + 1e-6)
        for length, factor in ((grid.height, down), (grid.width, across))
    )
    if height < 1 or width < 1:
        raise GridError(f"{scene} is smaller than one pixel of --gsd {gsd_m:g} m.")
    if min(across, down) < 1 / _FINEST:
        raise GridError(
            f"--gsd {gsd_m:g} m is more than {_FINEST} times finer than the pixels of {scene} "
            f"({gsd_m / across:.4g} x {gsd_m / down:.4g} m). Give it in metres."
        )
    return Grid(grid.crs, grid.transform @ Affine.scale(across, down), height, width)


def _stripe_rows(placed: Sequence[tuple[Layer, tuple[Axis, Axis] | None]], width: int) -> int:
    """About 256 rows, of the raster or of a file with smaller pixels, and whole blocks."""
    about = _STRIPE_ROWS if width < _WIDE else _WIDE_ROWS
    heights = [layer.block_rows for layer, axes in placed if axes is None]
    blocks = math.lcm(*heights)
    if heights and blocks > max(about, *heights):
        blocks = max(heights)
    finest = max([1.0, *(axes[0].step for _, axes in placed if axes)])
    return blocks * max(1, round(about / finest / blocks))


def same_place(one: Affine, other: Affine, height: int, width: int) -> bool:
    """Whether two grids of ``height`` x ``width`` pixels coincide to a hundredth of a pixel.

    At the far corner too: pixels a little larger shift what is there by whole ones.
    """
    among = ~one @ other
    corners = ((0, 0), (width, 0), (0, height))
    return all(np.allclose(among @ corner, corner, rtol=0, atol=0.01) for corner in corners)


def _axes(layer: Layer, grid: Grid, scene: str) -> tuple[Axis, Axis] | None:
    """The rows and columns of ``grid`` among those of ``layer``; None where they are the same."""
    own, file = layer.grid, Path(layer.path).name
    if own.crs != grid.crs:
        raise SourceError(
            f"{scene}: {file} is in {own.crs or 'no CRS'}, other bands in {grid.crs or 'no CRS'}. "
            "Bring them to one CRS first (gdalwarp -t_srs)."
        )
    # Edges of the grid's pixels among the file's: x' = a x + b y + c, y' = d x + e y + f.
    among = ~own.transform @ grid.transform
    same_size = (own.height, own.width) == (grid.height, grid.width)
    if same_size and same_place(own.transform, grid.transform, grid.height, grid.width):
        return None
    if own.crs is None:
        raise SourceError(
            f"{scene}: {file} has {own.height} x {own.width} pixels, another band {grid.height} x "
            f"{grid.width}, and neither has a CRS to bring them together by."
        )
    if (
        max(abs(among.b), abs(among.d)) * max(grid.width, grid.height) > 0.01
        or among.a < 0
        or among.e < 0
    ):
        raise SourceError(
            f"{scene}: {file} is turned or flipped against the other bands. Bring them to one grid "
            "first (gdalwarp)."
        )
    axes = Axis(among.e, among.f, own.height), Axis(among.a, among.c, own.width)
    if axes[0].covered(0, grid.height)[0] == axes[0].covered(0, grid.height)[1] or (
        axes[1].covered(0, grid.width)[0] == axes[1].covered(0, grid.width)[1]
    ):
        raise SourceError(f"{scene}: {file} shows another place than the other bands.")
    return axes


_EIGHT_BITS, _LEVEL_1 = 1 / 255, "Landsat Level 1"
_GUESSES = (
    (1e-4, 0.0, "Sentinel-2 L1C and L2A before 2022, HLS"),
    (2.75e-5, -0.2, "Landsat Collection 2 Level 2"),
    (2e-5, -0.1, _LEVEL_1),
    (_EIGHT_BITS, 0.0, "8-bit imagery"),
    (0.01, 0.0, "percent"),
)
_SAMPLE_SIDE = 5
_SAMPLE_PIXELS = 48
_SAMPLE_ENOUGH = 9
_SAMPLE_STEP = 7


def check_range(raster: Raster, bands: Sequence[Band]) -> None:
    """Refuse a scene whose values cannot be in the model's units.

    Looks at 9 to 25 small windows all over the raster: a sample, so that a scene of any size is checked
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
    fitting: list[tuple[float, str]] = []
    level_1 = re.search(r"_L1[A-Z]{2}_", raster.name)
    # A scale in the file's own tags or from the user is not doubted: guesses are for bare numbers.
    guesses = sorted(_GUESSES, key=lambda guess: guess[2] != _LEVEL_1) if level_1 else _GUESSES
    for scale, offset, kind in guesses if raster.is_bare else ():
        if (scale == _EIGHT_BITS) != (raster.dtype.itemsize == 1):
            continue
        scaled = sample * scale + offset
        inside = (((scaled < low) | (scaled > high)).mean(axis=1) <= 0.5).all()
        # Nearly black is within most ranges too, and is what too small a scale makes of any scene.
        if inside and (np.percentile(scaled, 98, axis=1) > means / 4).any():
            # Landsat's numbers, taken for Sentinel-2's, would be bright cloud, within most ranges too.
            farness = float(np.abs(np.median(scaled, axis=1) - means).mean())
            offset_flag = f" --offset {offset:g}" if offset else ""
            fitting.append((farness, f"Try --scale {scale:.6g}{offset_flag} ({kind})."))
    # What is about as near to the model's means as anything, in the order of how common it is.
    nearest = 2 * min(fitting, default=(0.0, ""))[0]
    advice = next((found for farness, found in fitting if farness <= nearest), advice)
    raise RangeError(
        f"{raster.name}: band {bands[worst].name} holds values from {seen[0]:.4g} to {seen[1]:.4g}, "
        f"the model was made for {bands[worst].valid_range[0]:g} to {bands[worst].valid_range[1]:g}. "
        f"{advice}"
    )


def _sample(raster: Raster) -> NDArray[np.float32]:
    """Valid pixels (C, n) from windows all over the raster, until enough of them are half valid.

    Each may take decoding a whole block: of a small raster, all of them would be all of it.
    """
    height, width = min(_SAMPLE_PIXELS, raster.height), min(_SAMPLE_PIXELS, raster.width)
    rows = np.linspace(0, raster.height - height, _SAMPLE_SIDE).astype(int).tolist()
    cols = np.linspace(0, raster.width - width, _SAMPLE_SIDE).astype(int).tolist()
    corners = list(dict.fromkeys(product(rows, cols)))
    parts, enough = [], _SAMPLE_ENOUGH
    # From the middle on in steps of seven, which come to lie far apart on five by five.
    for number in range(len(corners)):
        row, col = corners[(len(corners) // 2 + _SAMPLE_STEP * number) % len(corners)]
        pixels, valid = raster.read_pixels(Window(col, row, width, height))
        parts.append(pixels[:, valid])
        enough -= 2 * parts[-1].shape[1] >= valid.size
        if not enough:
            break
    return np.concatenate(parts, axis=1)


def ground_sample_distance_m(crs: CRS | None, transform: Affine) -> float | None:
    """Metres a pixel, from the area of a pixel; None unless the CRS is projected."""
    if crs is None or not crs.is_projected:
        return None
    _, factor = crs.linear_units_factor
    return math.sqrt(abs(transform.determinant)) * float(factor)
