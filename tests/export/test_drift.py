"""Which layer is at fault: planted in a model of each precision, and of sound ones none."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from geodeploy.errors import ModelError
from geodeploy.export import bisect, export, proof
from geodeploy.export import onnx as export_module
from geodeploy.export.options import ExportOptions
from geodeploy.spec import Precision
from geodeploy.train.run import Run, load_run

Tune = Callable[..., Path]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")


def peaked(path: Path) -> Run:
    """The RUN with queries 20 000 times as large, so that each token looks at one other alone.

    As in a pretrained vision transformer, rounding now turns some tokens to another, whose values are
    far from those of the first, and no class of a pixel changes.
    """
    run = load_run(path)
    attention = run.model.backbone.get_base_model().blocks[0].attn
    width = attention.proj.in_features
    with torch.no_grad():
        attention.qkv.base_layer.weight[:width].mul_(20_000)
        attention.proj.weight.mul_(0.1)
    return run


@pytest.fixture(scope="module", params=PRECISIONS)
def exported(
    request: pytest.FixtureRequest, tune: Tune, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A RUN that rounding moves inside, and its export in each precision, released."""
    run, model = tune(), tmp_path_factory.mktemp(request.param) / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "load_run", peaked)
        assert export(run, model, options=ExportOptions(precision=request.param)).released
    return run, model


@pytest.fixture
def loaded_peaked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "load_run", peaked)


def negated(tensor: TensorProto) -> None:
    """Each weight has the other sign."""
    if tensor.data_type == TensorProto.BFLOAT16:
        values = np.frombuffer(tensor.raw_data, ml_dtypes.bfloat16)
        tensor.raw_data = (-values).tobytes()
    else:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(-values, tensor.name))


def test_every_node_is_needed_and_none_only_hands_on(exported: tuple[Path, Path]) -> None:
    graph = onnx.load(exported[1]).graph
    needed = {output.name for output in graph.output}
    for node in reversed(graph.node):  # each before those that it needs
        assert needed.intersection(node.output), node.name
        assert node.op_type not in ("Identity", "Dropout"), node.name
        needed.update(node.input)
    assert not [item.name for item in graph.initializer if item.name not in needed]


@pytest.mark.usefixtures("loaded_peaked")
def test_a_released_model_has_no_layer_to_blame(exported: tuple[Path, Path]) -> None:
    for found in bisect(*exported):
        assert found.first_drift is None
        assert found.problem is None
        assert found.largest
        assert found.compared > 20
        assert f"the outputs hold; of {found.compared} values" in str(found)


@pytest.mark.usefixtures("loaded_peaked")
def test_a_fault_is_found_in_its_layer_whatever_rounding_does_before_it(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, model = exported
    graph = onnx.load(model)
    *_, last = (item for item in graph.graph.initializer if list(item.dims) == [8, 8, 3, 3])
    negated(last)  # of decoder.levels.3, whose convolutions are the only ones of 8 channels
    onnx.save(graph, tmp_path / "faulty.onnx")
    for found in bisect(run, tmp_path / "faulty.onnx"):
        assert found.problem
        assert found.first_drift
        assert found.first_drift.module.startswith("decoder.levels.3.1"), found
        # What the fault makes wrong is far beyond what rounding does to any other layer.
        assert found.first_drift == found.largest


def test_a_bound_of_the_user_is_held_against_each_layer(tune: Tune, tmp_path: Path) -> None:
    export(tune(), tmp_path / "model.onnx")
    strict = bisect(tune(), tmp_path / "model.onnx", tolerance=0.0)
    assert all(found.first_drift for found in strict)
    loose = bisect(tune(), tmp_path / "model.onnx", tolerance=10.0)
    assert all("values drifts by more than 10 by itself" in str(found) for found in loose)
    with pytest.raises(ModelError, match="looked at in ONNX files"):
        bisect(tune(), tmp_path / "model.pt2")
