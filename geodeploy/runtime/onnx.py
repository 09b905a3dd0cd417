"""Run an ONNX file with ONNX Runtime, on the CPU or an NVIDIA GPU. It has not run on a GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError, ModelError, check_memory, first_line, missing_extra
from geodeploy.machine import private_folder, usable_cores
from geodeploy.runtime import Device
from geodeploy.runtime.bound import Bound, even_batch
from geodeploy.runtime.graph import (
    OnnxFile,
    Value,
    check_outputs,
    check_signature,
    from_graph,
    input_names,
    input_shape,
    to_graph,
)
from geodeploy.runtime.streams import TILES, Streams

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


class OnnxSession:
    """An ONNX model in ONNX Runtime. See `geodeploy.runtime.Session`.

    On a processor the ``threads`` are shared out among ``batch`` tiles: those that work on one tile
    wait for one another in each layer, and the more so while scenes are read and maps written.
    """

    def __init__(
        self,
        file: OnnxFile,
        *,
        device: Device,
        threads: int | None,
        tensorrt: bool = False,
        batch: int | None = None,
    ) -> None:
        ort = import_onnxruntime("gpu" if tensorrt or device == "cuda" else "cpu")
        tensorrts = [(_TENSORRT, tensorrt_options(file))] if tensorrt else []
        threads = threads or usable_cores()
        tiles = 1 if tensorrt or device == "cuda" else batch or TILES  # a GPU takes all tiles at once

        def load(threads: int) -> tuple[Any, str]:
            return start(file.path, file.content, device=device, threads=threads, before=tensorrts)

        shared = Streams(threads, tiles)
        try:
            session, self.device = load(shared.threads)
        except ModelError as error:
            if device != "cuda" and not tensorrt and file.spec.precision == "bf16":
                raise ModelError(
                    f"{file.path} is in bf16, which ONNX Runtime has on GPUs alone. Take an export in "
                    "fp32, --runtime openvino, or --device cuda."
                ) from error
            raise
        self._signature = check_signature(
            file, _values(session.get_inputs()), _values(session.get_outputs()), float32="float"
        )
        fixed = self._signature.batch
        if self.device == "cpu" and fixed:
            loaded, shared = shared, Streams(threads, tiles, fixed)
            if shared.threads != loaded.threads:
                session, _ = load(shared.threads)
        self.spec = file.spec
        self.name = f"onnxruntime {ort.__version__}" + (" with TensorRT" if tensorrt else "")
        self.precision = file.spec.precision
        self.sha256 = file.sha256
        self._session = session
        self._model = file.path
        self._batch = fixed or (TILES if tensorrt else None)
        self._streams = shared
        self.streams = shared.number if self.device == "cpu" else 1
        self._memory = self.device
        self._bound: dict[int, Bound] = {}
        self._one_batch = Lock()  # what is bound is of one caller at a time
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong is raised, once

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        batch = self._batch
        if batch is None and self.device == "cuda":
            batch = even_batch(len(pixels))
        parts = to_graph(pixels, self.spec, batch)
        if self.device == "cuda":
            found = [self._call(part) for part in parts]
        elif batch is None:
            found = self._streams.each(self._call, self._streams.shares(parts[0]))
        else:
            found = self._streams.each(self._call, parts)
        return from_graph(found, self.spec, len(pixels))

    def _call(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of ``pixels``, both as the graph has them; checked."""
        feed = {self._signature.input: pixels}
        try:
            if self.device == "cuda":
                outputs = self._on_gpu(pixels)
            else:
                (outputs,) = self._session.run([self._signature.output], feed, self._run_options)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            if self.device == "cpu":  # what a GPU lacks, a smaller batch mends
                check_memory(error)
            raise ModelError(
                f"{self._model}: {self.name} could not run it on {list(pixels.shape)} "
                f"({first_line(error)}). Check the tile in its description, or take a smaller --batch."
            ) from error
        result: NDArray[np.float32] = outputs
        check_outputs(self._model, self.spec, pixels, result)
        return result

    def _on_gpu(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same with memory bound beforehand."""
        batch = len(pixels)
        with self._one_batch:
            if batch not in self._bound:
                self._bound[batch] = Bound(
                    self._session, self._signature, self.spec, batch, memory=self._memory
                )
            return self._bound[batch].run(pixels, self._run_options)

    def close(self) -> None:
        """Give back the memory."""
        self._streams.close()
        del self._session, self._bound


def start(
    path: Path,
    content: bytes,
    *,
    device: Device,
    threads: int | None,
    before: Sequence[tuple[str, dict[str, str]]] = (),
    settings: Mapping[str, str] | None = None,
) -> tuple[Any, str]:
    """A session of ONNX Runtime for the graph ``content``, which lies in ``path``; where it runs.

    Providers that come ``before`` CUDA must be those that run it, on the GPU.

    Raises:
        ModelError: ONNX Runtime cannot load it.
        DeviceError: the device asked for is not there.
    """
    ort = import_onnxruntime("gpu" if before or device == "cuda" else "cpu")
    wanted = _device(ort, "cuda" if before else device, tensorrt=bool(before))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    # What goes wrong is raised, once; why a GPU cannot be used is only logged.
    options.log_severity_level = 4 if wanted == "cpu" else 3
    # The graph is handed over as bytes, which lie in no folder.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    # TF32, which ONNX Runtime takes unless told, has the digits of float16: float32 is to be that.
    providers: list[Any] = [_CPU] if wanted == "cpu" else [(_CUDA, {"use_tf32": "0"}), _CPU]
    try:
        session = ort.InferenceSession(content, options, providers=[*before, *providers])
    except Exception as error:  # ONNX Runtime's errors share no base but Exception
        raise ModelError(
            f"{path} is not an ONNX model that ONNX Runtime {ort.__version__} can load "
            f"({first_line(error)}). Export it again, or check that the file is whole."
        ) from error
    # ONNX Runtime falls back to the CPU in silence: what was asked for must be what runs.
    taken = session.get_providers()[0]
    if before and taken != before[0][0]:
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} could not use TensorRT: it needs version 10, "
            "which it is linked with. Take --runtime onnxruntime or tensorrt."
        )
    found = "cpu" if taken == _CPU else "cuda"
    if device == "cuda" and found != "cuda":
        raise DeviceError(
            "The GPU was asked for, but ONNX Runtime could not use it and would run on the CPU. "
            "See `geodeploy doctor`, or take --device cpu."
        )
    return session, found


class Graph:
    """A graph loaded in ONNX Runtime, which any number of threads may run. See `start`."""

    def __init__(
        self,
        path: Path,
        content: bytes,
        *,
        device: Device,
        threads: int | None,
        settings: Mapping[str, str],
    ) -> None:
        self._ort = ort = import_onnxruntime()
        self._session, self.device = start(
            path, content, device=device, threads=threads, settings=settings
        )
        self._memory = self.device
        self.path = path
        self.name = f"onnxruntime {ort.__version__}"
        self.inputs = _values(self._session.get_inputs())
        self.optional = {item.name for item in self._session.get_overridable_initializers()}
        """Names of inputs that have a value of their own."""
        self.outputs = _values(self._session.get_outputs())
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong is raised, once

    def value(self, array: NDArray[np.float32]) -> Any:
        """``array`` in the memory where the graph is computed; on the processor it is not copied."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._memory, 0)

    def run(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """The values of ``outputs``, which stay in that memory; the first of ``feed`` is the tiles."""
        try:
            binding = self._session.io_binding()
            for name, value in feed.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, self._memory)
            self._session.run_with_iobinding(binding, self._run_options)
            found: list[Any] = binding.get_outputs()
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            if self.device == "cpu":  # what a GPU lacks, a smaller batch mends
                check_memory(error)
            shape = list(next(iter(feed.values())).shape())
            raise ModelError(
                f"{self.path}: {self.name} could not run it on {shape} "
                f"({first_line(error)}). Check the tile in its description, or take a smaller --batch."
            ) from error
        return found


def import_onnxruntime(extra: str = "cpu") -> Any:
    """The package, or the error that names the ``extra`` which brings it: ``cpu`` or ``gpu``."""
    try:
        import onnxruntime
    except ImportError as error:
        package = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}[extra]
        raise missing_extra(extra, package) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise DeviceError(
            "onnxruntime is installed but broken, as when onnxruntime and onnxruntime-gpu overwrote "
            "one another. `geodeploy doctor` says how to mend it."
        )
    return onnxruntime


def _device(ort: Any, device: Device, *, tensorrt: bool) -> str:
    compiled = _CUDA in ort.get_available_providers()
    if device == "cuda" and not compiled:
        other = "--runtime onnxruntime" if tensorrt else "--device cpu"
        raise DeviceError(
            "The GPU was asked for, but the installed onnxruntime has no CUDA in it. Install the other "
            f"one: pip uninstall onnxruntime && pip install 'geodeploy-eo[gpu]', or take {other}."
        )
    if device == "cpu" or not compiled:
        return "cpu"
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the wheels of the extra `gpu`
    return "cuda"


def tensorrt_options(file: OnnxFile) -> dict[str, Any]:
    """What ONNX Runtime is to tell TensorRT: the one shape, and where engines and timings are kept.

    The graph alone says the precision.
    """
    cache = private_folder("onnxruntime-tensorrt")
    folder = cache / f"{import_onnxruntime('gpu').__version__}-{file.sha256}"
    folder.mkdir(exist_ok=True)
    size = "x".join(map(str, (TILES, *input_shape(file.spec))))
    shapes = ",".join(f"{name}:{size}" for name in input_names(file.content))
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
        **{f"trt_profile_{part}_shapes": shapes for part in ("min", "opt", "max")},
    }


def _values(arguments: Sequence[Any]) -> list[Value]:
    return [
        Value(item.name, item.shape, item.type.removeprefix("tensor(").removesuffix(")"))
        for item in arguments
    ]
