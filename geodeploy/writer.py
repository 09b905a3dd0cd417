"""Write a class map: blocks in part by part, a whole Cloud Optimized GeoTIFF out, or nothing."""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.shutil import copy as rasterio_copy
from rasterio.windows import Window

from geodeploy.blend import Block
from geodeploy.dataset import reason
from geodeploy.errors import OutputError
from geodeploy.machine import usable_cores
from geodeploy.parts import Journal, Part, sync
from geodeploy.products import Product
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
    """A map that grows by parts and appears at ``output`` when it is whole.

    The blocks of a part gather in memory, a byte a pixel. A part that is whole goes into the journal;
    `finish` makes one COG of them all and moves it into place with its ``.aux.xml``.

    Args:
        output: Where the map goes.
        journal: Holds the parts, those of an earlier run too.
        parts: All parts of the map.
        corner: Row and column of the raster that the map begins with.
        height: Rows of the map.
        width: Columns of the map.
        crs: None for a map without one.
        transform: From pixel corner to CRS.
        classes: Their values, names and colours.
        product: What is written of the probabilities.
        clean: Given the joined map and where to write it clean; the pixels of each value, (256,).
    """

    def __init__(
        self,
        output: Path,
        *,
        journal: Journal,
        parts: Sequence[Part],
        height: int,
        width: int,
        crs: CRS | None,
        transform: Affine,
        classes: Sequence[SegmentationClass],
        product: Product,
        corner: tuple[int, int] = (0, 0),
        clean: Callable[[Path, Path], NDArray[np.int64]] | None = None,
    ) -> None:
        self._output = output
        self._journal = journal
        self._parts = parts
        self._height, self._width = height, width
        self._corner = corner
        self._crs, self._transform = crs, transform
        self._classes = classes
        self._product = product
        self._clean = clean
        self._counts: NDArray[np.int64] | None = None
        self._canvas: NDArray[Any] | None = None
        self._filled = 0

    def add(self, part: Part, block: Block) -> bool:
        """Put the next ``block`` of ``part`` in its place; whether it was the part's last."""
        window, product = part.window, self._product
        if self._canvas is None:
            self._canvas = np.empty((product.bands, window.height, window.width), product.dtype)
            self._filled = 0
        height, width = block.valid.shape
        row, col = block.row - window.row_off, block.col - window.col_off
        inside = 0 <= row <= window.height - height and 0 <= col <= window.width - width
        assert inside, f"{height} x {width} pixels at {block.row}, {block.col} are not of {part}"
        self._canvas[:, row : row + height, col : col + width] = product.of(block)
        self._filled += height * width
        return self._filled == part.pixels

    def save(self, part: Part, facts: Mapping[str, Any]) -> None:
        """Write ``part``, which is whole, and note it in the journal with ``facts``."""
        assert self._canvas is not None
        assert self._filled == part.pixels, f"{self._filled} of the {part.pixels} pixels of {part}"
        pixels, self._canvas = self._canvas, None
        counts = np.bincount(pixels[0].ravel(), minlength=256).tolist()
        try:
            # Through memory: Python tells of a full disk, GDAL does not always.
            files = {_part_name(part): _encode(pixels)}
            self._journal.save(part.number, files, {"counts": counts, **facts})
        except (RasterioError, OSError) as error:
            raise self._failed(error) from error

    def counts(self) -> NDArray[np.int64]:
        """Pixels of each value, (256,): in the parts that are done; in the map once it is whole."""
        if self._counts is not None:
            return self._counts
        noted = [facts["counts"] for facts in self._journal.done.values()]
        total: NDArray[np.int64] = np.sum(np.array(noted, np.int64), axis=0)
        return total

    def finish(self, tags: Mapping[str, str]) -> None:
        """Join the parts, move the map into place with its ``.aux.xml``, remove the journal.

        ``tags`` are written into the file; nothing that changes from run to run may be among them, so
        that the same job gives the same bytes.
        """
        done = self._journal.done
        assert len(done) == len(self._parts), f"{len(done)} of {len(self._parts)} parts"
        folder = self._journal.folder
        joined, cog, names = folder / "map.vrt", folder / "map.tif", folder / "map.tif.aux.xml"
        try:
            self._join(joined, tags, {_part_name(part): part.window for part in self._parts})
            self._counts = self.counts()  # of the parts, which go with the journal
            if self._clean is not None:
                self._counts = self._clean(joined, folder / "clean.tif")
                self._join(joined, tags, {"clean.tif": Window(0, 0, self._width, self._height)})
            self._make_cog(joined, cog)
            self._finish_aux(names)
            sync(names)
            sync(cog)
            self._journal.note_moving(cog.name)
            # The names go first: for a moment a stray .aux.xml, never a map without its names.
            names.replace(aux_path(self._output))
            cog.replace(self._output)
            with suppress(OSError):  # not every file system can do this to a folder
                sync(self._output.absolute().parent)
        except (RasterioError, OSError) as error:
            raise self._failed(error) from error
        self._journal.remove()

    def _make_cog(self, joined: Path, cog: Path) -> None:
        counts = np.zeros(256, np.int64)
        try:
            with _quiet():
                rasterio_copy(
                    joined,
                    cog,
                    driver="COG",
                    blocksize=BLOCK,
                    compress="deflate",
                    overview_resampling="mode",
                    statistics="auto",  # those of the joined raster
                    bigtiff="if_safer",
                    num_threads=str(usable_cores()),
                )
                # A full disk does not always stop GDAL: what it has written is looked at, all of it.
                for values in _blocks(cog):
                    counts += np.bincount(values.ravel(), minlength=256)
                for level in range(_overviews(cog)):
                    for _ in _blocks(cog, overview_level=level):
                        pass
        except MemoryError:
            raise
        except Exception as error:  # some of what rasterio raises has no base but Exception
            raise self._failed(error) from error
        if (counts != self.counts()).any():
            raise self._failed(OSError("what was written reads otherwise"))

    def _join(self, path: Path, tags: Mapping[str, str], files: Mapping[str, Window]) -> None:
        """One raster of all parts, with colours and tags: a COG takes them from what it is made of."""
        root = ElementTree.Element(
            "VRTDataset", rasterXSize=str(self._width), rasterYSize=str(self._height)
        )
        if self._crs is not None:
            ElementTree.SubElement(root, "SRS").text = self._crs.to_wkt()
        if self._transform != Affine.identity():
            ElementTree.SubElement(root, "GeoTransform").text = ", ".join(
                map(repr, map(float, self._transform.to_gdal()))
            )
        _add_tags(root, tags)
        band = ElementTree.SubElement(root, "VRTRasterBand", dataType="Byte", band="1")
        _add_tags(band, _statistics(self.counts(), self._product.nodata))
        ElementTree.SubElement(band, "Description").text = "class"
        ElementTree.SubElement(band, "NoDataValue").text = str(self._product.nodata)
        ElementTree.SubElement(band, "ColorInterp").text = "Palette"
        table = ElementTree.SubElement(band, "ColorTable")
        colours = {item.value: (*item.rgb, 255) for item in self._classes}
        for number in range(256):
            absent = (0, 0, 0, 0 if number == self._product.nodata else 255)
            cells = map(str, colours.get(number, absent))
            entry = dict(zip(("c1", "c2", "c3", "c4"), cells, strict=True))
            ElementTree.SubElement(table, "Entry", entry)
        for name, window in files.items():
            height, width = str(window.height), str(window.width)
            source = ElementTree.SubElement(band, "SimpleSource")
            ElementTree.SubElement(source, "SourceFilename", relativeToVRT="1").text = name
            ElementTree.SubElement(source, "SourceBand").text = "1"
            ElementTree.SubElement(source, "SrcRect", xOff="0", yOff="0", xSize=width, ySize=height)
            ElementTree.SubElement(
                source, "DstRect", xOff=str(window.col_off - self._corner[1]),
                yOff=str(window.row_off - self._corner[0]), xSize=width,
                ySize=height,
            )  # fmt: skip
        ElementTree.ElementTree(root).write(path, encoding="utf-8")

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
        why = getattr(error, "strerror", None) or reason(error)
        free = shutil.disk_usage(self._journal.folder.parent).free
        return OutputError(
            f"{self._output} cannot be written ({why}). {free / 2**20:.0f} MiB are free there: make "
            "room, or choose another place with -o."
        )


def _add_tags(element: ElementTree.Element, tags: Mapping[str, str]) -> None:
    metadata = ElementTree.SubElement(element, "Metadata")
    for key, value in tags.items():
        ElementTree.SubElement(metadata, "MDI", key=key).text = value


def _statistics(counts: NDArray[np.int64], nodata: int) -> dict[str, str]:
    """What GDAL would find in the map, from the pixels of each value; nothing without a valid one."""
    found = {value: int(count) for value, count in enumerate(counts) if count and value != nodata}
    pixels = sum(found.values())
    if not pixels:
        return {}
    # Whole numbers: the same sums however the map is cut.
    total = sum(value * count for value, count in found.items())
    squares = sum(value * value * count for value, count in found.items())
    return {
        "STATISTICS_MINIMUM": str(min(found)),
        "STATISTICS_MAXIMUM": str(max(found)),
        "STATISTICS_MEAN": f"{total / pixels:.14g}",
        "STATISTICS_STDDEV": f"{math.sqrt(squares * pixels - total * total) / pixels:.14g}",
        "STATISTICS_VALID_PERCENT": f"{100 * pixels / int(counts.sum()):.4g}",
    }


def _overviews(cog: Path) -> int:
    with rasterio.open(cog) as dataset:
        return len(dataset.overviews(1))


def _blocks(cog: Path, **level: int) -> Iterator[NDArray[np.uint8]]:
    """All of a raster, a row of its blocks at a time."""
    with rasterio.open(cog, **level) as dataset:
        for row in range(0, dataset.height, BLOCK):
            rows = min(BLOCK, dataset.height - row)
            yield dataset.read(1, window=Window(0, row, dataset.width, rows))


def _part_name(part: Part) -> str:
    return f"part-{part.number:05}.tif"


def _encode(pixels: NDArray[Any]) -> bytes:
    """A small GeoTIFF of ``pixels`` (bands, h, w)."""
    bands, height, width = pixels.shape
    with _quiet(), MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=bands, height=height, width=width, dtype=pixels.dtype,
            compress="deflate", zlevel=1, tiled=True, blockxsize=BLOCK, blockysize=BLOCK,
        ) as file:  # fmt: skip
            file.write(pixels)
        return bytes(memory.getbuffer())


def aux_path(raster: Path) -> Path:
    """The file beside ``raster`` in which GDAL looks for what the format cannot hold."""
    return raster.with_name(raster.name + ".aux.xml")


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Without rasterio's warning about maps that have no georeference: the scene had none."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
