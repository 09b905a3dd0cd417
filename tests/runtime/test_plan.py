"""TensorRT for RTX builds each exported precision without a GPU, by the builder's own code.

In a process of its own: on a graph that it does not support it may end the process.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
from onnx import helper
from torch import Tensor, nn

from geodeploy.export import export
from geodeploy.export.options import ExportOptions
from geodeploy.export.program import onnx_program
from geodeploy.spec import METADATA_KEY, ModelSpec, Precision
from geodeploy.train.deformable import DeformableAttention

MakeModel = Callable[..., Any]
BUILD = """
import json, sys
from pathlib import Path
from geodeploy.errors import ModelError
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.plan import PlanOptions, build_plan, import_tensorrt
trt = import_tensorrt()
for model in sys.argv[1:]:
    try:
        plan = build_plan(trt, read_onnx(Path(model)), PlanOptions())
        print(json.dumps([trt.__name__, len(plan.content), None]))
    except ModelError as error:
        print(json.dumps([trt.__name__, 0, str(error)]))
"""

pytestmark = [
    pytest.mark.chain,
    pytest.mark.skipif(
        find_spec("tensorrt_rtx") is None or find_spec("tensorrt") is not None,
        reason="needs TensorRT for RTX and no other: pip install tensorrt-rtx-cu12",
    ),
]


def build(*models: Path) -> list[tuple[str, int, str | None]]:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *models], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_exported_precision_is_built(tune: Callable[..., Path], tmp_path: Path) -> None:
    names = [name for name in get_args(Precision) if name != "int8"]  # which is for CPUs
    models = {name: tmp_path / f"{name}.onnx" for name in names}
    for name, model in models.items():
        export(tune(), model, options=ExportOptions(precision=name))
    sizes = {}
    for name, (runtime, size, error) in zip(models, build(*models.values()), strict=True):
        assert error is None
        assert runtime == "tensorrt_rtx"
        sizes[name] = size
    assert min(sizes.values()) > 10_000


def test_a_graph_that_tensorrt_does_not_know_is_told_in_one_line(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model.onnx")
    graph = onnx.load(model.path)
    graph.graph.node[-1].output[0] = "raw"
    graph.graph.node.append(helper.make_node("Unknown", ["raw"], ["logits"], domain="nobody"))
    graph.opset_import.append(helper.make_opsetid("nobody", 1))
    onnx.save(graph, tmp_path / "unknown.onnx")
    ((_, size, error),) = build(tmp_path / "unknown.onnx")
    assert size == 0
    assert error is not None
    assert "unknown.onnx: tensorrt_rtx" in error
    assert "cannot build it (" in error
    assert "\n" not in error


class Look(nn.Module):
    """Deformable attention of each pixel to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DeformableAttention(6, heads=2, points=2, value_ratio=1, of=[8], to=[8])

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        tokens = pixels_BCHW.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens).transpose(1, 2).unflatten(-1, (8, 8))


def test_deformable_attention_is_built(make_spec: Callable[..., ModelSpec], tmp_path: Path) -> None:
    spec = make_spec(values=range(6), tile=8, overlap=2)
    model = onnx_program(Look(), spec).model_proto
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, tmp_path / "look.onnx")
    assert "GridSample" in {node.op_type for node in model.graph.node}
    ((_, size, error),) = build(tmp_path / "look.onnx")
    assert error is None
    assert size > 1000
