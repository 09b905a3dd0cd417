"""Where an exported graph leaves the model that it was made of: the first of its values that drifts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from geodeploy.export.program import onnx_program
from geodeploy.export.values import Arrays, values_of
from geodeploy.runtime.float32 import load
from geodeploy.runtime.graph import OnnxFile, to_graph
from geodeploy.spec import ModelSpec


class Drift(BaseModel):
    """A value of a graph that is not what PyTorch computes."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    value: str
    """Its name in the graph."""
    node: str
    """Type and name of the node that gives it."""
    module: str
    """The part of the PyTorch model that it was made of: its name there, or the kind of the whole."""
    relative_diff: float | None
    """Its largest difference over the reference's largest number; None where it has none."""

    @property
    def size(self) -> float:
        """The same, infinite where there is none."""
        return float("inf") if self.relative_diff is None else self.relative_diff

    def __str__(self) -> str:
        far = (
            "of another shape, NaN or infinite"
            if self.relative_diff is None
            else f"by {self.relative_diff:.2g}"
        )
        return (
            f"{self.value} ({self.node}), made of {self.module}, is the first value that drifts: {far}"
        )


class Bisection(BaseModel):
    """A graph beside PyTorch, value by value."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    runtime: str
    tolerance: float
    """Of a value's largest difference over the reference's largest number."""
    compared: int
    """Values that both have, by their names."""
    first_drift: Drift | None
    """None where all lie within the tolerance."""
    largest: Drift | None
    """The value that is furthest off; None where none could be compared."""

    def __str__(self) -> str:
        if self.largest is None:
            return f"{self.runtime}: no value of the graph has a name that our exporter gives"
        if self.first_drift:
            return f"{self.runtime}: {self.first_drift} (more than {self.tolerance:g})"
        return (
            f"{self.runtime}: none of {self.compared} values drifts by more than {self.tolerance:g}; "
            f"{self.largest.value} ({self.largest.node}), made of {self.largest.module}, is furthest "
            f"off, by {self.largest.size:.2g}"
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """What PyTorch computes between pixels and outputs, by the names that the graph has for it."""

    arrays: Arrays
    modules: Mapping[str, str]


def reference_values(model: nn.Module, spec: ModelSpec, pixels: NDArray[np.float32]) -> Reference:
    """All that ``model`` computes of ``pixels`` (B, C, tile, tile), in the spec's units."""
    program = onnx_program(model, spec).exported_program
    assert program is not None
    (output,) = program.graph_signature.user_outputs
    recorder = _Recorder(program.module())
    with torch.inference_mode():
        recorder.run(*map(torch.from_numpy, to_graph(pixels, spec, None)))
    names = {name: spec.output if name == output else name for name in recorder.arrays}
    return Reference(
        arrays={names[name]: array for name, array in recorder.arrays.items()},
        modules={names[node.name]: _module(node) for node in program.graph.nodes if node.name in names},
    )


def first_drift(
    reference: Reference,
    file: OnnxFile,
    pixels: NDArray[np.float32],
    *,
    runtime: str = "onnxruntime",
    tolerance: float,
) -> Drift | None:
    """The first value of the graph in ``file`` that is further from ``reference`` than ``tolerance``.

    Values are known by the names that our exporter gives; of a graph that has none of them, and of one
    in which nothing drifts, there is nothing to tell.
    """
    return bisect(reference, file, pixels, runtime=runtime, tolerance=tolerance).first_drift


def bisect(
    reference: Reference,
    file: OnnxFile,
    pixels: NDArray[np.float32],
    *,
    runtime: str = "onnxruntime",
    tolerance: float,
) -> Bisection:
    """How far the values of the graph in ``file`` are from ``reference``, in their order."""
    model = load(file)
    known = {
        name: node
        for node in model.graph.node  # each after those that it needs
        for name in node.output
        if name in reference.arrays
    }
    (feed,) = to_graph(pixels, file.spec, None)
    found = values_of(model, known, runtime=runtime)(feed)
    drifts = [
        Drift(
            value=name,
            node=f"{node.op_type} {node.name}".strip(),
            module=reference.modules[name],
            relative_diff=_relative_diff(found[name], reference.arrays[name]),
        )
        for name, node in known.items()
    ]
    return Bisection(
        runtime=runtime,
        tolerance=tolerance,
        compared=len(drifts),
        first_drift=next((drift for drift in drifts if drift.size > tolerance), None),
        largest=max(drifts, key=lambda drift: drift.size, default=None),
    )


class _Recorder(torch.fx.Interpreter):
    """Runs a program and keeps every array of floats that it computes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.arrays: Arrays = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            self.arrays[n.name] = result.numpy().copy()
        return result


def _module(node: torch.fx.Node) -> str:
    """The innermost module that ``node`` was traced in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "the model itself")}
    path, kind = list(stack.values())[-1]
    return str(path) or str(kind).rpartition(".")[-1]


def _relative_diff(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float | None:
    if found.shape != expected.shape:
        return None
    if not found.size:
        return 0.0
    difference = np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12)
    return float(difference) if np.isfinite(difference) else None
