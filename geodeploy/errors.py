"""What can go wrong in a way the user can mend.

Each message says what was found, what is needed and what to do.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec


class GeodeployError(Exception):
    """The root. The command line prints its message on stderr and exits 1."""


class SourceError(GeodeployError, OSError):
    """A raster that is missing, is not a raster, or breaks while it is read."""


class BandError(GeodeployError, ValueError):
    """Bands that are too few, unknown or ambiguous."""


class RangeError(GeodeployError, ValueError):
    """Pixel values outside what the model was made for."""


class GridError(GeodeployError, ValueError):
    """Tiles, overlaps or rasters whose sizes do not fit together."""


class AreaError(GeodeployError, ValueError):
    """An area to map that cannot be read, or does not lie on the scene."""


class SpecError(GeodeployError, ValueError):
    """A model description that is absent, unreadable or newer than this program."""


class ModelError(GeodeployError, RuntimeError):
    """A model that cannot be loaded, or that returns what it must not."""


class DeviceError(GeodeployError, RuntimeError):
    """A device or runtime that was asked for and is not there."""


class OutputError(GeodeployError, OSError):
    """A place that cannot be written, or must not be overwritten."""


class MemoryLimitError(GeodeployError, MemoryError):
    """More memory than there is: planned, or found out."""


class LabelError(GeodeployError, ValueError):
    """Label values that are no class, or labels that do not lie on the image."""


class RecipeError(GeodeployError, ValueError):
    """A recipe, or an option, with a key or value that it must not have."""


class WeightsError(GeodeployError, ValueError):
    """Backbone weights that are missing, of another shape, or not the ones that were named."""


class ParityError(GeodeployError, RuntimeError):
    """An exported model that does not do what the tuned one does."""


class ProcessError(GeodeployError, RuntimeError):
    """A process of several that was ended from outside, or that cannot work with the others."""


class MissingExtraError(GeodeployError, ImportError):
    """A part of geodeploy whose optional dependencies are not installed."""


def missing_extra(extra: str, package: str) -> MissingExtraError:
    """The error for an absent optional ``package``, naming the ``extra`` that brings it."""
    return MissingExtraError(
        f"This needs the package {package}, which is not installed: "
        f"pip install 'geodeploy-eo[{extra}]'."
    )


_NO_MEMORY = re.compile(r"bad_alloc|[Ff]ailed to allocate|[Cc]annot allocate")


def check_memory(error: BaseException) -> None:
    """Raise a MemoryError if a library's ``error`` is one, or says so in words of its own."""
    if isinstance(error, MemoryError):
        raise error
    if _NO_MEMORY.search(str(error)):
        raise MemoryError(asked_memory(error)) from error


def asked_memory(error: BaseException) -> str:
    """How much more memory was asked for in vain, in words; empty where ``error`` does not tell."""
    asked = re.search(r"(?:buffer of size|allocate) (\d+)", str(error))
    return f"{int(asked[1]) / 2**20:.0f} MiB more were asked for" if asked else ""


def first_line(error: BaseException) -> str:
    """The beginning of what another library says, fit for one line of a terminal."""
    first, *rest = (str(error).strip() or repr(error)).splitlines()
    line = (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first)[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def require(extra: str, packages: Sequence[str]) -> None:
    """Refuse to go on without the ``packages`` of an ``extra``; nothing is imported.

    Raises:
        MissingExtraError: names the first that is absent.
    """
    for package in packages:
        if find_spec(package) is None:
            raise missing_extra(extra, package.replace("_", "-"))
