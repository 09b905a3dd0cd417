"""Run an ONNX file with OpenVINO, on the CPU."""

import json
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import (
    DeviceError,
    GeodeployError,
    ModelError,
    check_memory,
    first_line,
    missing_extra,
)
from geodeploy.machine import private_folder, usable_cores
from geodeploy.runtime.engines import kept_engine
from geodeploy.runtime.graph import (
    OnnxFile,
    Value,
    check_outputs,
    check_signature,
    from_graph,
    input_shape,
    to_graph,
)
from geodeploy.runtime.plan import Plan
from geodeploy.runtime.streams import TILES, Streams

OPENVINO, IN_BF16 = "openvino", "openvino-bf16"
"""Names of the runtime, computing in float32 and, where the processor has it, in bfloat16."""
MAY_TAKE_BF16 = ("bf16", "int8")
"""Precisions of files of which the rest, or all, may be computed in bfloat16."""

CACHE = "GEODEPLOY_OPENVINO_CACHE"
"""Set to 1, compiled models are kept between runs: an int8 model loads in two thirds of the time, any
other hardly faster. A copy of all weights is kept for each model, number of threads and of streams."""


class OpenVinoSession:
    """An ONNX model in OpenVINO. See `geodeploy.runtime.Session`.

    The graph is compiled for one tile (or for the batch that it fixes itself), and a stream of its own
    works on each: threads that need not wait for one another inside a layer take less time, and what
    comes of a tile cannot depend on what else is in its batch. With ``bf16`` all that is not int8 is
    computed in bfloat16, which the processor must have (`has_bf16`). Threads are shared out among
    ``batch`` tiles; any number run.
    """

    device = "cpu"

    def __init__(
        self,
        file: OnnxFile,
        *,
        threads: int | None,
        bf16: bool = False,
        batch: int | None = None,
    ) -> None:
        ov = import_openvino()
        version = ov.__version__.partition("-")[0]
        threads = threads or usable_cores()
        try:
            graph = read_graph(file.path)
        except Exception as error:  # OpenVINO's errors share no base but Exception
            raise ModelError(
                f"{file.path} is not an ONNX model that OpenVINO {version} can load "
                f"({_reason(error)}). Take --runtime onnxruntime, or check that the file is whole."
            ) from error
        self.sha256 = file.sha256
        signature = check_signature(file, _values(graph.inputs), _values(graph.outputs), float32="f32")
        self._batch = signature.batch or 1
        self._streams = Streams(threads, batch or TILES, self._batch)
        self.streams = self._streams.number
        try:
            graph.reshape([self._batch, *input_shape(file.spec)])
            compiled = _compile(
                ov,
                graph,
                {
                    **arithmetic(bf16=bf16),
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": self.streams,
                },
                self.sha256,
            )
        except GeodeployError:
            raise
        except Exception as error:
            raise ModelError(
                f"{file.path}: OpenVINO {version} cannot run it on tiles of {file.spec.tile} pixels "
                f"({_reason(error)}). Check the tile in its description, or take --runtime onnxruntime."
            ) from error
        self.spec = file.spec
        self.name = f"{IN_BF16 if bf16 else OPENVINO} {version}"
        self.precision = file.spec.precision
        self._model = file.path
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self.streams):
            self._idle.put(compiled.create_infer_request())

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        parts = to_graph(pixels, self.spec, self._batch)
        found = self._streams.each(self._one_by_one, self._streams.shares(parts))
        return from_graph([outputs for share in found for outputs in share], self.spec, len(pixels))

    def _one_by_one(self, parts: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Outputs of each of ``parts``, both as the graph has them; checked."""
        request = self._idle.get()
        try:
            found = []
            for part in parts:
                request.infer([part], share_inputs=True)
                found.append(request.get_output_tensor(0).data.copy())
        except Exception as error:
            check_memory(error)
            raise ModelError(
                f"{self._model}: {self.name} could not run it on {list(parts[0].shape)} "
                f"({_reason(error)}). Take --runtime onnxruntime."
            ) from error
        finally:
            self._idle.put(request)
        check_outputs(self._model, self.spec, parts[0], found[0])
        return found

    def close(self) -> None:
        """Give back the memory."""
        self._streams.close()
        del self._idle


def _compile(ov: Any, graph: Any, properties: Mapping[str, Any], digest: str) -> Any:
    """``graph``, made of the file with that ``digest``, compiled; or as it was by an earlier run.

    By our own cache: of OpenVINO's nobody looks at the content, and with one byte changed it gave other
    logits without a word.
    """
    core = ov.Core()
    if os.environ.get(CACHE, "0") == "0":
        return core.compile_model(graph, "CPU", properties)
    processor = core.get_property("CPU", "FULL_DEVICE_NAME")
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    facts = {
        "model": digest,
        "runtime": f"openvino {ov.__version__}",
        "device": f"{processor}, {', '.join(sorted(able))}",
        "options": json.dumps({**properties, "batch": list(map(str, graph.inputs[0].partial_shape))}),
    }

    def build(_: bytes) -> Plan:
        return Plan(core.compile_model(graph, "CPU", properties).export_model().getvalue(), b"")

    def load(content: bytes) -> Any:
        try:
            return core.import_model(BytesIO(content), "CPU", properties)
        except RuntimeError:  # of a plugin that is another one after all
            return None

    compiled = kept_engine(
        private_folder("openvino"), facts, machine="", load=load, fit=lambda _: True, build=build
    )
    return core.compile_model(graph, "CPU", properties) if compiled is None else compiled


def import_openvino() -> Any:
    """The package, or the error that names the extra which brings it."""
    try:
        import openvino
    except ImportError as error:
        raise missing_extra("cpu", "openvino") from error
    if not hasattr(openvino, "Core"):
        raise DeviceError(
            "openvino is installed but broken: pip install --force-reinstall 'geodeploy-eo[cpu]', or "
            "take --runtime onnxruntime."
        )
    return openvino


def has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def arithmetic(*, bf16: bool) -> dict[str, str]:
    """The properties that say what OpenVINO computes in: without them it goes by the processor."""
    return {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


def read_graph(model: Path) -> Any:
    """The ONNX file ``model`` as OpenVINO's graph, in float32 where the file is in bfloat16."""
    # By its path: of bytes OpenVINO would read external weights from anywhere, and not only ONNX.
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    graph = frontend.convert(frontend.load(str(model)))
    _widen(graph)
    return graph


def _widen(graph: Any) -> None:
    """Make what is bfloat16 in ``graph`` float32.

    Else a processor that has bfloat16 would take it whatever it is told, and between layers convert
    from and to float32, which costs a quarter of the time.
    """
    from openvino import Type, opset13

    for node in graph.get_ordered_ops():
        if not node.get_output_size() or node.get_output_element_type(0) != Type.bf16:
            continue
        if node.get_type_name() == "Constant":
            values = opset13.constant(node.get_data(dtype=np.float32))
            node.output(0).replace(values.output(0))
        elif node.get_type_name() == "Convert":
            taken = node.input_value(0)
            if taken.get_element_type() != Type.f32:  # a mask, a number of something
                taken = opset13.convert(taken, "f32").output(0)
            node.output(0).replace(taken)
    graph.validate_nodes_and_infer_types()


def _values(nodes: Any) -> list[Value]:
    return [
        Value(
            node.get_any_name(),
            [None if size.is_dynamic else size.get_length() for size in node.get_partial_shape()],
            node.get_element_type().get_type_name(),
        )
        for node in nodes
    ]


def _reason(error: Exception) -> str:
    """OpenVINO's messages tell where in its source; what is wrong comes last, before advice."""
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    told = [line for line in lines if not line.startswith("To facilitate")]
    return first_line(ModelError(told[-1].lstrip("- "))) if told else first_line(error)
