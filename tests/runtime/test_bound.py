"""What a GPU is handed, on the processor: the same calls of ONNX Runtime in another memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from geodeploy.runtime.bound import even_batch
from geodeploy.runtime.graph import input_names, read_onnx
from geodeploy.runtime.onnx import OnnxSession, tensorrt_options

MakeModel = Callable[..., Any]


@pytest.fixture
def sessions(make_model: MakeModel, tmp_path: Path) -> tuple[OnnxSession, OnnxSession]:
    """The judge, and one that takes the way to a GPU."""
    file = read_onnx(make_model(tmp_path / "model.onnx", kernels=(3,)).path)
    judge, bound = (OnnxSession(file, device="cpu", threads=1) for _ in range(2))
    bound.device = "cuda"
    return judge, bound


def test_bound_memory_gives_the_same_for_any_batch_and_keeps_what_it_gave(
    sessions: tuple[OnnxSession, OnnxSession],
) -> None:
    judge, bound = sessions
    random = np.random.default_rng(0)
    given = []
    for batch in (8, 3, 8, 1, 19):
        pixels = random.random((batch, 6, 64, 64), np.float32)
        given.append((bound.run(pixels), judge.run(pixels)))
    for found, expected in given:  # after all: no later batch has overwritten an earlier one
        np.testing.assert_array_equal(found, expected)


def test_threads_may_share_bound_memory(sessions: tuple[OnnxSession, OnnxSession]) -> None:
    judge, bound = sessions
    shares = np.random.default_rng(4).random((4, 5, 6, 64, 64), np.float32)
    judges = [judge.run(pixels) for pixels in shares]
    with ThreadPoolExecutor(len(shares)) as pool:
        for _ in range(20):
            for found, expected in zip(pool.map(bound.run, shares), judges, strict=True):
                np.testing.assert_array_equal(found, expected)


def test_batches_of_any_size_come_to_few() -> None:
    assert [even_batch(tiles) for tiles in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    assert all(tiles <= even_batch(tiles) < 2 * tiles for tiles in range(1, 100))


def test_tensorrt_is_told_one_shape_and_where_to_keep_what_it_finds(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path / "cache"))
    one, other = (
        tensorrt_options(read_onnx(make_model(tmp_path / f"{seed}.onnx", seed=seed).path))
        for seed in range(2)
    )
    for part in ("min", "opt", "max"):
        assert one[f"trt_profile_{part}_shapes"] == "pixels:8x6x64x64"
    assert one["trt_engine_cache_path"] != other["trt_engine_cache_path"]
    assert one["trt_timing_cache_path"] == other["trt_timing_cache_path"]
    assert Path(one["trt_timing_cache_path"]).stat().st_mode & 0o077 == 0


def test_an_input_with_a_value_of_its_own_is_none_to_be_fed(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = onnx.load(make_model(tmp_path / "model.onnx").path)
    weights = model.graph.initializer[0]
    model.graph.input.append(
        helper.make_tensor_value_info(weights.name, TensorProto.FLOAT, weights.dims)
    )
    assert input_names(model.SerializeToString()) == ["pixels"]
