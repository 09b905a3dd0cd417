"""The files of a folder, a zip or a tar, under one way to list and to read them."""

import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from geodeploy.errors import SourceError, first_line

_METADATA_BYTES = 64 * 2**20
"""More than any metadata file has; what claims more is not read."""


@dataclass(frozen=True, slots=True)
class Archive:
    """Files by their names inside, with ``/`` between folders."""

    name: str
    """For messages."""
    root: str
    """What GDAL calls it."""
    files: tuple[str, ...]
    _read: Callable[[str], bytes]

    def gdal_name(self, file: str) -> str:
        """What GDAL calls ``file``."""
        return f"{self.root}/{file}"

    def read(self, file: str) -> bytes:
        """The bytes of a small ``file``.

        Raises:
            SourceError: it cannot be read.
        """
        try:
            content = self._read(file)
        except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise SourceError(f"{self.name}: {file} cannot be read ({first_line(error)}).") from error
        if len(content) > _METADATA_BYTES:
            raise SourceError(f"{self.name}: {file} is too large to be metadata.")
        return content


def open_archive(path: Path) -> Archive:
    """What ``path`` holds: a folder (and the folders in it), a zip or a tar.

    Raises:
        SourceError: it is damaged.
    """
    try:
        if path.is_dir():
            return _folder(path)
        if zipfile.is_zipfile(path):
            return _zip(path)
        return _tar(path)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise SourceError(
            f"{path} cannot be listed ({first_line(error)}). Is it whole? Fetch it again."
        ) from error


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a folder, a zip or a tar."""
    return path.is_dir() or (path.is_file() and path.name.lower().endswith((".zip", ".tar")))


def _folder(path: Path) -> Archive:
    def read(file: str) -> bytes:
        with (path / file).open("rb") as opened:
            return opened.read(_METADATA_BYTES + 1)

    files = (file for file in path.rglob("*") if file.is_file())
    return Archive(
        name=path.name or str(path.resolve()),
        root=str(path),
        files=tuple(sorted(file.relative_to(path).as_posix() for file in files)),
        _read=read,
    )


def _zip(path: Path) -> Archive:
    def read(file: str) -> bytes:
        with zipfile.ZipFile(path) as archive, archive.open(file) as opened:
            return opened.read(_METADATA_BYTES + 1)

    with zipfile.ZipFile(path) as archive:
        files = sorted(item.filename for item in archive.infolist() if not item.is_dir())
    return Archive(path.name, f"/vsizip/{path.absolute()}", tuple(files), read)


def _tar(path: Path) -> Archive:
    def read(file: str) -> bytes:
        with tarfile.open(path) as archive:
            opened = archive.extractfile(file)
            if opened is None:
                raise tarfile.TarError(f"{file} is no plain file")
            with opened:
                return opened.read(_METADATA_BYTES + 1)

    with tarfile.open(path) as archive:
        files = sorted(item.name for item in archive.getmembers() if item.isfile())
    return Archive(path.name, f"/vsitar/{path.absolute()}", tuple(files), read)
