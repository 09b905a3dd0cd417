"""Sums that are the same on however many cores: one thread a tile, and tiles side by side.

The last bits of a sum hang on how threads share it out. What is written into a file must not.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from geodeploy.machine import usable_cores

_MOST = 8
"""Tiles at once at most, which are also in memory at once."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute each thing in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiles_at_once() -> int:
    """A power of two: OpenVINO, given as many threads, works on as many tiles with one each."""
    return 1 << (min(usable_cores(), _MOST).bit_length() - 1)


def workers(number: int) -> ThreadPoolExecutor:
    """So many threads in each of which torch takes no others."""
    return ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))
