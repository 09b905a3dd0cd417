"""Run an ONNX file with ONNX Runtime, on the CPU or an NVIDIA GPU."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError, ModelError, SpecError, first_line, missing_extra
from geodeploy.machine import usable_cores
from geodeploy.runtime import Device
from geodeploy.spec import METADATA_KEY, ModelSpec

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxSession:
    """An ONNX model in ONNX Runtime. See `geodeploy.runtime.Session`."""

    def __init__(self, model: Path, *, device: Device, threads: int | None) -> None:
        ort = import_onnxruntime()
        try:
            content = model.read_bytes()
        except OSError as error:
            raise ModelError(f"The model {model} cannot be read ({error.strerror}).") from error
        wanted = _device(ort, device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = [_PROVIDERS["cpu"]] if wanted == "cpu" else list(_PROVIDERS.values())[::-1]
        try:
            session = ort.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise ModelError(
                f"{model} is not an ONNX model that ONNX Runtime {ort.__version__} can load "
                f"({first_line(error)}). Export it again, or check that the file is whole."
            ) from error
        # ONNX Runtime falls back to the CPU in silence: what was asked for must be what runs.
        self.device = "cuda" if session.get_providers()[0] == _PROVIDERS["cuda"] else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise DeviceError(
                "The GPU was asked for, but ONNX Runtime could not use it and would run on the CPU. "
                "See `geodeploy doctor`, or take --device cpu."
            )
        self.spec = _spec(session, model)
        self.name = f"onnxruntime {ort.__version__}"
        self.precision = self.spec.precision
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._session = session
        self._input, self._output = _check_signature(session, self.spec, model)
        self._mean = _per_band([band.mean for band in self.spec.bands])
        self._std = _per_band([band.std for band in self.spec.bands])

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        if self.spec.normalise:
            pixels = (pixels - self._mean) / self._std
        (outputs,) = self._session.run([self._output], {self._input: pixels})
        result: NDArray[np.float32] = outputs
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


def _spec(session: Any, model: Path) -> ModelSpec:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is not None:
        return ModelSpec.from_json(text, source=str(model))
    beside = model.with_suffix(".spec.json")
    if beside.exists():
        return ModelSpec.read(beside)
    raise SpecError(
        f"{model} does not say which bands and classes it has. Export it with `geodeploy export`, "
        f"or describe it in {beside.name} beside it."
    )


def _check_signature(session: Any, spec: ModelSpec, model: Path) -> tuple[str, str]:
    """The names of the one input and one output, whose shapes must be what the spec says."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    needed_in = [len(spec.bands), spec.tile, spec.tile]
    needed_out = [len(spec.classes), spec.tile, spec.tile]
    for what, values, needed in (("input", inputs, needed_in), ("output", outputs, needed_out)):
        if len(values) != 1:
            raise ModelError(f"{model} has {len(values)} {what}s, exactly one is needed.")
        shape = values[0].shape
        fixed = [size if isinstance(size, int) else None for size in shape[1:]]
        fits = all(size is None or size == need for size, need in zip(fixed, needed, strict=False))
        if len(shape) != 4 or not fits:
            raise ModelError(
                f"{model}: the {what} {values[0].name} has shape {shape}, its description says "
                f"(batch, {', '.join(map(str, needed))}). Export the model again."
            )
        if isinstance(shape[0], int):
            raise ModelError(
                f"{model}: the {what} {values[0].name} has a fixed batch of {shape[0]}, a batch of any "
                "size is needed. Export it with a dynamic first axis."
            )
        if values[0].type != "tensor(float)":
            raise ModelError(
                f"{model}: the {what} {values[0].name} is {values[0].type}, float32 is needed."
            )
    return inputs[0].name, outputs[0].name


def _per_band(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, 1, 1)
