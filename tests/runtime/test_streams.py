"""Threads of a processor, shared out among tiles."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from geodeploy.runtime import Runtime, open_session
from geodeploy.runtime.streams import Streams, streams

MakeModel = Callable[..., Any]


def test_threads_are_shared_out_for_any_number_of_them_and_any_batch() -> None:
    assert [streams(threads, 1) for threads in (1, 2, 3, 8, 22)] == [1] * 5
    assert [streams(1, tiles) for tiles in (1, 3, 8)] == [1] * 3
    assert {threads: streams(threads, 8) for threads in (2, 3, 4, 5, 6, 7, 8, 14, 16, 22)} == {
        2: 2, 3: 3, 4: 4, 5: 4, 6: 3, 7: 3, 8: 8, 14: 4, 16: 8, 22: 8,
    }  # fmt: skip
    for threads, tiles in product(range(1, 65), range(1, 17)):
        number = streams(threads, tiles)
        assert 1 <= number <= min(threads, tiles)
        # What is left over never doubles the time that all threads would need.
        assert math.ceil(tiles / number) / (threads // number) < tiles / threads * 2


def test_each_stream_has_a_share_and_a_single_one_stays_with_its_caller() -> None:
    shared = Streams(threads=4, tiles=8)
    assert (shared.number, shared.threads) == (4, 1)
    shares = shared.shares(list(range(8)))
    assert shares == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [len(share) for share in shared.shares(np.zeros((9, 2)))] == [2, 2, 2, 2, 1]
    assert [len(share) for share in shared.shares([0, 1, 2])] == [2, 1]
    together = threading.Barrier(4, timeout=10)  # broken, unless all four are at work at once

    def work(share: list[int]) -> tuple[int, str]:
        together.wait()
        return sum(share), threading.current_thread().name

    found = shared.each(work, shares)
    assert [total for total, _ in found] == [1, 5, 9, 13]
    assert len({name for _, name in found}) == 4
    here = shared.each(lambda share: threading.current_thread(), shared.shares([0, 1]))
    assert here == [threading.current_thread()]
    shared.close()


def test_a_graph_that_takes_all_tiles_at_once_has_all_threads() -> None:
    assert [Streams(4, 8, batch).threads for batch in (1, 4, 8)] == [1, 2, 4]


@pytest.mark.parametrize("fixed", [None, 2])
def test_threads_may_share_a_session(
    make_model: MakeModel, tmp_path: Path, runtime: Runtime, fixed: int | None
) -> None:
    path = make_model(tmp_path / "model.onnx", kernels=(3, 3)).path
    if fixed:
        graph = onnx.load(path)
        for value in (graph.graph.input[0], graph.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = fixed
        onnx.save(graph, path)
    alone = open_session(path, runtime=runtime, device="cpu", threads=1)
    session = open_session(path, runtime=runtime, device="cpu", threads=2)
    assert (alone.streams, session.streams) == (1, 2)
    shares = np.random.default_rng(4).uniform(0, 0.6, (4, 9, 6, 64, 64)).astype(np.float32)
    judges = [alone.run(pixels) for pixels in shares]
    with ThreadPoolExecutor(len(shares)) as pool:
        for _ in range(30):
            for found, judge in zip(pool.map(session.run, shares), judges, strict=True):
                assert np.array_equal(found, judge)
