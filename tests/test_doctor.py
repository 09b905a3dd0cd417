"""The doctor, in environments made broken on purpose."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from geodeploy.doctor import examine
from geodeploy.runtime import driver


def doctor(*, path: Path) -> tuple[int, dict[str, object]]:
    """Exit status and findings of a process that sees the packages and programs in ``path`` first."""
    done = subprocess.run(
        [sys.executable, "-m", "geodeploy", "doctor", "--json"],
        env={"PYTHONPATH": str(path), "PATH": str(path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def distribution(folder: Path, name: str, version: str, *needs: str) -> None:
    """What an installed package leaves for others to find."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
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


def nvidia_smi(folder: Path, says: str, *, status: int = 0) -> None:
    """The driver's own program, as it answers."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    program.chmod(0o755)


def test_a_gpu_that_is_unused_is_named_with_what_to_do(tmp_path: Path) -> None:
    nvidia_smi(tmp_path, "575.51.03, NVIDIA H200")
    status, found = doctor(path=tmp_path)
    assert status == 0
    assert found["gpu"].startswith("NVIDIA H200, driver 575.51.03")
    (note,) = [line for line in found["notes"] if line.startswith("predict does not use the GPU")]
    assert "pip uninstall -y onnxruntime, then pip install 'geodeploy-eo[gpu]'" in note


@pytest.mark.parametrize(("version", "too_old"), [("575.51.03", True), ("580.65.06", False)])
def test_a_driver_that_is_too_old_for_the_runtime_is_found(
    tmp_path: Path, version: str, too_old: bool
) -> None:
    need = "nvidia-cuda-runtime~=13.0; extra == 'cuda'"
    distribution(tmp_path, "onnxruntime-gpu", "1.31.1", need)
    nvidia_smi(tmp_path, f"{version}, NVIDIA H200")
    told = [line for line in doctor(path=tmp_path)[1]["broken"] if "too old for CUDA 13" in line]
    assert len(told) == too_old
    assert all(f"driver {version}" in line and "install 580 or newer" in line for line in told)


def test_a_driver_that_does_not_answer_is_told_in_its_own_words(tmp_path: Path) -> None:
    nvidia_smi(tmp_path, "Failed to initialize NVML: Driver/library version mismatch", status=18)
    status, found = doctor(path=tmp_path)
    assert status == 0  # nothing installed here needs a GPU
    assert any("Driver/library version mismatch" in line for line in found["notes"])


def test_a_gpu_without_a_driver_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    monkeypatch.setattr(driver, "_PCI", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert any("no driver (nvidia-smi): install NVIDIA's" in line for line in examine().notes)
    (device / "vendor").write_text("0x1af4\n")
    assert not driver.has_gpu()
