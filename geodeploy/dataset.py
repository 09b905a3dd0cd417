"""Open what GDAL reads, here or far away, with errors in one line."""

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import rasterio
from rasterio._err import CPLE_OutOfMemoryError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from geodeploy.errors import SourceError, asked_memory

_VIRTUAL = {
    "http": "/vsicurl/http://",
    "https": "/vsicurl/https://",
    "s3": "/vsis3/",
    "gs": "/vsigs/",
    "az": "/vsiaz/",
}
_URL = re.compile(rf"(?:/vsicurl/)?({'|'.join(_VIRTUAL)}):/+(.+)", re.DOTALL)
_NETWORK = ("/vsicurl", "/vsis3", "/vsigs", "/vsiaz")


def gdal_name(path: Path | str) -> str:
    """What GDAL calls ``path``: URLs go through its virtual file systems.

    A URL that has been a `Path` has lost a slash (``https:/host``); it is understood too, and so is
    one in GDAL's own words (``/vsicurl/https:/host``).
    """
    url = _URL.fullmatch(str(path))
    return _VIRTUAL[url[1]] + url[2] if url else str(path)


def as_url(path: Path | str) -> str | None:
    """``path`` with both its slashes, if it is a URL."""
    url = _URL.fullmatch(str(path))
    return f"{url[1]}://{url[2]}" if url else None


@contextmanager
def open_dataset(path: Path | str) -> Iterator[Any]:
    """A rasterio dataset, or a SourceError that says what is wrong with ``path``."""
    name = gdal_name(path)
    path = as_url(path) or path
    # With a colon it may be a subdataset, such as NETCDF:file.nc:name: GDAL knows whether it is there.
    if ":" not in name and not name.startswith("/vsi") and not Path(name).exists():
        raise SourceError(f"{path} does not exist. Check the path; a raster file is needed.")
    try:
        dataset = open_quietly(name)
    except RasterioError as error:
        check_is_of_the_file(error)
        if Path(name).is_dir():
            raise SourceError(f"{path} is a folder; a raster file is needed.") from error
        if name.startswith(_NETWORK):
            raise SourceError(
                f"{path} cannot be read as a raster over the network ({reason(error)}). Check the "
                "address, and that it may be read without signing in or with the keys that are set."
            ) from error
        raise SourceError(
            f"{path} is not a raster that GDAL {rasterio.__gdal_version__} can open "
            f"({reason(error)}). A whole GeoTIFF, COG, JP2, VRT or the like is needed; if this was "
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
def reading(path: Path | str, window: Window) -> Iterator[None]:
    """Make what GDAL raises while ``window`` of ``path`` is read a SourceError.

    Raises:
        SourceError: the file is at fault.
        MemoryError: the machine is.
    """
    try:
        yield
    except RasterioError as error:
        check_is_of_the_file(error)
        raise SourceError(
            f"{path}: rows {window.row_off} to {window.row_off + window.height} cannot be "
            f"read ({reason(error)}). The file is damaged or truncated: fetch it again."
        ) from error


def check_is_of_the_file(error: BaseException) -> None:
    """Raise a MemoryError if GDAL's ``error`` comes of one: the machine is at fault then."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CPLE_OutOfMemoryError):
            raise MemoryError(asked_memory(cause)) from error
        cause = cause.__cause__


WARNINGS = threading.Lock()
"""Hold it to change which warnings Python shows: the list belongs to the whole process."""


def open_quietly(name: str) -> Any:
    """A rasterio dataset. One without georeference is normal here, and told to the user once by us."""
    if name.startswith("xarray:"):
        from geodeploy.arrays import open_array

        return open_array(name)
    # Over the network each look for a file beside the raster is a request, and the first may fail.
    remote = rasterio.Env(
        GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_HTTP_MAX_RETRY="3", GDAL_HTTP_RETRY_DELAY="1"
    )
    with (
        WARNINGS,
        warnings.catch_warnings(),
        remote if name.startswith(_NETWORK) else nullcontext(),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(name)


def reason(error: BaseException) -> str:
    """GDAL's own words: the deepest cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".")
