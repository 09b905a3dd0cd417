"""A runtime or GPU that is not there is told with what brings it."""

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from geodeploy.errors import DeviceError, MissingExtraError
from geodeploy.runtime import open_session
from geodeploy.runtime.driver import is_loaded
from geodeploy.spec import ModelSpec, Parity

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "absent", "package", "extra"),
    [
        ({}, ["onnxruntime"], "onnxruntime", "cpu"),
        ({"runtime": "onnxruntime"}, ["onnxruntime"], "onnxruntime", "cpu"),
        ({"runtime": "onnxruntime", "device": "cuda"}, ["onnxruntime"], "onnxruntime-gpu", "gpu"),
        ({"device": "cuda"}, ["onnxruntime"], "onnxruntime-gpu", "gpu"),
        ({"runtime": "onnxruntime-tensorrt"}, ["onnxruntime"], "onnxruntime-gpu", "gpu"),
        ({"runtime": "openvino"}, ["openvino"], "openvino", "cpu"),
        ({"runtime": "tensorrt"}, ["tensorrt", "tensorrt_rtx"], "tensorrt", "tensorrt"),
    ],
)
def test_each_runtime_that_is_missing_names_its_package_and_extra(
    make_model: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    absent: list[str],
    package: str,
    extra: str,
) -> None:
    model = make_model(tmp_path / "model.onnx").path
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as caught:
        open_session(model, **options)
    assert f"the package {package}, " in str(caught.value)
    assert f"pip install 'geodeploy-eo[{extra}]'" in str(caught.value)


def test_what_is_advised_where_onnxruntime_has_no_cuda_is_not_refused_next(
    make_model: Make, tmp_path: Path
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can use a GPU")
    model = make_model(tmp_path / "model.onnx").path
    for asked, advice, followed in (
        ({"runtime": "onnxruntime-tensorrt"}, "--runtime onnxruntime", {"runtime": "onnxruntime"}),
        ({"device": "cuda"}, "--device cpu", {"device": "cpu"}),
    ):
        with pytest.raises(DeviceError, match=rf"or take {advice}\.$"):
            open_session(model, **asked)
        open_session(model, **followed).close()


def test_auto_takes_openvino_where_onnxruntime_is_for_a_gpu_that_is_not_there(
    make_model: Make, make_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'geodeploy-eo[cpu]'")
    if is_loaded() or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there is a GPU, or no x86, on which alone OpenVINO is taken")
    covered = ("onnxruntime", "openvino")
    spec: ModelSpec = make_spec()
    parity = Parity(argmax_agreement=1.0, report_sha256="ab", runtimes=covered)
    model = make_model(tmp_path / "model.onnx", spec.model_copy(update={"parity": parity})).path
    info = tmp_path / "packages" / "onnxruntime_gpu-1.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.32.0\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert open_session(model).name.startswith("openvino ")
    assert open_session(model, runtime="onnxruntime").name.startswith("onnxruntime ")


def test_a_driver_is_there_where_its_device_is(tmp_path: Path) -> None:
    nodes = [tmp_path / "one", tmp_path / "other"]
    assert not is_loaded(nodes)
    nodes[1].touch()
    assert is_loaded(nodes)
