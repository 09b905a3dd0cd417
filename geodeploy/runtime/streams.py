"""Threads of a processor shared out among the tiles of a batch."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Given = TypeVar("Given", bound=Any)
Made = TypeVar("Made")

TILES = 8
"""What `predict` takes at once, unless the user says otherwise."""
_WAITING = 0.25
"""What each further thread of a stream adds to a tile's time on all of them, as a share. In OpenVINO a
ViT-S/14 took 1.17 (float32) and 1.45 (int8) times as long in one stream of two threads as in two of
one."""


def streams(threads: int, tiles: int) -> int:
    """How many of ``tiles`` are in work at once, ``threads`` being shared out among them.

    Of threads and tiles as few as can be are to be left over, and threads of one stream wait for one
    another in each layer. What comes of a tile hangs on neither.
    """

    def time(number: int) -> float:
        each = threads // number
        return math.ceil(tiles / number) * (1 + _WAITING * (each - 1)) / each

    return min(range(1, min(threads, tiles) + 1), key=time)


class Streams:
    """Calls that work beside one another, each on its share of the threads.

    Args:
        threads: In all.
        tiles: That are there at once, as far as is known.
        batch: That one call takes.
    """

    def __init__(self, threads: int, tiles: int, batch: int = 1) -> None:
        calls = math.ceil(tiles / batch)
        self.number = streams(threads, calls)
        self.threads = threads // self.number
        """Of each."""
        self._calls = math.ceil(calls / self.number)
        self._pool = ThreadPoolExecutor(self.number, thread_name_prefix="stream")

    def shares(self, calls: Given) -> list[Given]:
        """Of ``calls``, a sequence or an array, what one caller at a time is to do, alike in size."""
        size = math.ceil(len(calls) / math.ceil(len(calls) / self._calls))
        return [calls[first : first + size] for first in range(0, len(calls), size)]

    def each(self, work: Callable[[Given], Made], shares: Sequence[Given]) -> list[Made]:
        """What ``work`` makes of each of the ``shares``; of a single one in the caller's own thread."""
        if len(shares) == 1:
            return [work(shares[0])]
        return list(self._pool.map(work, shares))

    def close(self) -> None:
        """Wait for what is at work, and give the threads back."""
        self._pool.shutdown()
