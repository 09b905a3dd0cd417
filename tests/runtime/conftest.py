from importlib.util import find_spec

import pytest

from geodeploy.runtime import Runtime


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Each that runs an ONNX file on a CPU."""
    if find_spec(request.param) is None:
        pytest.skip(f"needs {request.param}: pip install 'geodeploy-eo[cpu]'")
    return request.param
