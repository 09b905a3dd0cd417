"""Run an ONNX file with ONNX Runtime, on the CPU or an NVIDIA GPU."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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
        self._model = model
        self._input, self._output, self._batch = _check_signature(session, self.spec, model)
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong is raised, once
        self._mean = _per_band([band.mean for band in self.spec.bands])
        self._std = _per_band([band.std for band in self.spec.bands])

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        if self.spec.normalise:
            pixels = (pixels - self._mean) / self._std
        if self.spec.layout == "NCHW":
            return self._outputs(pixels)
        outputs = self._outputs(np.ascontiguousarray(np.moveaxis(pixels, 1, 3)))
        return np.ascontiguousarray(np.moveaxis(outputs, 3, 1))

    def _outputs(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of ``pixels``, in batches of the graph's size where it fixes one."""
        if self._batch is None:
            return self._call(pixels)
        surplus = np.repeat(pixels[-1:], -len(pixels) % self._batch, axis=0)
        parts = np.concatenate([pixels, surplus]).reshape(-1, self._batch, *pixels.shape[1:])
        return np.concatenate([self._call(part) for part in parts])[: len(pixels)]

    def _call(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of ``pixels``, both as the graph has them; checked."""
        feed = {self._input: pixels}
        try:
            (outputs,) = self._session.run([self._output], feed, self._run_options)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise ModelError(
                f"{self._model}: {self.name} could not run it on {list(pixels.shape)} "
                f"({first_line(error)}). Check the tile in its description, or take a smaller --batch."
            ) from error
        expected = [len(pixels), *_shape(self.spec, len(self.spec.classes))]
        if list(outputs.shape) != expected:
            raise ModelError(
                f"{self._model} returned {list(outputs.shape)} for {list(pixels.shape)}, {expected} is "
                "needed: a value for each class and pixel."
            )
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
        f"or describe it in {beside.name} beside it: JSON with name, tile, overlap, bands (name, mean, "
        "std, valid_range), classes (value, name, color) and, where needed, normalise, layout, output."
    )


def _check_signature(session: Any, spec: ModelSpec, model: Path) -> tuple[str, str, int | None]:
    """The names of the one input and one output, whose shapes must be what the spec says.

    And the number of tiles that the graph takes at once; None for any number.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    for what, values, channels in (
        ("input", inputs, len(spec.bands)),
        ("output", outputs, len(spec.classes)),
    ):
        if len(values) != 1:
            raise ModelError(f"{model} has {len(values)} {what}s, exactly one is needed.")
        shape, needed = values[0].shape, _shape(spec, channels)
        if not _fits(shape, needed):
            other: Literal["NCHW", "NHWC"] = "NHWC" if spec.layout == "NCHW" else "NCHW"
            advice = (
                f'Write "layout": "{other}" in the description'
                if _fits(shape, _shape(spec.model_copy(update={"layout": other}), channels))
                else "Mend the description"
            )
            raise ModelError(
                f"{model}: the {what} {values[0].name} has shape {shape}, its description says "
                f"(batch, {', '.join(map(str, needed))}). {advice}, or export the model again."
            )
        if values[0].type != "tensor(float)":
            raise ModelError(
                f"{model}: the {what} {values[0].name} is {values[0].type}, float32 is needed."
            )
    batch = inputs[0].shape[0]
    return inputs[0].name, outputs[0].name, batch if isinstance(batch, int) else None


def _shape(spec: ModelSpec, channels: int) -> list[int]:
    """Of one tile in the graph's layout."""
    side = [spec.tile, spec.tile]
    return [channels, *side] if spec.layout == "NCHW" else [*side, channels]


def _fits(shape: Sequence[int | str | None], needed: list[int]) -> bool:
    """Whether ``shape`` is a batch of ``needed``; a name or None stands for any size."""
    return len(shape) == 4 and all(
        not isinstance(size, int) or size == need for size, need in zip(shape[1:], needed, strict=True)
    )


def _per_band(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, 1, 1)
