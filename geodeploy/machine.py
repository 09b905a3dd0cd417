"""What this machine and this process have: cores, memory, time on the processor."""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from geodeploy.errors import OutputError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores this process may run on: the affinity mask, not the host's count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory_bytes() -> int:
    """What this process may hold at most: the machine's memory, its container's or its own limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY:
        limits.append(own)
    container = Path("/sys/fs/cgroup/memory.max")  # a container sees its own group there
    if container.exists() and (text := container.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


def cache_folder() -> Path:
    """Where what can be made again is kept between runs."""
    return Path(os.environ.get("GEODEPLOY_CACHE") or Path.home() / ".cache" / "geodeploy")


def private_folder(name: str) -> Path:
    """The folder ``name`` of the cache for what is run as it is: nobody else may leave anything there.

    Raises:
        OutputError: it belongs to somebody else, or cannot be made.
    """
    folder = cache_folder() / name
    advice = "Set GEODEPLOY_CACHE to a folder of your own."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (owner := folder.stat().st_uid) != os.getuid():
            raise OutputError(
                f"{folder} belongs to user {owner}, not to you ({os.getuid()}), and what it keeps is "
                f"run as it is. {advice}"
            )
        folder.chmod(0o700)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder} cannot be made ({error.strerror}). {advice}") from error
    return folder


def peak_memory_bytes() -> int:
    """The most resident memory that this program has held."""
    # Linux counts what the parent process held before this program began into ru_maxrss, not here.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


class Stopwatch:
    """Seconds spent in one stage of a pipeline."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def timed(self, function: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
        """``function``, its seconds counted here, from whatever threads call it."""

        def counted(argument: Argument) -> Result:
            begun = time.perf_counter()
            try:
                return function(argument)
            finally:
                with self._lock:
                    self.seconds += time.perf_counter() - begun

        return counted
