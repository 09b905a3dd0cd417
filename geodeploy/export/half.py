"""Half precision in a graph: products in it, what needs digits or range in float32.

The rule is that of `torch.autocast`: convolutions and matrix products take and give halves; what only
moves values or treats each by itself follows its inputs, and is float32 where one of them is;
normalisation, softmax, logarithms, linear resizing and all else are float32. So a transformer's sums
over its blocks stay float32, and so do the pixels up to the first convolution. Beyond that rule,
the layer that gives the logits is float32 (a half near 100 goes in steps of 1/16), and so is what
real tiles bring near the largest number of float16.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from geodeploy.export.values import values_of
from geodeploy.runtime.float32 import cast, types_of
from geodeploy.runtime.graph import to_graph
from geodeploy.spec import ModelSpec

log = logging.getLogger(__name__)

_TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16), 65504.0),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 3.38e38),
}
"""The element type in ONNX and in numpy, and its largest number."""
HALVES = tuple(_TYPES)
"""The names of the precisions."""

_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FOLLOWING = {
    "Add", "AveragePool", "Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather",
    "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mul", "Neg", "PRelu",
    "Pad", "Relu", "Reshape", "Sigmoid", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Tanh",
    "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
_OF_ANY_TYPE = {"Shape", "Size"}

_BATCH = 4
_HEADROOM = 8
"""What other scenes may exceed the RUN's tiles by before float16 overflows."""


def write_half(path: Path, spec: ModelSpec, pixels: NDArray[np.float32]) -> None:
    """Make the float32 graph in ``path`` compute in ``spec.precision``, its input and output float32.

    Ranges are taken from ``pixels`` (N, C, tile, tile), real tiles in the spec's units.
    """
    model = onnx.load(path)
    largest = _largest(model, spec, pixels) if spec.precision == "fp16" else {}
    kept = halve(model, spec.precision, largest)
    if kept:
        log.info(
            "%d nodes stay float32, for float16 ends at 65504 and %s reaches %.3g on real tiles.",
            len(kept),
            *max(kept.items(), key=lambda item: item[1]),
        )
    onnx.save(model, path)


def halve(model: onnx.ModelProto, precision: str, largest: Mapping[str, float]) -> dict[str, float]:
    """Make ``model`` compute in ``precision``; say which nodes are not for their range, and that.

    ``largest`` has the largest absolute numbers that values take.
    """
    halving = _Halving(model, precision, largest)
    halving.run()
    return halving.kept


class _Halving:
    """A graph on its way to half precision."""

    def __init__(self, model: onnx.ModelProto, precision: str, largest: Mapping[str, float]) -> None:
        self.graph = model.graph
        self.precision = precision
        self.kind, self.dtype, end = _TYPES[precision]
        self.limit = end / _HEADROOM
        self.types = types_of(model)
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.largest = {
            name: float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
            for name, tensor in self.weights.items()
            if tensor.data_type == TensorProto.FLOAT
        } | dict(largest)
        self.last = last_layers(self.graph)
        self.halves: set[str] = set()
        self.made: dict[tuple[str, bool], str] = {}
        self.nodes: list[NodeProto] = []
        self.kept: dict[str, float] = {}

    def run(self) -> None:
        for place, node in enumerate(self.graph.node):
            if node.op_type not in _OF_ANY_TYPE:
                in_half = place not in self.last and self._gains(node) and self._fits(node)
                for position in self._data(node):
                    node.input[position] = self._as(node.input[position], half=in_half)
                if in_half:
                    self.halves |= set(node.output)
            self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        weights = [tensor for name, tensor in self.weights.items() if name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(weights)
        for value in self.graph.value_info:
            if value.name in self.halves:
                value.type.tensor_type.elem_type = self.kind

    def _data(self, node: NodeProto) -> list[int]:
        """The positions of the floats that ``node`` computes with."""
        inputs = node.input[:1] if node.op_type == "Resize" else node.input  # the rest are scales
        return [place for place, name in enumerate(inputs) if self.types.get(name) == TensorProto.FLOAT]

    def _gains(self, node: NodeProto) -> bool:
        if node.op_type in _PRODUCTS:
            return True
        if node.op_type not in _FOLLOWING and not _is_nearest(node):
            return False
        # A bias, a scale: weights of one axis at most go with what they are added to.
        heard = [
            name
            for name in (node.input[place] for place in self._data(node))
            if name not in self.weights or len(self.weights[name].dims) > 1
        ]
        return bool(heard) and self.halves.issuperset(heard)

    def _fits(self, node: NodeProto) -> bool:
        names = [*(node.input[place] for place in self._data(node)), *node.output]
        reach = max(self.largest.get(name, 0.0) for name in names)
        if reach <= self.limit:
            return True
        self.kept[node.name or node.output[0]] = reach
        return False

    def _as(self, name: str, *, half: bool) -> str:
        """The name under which ``name`` is found in half precision, or in float32."""
        if half == (name in self.halves):
            return name
        if (name, half) not in self.made:
            other = f"{name}.{self.precision if half else 'fp32'}"
            self.made[name, half] = other
            kind = self.kind if half else TensorProto.FLOAT
            if name in self.weights:
                self.weights[other] = self._halved(self.weights[name], other)
            else:
                self.nodes.append(cast(name, other, kind))
        return self.made[name, half]

    def _halved(self, tensor: TensorProto, name: str) -> TensorProto:
        values = numpy_helper.to_array(tensor).astype(self.dtype)
        return helper.make_tensor(name, self.kind, values.shape, values.tobytes(), raw=True)


def _largest(model: onnx.ModelProto, spec: ModelSpec, pixels: NDArray[np.float32]) -> dict[str, float]:
    """The largest absolute number that each float value of the graph takes on ``pixels``."""
    types = types_of(model)
    names = [
        name
        for node in model.graph.node
        for name in node.output
        if types.get(name) == TensorProto.FLOAT
    ]
    # Taken inside the graph: all of its values at once would be gigabytes.
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    for name in names:
        size, reach = f"{name}.size", f"{name}.reach"
        asked.graph.node.append(helper.make_node("Abs", [name], [size]))
        asked.graph.node.append(helper.make_node("ReduceMax", [size], [reach], keepdims=0))
    compute = values_of(asked, [f"{name}.reach" for name in names])
    parts = [compute(tiles) for tiles in to_graph(pixels, spec, min(len(pixels), _BATCH))]
    return {name: float(max(part[f"{name}.reach"] for part in parts)) for name in names}


def last_layers(graph: onnx.GraphProto) -> set[int]:
    """The nodes that an output needs, back to the first product."""
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output}
    found: set[int] = set()
    waiting = [output.name for output in graph.output]
    while waiting:
        place = makers.get(waiting.pop())
        if place is not None and place not in found:
            found.add(place)
            if graph.node[place].op_type not in _PRODUCTS:
                waiting.extend(graph.node[place].input)
    return found


def _is_nearest(node: NodeProto) -> bool:
    """Whether ``node`` resizes and makes no new numbers."""
    modes = [helper.get_attribute_value(item) for item in node.attribute if item.name == "mode"]
    return node.op_type == "Resize" and modes in ([], [b"nearest"])
