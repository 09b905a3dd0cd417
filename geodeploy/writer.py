"""Write a map and what lies beside it: blocks in part by part, whole rasters out, or nothing."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.windows import Window

from geodeploy.blend import Block
from geodeploy.cog import Frame, aux_path, encode, join, make_cog, write_names
from geodeploy.dataset import check_is_of_the_file, reason
from geodeploy.errors import OutputError
from geodeploy.note import sync
from geodeploy.parts import Journal, Part
from geodeploy.products import Product
from geodeploy.spec import SegmentationClass
from geodeploy.tally import TALLIES, Counts, add_up

_ROWS = 64
"""Tallied at a time."""
_LONGEST = ".aux.xml"
"""What names of files and folders beside an output add to its own, at most."""
TIFF = (".tif", ".tiff")
Told = Callable[[Path], None]
"""Hears of a file that is whole, by its place of the moment, before it is moved to its own."""


def check_output(
    output: Path,
    sources: Sequence[Path],
    *,
    overwrite: bool,
    make_folder: bool = False,
    flag: str = "-o",
    suffixes: Sequence[str] = (),
) -> None:
    """Refuse, before any work, an ``output`` that cannot or must not be written.

    With ``make_folder`` its folder is made where it is missing; ``flag`` is what the user gave it by;
    ``suffixes`` are those of what will be in it, any if there are none.

    Raises:
        OutputError: its folder is missing or not writable, it exists or is no file, it is one of
            ``sources``, or its name is too long or lies.
    """
    folder = output.parent
    if make_folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {folder} cannot be made ({error.strerror}).") from error
    _check_is_folder(folder)
    _check_is_short(output, flag)
    if any(output.exists() and source.exists() and output.samefile(source) for source in sources):
        raise OutputError(f"{output} is the input itself. Choose another place with {flag}.")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; a file name is needed, such as {output / 'NAME'}.")
    if output.is_symlink() and not output.exists():  # `followed` ends here where links are in a circle
        raise OutputError(f"{output} is a link that leads nowhere. Choose another place with {flag}.")
    if output.exists() and not output.is_file():
        raise OutputError(
            f"{output} is a device, pipe or socket, in whose place a file would be put. Choose another "
            f"place with {flag}."
        )
    if suffixes and output.suffix.lower() not in suffixes:
        raise OutputError(
            f"{output} would not be what its name says: it needs {' or '.join(suffixes)}. Choose "
            f"another name with {flag}."
        )
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists. Choose another place with {flag}, or add --overwrite.")
    _check_is_writable(folder, flag)


def followed(output: Path) -> Path:
    """Where ``output`` leads if it is a link: a file moved to a link's place would replace the link."""
    is_link = os.path.islink(output)  # noqa: PTH114  # pathlib raises where a name is too long
    return Path(os.path.realpath(output)) if is_link else output


@contextmanager
def replacing(output: Path, told: Told | None = None) -> Iterator[Path]:
    """A place for a file that is moved to ``output`` when the context is left without an error.

    ``told`` hears of the whole file just before: what it notes is true even if the process ends then.
    """
    clear_draft(output)
    folder = _draft_folder(output)
    try:
        folder.mkdir()
        draft = folder / output.name
        yield draft
        if told is not None:
            sync(draft)
            told(draft)
        draft.replace(output)
    finally:
        clear_draft(output)


def clear_draft(output: Path) -> None:
    """Remove what a run that was killed left of a draft of ``output``."""
    shutil.rmtree(_draft_folder(output), ignore_errors=True)


def _draft_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.part")


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
    if not os.path.isdir(folder):  # noqa: PTH112  # pathlib raises where a name is too long
        raise OutputError(f"The folder {folder} does not exist. Make it first: mkdir -p {folder}")


def _check_is_short(output: Path, flag: str) -> None:
    most = os.pathconf(output.parent, "PC_NAME_MAX") - len(_LONGEST)
    found = len(os.fsencode(output.name))
    if found > most:
        raise OutputError(
            f"The name {output.name[:20]}... has {found} bytes; {most} are the most, as files beside "
            f"it have longer ones. Choose a shorter one with {flag}."
        )


def _check_is_writable(folder: Path, flag: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {folder} cannot be written. Choose another place with {flag}.")


class MapWriter:
    """A map and what lies beside it, which grow by parts and appear when all is whole.

    The blocks of a part gather in memory, as the rasters store them. A part that is whole goes into the
    journal; `finish` makes a COG of each raster and moves them into place, the map last.

    Args:
        output: Where the map goes, with an ``.aux.xml``; `beside` says where the others go.
        journal: Holds the parts, those of an earlier run too.
        parts: All parts of the map.
        frame: Its size and place.
        classes: Their values, names and colours.
        product: What is written of the model's answers as the map.
        others: What is written beside it, in numbers of the same type.
        clean: Given the joined map and where to write it clean; the pixels of each value, (256,).
        around: What the parts show, where that is more than ``clean`` leaves of the map.
        inside: Which pixels of a window are the map's, (h, w), of those that the parts show.
    """

    def __init__(
        self,
        output: Path,
        *,
        journal: Journal,
        parts: Sequence[Part],
        frame: Frame,
        classes: Sequence[SegmentationClass],
        product: Product,
        others: Sequence[Product] = (),
        clean: Callable[[Path, Path], NDArray[np.int64]] | None = None,
        around: Frame | None = None,
        inside: Callable[[Window], NDArray[np.bool_]] | None = None,
    ) -> None:
        self._output = output
        self._journal = journal
        self._parts = parts
        self._frame = frame
        self._classes = classes
        self._products = (product, *others)
        self._clean = clean
        self._around, self._inside = around or frame, inside
        stops = list(accumulate(len(each.bands) for each in self._products))
        self._bands = {
            each.name: slice(stop - len(each.bands), stop)
            for each, stop in zip(self._products, stops, strict=True)
        }
        self._kind = TALLIES[product.dtype]
        self._tallies: list[Any] = []
        if journal.finished:
            self._tallies = list(map(self._kind.read, journal.finished["tallies"]))
        self._canvas: NDArray[Any] | None = None
        self._filled = 0

    def add(self, part: Part, block: Block) -> bool:
        """Put the next ``block`` of ``part`` in its place; whether it was the part's last."""
        window = part.window
        if self._canvas is None:
            bands = sum(len(product.bands) for product in self._products)
            shape = (bands, window.height, window.width)
            self._canvas = np.empty(shape, self._products[0].dtype)
            self._filled = 0
        height, width = block.valid.shape
        row, col = block.row - window.row_off, block.col - window.col_off
        inside = 0 <= row <= window.height - height and 0 <= col <= window.width - width
        assert inside, f"{height} x {width} pixels at {block.row}, {block.col} are not of {part}"
        shown = block
        if self._inside is not None:
            window = Window(block.col, block.row, width, height)
            shown = replace(block, valid=block.valid & self._inside(window))
        for product in self._products:
            place = self._bands[product.name]
            # What is made clean by its neighbours is cut afterwards.
            given = block if product is self._products[0] else shown
            self._canvas[place, row : row + height, col : col + width] = product.of(given)
        self._filled += height * width
        return self._filled == part.pixels

    def save(self, part: Part, facts: Mapping[str, Any]) -> None:
        """Write ``part``, which is whole, and note it in the journal with ``facts``."""
        assert self._canvas is not None
        assert self._filled == part.pixels, f"{self._filled} of the {part.pixels} pixels of {part}"
        pixels, self._canvas = self._canvas, None
        of_map = pixels[self._bands[self._products[0].name]]
        beside_it = pixels[len(of_map) :, *self._shown(part.window)]
        tallies = [self._tally(band).noted for band in (*of_map, *beside_it)]
        try:
            # Through memory: Python tells of a full disk, GDAL does not always.
            files = {_part_name(part): encode(pixels)}
            self._journal.save(part.number, files, {"tallies": tallies, **facts})
        except (RasterioError, OSError) as error:
            raise self._failed(error) from error

    def _shown(self, window: Window) -> tuple[slice, slice]:
        """The rows and columns of ``window`` that are not only around the map."""
        (first_row, last_row), (first_col, last_col) = self._frame.window.toranges()
        row, col = window.row_off, window.col_off
        return (
            slice(max(first_row - row, 0), max(last_row - row, 0)),
            slice(max(first_col - col, 0), max(last_col - col, 0)),
        )

    def tallies(self, product: Product | None = None) -> Sequence[Any]:
        """What the pixels of each band of a ``product`` come to; of the map without one.

        They are those of the parts that are done, and those of the map once it is whole.
        """
        total = self._tallies or self._of_parts()
        return total[self._bands[(product or self._products[0]).name]]

    def _of_parts(self) -> list[Any]:
        done = self._journal.done
        noted = zip(*(done[number]["tallies"] for number in sorted(done)), strict=True)
        return [add_up(map(self._kind.read, band)) for band in noted]

    def _tally(self, band: NDArray[Any]) -> Any:
        # A few rows at a time: sums in float64 take many times the bytes of what is summed.
        return add_up(self._kind.of(band[row : row + _ROWS]) for row in range(0, len(band) or 1, _ROWS))

    def finish(self, tags: Mapping[str, str]) -> None:
        """Join the parts, move the rasters into place, remove the parts.

        ``tags`` are written into the files; nothing that changes from run to run may be among them, so
        that the same job gives the same bytes.
        """
        done = self._journal.done
        assert len(done) == len(self._parts), f"{len(done)} of {len(self._parts)} parts"
        names = self._journal.folder / "names.aux.xml"
        self._tallies = self._of_parts()  # they go with the journal
        moves = {}
        try:
            # The map goes last: for a moment there may be names or doubts without it, but never the
            # map alone.
            if self._classes:
                write_names(names, self._classes)
                sync(names)
                moves[names.name] = aux_path(self._output)
            else:  # of a class map that this one replaces
                aux_path(self._output).unlink(missing_ok=True)
            for product in reversed(self._products):
                cog = self._make(product, tags)
                sync(cog)
                is_map = product is self._products[0]
                moves[cog.name] = self._output if is_map else beside(self._output, product.name)
            self._journal.move(moves, {"tallies": [tally.noted for tally in self._tallies]})
            with suppress(OSError):  # not every file system can do this to a folder
                sync(self._output.absolute().parent)
        except (RasterioError, OSError) as error:
            raise self._failed(error) from error

    def _make(self, product: Product, tags: Mapping[str, str]) -> Path:
        """The COG of one raster, in the folder of the parts."""
        folder, tallies = self._journal.folder, self.tallies(product)
        joined, cog = folder / f"{product.name}.vrt", folder / f"{product.name}.tif"
        first = self._bands[product.name].start + 1
        files = {_part_name(part): part.window for part in self._parts}
        is_map = product is self._products[0]
        about: dict[str, Any] = {"tags": tags, "classes": self._classes if is_map else ()}
        frame = self._around if is_map else self._frame
        join(joined, product, frame, files, first=first, tallies=tallies, **about)
        if is_map and self._clean is not None:
            tallies = [Counts(self._clean(joined, folder / "clean.tif"))]
            self._tallies[0] = tallies[0]
            files = {"clean.tif": self._frame.window}
            join(joined, product, self._frame, files, first=1, tallies=tallies, **about)
        try:
            make_cog(joined, cog, product, tallies)
        except MemoryError:
            raise
        except Exception as error:  # some of what rasterio raises has no base but Exception
            raise self._failed(error) from error
        return cog

    def _failed(self, error: Exception) -> OutputError:
        check_is_of_the_file(error)
        why = getattr(error, "strerror", None) or reason(error)
        free = shutil.disk_usage(self._journal.folder.parent).free
        return OutputError(
            f"{self._output} cannot be written ({why}). {free / 2**20:.0f} MiB are free there: make "
            "room, or choose another place with -o."
        )


def beside(output: Path, name: str) -> Path:
    """Where the raster ``name`` of the map at ``output`` lies."""
    return output.with_name(f"{output.stem}_{name}.tif")


def _part_name(part: Part) -> str:
    return f"part-{part.number:05}.tif"
