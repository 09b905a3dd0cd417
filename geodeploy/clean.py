"""Clean maps: smoothed, sieved, in flat memory."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.shutil import copy as rasterio_copy
from rasterio.windows import Window

from geodeploy.classmap import ClassMap, open_class_map
from geodeploy.cog import BLOCK, aux_path
from geodeploy.dataset import check_is_of_the_file, reason
from geodeploy.errors import GeodeployError, OutputError
from geodeploy.filters import Side, Size, sieve_bands, sieve_reach, smooth_bands
from geodeploy.machine import usable_cores
from geodeploy.writer import TIFF, check_output, followed

_OF_COG = ("OVR_RESAMPLING_ALG", "LAYOUT")
"""Tags that say how a file was made, not what it holds."""


class CleanOptions(BaseModel):
    """What to do to a class map: first smooth, then sieve."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    smooth: Side | None = None
    """Each pixel takes the majority of a square of so many pixels, an odd number up to 255."""
    sieve: Size | None = None
    """Regions of fewer pixels than this, up to 1000, take the class with the longest common border."""
    overwrite: bool = False
    """Replace a map that exists."""

    @property
    def tags(self) -> dict[str, str]:
        """What a map says of its cleaning."""
        return {"GEODEPLOY_SMOOTH": str(self.smooth), "GEODEPLOY_SIEVE": str(self.sieve)}

    @property
    def reach(self) -> int:
        """How far away, in pixels, what a pixel becomes may depend on what the map holds."""
        return (self.smooth or 1) // 2 + sieve_reach(self.sieve or 0)

    def __bool__(self) -> bool:
        return self.smooth is not None or self.sieve is not None


class CleanReport(BaseModel):
    """What was done."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    map: Path
    output: Path
    pixels_changed: int
    share_changed: float
    """Of the pixels that hold data, 0 to 1."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.pixels_changed} pixels changed ({self.share_changed:.2%}) in "
            f"{self.seconds:.1f} s"
        )


def clean_map(source: Path | str, output: Path | str, *, options: CleanOptions) -> CleanReport:
    """Write the class map at ``source``, cleaned, to ``output``: a COG with the same names and colours.

    Raises:
        OutputError: ``output`` cannot or must not be written.
        SourceError: the map is missing, damaged, or no class map.
    """
    source, output, begun = Path(source), followed(Path(output)), time.perf_counter()
    check_output(output, [source], overwrite=options.overwrite, suffixes=TIFF)
    folder = output.with_name(f".{output.name}.part")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    whole, cog = folder / "whole.tif", folder / "map.tif"
    try:
        folder.mkdir()
        counts, changed = clean_raster(source, whole, options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            rasterio_copy(
                whole,
                cog,
                driver="COG",
                blocksize=BLOCK,
                compress="deflate",
                overview_resampling="mode",
                statistics="yes",
                bigtiff="if_safer",
                num_threads=str(usable_cores()),
            )
        with open_class_map(cog) as written:
            # A full disk does not always stop GDAL.
            if (_count(values for _, values in written.bands()) != counts).any():
                raise OSError("what was written reads otherwise")
            nodata = written.nodata
        if aux_path(source).exists():
            shutil.copyfile(aux_path(source), folder / "names")
            (folder / "names").replace(aux_path(output))
        cog.replace(output)
    except (RasterioError, OSError) as error:
        check_is_of_the_file(error)
        if isinstance(error, GeodeployError):
            raise
        raise OutputError(
            f"{output} cannot be written ({reason(error)}). Is the disk full? Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if nodata is not None:
        counts[nodata] = 0
    return CleanReport(
        map=source,
        output=output,
        pixels_changed=changed,
        share_changed=changed / max(int(counts.sum()), 1),
        seconds=time.perf_counter() - begun,
    )


def clean_raster(source: Path, target: Path, options: CleanOptions) -> tuple[NDArray[np.int64], int]:
    """Write the class map at ``source``, cleaned, to ``target``: a plain GeoTIFF, tags and colours too.

    Returns:
        Pixels of each value that were written, (256,), and how many pixels have changed.
    """
    with open_class_map(source) as opened:
        dataset = opened.dataset
        with (
            warnings.catch_warnings(),
            _new(target, opened, Window(0, 0, opened.width, opened.height)) as file,
        ):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            tags = {name: value for name, value in dataset.tags().items() if name not in _OF_COG}
            file.update_tags(**(tags | options.tags))
            if dataset.descriptions[0]:
                file.set_band_description(1, dataset.descriptions[0])
            if dataset.colorinterp[0] == rasterio.enums.ColorInterp.palette:
                file.write_colormap(1, dataset.colormap(1))
            counts, changed, row = np.zeros(256, np.int64), 0, 0
            for values in cleaned(opened, options):
                window = Window(0, row, opened.width, len(values))
                changed += int((values != dataset.read(1, window=window)).sum())
                counts += _count([values])
                file.write(values, 1, window=window)
                row += len(values)
    return counts, changed


def cut_raster(
    source: Path, target: Path, window: Window, inside: Callable[[Window], NDArray[np.bool_]]
) -> NDArray[np.int64]:
    """Write ``window`` of the class map at ``source`` to ``target``, a plain GeoTIFF of values alone.

    Args:
        source: The class map, which has nodata.
        target: What is written.
        window: Of ``source``.
        inside: Which pixels of a window of ``source`` stay, (h, w); the others become nodata.

    Returns:
        Pixels of each value that were written, (256,).
    """
    counts = np.zeros(256, np.int64)
    with (
        open_class_map(source) as opened,
        warnings.catch_warnings(),
        _new(target, opened, window) as file,
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        for row in range(0, window.height, BLOCK):
            rows = min(BLOCK, window.height - row)
            part = Window(window.col_off, window.row_off + row, window.width, rows)
            values = opened.dataset.read(1, window=part)
            values[~inside(part)] = opened.nodata
            counts += _count([values])
            file.write(values, 1, window=Window(0, row, window.width, rows))
    return counts


def _new(target: Path, source: ClassMap, window: Window) -> Any:
    """A plain GeoTIFF for a ``window`` of ``source``, to be written from the top."""
    return rasterio.open(
        target, "w", driver="GTiff", count=1, dtype="uint8", height=window.height,
        width=window.width, crs=source.crs, nodata=source.nodata,
        transform=source.transform @ Affine.translation(window.col_off, window.row_off),
        compress="deflate", zlevel=1, tiled=True, blockxsize=BLOCK, blockysize=BLOCK,
        bigtiff="if_safer",
    )  # fmt: skip


def cleaned(source: ClassMap, options: CleanOptions) -> Iterator[NDArray[np.uint8]]:
    """The rows of a class map from the top, cleaned."""
    bands: Iterable[NDArray[np.uint8]] = (values for _, values in source.bands())
    if options.smooth is not None:
        bands = smooth_bands(bands, options.smooth, nodata=source.nodata)
    if options.sieve is not None:
        bands = sieve_bands(bands, options.sieve, nodata=source.nodata)
    yield from bands


def _count(bands: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    counts = np.zeros(256, np.int64)
    for values in bands:
        counts += np.bincount(values.ravel(), minlength=256)
    return counts
