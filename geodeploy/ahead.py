"""Do the next pieces of work in threads while the last one is used."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Asked = TypeVar("Asked")
Made = TypeVar("Made")


def read_ahead(
    read: Callable[[Asked], Made], asked: Iterable[Asked], *, workers: int, ahead: int
) -> Generator[Made, None, None]:
    """Yield ``read`` of each thing ``asked``, in order, with up to ``ahead`` more read in threads.

    What a reader raises is raised here. Closing the generator joins the threads: only then may what
    they read from be closed.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        todo = iter(asked)
        pending = deque(pool.submit(read, item) for item in islice(todo, ahead))
        try:
            while pending:
                made = pending.popleft().result()
                pending.extend(pool.submit(read, item) for item in islice(todo, 1))
                yield made
                del made  # or it would be held until the next one is asked for
        finally:
            for future in pending:
                future.cancel()
