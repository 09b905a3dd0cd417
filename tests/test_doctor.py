"""The doctor, in environments made broken on purpose."""

import json
import subprocess
import sys
from pathlib import Path

from geodeploy.doctor import examine


def doctor(*, path: Path) -> tuple[int, dict[str, object]]:
    """Exit status and findings of a process that sees the packages in ``path`` first."""
    done = subprocess.run(
        [sys.executable, "-m", "geodeploy", "doctor", "--json"],
        env={"PYTHONPATH": str(path), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def distribution(folder: Path, name: str, version: str) -> None:
    """What an installed package leaves for others to find."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")


def test_this_environment_is_sound() -> None:
    found = examine()
    assert found.broken == ()
    assert found.train == "ready"
    assert "onnxruntime" in found.predict
    assert "Nothing is broken" in str(found)


def test_two_runtimes_that_overwrite_each_other_are_found(tmp_path: Path) -> None:
    distribution(tmp_path, "onnxruntime-gpu", "1.31.1")
    status, found = doctor(path=tmp_path)
    assert status == 1
    assert any("pip uninstall -y onnxruntime onnxruntime-gpu" in line for line in found["broken"])


def test_the_unrelated_package_of_our_name_is_found(tmp_path: Path) -> None:
    distribution(tmp_path, "geodeploy", "0.3.0")
    status, found = doctor(path=tmp_path)
    assert status == 1
    assert any("unrelated distribution" in line for line in found["broken"])


def test_a_runtime_that_is_a_shell_is_found(tmp_path: Path) -> None:
    # What is left of onnxruntime when one of two wheels was uninstalled: a package without content.
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    status, found = doctor(path=tmp_path)
    assert status == 1
    assert found["predict"] == "cannot run"
    assert any("force-reinstall" in line for line in found["broken"])


def test_an_openvino_that_is_a_shell_is_found(tmp_path: Path) -> None:
    distribution(tmp_path, "openvino", "2026.4.1")
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").touch()
    status, found = doctor(path=tmp_path)
    assert status == 1
    assert found["predict"].startswith("onnxruntime ")
    assert any("openvino is broken" in line for line in found["broken"])
