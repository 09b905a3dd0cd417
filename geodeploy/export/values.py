"""What a graph computes between its input and its output, value by value."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
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
_Run = Callable[[Mapping[str, NDArray[np.float32]]], Arrays]
"""From all that a graph takes, by name."""


def values_of(model: onnx.ModelProto, names: Iterable[str], *, runtime: str = "onnxruntime") -> Compute:
    """What computes the values ``names`` of the graph, and its outputs."""
    compute = _COMPILE[runtime](_telling(model, names))
    (pixels,) = model.graph.input
    return lambda tiles: compute({pixels.name: tiles})


def values_apart(model: onnx.ModelProto, given: Arrays, *, runtime: str = "onnxruntime") -> Compute:
    """What computes the values ``given`` too, each from the others as they are given.

    So what is wrong with one of them does not reach the next.
    """
    cut = _telling(model, given)
    for node in cut.graph.node:
        for place, name in enumerate(node.input):
            if name in given:
                node.input[place] = f"{name}.given"
    del cut.graph.value_info[:]
    (pixels,) = model.graph.input
    taken = {name for node in cut.graph.node for name in node.input}
    feed = {f"{name}.given": array for name, array in given.items() if f"{name}.given" in taken}
    cut.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
        for name, array in feed.items()
    )
    compute = _COMPILE[runtime](cut)
    return lambda tiles: compute({pixels.name: tiles, **feed})


def _telling(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of ``model`` with the values ``names`` among its outputs."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    outputs = {output.name for output in told.graph.output}
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    return told


def _in_onnxruntime(model: onnx.ModelProto) -> _Run:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1  # ranges and reports must not depend on the number of cores
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def _in_openvino(model: onnx.ModelProto, *, bf16: bool = False) -> _Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        graph = read_graph(path)
        settings = {**arithmetic(bf16=bf16), "INFERENCE_NUM_THREADS": 1}
        compiled = import_openvino().Core().compile_model(graph, "CPU", settings)

    def compute(feed: Mapping[str, NDArray[np.float32]]) -> Arrays:
        found = compiled(dict(feed))
        return {name: found[output] for output in compiled.outputs for name in output.get_names()}

    return compute


_COMPILE: dict[str, Callable[[onnx.ModelProto], _Run]] = {
    "onnxruntime": _in_onnxruntime,
    OPENVINO: _in_openvino,
    IN_BF16: partial(_in_openvino, bf16=True),
}
