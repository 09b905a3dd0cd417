"""The parts that a map is made in, and the journal of those that are done.

A part is a band of rows, as wide as the map or, where that would take too much memory, as a panel of
it. Each is written whole and then noted: whatever ends the process, what is noted is good, and the
same command goes on from there.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree.ElementTree import ParseError

from rasterio.windows import Window

from geodeploy.aoi import places_over
from geodeploy.errors import OutputError
from geodeploy.note import read_note, sync, write_note
from geodeploy.tiles import Region, TileGrid

log = logging.getLogger(__name__)

ROWS = 512
"""Pixels of height from which a part is high enough: what a killed run loses at most."""


@dataclass(frozen=True, slots=True)
class Part:
    """One rectangle of the map, by its tiles' places in the grid."""

    number: int
    rows: range
    cols: range
    window: Window
    """In the raster."""

    @property
    def pixels(self) -> int:
        """How many it has."""
        return int(self.window.height * self.window.width)


def plan_parts(grid: TileGrid, *, columns: int, within: Window | None = None) -> list[Part]:
    """The parts of the map, panel by panel and in each from the top; those of ``within`` the raster.

    Each panel is as wide as its neighbours, and with what its tiles read beyond it no wider than
    ``columns``, if that has room for a tile of its own.
    """
    whole = within or Window(0, 0, grid.width, grid.height)
    down = places_over(grid.rows, whole.row_off, whole.row_off + whole.height)
    across = places_over(grid.cols, whole.col_off, whole.col_off + whole.width)
    height = -(-ROWS // grid.stride)
    most = len(across)
    if grid.part(down, across).source.width > columns:
        most = max((columns - grid.overlap) // grid.stride - grid.reach, 1)
    width = -(-len(across) // -(-len(across) // most))
    parts: list[Part] = []
    for left in range(across.start, across.stop, width):
        cols = range(left, min(left + width, across.stop))
        for top in range(down.start, down.stop, height):
            rows = range(top, min(top + height, down.stop))
            window = grid.part(rows, cols).window.intersection(whole)
            parts.append(Part(len(parts), rows, cols, window))
    return parts


def missing_regions(
    grid: TileGrid, parts: Sequence[Part], done: Collection[int]
) -> Iterator[tuple[Region, list[Part]]]:
    """What is still to be mapped: as few regions as there are, each with its parts from the top."""
    run: list[Part] = []
    for part in [*parts, None]:
        follows = part and run and part.cols == run[-1].cols and part.number == run[-1].number + 1
        if run and (part is None or part.number in done or not follows):
            yield grid.part(range(run[0].rows.start, run[-1].rows.stop), run[0].cols), run
            run = []
        if part is not None and part.number not in done:
            run.append(part)


class Journal:
    """A folder of parts beside the map, and the list of those that are whole.

    The folder belongs to one job: to the same scene, model and options. One of another job is emptied.
    Leaving the context by an error keeps a folder that holds a part, and removes one that holds none.
    Once the map is in its place the list alone stays, and tells whose it is, until `seal`.

    Args:
        output: Where the map will lie; the folder is hidden beside it.
        job: What the map's bytes depend on, by names that the user knows.
        parts: How many make the map.
        keep: Whether the parts of a run that ends early are of use to another one.
        holes: Whether parts with holes are of use; without it they are made again.
        anew: Whether a map is made again that the same job made in an earlier command.
        useless_after: The errors after which the parts are of no use to another run.

    Raises:
        OutputError: the folder cannot be written, or another run writes the same map.
    """

    def __init__(
        self,
        output: Path,
        job: Mapping[str, str],
        *,
        parts: int,
        keep: bool = True,
        holes: bool = False,
        anew: bool = False,
        useless_after: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.folder = _folder(output)
        self.done: dict[int, dict[str, Any]] = {}
        """What was noted of each part that is whole."""
        self.finished: Mapping[str, Any] | None = None
        """What was noted of the map, once it is in its place."""
        self._output = output
        self._job = dict(job)
        self._parts = parts
        self._keep = keep
        self._holes = holes
        self._anew = anew
        self._useless_after = useless_after
        self._list = self.folder / _LIST

    def __enter__(self) -> Self:
        try:
            lock = _lock(self.folder)
        except OSError as error:
            raise OutputError(
                f"The folder {self.folder.parent} cannot be written ({error.strerror}). "
                "Choose another place with -o."
            ) from error
        if lock is None:
            raise OutputError(
                f"{self._output} is being written by another run. Wait for it, or choose another place "
                "with -o."
            )
        self._lock = lock
        try:
            self._resume()
        except BaseException as error:
            if not self._list.exists():
                self.remove()
            os.close(lock)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"The folder {self.folder} for parts of the map cannot be used ({error.strerror}). "
                "Make room on the disk, or choose another place with -o."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if not _holds(self.folder, self._lock):  # removed, and perhaps made anew by another run
                return
            if self.finished:
                return
            # An interrupt may have come between the note on the disk and the one in memory.
            self.done = self._noted() or self.done
            useless = kind is not None and issubclass(kind, self._useless_after)
            if self.done and self._keep and not useless:
                with suppress(OSError):
                    self._tidy()
                log.warning(
                    "%s: %d of %d parts kept; the same command goes on from there.",
                    self._output.name,
                    len(self.done),
                    self._parts,
                )
            else:
                self.remove()
        finally:
            os.close(self._lock)

    def save(self, number: int, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write the ``files`` of part ``number``, then note it with ``facts``: it is whole."""
        for name, content in files.items():
            draft = self.folder / f"{name}.draft"
            draft.write_bytes(content)
            sync(draft)
            draft.replace(self.folder / name)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        noted = {"part": number, "files": digests, **facts}
        _append(self._list, noted)
        self.done[number] = noted

    def move(self, places: Mapping[str, Path], facts: Mapping[str, Any]) -> None:
        """Move files of the folder, by their names, to their ``places`` beside it, in this order.

        They are whole, and ``facts`` are noted of them. A run that is killed before all are there has
        made them all the same: `settle` moves what is left. All else in the folder is removed.
        """
        names = {name: place.name for name, place in places.items()}
        # Viewers write statistics into an .aux.xml.
        digests = {
            new: _digest(self.folder / name) for name, new in names.items() if not new.endswith(".xml")
        }
        _append(self._list, {"moving": names, "sha256": digests, **facts})
        _move(self._output, names)
        self.finished = _moved(_read(self._list))
        if self._keep:
            for file in self.folder.iterdir():
                if file.name not in (_LIST, _LOCK):
                    file.unlink()
        else:
            _remove(self.folder, self._lock)

    def remove(self) -> None:
        """Remove the folder: nothing of the map is there."""
        self.done = {}
        _remove(self.folder, self._lock)

    def _resume(self) -> None:
        sealed = not _read(self._list) and not self._anew
        if sealed and noted_job(self._output) == self._job and is_finished(self._output):
            self._rewrite(read_note(self._output)[1:])
        lines = _read(self._list)
        found = lines[0].get("job") if lines else None
        usable = self._holes or not has_holes(self._output)
        if found == self._job and usable and is_finished(self._output):
            self.finished, self.done = _moved(lines), self._noted()
            log.info("%s is done: the same job made it.", self._output.name)
            return
        if found == self._job:
            noted = self._noted()
            if not self._holes:
                noted = self._without_holes(noted)
            self.done = {number: line for number, line in noted.items() if self._is_whole(line)}
            damaged = sorted(noted.keys() - self.done.keys())
            if damaged and not _moved(lines):  # they went when the map was whole, and it is gone
                log.warning(
                    "Parts of %s that were done are missing or damaged, and made again: %s.",
                    self._output.name,
                    ", ".join(map(str, damaged)),
                )
            if self.done:
                log.info(
                    "Going on with %s: %d of %d parts done.",
                    self._output.name,
                    len(self.done),
                    self._parts,
                )
        elif isinstance(found, dict):
            changed = differences(found, self._job)
            log.warning("%s was begun with %s: starting afresh.", self._output.name, changed)
        elif self._list.exists():
            log.warning("The journal of %s cannot be read: starting afresh.", self._output.name)
        self._tidy()
        self._rewrite(self.done.values())

    def _noted(self) -> dict[int, dict[str, Any]]:
        lines = _read(self._list)
        return {line["part"]: line for line in lines if {"part", "files"} <= line.keys()}

    def _without_holes(self, noted: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        kept = {
            number: line
            for number, line in noted.items()
            if not line.get("holes") and not line.get("failed")
        }
        if torn := sorted(noted.keys() - kept.keys()):
            log.warning(
                "Parts of %s that have holes are made again: %s.",
                self._output.name,
                ", ".join(map(str, torn)),
            )
        return kept

    def _is_whole(self, noted: Mapping[str, Any]) -> bool:
        """Whether the files of a part are as they were when it was noted."""
        try:
            return all(
                hashlib.sha256((self.folder / name).read_bytes()).hexdigest() == digest
                for name, digest in noted["files"].items()
            )
        except OSError:
            return False

    def _tidy(self) -> None:
        """Remove what is no file of a part that is done: drafts, a half-made map."""
        known = {name for noted in self.done.values() for name in noted["files"]} | {_LIST, _LOCK}
        for file in self.folder.iterdir():
            if file.name not in known:
                file.unlink()

    def _rewrite(self, noted: Iterable[dict[str, Any]]) -> None:
        # The line that a killed run left half-written would swallow the next.
        draft = self._list.with_suffix(".draft")
        lines = [{"job": self._job}, *noted]
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        sync(draft)
        draft.replace(self._list)


_LIST, _LOCK = "journal.jsonl", "lock"


def differences(found: Mapping[str, str], job: Mapping[str, str]) -> str:
    """What of the job that was ``found`` is not as in ``job``, by the names that the user knows."""
    changed = [name for name in {**job, **found} if found.get(name) != job.get(name)]
    return "another " + ", another ".join(changed)


def settle(output: Path) -> bool:
    """Move what a run made whole that was killed before all was in its place.

    Returns:
        Whether the map and what is beside it are what the journal tells of, to the last byte.
    """
    folder = _folder(output)
    if not os.path.isdir(folder):  # noqa: PTH112  # pathlib raises where a name is too long
        return is_finished(output)
    with suppress(OSError):
        lock = _lock(folder)
        if lock is None:
            return False
        try:
            moved = _moved(_read(folder / _LIST))
            if moved:
                _move(output, moved["moving"])
            if is_finished(output):
                return True
            if moved or (not _read(folder / _LIST) and output.exists()):
                _remove(folder, lock)
        finally:
            os.close(lock)
    return False


def is_finished(output: Path) -> bool:
    """Whether the map at ``output`` and what is beside it are what its journal says was made."""
    digests = (_moved(_lines(output)) or {}).get("sha256")
    if not digests:
        return False
    places = {output.with_name(name): digest for name, digest in digests.items()}
    return all(place.is_file() and _digest(place) == digest for place, digest in places.items())


def noted_job(output: Path) -> dict[str, str]:
    """The job that the journal of ``output`` is of; empty without one."""
    lines = _lines(output)
    job: dict[str, str] = lines[0].get("job", {}) if lines else {}
    return job


def has_holes(output: Path) -> bool:
    """Whether the journal of ``output`` tells of a part with holes."""
    return any(line.get("holes") or line.get("failed") for line in _lines(output))


def note_derived(output: Path, draft: Path, place: Path, way: str) -> None:
    """Note that ``draft``, made in this ``way`` of the finished map at ``output``, goes to ``place``.

    To be noted before it goes: a run that is killed in between is known by the file all the same.
    """
    journal = _folder(output) / _LIST
    if journal.exists():
        # A map may be moved to another folder with what lies beside it.
        relative = os.path.relpath(place.absolute(), output.absolute().parent)
        _append(journal, {"derived": relative, "way": way, "sha256": _digest(draft)})


def noted_derived(output: Path, way: str) -> set[Path]:
    """What was made in this ``way`` of the finished map at ``output``, and is as it was then."""
    folder = output.absolute().parent
    noted = [line for line in _lines(output) if line.get("way") == way]
    files = {Path(os.path.normpath(folder / line["derived"])): line["sha256"] for line in noted}
    return {file for file, digest in files.items() if file.is_file() and _digest(file) == digest}


def seal(output: Path) -> None:
    """Let a finished map remember its job in its ``.aux.xml``, and remove the journal."""
    lines = _read(_folder(output) / _LIST)
    if _moved(lines):
        with suppress(OSError, ParseError):
            write_note(output, _brief(lines), draft=_folder(output) / "note.draft")
    forget(output)


def _brief(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of a journal is of use once the parts are joined; the same however often it was stopped."""
    parts = {line["part"]: {**line, "files": {}, "tallies": []} for line in lines if "part" in line}
    moved = [line for line in lines if "moving" in line][-1]
    derived = {line["derived"]: line for line in lines if "derived" in line}
    return [
        lines[0],
        *(parts[number] for number in sorted(parts)),
        moved,
        *(derived[name] for name in sorted(derived)),
    ]


def forget(output: Path) -> None:
    """Remove the journal of a map, and its parts."""
    folder = _folder(output)
    if folder.exists():
        with suppress(OSError):
            lock = _lock(folder)
            if lock is not None:
                try:
                    _remove(folder, lock)
                finally:
                    os.close(lock)


def _lines(output: Path) -> list[dict[str, Any]]:
    """What the journal tells of the map at ``output``, or the map itself once it is sealed."""
    return _read(_folder(output) / _LIST) or read_note(output)


def _moved(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What was noted of the map, if it was whole."""
    moved = [line for line in lines if "moving" in line]
    return moved[-1] if moved else None


def _append(journal: Path, line: Mapping[str, Any]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _move(output: Path, names: Mapping[str, str]) -> None:
    """Move the files that are still in the folder to their new ``names`` beside ``output``."""
    for name, new in names.items():
        with suppress(FileNotFoundError):
            (_folder(output) / name).replace(output.with_name(new))


def _folder(output: Path) -> Path:
    return output.absolute().with_name(f".{output.name}.parts")


def _lock(folder: Path) -> int | None:
    """A handle that holds ``folder``, which is made, until it is closed; None if another run does."""
    while True:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():  # somebody else's doing, and files would be removed where it leads
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except FileNotFoundError:  # another run has just removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a file system without locks
            return handle
        if _holds(folder, handle):
            return handle
        os.close(handle)


def _holds(folder: Path, handle: int) -> bool:
    """Whether ``handle`` is that of the lock in ``folder``, not of one that was removed before."""
    try:
        return os.path.samestat((folder / _LOCK).stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove(folder: Path, handle: int) -> None:
    """Remove ``folder``, if ``handle`` holds it: the list first, so that none tells of lost parts."""
    if not _holds(folder, handle):
        return
    with suppress(OSError):
        (folder / _LIST).unlink(missing_ok=True)
        for file in folder.iterdir():
            if file.name != _LOCK:
                file.unlink()
        # From here on another run may make the folder its own.
        (folder / _LOCK).unlink()
        folder.rmdir()


def _read(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what follows a broken one is not trusted."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for text in journal.read_bytes().splitlines():
            line = json.loads(text)
            if not isinstance(line, dict):
                break
            lines.append(line)
    return lines


def identify(files: Iterable[str], *values: object) -> tuple[str, str]:
    """The names of a scene's ``files``, and what tells one state of the scene from another.

    That is their bytes and times of change, where they are on a disk, and ``values``.
    """
    names, states = [], []
    for name in sorted(set(files)):
        path = Path(re.sub(r"^(/vsi(zip|tar|gzip)/)+", "", name))
        local = [path]
        if path.is_dir():
            local = sorted(file for file in path.rglob("*") if file.is_file())
        elif not path.is_file():  # far away, or within an archive
            local = [archive for archive in path.parents if archive.is_file()]
        names.append(str(path.absolute()) if local else name)
        states += [(file.stat().st_size, file.stat().st_mtime_ns) for file in local]
    return " ".join(names), hashlib.sha256(repr((states, values)).encode()).hexdigest()
