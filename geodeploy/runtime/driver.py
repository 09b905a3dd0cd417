"""NVIDIA's driver and the GPUs that it knows, without CUDA and without a package of Python."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from geodeploy.errors import DeviceError, first_line

NEWEST = 580
"""The branch of the driver that the newest CUDA needs which we are installed with."""

_BRANCHES = {11: 450, 12: 525, 13: NEWEST}
"""The oldest branch for each CUDA, by its release notes (minor version compatibility)."""
_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""What CUDA opens: of the driver, and of the one that Windows lends to its Linux."""
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver that answers."""

    version: str
    gpus: tuple[str, ...]
    """Their names."""

    @property
    def branch(self) -> int:
        """The first part of the version."""
        return int(self.version.partition(".")[0])

    def __str__(self) -> str:
        return f"{', '.join(self.gpus)}, driver {self.version}"


def find_driver() -> Driver | None:
    """What `nvidia-smi` tells; None where there is none.

    Raises:
        DeviceError: it is there and finds no GPU or no driver; the message has its reason.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"nvidia-smi does not answer ({first_line(error)})") from error
    found = [line.split(", ", 1) for line in done.stdout.splitlines() if re.match(r"\d+\.\d", line)]
    if done.returncode or not found:
        told = done.stdout.strip() or done.stderr.strip() or f"exit {done.returncode}"
        raise DeviceError(f"nvidia-smi finds no GPU ({first_line(DeviceError(told))})")
    return Driver(found[0][0], tuple(name for _, name in found))


def has_gpu() -> bool:
    """Whether a display adapter or accelerator of NVIDIA is in the machine, driver or not."""
    return any(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in (_PCI.iterdir() if _PCI.is_dir() else ())
    )


def is_loaded(nodes: Iterable[Path] = _NODES) -> bool:
    """Whether this process sees a driver, as in a container only one that was given a GPU does."""
    return any(node.exists() for node in nodes)


def needed_branch(requirements: Iterable[str]) -> tuple[int, int] | None:
    """The CUDA that a distribution with these requirements is built for, and the driver for that.

    None where that cannot be told.
    """
    for line in requirements:
        found = re.match(r"nvidia-cuda-runtime(?:-cu\d+)?\s*[~=>]=\s*(\d+)", line)
        if found and int(found[1]) in _BRANCHES:
            return int(found[1]), _BRANCHES[int(found[1])]
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
