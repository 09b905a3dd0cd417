"""Run a RUN folder in PyTorch, its adapter unmerged: the model as it was tuned."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError
from geodeploy.machine import usable_cores
from geodeploy.runtime import Device
from geodeploy.train import require_packages


class TorchSession:
    """A tuned model in PyTorch. See `geodeploy.runtime.Session`."""

    precision = "fp32"

    def __init__(self, model: Path, *, device: Device, threads: int | None) -> None:
        require_packages()
        import torch

        from geodeploy.train.run import load_run

        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                f"The GPU was asked for, but torch {torch.__version__} finds none. "
                "Take --device cpu, or see `geodeploy doctor`."
            )
        run = load_run(model)
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.spec = run.spec
        self.name = f"torch {torch.__version__}"
        self.sha256 = run.sha256
        self.streams = 1
        self._model = run.model.to(self.device)
        torch.set_num_threads(threads or usable_cores())

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        import torch

        with torch.inference_mode():
            logits = self._model(torch.from_numpy(pixels).to(self.device))
        outputs: NDArray[np.float32] = logits.cpu().numpy()
        return outputs

    def close(self) -> None:
        """Give back the memory."""
        del self._model
