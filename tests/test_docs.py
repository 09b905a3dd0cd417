"""The Python examples of docs/ run as they stand."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from geodeploy.predict import predict

DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in DOCS
    for number, code in enumerate(re.findall(r"```python\n(.+?)```", page.read_text(), re.DOTALL), 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real_scene: Path, pointwise: Any) -> Path:
    """Two scenes, a model and a map, by the names that the pages use."""
    path = tmp_path_factory.mktemp("docs")
    for name in ("scene.tif", "other.tif"):
        shutil.copy(real_scene, path / name)
    shutil.copy(pointwise.path, path / "model.onnx")
    predict(real_scene, output=path / "map.tif")
    return path


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
