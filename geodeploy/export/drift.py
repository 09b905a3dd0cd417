"""Where an exported graph leaves the model that it was made of: the first of its values that drifts.

A value is judged by what it is off by itself: computed from what PyTorch has for the values before it.
Else a sound model of halves or int8, whose rounding adds up from layer to layer, could not be told
from one with a fault, nor a layer with a fault from the one before, where the sum became too large.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from geodeploy.export.program import onnx_program
from geodeploy.export.values import Arrays, values_apart, values_of
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
    relative_rms: float | None
    """Root mean square of its difference over that of the reference, where the values before it are
    those of the reference; None where it has none."""

    @property
    def size(self) -> float:
        """The same, infinite where there is none."""
        return float("inf") if self.relative_rms is None else self.relative_rms

    def __str__(self) -> str:
        far = (
            "of another shape, NaN or infinite"
            if self.relative_rms is None
            else f"by {self.relative_rms:.2g} of itself"
        )
        return (
            f"{self.value} ({self.node}), made of {self.module}, is the first value that drifts: {far}"
        )


class Bisection(BaseModel):
    """A graph beside PyTorch, value by value."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    runtime: str
    tolerance: float | None
    """Of a `Drift.relative_rms`; None where the outputs hold, so that there is no fault to find."""
    compared: int
    """Values that both have, by their names."""
    problem: str | None = None
    """Why the outputs do not hold; None if they do."""
    first_drift: Drift | None
    """None where all lie within the tolerance."""
    largest: Drift | None
    """The value that is furthest off; None where none could be compared."""

    def __str__(self) -> str:
        if self.largest is None:
            return f"{self.runtime}: no value of the graph has a name that our exporter gives"
        if self.first_drift:
            return f"{self.runtime}: {self.first_drift} (more than {self.tolerance:g})"
        found = (
            f"the outputs hold; of {self.compared} values"
            if self.tolerance is None
            else f"none of {self.compared} values drifts by more than {self.tolerance:g} by itself;"
        )
        problem = f"{self.problem}, but " if self.problem else ""
        return (
            f"{self.runtime}: {problem}{found} {self.largest.value} ({self.largest.node}), made of "
            f"{self.largest.module}, is furthest off, by {self.largest.size:.2g} of itself"
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """What PyTorch computes between pixels and outputs, by the names that the graph has for it."""

    arrays: Arrays
    modules: Mapping[str, str]


def reference_of(model: nn.Module, spec: ModelSpec) -> Callable[[NDArray[np.float32]], Reference]:
    """What tells all that ``model`` computes of pixels (B, C, tile, tile), in the spec's units."""
    program = onnx_program(model, spec).exported_program
    assert program is not None
    (output,) = program.graph_signature.user_outputs
    module = program.module()

    def reference(pixels: NDArray[np.float32]) -> Reference:
        recorder = _Recorder(module)
        with torch.inference_mode():
            recorder.run(*map(torch.from_numpy, to_graph(pixels, spec, None)))
        names = {name: spec.output if name == output else name for name in recorder.arrays}
        return Reference(
            arrays={names[name]: array for name, array in recorder.arrays.items()},
            modules={
                names[node.name]: _module(node) for node in program.graph.nodes if node.name in names
            },
        )

    return reference


def bisect(
    reference: Reference,
    file: OnnxFile,
    pixels: NDArray[np.float32],
    *,
    runtime: str = "onnxruntime",
    tolerance: float | None,
    problem: str | None = None,
) -> Bisection:
    """How far the values of the graph in ``file`` are from ``reference`` by themselves, in their order.

    Values are known by the names that our exporter gives. The first that is off by more than
    ``tolerance`` is told; nothing is with None. ``problem`` says what is wrong with the outputs.
    """
    model = load(file)
    known = {
        name: node
        for node in model.graph.node  # each after those that it needs
        for name in node.output
        if name in reference.arrays
    }
    (feed,) = to_graph(pixels, file.spec, None)
    expected = {name: reference.arrays[name] for name in known}
    found = values_of(model, known, runtime=runtime)(feed)
    if all(found[name].shape == array.shape for name, array in expected.items()):
        found = values_apart(model, expected, runtime=runtime)(feed)
    drifts = [
        Drift(
            value=name,
            node=f"{node.op_type} {node.name}".strip(),
            module=reference.modules[name],
            relative_rms=_relative_rms(found[name], expected[name]),
        )
        for name, node in known.items()
    ]
    too_far = (drift for drift in drifts if tolerance is not None and drift.size > tolerance)
    return Bisection(
        runtime=runtime,
        tolerance=tolerance,
        compared=len(drifts),
        problem=problem,
        first_drift=next(too_far, None),
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


def _relative_rms(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float | None:
    if found.shape != expected.shape:
        return None
    if not found.size:
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # told as None
        apart = np.square(found.astype(np.float64) - expected).mean()
    relative = np.sqrt(apart / max(np.square(expected.astype(np.float64)).mean(), 1e-24))
    return float(relative) if np.isfinite(relative) else None
