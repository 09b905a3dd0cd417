"""Run an ONNX file with ONNX Runtime, on the CPU or an NVIDIA GPU."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError, ModelError, first_line, missing_extra
from geodeploy.machine import usable_cores
from geodeploy.runtime import Device
from geodeploy.runtime.graph import (
    OnnxFile,
    Value,
    check_outputs,
    check_signature,
    from_graph,
    to_graph,
)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxSession:
    """An ONNX model in ONNX Runtime. See `geodeploy.runtime.Session`."""

    def __init__(self, file: OnnxFile, *, device: Device, threads: int | None) -> None:
        ort = import_onnxruntime()
        wanted = _device(ort, device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        # What goes wrong is raised, once; why a GPU cannot be used is only logged.
        options.log_severity_level = 4 if wanted == "cpu" else 3
        # The graph is handed over as bytes, which lie in no folder.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.path.parent)
        )
        providers = [_PROVIDERS["cpu"]] if wanted == "cpu" else list(_PROVIDERS.values())[::-1]
        try:
            session = ort.InferenceSession(file.content, options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise ModelError(
                f"{file.path} is not an ONNX model that ONNX Runtime {ort.__version__} can load "
                f"({first_line(error)}). Export it again, or check that the file is whole."
            ) from error
        # ONNX Runtime falls back to the CPU in silence: what was asked for must be what runs.
        self.device = "cuda" if session.get_providers()[0] == _PROVIDERS["cuda"] else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise DeviceError(
                "The GPU was asked for, but ONNX Runtime could not use it and would run on the CPU. "
                "See `geodeploy doctor`, or take --device cpu."
            )
        self.spec = file.spec
        self.name = f"onnxruntime {ort.__version__}"
        self.precision = file.spec.precision
        self.sha256 = file.sha256
        self._session = session
        self._model = file.path
        self._signature = check_signature(
            file, _values(session.get_inputs()), _values(session.get_outputs()), float32="float"
        )
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong is raised, once

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        parts = to_graph(pixels, self.spec, self._signature.batch)
        return from_graph([self._call(part) for part in parts], self.spec, len(pixels))

    def _call(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of ``pixels``, both as the graph has them; checked."""
        feed = {self._signature.input: pixels}
        try:
            (outputs,) = self._session.run([self._signature.output], feed, self._run_options)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise ModelError(
                f"{self._model}: {self.name} could not run it on {list(pixels.shape)} "
                f"({first_line(error)}). Check the tile in its description, or take a smaller --batch."
            ) from error
        result: NDArray[np.float32] = outputs
        check_outputs(self._model, self.spec, pixels, result)
        return result

    def close(self) -> None:
        """Give back the memory."""
        del self._session


def import_onnxruntime() -> Any:
    """The package, or the error that names the extra which brings it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("cpu", "onnxruntime") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise DeviceError(
            "onnxruntime is installed but broken, as when onnxruntime and onnxruntime-gpu overwrote "
            "one another. `geodeploy doctor` says how to mend it."
        )
    return onnxruntime


def _device(ort: Any, device: Device) -> str:
    compiled = _PROVIDERS["cuda"] in ort.get_available_providers()
    if device == "cuda" and not compiled:
        raise DeviceError(
            "The GPU was asked for, but the installed onnxruntime has no CUDA in it. Install the other "
            "one: pip uninstall onnxruntime && pip install 'geodeploy-eo[gpu]', or take --device cpu."
        )
    if device == "cpu" or not compiled:
        return "cpu"
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the wheels of the extra `gpu`
    return "cuda"


def _values(arguments: Sequence[Any]) -> list[Value]:
    return [
        Value(item.name, item.shape, item.type.removeprefix("tensor(").removesuffix(")"))
        for item in arguments
    ]
