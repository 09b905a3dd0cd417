"""TensorRT for RTX builds each exported precision without a GPU, by the builder's own code.

In a process of its own: on a graph that it does not support it may end the process.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from geodeploy.export import export
from geodeploy.export.options import ExportOptions

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
    models = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "fp16", "bf16")}
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
