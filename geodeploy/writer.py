"""Write a class map: rows in from the top, a whole Cloud Optimized GeoTIFF out, or nothing."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.shutil import copy as rasterio_copy
from rasterio.windows import Window

from geodeploy.errors import OutputError
from geodeploy.machine import usable_cores
from geodeploy.spec import SegmentationClass

BLOCK = 512


def check_output(
    output: Path,
    sources: Sequence[Path],
    *,
    overwrite: bool,
    make_folder: bool = False,
    flag: str = "-o",
) -> None:
    """Refuse, before any work, an ``output`` that cannot or must not be written.

    With ``make_folder`` its folder is made where it is missing; ``flag`` is what the user gave it by.

    Raises:
        OutputError: its folder is missing or not writable, it exists, or it is one of ``sources``.
    """
    folder = output.parent
    if make_folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {folder} cannot be made ({error.strerror}).") from error
    _check_is_folder(folder)
    if any(output.exists() and source.exists() and output.samefile(source) for source in sources):
        raise OutputError(f"{output} is the input itself. Choose another place with {flag}.")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; a file name is needed, such as {output / 'NAME'}.")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists. Choose another place with {flag}, or add --overwrite.")
    _check_is_writable(folder, flag)


def check_new_folder(output: Path) -> None:
    """Refuse a place where a new folder cannot be made.

    The folder around it may be missing too, as ``runs`` is before the first RUN; the one above may not.

    Raises:
        OutputError: something is there already, or it cannot be made there.
    """
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists already. Choose another place with -o, or remove it.")
    folder = output.absolute().parent
    folder = folder if folder.exists() else folder.parent
    _check_is_folder(folder)
    _check_is_writable(folder, "-o")


def _check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} does not exist. Make it first: mkdir -p {folder}")


def _check_is_writable(folder: Path, flag: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {folder} cannot be written. Choose another place with {flag}.")


class MapWriter:
    """A map that grows by rows and appears at ``output`` when it is whole.

    Rows gather in a plain tiled GeoTIFF in a folder beside ``output``; `finish` makes the COG of it
    and moves it into place with its ``.aux.xml``. Leaving the context earlier, by an error or Ctrl-C,
    removes the folder. Memory: 512 rows of one byte a pixel, and GDAL's block cache.

    Args:
        output: Where the map goes.
        height: Rows of the map.
        width: Columns of the map.
        crs: None for a map without one.
        transform: From pixel corner to CRS.
        classes: Their values, names and colours.
        nodata: Written where the scene has no data.
        tags: Written into the file; nothing that changes from run to run, so that the same job
            gives the same bytes.
    """

    def __init__(
        self,
        output: Path,
        *,
        height: int,
        width: int,
        crs: CRS | None,
        transform: Affine,
        classes: Sequence[SegmentationClass],
        nodata: int,
        tags: Mapping[str, str],
    ) -> None:
        self._output = output
        self._height, self._width = height, width
        self._georeference: dict[str, Any] = {"crs": crs, "transform": transform}
        self._classes = classes
        self._nodata = nodata
        self._tags = dict(tags)
        self._pending: list[NDArray[np.uint8]] = []
        self._pending_rows = 0
        self._row = 0
        self.counts = np.zeros(256, np.int64)
        """Pixels of each value written so far."""

    def __enter__(self) -> Self:
        try:
            self._folder = Path(
                tempfile.mkdtemp(prefix=f".{self._output.name}-", dir=self._output.parent)
            )
        except OSError as error:
            raise OutputError(
                f"The folder {self._output.parent} cannot be written ({error.strerror}). "
                "Choose another place with -o."
            ) from error
        self._rows_file = self._folder / "rows.tif"
        try:
            with _quiet():
                self._dataset = rasterio.open(
                    self._rows_file,
                    "w",
                    driver="GTiff",
                    height=self._height,
                    width=self._width,
                    count=1,
                    dtype="uint8",
                    nodata=self._nodata,
                    tiled=True,
                    blockxsize=BLOCK,
                    blockysize=BLOCK,
                    compress="deflate",
                    zlevel=1,
                    bigtiff="if_safer",
                    **self._georeference,
                )
            self._describe()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._dataset.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, row: int, classes: NDArray[np.uint8]) -> None:
        """Add rows (H, width); ``row`` is the first, and follows the last one written."""
        assert row == self._row, f"row {row} after {self._row}"
        self._row += len(classes)
        self._pending.append(classes)
        self._pending_rows += len(classes)
        # Whole blocks only: a block written twice is compressed twice and leaves a hole in the file.
        whole = self._pending_rows // BLOCK * BLOCK
        if whole:
            self._flush(whole)

    def finish(self, *, tags: Mapping[str, str] | None = None) -> None:
        """Make the COG and move it into place with its ``.aux.xml``.

        ``tags`` are written too: what is known only when the last row is.
        """
        assert self._row == self._height, f"{self._row} of {self._height} rows"
        if self._pending_rows:
            self._flush(self._pending_rows)
        try:
            self._dataset.update_tags(**(tags or {}))
            self._dataset.close()
            cog = self._folder / "map.tif"
            with _quiet():
                rasterio_copy(
                    self._rows_file,
                    cog,
                    driver="COG",
                    blocksize=BLOCK,
                    compress="deflate",
                    overview_resampling="mode",
                    statistics="yes",
                    bigtiff="if_safer",
                    num_threads=str(usable_cores()),
                )
        except RasterioError as error:
            raise self._failed(error) from error
        self._finish_aux(self._folder / "map.tif.aux.xml")
        try:
            # The names go first: for a moment a stray .aux.xml, never a map without its names.
            (self._folder / "map.tif.aux.xml").replace(aux_path(self._output))
            cog.replace(self._output)
        except OSError as error:
            raise self._failed(error) from error

    def _flush(self, rows: int) -> None:
        gathered = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)
        block, rest = gathered[:rows], gathered[rows:]
        self.counts += np.bincount(block.ravel(), minlength=256)
        top = self._row - self._pending_rows
        try:
            self._dataset.write(block, 1, window=Window(0, top, self._width, len(block)))
        except RasterioError as error:
            raise self._failed(error) from error
        self._pending = [rest] if len(rest) else []
        self._pending_rows = len(rest)

    def _describe(self) -> None:
        """Colours and tags: a COG cannot be updated afterwards without losing its layout."""
        self._dataset.write_colormap(
            1,
            {item.value: (*item.rgb, 255) for item in self._classes} | {self._nodata: (0, 0, 0, 0)},
        )
        self._dataset.set_band_description(1, "class")
        self._dataset.update_tags(**self._tags)

    def _finish_aux(self, path: Path) -> None:
        # A TIFF cannot carry names of classes; GDAL and QGIS read them from this file beside it.
        root = ElementTree.Element("PAMDataset")
        band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
        names = {item.value: item.name for item in self._classes}
        categories = ElementTree.SubElement(band, "CategoryNames")
        for value in range(max(names) + 1):
            ElementTree.SubElement(categories, "Category").text = names.get(value, "")
        table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
        # Type 0 integer, 2 string; usage 5 value, 2 name, 6 to 8 red, green, blue (GDAL's gdal_rat.h).
        columns = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
        for place, (title, kind, usage) in enumerate(columns):
            column = ElementTree.SubElement(table, "FieldDefn", index=str(place))
            ElementTree.SubElement(column, "Name").text = title
            ElementTree.SubElement(column, "Type").text = str(kind)
            ElementTree.SubElement(column, "Usage").text = str(usage)
        for place, item in enumerate(self._classes):
            row = ElementTree.SubElement(table, "Row", index=str(place))
            for cell in (item.value, item.name, *item.rgb):
                ElementTree.SubElement(row, "F").text = str(cell)
        ElementTree.indent(root)
        ElementTree.ElementTree(root).write(path, encoding="utf-8")

    def _failed(self, error: Exception) -> OutputError:
        return OutputError(
            f"{self._output} cannot be written ({' '.join(str(error).split())}). "
            "Is the disk full? Nothing was left behind."
        )


def aux_path(raster: Path) -> Path:
    """The file beside ``raster`` in which GDAL looks for what the format cannot hold."""
    return raster.with_name(raster.name + ".aux.xml")


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Without rasterio's warning about maps that have no georeference: the scene had none."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
