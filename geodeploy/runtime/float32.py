"""A graph of halves as one of float32. Needs the package onnx."""

from dataclasses import replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from geodeploy.runtime.graph import OnnxFile

_HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def in_float32(model: onnx.ModelProto, *, rounded: bool) -> onnx.ModelProto:
    """``model`` computing in float32; where ``rounded``, each value that was a half is rounded to one.

    Rounded it is what a GPU computes, whose products are summed in float32. Neither ONNX Runtime nor
    OpenVINO tells that on a CPU: they compute float16 in float32 from layer to layer, where nothing
    overflows, and ONNX Runtime has no bfloat16 there. Not rounded it is the next precision up, with
    weights that were halves once.
    """
    types = types_of(model)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    del made.graph.value_info[:]
    for tensor in made.graph.initializer:
        if tensor.data_type in _HALVES:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        added = made.graph.node.add()
        added.CopyFrom(node)
        halves = [name for name in node.output if types.get(name) in _HALVES]
        if rounded:
            for name in halves:
                made.graph.node.extend(_rounding(added, name, types[name]))
        elif halves and node.op_type == "Cast":
            added.CopyFrom(cast(node.input[0], node.output[0], TensorProto.FLOAT))
    return made


def load(file: OnnxFile) -> onnx.ModelProto:
    """The graph in ``file`` with all of its weights."""
    model = onnx.load_from_string(file.content)
    onnx.external_data_helper.load_external_data_for_model(model, str(file.path.parent))
    return model


def widened(file: OnnxFile) -> OnnxFile:
    """``file``, its halves float32."""
    model = in_float32(load(file), rounded=False)
    spec = file.spec.model_copy(update={"precision": "fp32"})
    return replace(file, content=model.SerializeToString(), spec=spec, weights=())


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of each value of the graph."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {tensor.name: tensor.data_type for tensor in graph.initializer} | {
        value.name: value.type.tensor_type.elem_type for value in values
    }


def cast(name: str, other: str, kind: int) -> NodeProto:
    """The node that makes ``other``, of element type ``kind``, of ``name``."""
    return helper.make_node("Cast", [name], [other], name=f"{name} to {other}", to=kind)


def _rounding(node: NodeProto, name: str, kind: int) -> list[NodeProto]:
    """What rounds ``name``; ``node``, which gave it, gives another now."""
    exact, half = f"{name}.exact", f"{name}.half"
    back = cast(half, name, TensorProto.FLOAT)
    back.name = f"of {name}, what {node.op_type} {node.name} gives"
    place = list(node.output).index(name)
    if node.op_type == "Cast":
        node.output[place] = half
        return [back]
    node.output[place] = exact
    return [cast(exact, half, kind), back]
