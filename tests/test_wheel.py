"""The built wheel, installed as a user would have it, in an empty folder and without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio

ROOT = Path(__file__).parent.parent


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a fresh environment that holds the wheel with its extra for CPUs."""
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("geodeploy_eo-*.whl")
    call(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    call(folder / "env" / "bin" / "pip", "install", "--quiet", f"{wheel}[cpu]", cwd=folder)
    return folder / "env" / "bin"


@pytest.mark.chain
def test_the_demo_maps_the_scene_that_comes_along(installed: Path, tmp_path: Path) -> None:
    printed = call(installed / "geodeploy", "demo", "-o", "demo", cwd=tmp_path)
    for name in ("map.tif", "picture.png", "report.json"):
        assert str((tmp_path / "demo" / name).resolve()) in printed
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["device"] == "cpu"
    assert sum(item["pixels"] for item in report["classes"]) == report["valid_pixels"] > 0
    with rasterio.open(tmp_path / "demo" / "map.tif") as mapped:
        assert mapped.crs.to_epsg() == 32616
        assert mapped.shape == (509, 531)
        assert len(set(mapped.read(1).ravel().tolist()) - {255}) > 1
    # A second time over what the first one left.
    call(installed / "geodeploy", "demo", "-o", "demo", cwd=tmp_path)


@pytest.mark.chain
def test_no_torch_comes_with_it_and_the_doctor_is_content(installed: Path, tmp_path: Path) -> None:
    listed = {
        item["name"]
        for item in json.loads(call(installed / "pip", "list", "--format", "json", cwd=tmp_path))
    }
    assert not listed & {"torch", "timm", "peft", "onnx"}
    diagnosis = json.loads(call(installed / "geodeploy", "doctor", "--json", cwd=tmp_path))
    assert diagnosis["broken"] == []
    assert "geodeploy-eo[train]" in diagnosis["train"]


@pytest.mark.chain
def test_what_is_missing_is_named_with_the_extra_that_brings_it(
    installed: Path, tmp_path: Path
) -> None:
    for command, extra in ((("export", "run"), "export"), (("train", "recipe.toml"), "train")):
        done = subprocess.run(
            [str(installed / "geodeploy"), *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert f"pip install 'geodeploy-eo[{extra}]'" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
