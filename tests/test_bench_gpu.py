"""What a GPU's owner is asked to run works, as far as that can be told without a GPU."""

import json
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "gpu.py"
Tune = Callable[..., Path]


@pytest.mark.slow
def test_a_rehearsal_measures_each_precision_and_runtime_and_runs_the_tests(
    tune: Tune, tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    options = ["--rehearse", "--batch", "2", "--seconds", "0.05", "-o", output]
    done = subprocess.run(
        [sys.executable, BENCH, tune(), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    rows = {(row["precision"], row["runtime"]): row for row in found["runtimes"]}
    precisions = ("fp32", "fp16", "bf16", "int8-tensorrt")
    assert list(rows) == [(name, by) for name in precisions for by in ("onnxruntime", "openvino")]
    for runtime in ("onnxruntime", "openvino"):
        row = rows["fp32", runtime]
        assert "error" not in row, row
        assert row["parity"]["argmax_agreement"] > 0.999
        assert row["scene_agreement"] > 0.999
        assert row["images_per_s"] > 0
        assert row["peak_bytes"] >= 0
    assert "bf16, which ONNX Runtime has on GPUs alone" in rows["bf16", "onnxruntime"]["error"]
    assert [row["precision"] for row in found["torch"]] == ["fp32", "fp16", "bf16"]
    assert all(row["images_per_s"] > 0 and "peak_bytes" in row for row in found["torch"])
    tests = found["tests"]
    assert not tests["failed"]
    assert tests["passed"] or "needs an NVIDIA GPU" in str(tests["skipped"])


def test_what_fails_is_told_and_what_was_found_before_is_kept() -> None:
    tried: Callable[..., dict[str, Any]] = runpy.run_path(str(BENCH))["tried"]

    def breaks() -> dict[str, Any]:
        raise RuntimeError("no compiler")

    row = tried({"precision": "fp16"}, lambda: {"load_s": 1.0}, breaks, lambda: {"never": True})
    assert row == {"precision": "fp16", "load_s": 1.0, "error": "RuntimeError: no compiler"}


def test_the_peak_is_told_though_it_is_over() -> None:
    looked, taken = threading.Event(), [100]

    def look() -> int:
        found = taken[0]
        if found == 700:
            looked.set()
        return found

    peak = runpy.run_path(str(BENCH))["Peak"]("cuda", look)
    with peak:
        taken[0] = 700
        assert looked.wait(10)
        taken[0] = 200
    assert peak.bytes == 600
