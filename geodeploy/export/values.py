"""What a graph computes between its input and its output, value by value."""

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from geodeploy.runtime.onnx import import_onnxruntime
from geodeploy.runtime.openvino import IN_BF16, OPENVINO, arithmetic, import_openvino, read_graph

Arrays = dict[str, NDArray[np.float32]]
Compute = Callable[[NDArray[np.float32]], Arrays]
"""From pixels, as a graph takes them, to its values by their names."""


def values_of(model: onnx.ModelProto, names: Iterable[str], *, runtime: str = "onnxruntime") -> Compute:
    """What computes the values ``names`` of the graph, and its outputs."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    outputs = {output.name for output in told.graph.output}
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    return _COMPILE[runtime](told)


def _in_onnxruntime(model: onnx.ModelProto) -> Compute:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (pixels,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    return lambda tiles: dict(zip(names, session.run(names, {pixels.name: tiles}), strict=True))


def _in_openvino(model: onnx.ModelProto, *, bf16: bool = False) -> Compute:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        graph = read_graph(path)
        compiled = import_openvino().Core().compile_model(graph, "CPU", arithmetic(bf16=bf16))

    def compute(tiles: NDArray[np.float32]) -> Arrays:
        found = compiled([tiles])
        return {name: found[output] for output in compiled.outputs for name in output.get_names()}

    return compute


_COMPILE: dict[str, Callable[[onnx.ModelProto], Compute]] = {
    "onnxruntime": _in_onnxruntime,
    OPENVINO: _in_openvino,
    IN_BF16: partial(_in_openvino, bf16=True),
}
