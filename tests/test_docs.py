"""The Python examples of docs/ run as they stand."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from geodeploy.predict import predict
from geodeploy.runtime.adapter import DECODER, DESCRIPTION, Adapter, write_adapter
from geodeploy.spec import BASE_KEY, Backbone, BaseSpec

BYTES = (DESCRIPTION, DECODER)
DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in DOCS
    for number, code in enumerate(re.findall(r"```python\n(.+?)```", page.read_text(), re.DOTALL), 1)
]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    real_scene: Path,
    pointwise: Any,
    make_spec: Callable[..., Any],
    make_model: Callable[..., Any],
) -> Path:
    """Two scenes, models and a map, by the names that the pages use."""
    path = tmp_path_factory.mktemp("docs")
    for name in ("scene.tif", "other.tif"):
        shutil.copy(real_scene, path / name)
    shutil.copy(pointwise.path, path / "model.onnx")
    make_model(path / "cover.onnx", make_spec(task="multilabel"))
    dated = make_spec(timesteps=2, layout="NCHW")
    make_model(path / "crops.onnx", dated, shape=(2 * len(dated.bands), len(dated.outputs), dated.tile))
    build_base(path / "models", {"flood": pointwise, "cloud": pointwise})
    predict(real_scene, output=path / "map.tif")
    return path


def build_base(folder: Path, models: dict[str, Any]) -> None:
    """A base that does nothing, and adapters whose decoders are the ``models``, into ``folder``."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["scaled"])],
        "base",
        [
            helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", "bands", 64, 64]),
            *(helper.make_tensor_value_info(name, TensorProto.UINT8, ["n"]) for name in BYTES),
        ],
        [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["batch", "bands", 64, 64])],
        [numpy_helper.from_array(np.zeros(0, np.uint8), name) for name in BYTES],
    )
    base = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    spec = BaseSpec(backbone=Backbone(name="none", weights="random"), tile=64)
    helper.set_model_props(base, {BASE_KEY: spec.to_json()})
    folder.mkdir()
    onnx.save(base, folder / "base.onnx")
    for name, model in models.items():
        decoder = onnx.load(model.path)
        decoder.graph.input[0].name = decoder.graph.node[0].input[0] = "scaled"
        sha256 = hashlib.sha256((folder / "base.onnx").read_bytes()).hexdigest()
        described = model.spec.model_copy(update={"name": name, "base_sha256": sha256})
        adapter = Adapter(described, {}, decoder.SerializeToString())
        write_adapter(folder / f"{name}.onnx_adapter", adapter)


# rioxarray multiplies transforms as affine no longer likes it.
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs_as_it_stands(
    code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out
