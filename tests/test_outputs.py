"""The examples of docs/outputs.md run as they stand."""

import re
from pathlib import Path

import pytest

from geodeploy.predict import predict

DOCS = Path(__file__).parents[1] / "docs" / "outputs.md"
EXAMPLES = re.findall(r"## (.+?)\n.*?```python\n(.+?)```", DOCS.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Path:
    path = tmp_path_factory.mktemp("outputs")
    predict(real_scene, output=path / "map.tif")
    return path


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_an_example_runs_as_it_stands(
    code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, str(DOCS), "exec"), {})
    assert capsys.readouterr().out
