"""What a script in bench/ makes of trainings that end badly: an empty table is found out hours late."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import rasterio

BENCH = Path(__file__).parent.parent / "bench"
GOOD = {
    "validation": 0.5, "confusion": [[8, 2], [2, 8]], "trainable_parameters": 30,
    "trainable_backbone_parameters": 20, "tuned_bytes": 2e6, "memory_mib": 100, "seconds": 10.0,
}  # fmt: skip
"""A record as it was before the time of waiting was noted."""
DIVERGED = {"failed": "The loss is nan at step 3: training has diverged."}


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    import tuning

    monkeypatch.setattr(tuning, "RESULTS", tmp_path)
    yield tuning
    for name in ("tuning", "cloud", "ways"):
        sys.modules.pop(name, None)


def note(tuning: ModuleType, rate: float, seed: int, facts: dict[str, Any]) -> None:
    cell = tuning.Cell("osm", "dinov2", "lora")
    tuning.record_of(cell, rate, seed).write_text(json.dumps({"rate": rate, "seed": seed, **facts}))


def row_of(tuning: ModuleType) -> list[str]:
    (row,) = [line for line in tuning.write_table().splitlines() if "LoRA" in line]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_rate_that_diverged_is_shown_and_never_the_best(tuning: ModuleType) -> None:
    note(tuning, 1e-3, 0, {**GOOD, "validation": 0.0})
    note(tuning, 3e-3, 0, DIVERGED)
    row = row_of(tuning)
    assert row[2] == "1"
    assert row[6:8] == ["0.001", "0.001: 0.000, 0.003: diverged"]


def test_a_seed_that_diverged_is_counted_apart(tuning: ModuleType) -> None:
    note(tuning, 1e-3, 0, GOOD)
    note(tuning, 1e-3, 1, DIVERGED)
    note(tuning, 1e-3, 2, {**GOOD, "validation": 0.7, "waiting": 0.12})
    row = row_of(tuning)
    assert row[2:5] == ["2, 1 more diverged", "0.667 ± 0.000", "0.600 ± 0.100"]
    assert row[-2:] == ["10", "12%"]


def test_a_method_of_which_every_run_diverged_has_a_row(tuning: ModuleType) -> None:
    note(tuning, 1e-3, 0, DIVERGED)
    row = row_of(tuning)
    assert row[2:6] == ["0, 1 more diverged", "diverged", "-", "-"]
    assert row[7] == "0.001: diverged"
    assert len(row) == 13


def test_a_run_that_diverges_gives_a_record_that_can_be_told(
    tuning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name, pixels in (
        ("image.tif", rng.uniform(0, 0.5, (10, 128, 384)).astype(np.float32)),
        ("labels.tif", rng.integers(0, 2, (1, 128, 384)).astype(np.uint8)),
    ):
        profile = {"count": len(pixels), "height": 128, "width": 384, "dtype": pixels.dtype}
        with rasterio.open(
            tmp_path / name, "w", transform=rasterio.Affine(10, 0, 0, 0, -10, 0), **profile
        ) as target:
            target.write(pixels)
    image = tuning.Image("image.tif", "labels.tif", "TVH", tuple(range(1, 11)))
    monkeypatch.setitem(tuning.SETS, "osm", (image,))
    found = tuning.tune(tuning.Cell("osm", "light", "scratch"), 1e30, 0, tmp_path, 1)
    assert found.keys() == {"failed"}
    assert "training has diverged" in tuning.outcome(found)
