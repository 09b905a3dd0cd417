"""Keep what was decoded of a file while several threads still need it."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window


@dataclass(frozen=True, slots=True)
class Loss:
    """What could not be read."""

    window: Window
    cause: str


Pixels = tuple[NDArray[Any], NDArray[np.bool_], list[Loss]]
"""Stored values (bands, h, w), valid pixels (h, w), and what could not be read."""


class BlockRows:
    """Whole rows of a file's blocks, each read once for all threads; the last few used are kept.

    Args:
        rows: Of a piece: a multiple of the rows of the file's blocks.
        keep: How many pieces are kept.
    """

    def __init__(self, rows: int, keep: int) -> None:
        self.rows = rows
        self.keep = keep
        self._pieces: OrderedDict[tuple[int, int, int], Future[Pixels]] = OrderedDict()
        self._lock = Lock()

    def read(self, window: Window, height: int, read: Callable[[Window], Pixels]) -> Pixels:
        """``window`` of a file of ``height`` rows, out of pieces that ``read`` reads.

        Losses are those of the pieces, which reach beyond the window.
        """
        first, last = window.row_off, window.row_off + window.height
        pieces = []
        for number in range(first // self.rows, -(-last // self.rows)):
            top, bottom = number * self.rows, min((number + 1) * self.rows, height)
            whole = Window(window.col_off, top, window.width, bottom - top)
            stored, valid, losses = self._piece(number, whole, read)
            part = slice(max(first - top, 0), last - top)
            pieces.append((stored[:, part], valid[part], losses))
        if len(pieces) == 1:
            return pieces[0]
        values, masks, lost = zip(*pieces, strict=True)
        return np.concatenate(values, axis=1), np.concatenate(masks), list(chain.from_iterable(lost))

    def _piece(self, number: int, whole: Window, read: Callable[[Window], Pixels]) -> Pixels:
        key = number, whole.col_off, whole.width
        with self._lock:
            found = self._pieces.get(key)
            piece = self._pieces.setdefault(key, Future())
            self._pieces.move_to_end(key)
            while len(self._pieces) > self.keep:
                self._pieces.popitem(last=False)
        if found is None:
            try:
                piece.set_result(read(whole))
            except BaseException as error:
                with self._lock:
                    self._pieces.pop(key, None)
                piece.set_exception(error)
        return piece.result()
