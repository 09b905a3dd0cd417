"""Run an ONNX file with TensorRT on an NVIDIA GPU, without torch. Untested: it has not run on a GPU."""

import logging
from collections import deque
from itertools import cycle
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError, ModelError
from geodeploy.machine import private_folder
from geodeploy.runtime.cuda import Cuda
from geodeploy.runtime.engines import engine_facts, kept_engine
from geodeploy.runtime.graph import (
    OnnxFile,
    Value,
    check_outputs,
    check_signature,
    from_graph,
    input_shape,
    output_shape,
    to_graph,
)
from geodeploy.runtime.plan import Plan, PlanOptions, build_plan, import_tensorrt, plan_options
from geodeploy.runtime.refit import refit

log = logging.getLogger(__name__)

_STREAMS = 2
"""While one computes, the other copies."""


class TensorRtSession:
    """An ONNX model in TensorRT. See `geodeploy.runtime.Session`."""

    device = "cuda"

    def __init__(self, file: OnnxFile, *, options: PlanOptions | None = None) -> None:
        options = options or plan_options()
        trt = import_tensorrt()
        cuda = Cuda()
        self.spec = file.spec
        self.name = f"{trt.__name__} {trt.__version__}"
        self.precision = file.spec.precision
        self.sha256 = file.sha256
        self._model = file.path
        self._cuda = cuda
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._runtime.engine_host_code_allowed = options.version_compatible
        self._engine = _engine(trt, cuda, self._runtime, file, options)
        signature = check_signature(file, *_values(trt, self._engine), float32="FLOAT")
        self._batch = signature.batch or options.batch
        self._lanes = [
            _Lane(cuda, self._engine, signature.input, signature.output, self._batch, file)
            for _ in range(_STREAMS)
        ]
        self.streams = 1
        self._one_batch = Lock()  # the lanes' buffers are of one caller at a time

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        parts = to_graph(pixels, self.spec, self._batch)
        outputs: list[NDArray[np.float32]] = []
        at_work: deque[_Lane] = deque()
        with self._one_batch:
            for lane, part in zip(cycle(self._lanes), parts, strict=False):
                if lane in at_work:
                    outputs.append(at_work.popleft().result())
                lane.start(part)
                at_work.append(lane)
            outputs.extend(lane.result() for lane in at_work)
        check_outputs(self._model, self.spec, parts[0], outputs[0])
        return from_graph(outputs, self.spec, len(pixels))

    def close(self) -> None:
        """Give back the memory."""
        for lane in self._lanes:
            lane.close()
        del self._lanes, self._engine, self._runtime


class _Lane:
    """A stream with an execution context and buffers of its own, for batches of one size."""

    def __init__(
        self, cuda: Cuda, engine: Any, taken: str, given: str, batch: int, file: OnnxFile
    ) -> None:
        self._cuda = cuda
        shapes = {
            taken: (batch, *input_shape(file.spec)),
            given: (batch, *output_shape(file.spec)),
        }
        self._stream = cuda.call("cudaStreamCreate")
        self._context = engine.create_execution_context()
        if self._context is None:
            raise DeviceError(
                f"{file.path}: the GPU has no memory for it. Close what else runs there, or take "
                "--runtime onnxruntime."
            )
        self._context.set_input_shape(taken, shapes[taken])
        self._host, self._device = {}, {}
        for name, shape in shapes.items():
            self._host[name] = cuda.pinned(shape)
            self._device[name] = cuda.call("cudaMalloc", 4 * int(np.prod(shape)))
            self._context.set_tensor_address(name, int(self._device[name]))
        self._taken, self._given = taken, given

    def start(self, pixels: NDArray[np.float32]) -> None:
        """Copy ``pixels`` to the GPU, compute, and copy back, while the caller does other things."""
        address, array = self._host[self._taken]
        array[...] = pixels
        kind = self._cuda.api.cudaMemcpyKind
        self._copy(self._device[self._taken], address, array.nbytes, kind.cudaMemcpyHostToDevice)
        if not self._context.execute_async_v3(int(self._stream)):
            raise ModelError("TensorRT could not run the model. Take --runtime onnxruntime.")
        address, array = self._host[self._given]
        self._copy(address, self._device[self._given], array.nbytes, kind.cudaMemcpyDeviceToHost)

    def result(self) -> NDArray[np.float32]:
        """What `start` computed."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return self._host[self._given][1].copy()

    def close(self) -> None:
        """Give back the memory."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        del self._context
        for address, _ in self._host.values():
            self._cuda.call("cudaFreeHost", address)
        for pointer in self._device.values():
            self._cuda.call("cudaFree", pointer)
        self._cuda.call("cudaStreamDestroy", self._stream)

    def _copy(self, target: Any, source: Any, size: int, kind: Any) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self._stream)


def _engine(trt: Any, cuda: Cuda, runtime: Any, file: OnnxFile, options: PlanOptions) -> Any:
    """The engine of ``file`` out of the cache, built where it is not there or does not load."""
    version, device = f"{trt.__name__} {trt.__version__}", cuda.describe()

    def build(timings: bytes) -> Plan:
        log.info("Building %s for %s in %s: minutes, once ...", file.path.name, device, version)
        return build_plan(trt, file, options, timings=timings)

    engine = kept_engine(
        private_folder("tensorrt"),
        engine_facts(file, version, device, options),
        machine=f"{version}, {device}",
        fit=lambda engine: refit(trt, engine, file) if options.refit else True,
        load=runtime.deserialize_cuda_engine,
        build=build,
    )
    if engine is None:
        raise ModelError(
            f"{file.path}: {version} built it and cannot load it on {device}. Take --runtime "
            "onnxruntime."
        )
    return engine


def _values(trt: Any, engine: Any) -> tuple[list[Value], list[Value]]:
    """Inputs and outputs of ``engine``."""
    found: dict[Any, list[Value]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    for place in range(engine.num_io_tensors):
        name = engine.get_tensor_name(place)
        shape = [None if size < 0 else size for size in engine.get_tensor_shape(name)]
        value = Value(name, shape, engine.get_tensor_dtype(name).name)
        found[engine.get_tensor_mode(name)].append(value)
    return found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT]
