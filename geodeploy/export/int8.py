"""int8 in a graph: products of whole numbers, and all else in float32.

Static quantisation after training, written as pairs of QuantizeLinear and DequantizeLinear, of which
runtimes make arithmetic of whole numbers. Weights are symmetric, with a scale for each output channel;
what they are multiplied with has one scale, found on real tiles. It is unsigned for ONNX Runtime and
OpenVINO on CPUs, and signed, with 0 for 0, for TensorRT, which has no other; there biases are float32.
The layers by which it moves the outputs most are put back to float32, as many as it takes; that of the
logits never left.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from geodeploy.export.half import last_layers
from geodeploy.export.smooth import norms_of, smooth
from geodeploy.export.steps import Range, steps_of, weights_in_int8
from geodeploy.export.threads import tiles_at_once, workers
from geodeploy.export.values import values_of
from geodeploy.runtime.graph import to_graph
from geodeploy.spec import ModelSpec

log = logging.getLogger(__name__)

INT8 = ("int8", "int8-tensorrt")
"""The precisions that are written here."""

_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_TOKENS = {"Flatten", "Reshape", "Transpose"}
_TRIED = 2
"""Tiles that tell how far a layer by itself moves the outputs: there are many layers."""
_TOLD = 16
"""After so many layers the log says how far it is."""

Tiles = Sequence[NDArray[np.float32]]
"""As the graph takes them."""
Holds = Callable[[NDArray[np.float32], NDArray[np.float32]], bool]
"""Whether outputs in int8 (second) are near enough to those in float32 (first)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A product of values with weights."""

    output: str
    """The name of what it gives."""
    drift: float | None = None
    """How far int8 in this layer alone moves the model's outputs: root mean square of the difference,
    over that of the outputs. None where nothing had to be put back."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """What became of the products of a graph."""

    int8: tuple[Layer, ...]
    float32: tuple[Layer, ...]
    """Those put back, the one that moved the outputs most first."""


def write_int8(path: Path, spec: ModelSpec, pixels: NDArray[np.float32], holds: Holds) -> Quantised:
    """Make the float32 graph in ``path`` compute in int8, as far as that ``holds``.

    Ranges are taken from ``pixels`` (N, C, tile, tile), real tiles in the spec's units; on them it is
    also seen which layers have to stay float32.
    """
    model, signed = onnx.load(path), spec.precision == "int8-tensorrt"
    tiles = to_graph(pixels, spec, 1)
    layers = layers_of(model)
    ranges, expected = calibrate(model, layers, tiles, signed=signed)

    def made(without: Collection[Layer]) -> onnx.ModelProto:
        taken = [layer for layer in layers if layer not in without]
        return quantise(model, taken, ranges, signed=signed)

    def good(without: Collection[Layer]) -> bool:
        return holds(expected, _outputs(made(without), tiles))

    kept: list[Layer] = []
    if not good(kept):
        log.info("Trying int8 in each of %d layers by itself ...", len(layers))
        # Not by how much of its own values a layer loses: little of them may be what counts.
        few = tiles[:_TRIED]
        tried = []
        for number, layer in enumerate(layers, 1):
            found = _outputs(quantise(model, [layer], ranges, signed=signed), few)
            tried.append(replace(layer, drift=_drift(expected[:_TRIED], found)))
            if number % _TOLD == 0:
                log.info("Tried %d of %d layers.", number, len(layers))
        layers = tried
        worst = sorted(layers, key=lambda layer: layer.drift or 0.0, reverse=True)
        kept = worst[: _fewest(len(worst), lambda number: good(worst[:number]))]
    onnx.save(made(kept), path)
    return Quantised(tuple(layer for layer in layers if layer not in kept), tuple(kept))


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """The products that int8 can take over, in the graph's order."""
    graph = model.graph
    weights = {item.name: item for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    last = last_layers(graph)
    return [
        Layer(node.output[0])
        for place, node in enumerate(graph.node)
        if node.op_type in _PRODUCTS
        and place not in last
        and node.input[0] not in weights
        and node.input[1] in weights
        and (node.op_type != "MatMul" or len(weights[node.input[1]].dims) == 2)
        and not (node.op_type == "Gemm" and any(a.name != "transB" for a in node.attribute))
    ]


def quantise(
    model: onnx.ModelProto, layers: Sequence[Layer], ranges: Mapping[str, Range], *, signed: bool
) -> onnx.ModelProto:
    """A copy of ``model`` with ``layers`` in int8."""
    users = _users(model.graph)
    taken = {layer.output for layer in layers}
    left = {layer.output for layer in layers_of(model)} - taken
    writer = _Writer(model, ranges, signed=signed)
    ends = {_end(node, users) for node in model.graph.node if node.output[0] in taken}
    ends -= {node.input[0] for node in model.graph.node if node.output[0] in left}  # to help those
    rounded: dict[str, str] = {}
    for node in model.graph.node:
        added = writer.in_int8(node) if node.output[0] in taken else _copy(node)
        for place, name in enumerate(added.input):
            added.input[place] = rounded.get(name, name)
        writer.nodes.append(added)
        for given in node.output:
            if given in ends:
                rounded[given] = writer.rounded(given)
    return writer.written()


class _Writer:
    """A graph on its way to int8."""

    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, Range], *, signed: bool) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.ranges = ranges
        self.signed = signed
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.made: dict[str, str] = {}

    def rounded(self, name: str) -> str:
        """The name under which ``name`` is found rounded to one of 256 numbers."""
        if name not in self.made:
            step, zero = steps_of(*self.ranges[name], signed=self.signed)
            self._add(f"{name}.step", np.array(step, np.float32))
            self._add(f"{name}.zero", np.array(zero))
            given, self.made[name] = f"{name}.{zero.dtype}", f"{name}.rounded"
            for kind, taken, made in (
                ("QuantizeLinear", name, given),
                ("DequantizeLinear", given, self.made[name]),
            ):
                inputs = [taken, f"{name}.step", f"{name}.zero"]
                self.nodes.append(helper.make_node(kind, inputs, [made], name=f"{kind} {name}"))
        return self.made[name]

    def in_int8(self, node: NodeProto) -> NodeProto:
        """``node`` with inputs that were rounded before."""
        made, axis = _copy(node), _channel_axis(node)
        values = numpy_helper.to_array(self.weights[node.input[1]])
        step, _ = steps_of(*self.ranges[node.input[0]], signed=self.signed)
        bias = None
        if len(node.input) > 2 and node.input[2] and not self.signed:
            bias = numpy_helper.to_array(self.weights[node.input[2]]).astype(np.float64)
        whole, steps = weights_in_int8(values, axis, bias, float(step))
        made.input[0] = self.rounded(node.input[0])
        made.input[1] = self._restored(f"{node.output[0]}.weight", whole, steps, axis)
        if bias is not None:
            steps = steps * np.float32(step)
            sums = np.rint(bias / steps).astype(np.int32)
            made.input[2] = self._restored(f"{node.output[0]}.bias", sums, steps, 0)
        return made

    def _restored(self, name: str, whole: NDArray[Any], steps: NDArray[np.float32], axis: int) -> str:
        self._add(f"{name}.{whole.dtype}", whole)
        self._add(f"{name}.step", steps)
        self._add(f"{name}.zero", np.zeros(len(steps), whole.dtype))
        inputs = [f"{name}.{whole.dtype}", f"{name}.step", f"{name}.zero"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=axis))
        return name

    def _add(self, name: str, values: NDArray[Any]) -> None:
        self.weights[name] = numpy_helper.from_array(values, name)

    def written(self) -> onnx.ModelProto:
        graph = self.model.graph
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in used)
        return self.model


# What the tiles tell -----------------------------------------------------------------------------


def calibrate(
    model: onnx.ModelProto, layers: Sequence[Layer], tiles: Tiles, *, signed: bool
) -> tuple[dict[str, Range], NDArray[np.float32]]:
    """The ranges of what ``layers`` take and give, and the outputs; norms of ``model`` are smoothed."""
    graph, users = model.graph, _users(model.graph)
    nodes = {name: node for node in graph.node for name in node.output}
    products = [nodes[layer.output] for layer in layers]
    norms = norms_of(graph, products, users)
    asked = {node.input[0] for node in products} | {
        end for node in products if (end := _end(node, users))
    }
    compute = values_of(model, asked)
    reached: dict[str, list[float]] = defaultdict(lambda: [0.0])
    tokens: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    outputs = []
    for tile in tiles:
        found = compute(tile)
        outputs.append(found[graph.output[0].name])
        for name in asked:
            if name in norms:
                tokens[name].append(found[name].reshape(-1, found[name].shape[-1]))
            else:
                reached[name] += [float(found[name].min()), float(found[name].max())]
    for name, taking in norms.items():
        smoothed = smooth(graph, nodes[name], taking, np.concatenate(tokens[name]), signed=signed)
        reached[taking[0].input[0]] += [float(smoothed.min()), float(smoothed.max())]
    return {name: (min(ends), max(ends)) for name, ends in reached.items()}, np.concatenate(outputs)


def _drift(exact: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    apart = np.square(found.astype(np.float64) - exact).sum()
    return float(np.sqrt(apart / max(np.square(exact.astype(np.float64)).sum(), 1e-30)))


def _outputs(model: onnx.ModelProto, tiles: Tiles) -> NDArray[np.float32]:
    compute = values_of(model, ())
    (output,) = model.graph.output
    with workers(tiles_at_once()) as pool:
        return np.concatenate([found[output.name] for found in pool.map(compute, tiles)])


def _fewest(most: int, good: Callable[[int], bool]) -> int:
    """The least number above 0 that is good, where all larger ones are; ``most`` is not tried."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


# Nodes -------------------------------------------------------------------------------------------


def _channel_axis(node: NodeProto) -> int:
    """The axis of a product's weights along which its outputs lie."""
    if node.op_type == "Gemm":
        return 0 if any(item.name == "transB" and item.i for item in node.attribute) else 1
    return 1 if node.op_type == "MatMul" else 0


def _users(graph: onnx.GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes that take each value."""
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            users[name].append(node)
    return users


def _end(node: NodeProto, users: Mapping[str, list[NodeProto]]) -> str | None:
    """Where what a convolution gives is rounded: ONNX Runtime sums whole numbers only then."""
    name: str = node.output[0]
    if node.op_type != "Conv" or any(user.op_type in _TOKENS for user in users[name]):
        return None
    if [user.op_type for user in users[name]] == ["Relu"]:
        (name,) = users[name][0].output
    return name


def _copy(node: NodeProto) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    return made
