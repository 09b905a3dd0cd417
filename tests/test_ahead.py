import threading
from collections.abc import Iterator
from itertools import islice, repeat

import pytest

from geodeploy.ahead import read_ahead
from geodeploy.errors import SourceError


def test_the_order_is_kept_whatever_the_threads_do() -> None:
    events = {item: threading.Event() for item in range(6)}

    def read(item: int) -> int:
        if item % 2 == 0:
            events[item + 1].wait(5)  # each even one ends after its neighbour
        events[item].set()
        return item

    assert list(read_ahead(read, range(6), workers=2, ahead=2)) == list(range(6))


def test_no_more_than_what_was_said_is_read_ahead() -> None:
    begun: list[int] = []
    items = read_ahead(lambda item: begun.append(item) or item, range(100), workers=1, ahead=3)
    assert next(items) == 0
    items.close()
    assert len(begun) <= 4


def test_what_a_reader_raises_is_raised_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise SourceError("the file breaks off")

    ahead = read_ahead(next, repeat(items()), workers=1, ahead=3)
    assert list(islice(ahead, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(SourceError, match="breaks off"):
        next(ahead)


def test_closing_joins_the_threads() -> None:
    items = read_ahead(lambda item: item, range(10), workers=2, ahead=4)
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]
