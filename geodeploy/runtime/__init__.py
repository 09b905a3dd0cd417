"""Run a model on tiles, whatever runs it. Nothing outside this package knows which runtime does."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import ModelError
from geodeploy.spec import ModelSpec

Device = Literal["auto", "cpu", "cuda"]


class Session(Protocol):
    """A model, loaded and ready."""

    spec: ModelSpec
    name: str
    """Of the runtime, with its version."""
    device: str
    """Where it really runs: ``cpu`` or ``cuda``."""
    precision: str
    sha256: str
    """Of the model's file or files."""

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile), finite and in the spec's units."""
        ...

    def close(self) -> None:
        """Give back what the model holds."""
        ...


def open_session(model: Path, *, device: Device = "auto", threads: int | None = None) -> Session:
    """Load ``model``: an ONNX file with its spec inside or beside it, or a RUN folder.

    Args:
        model: The file or folder.
        device: ``auto`` takes a GPU if the installed runtime can use one.
        threads: For the model's own arithmetic; None for as many as the process may use.

    Raises:
        ModelError: it is neither, or it cannot be loaded.
        SpecError: its description is absent, broken or newer than this program.
        DeviceError: the device asked for is not there.
    """
    if not model.exists():
        raise ModelError(
            f"The model {model} does not exist. Give an ONNX file made by `geodeploy export`, or a RUN."
        )
    if model.is_dir():
        from geodeploy.runtime.torch import TorchSession

        return TorchSession(model, device=device, threads=threads)
    from geodeploy.runtime.onnx import OnnxSession

    return OnnxSession(model, device=device, threads=threads)
