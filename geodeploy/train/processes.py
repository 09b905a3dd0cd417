"""A training in several processes of this machine, which begin and end together. Imports no torch."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tqdm import tqdm

from geodeploy.errors import GeodeployError, ProcessError
from geodeploy.machine import usable_cores

Made = TypeVar("Made")

log = logging.getLogger(__name__)

_GRACE_S = 5.0
"""For a process to remove what it has half-written, once it is told to end."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a process ended early."""

    rank: int
    """0 an error it told of, 1 it vanished, 2 a crash, which may come of another's end."""
    time_s: float
    """When, on a clock that all processes share."""
    error: Exception


def is_first() -> bool:
    """Whether this process writes and shows: it is the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def run_in_processes(count: int, work: Callable[[], Made]) -> Made:
    """What ``work`` returns in the first of ``count`` new processes that all do it.

    Each finds its number and the others in the environment, in the words of `torchrun`; ``work`` can be
    pickled.

    Raises:
        GeodeployError: the first that a process raised, or that one was killed; by then all have ended.
    """
    context = multiprocessing.get_context("spawn")
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(usable_cores() // count, 1))),
    }
    level = log.getEffectiveLevel()
    members: list[BaseProcess] = []
    answers: list[Connection] = []
    try:
        for number in range(count):
            answer, sender = context.Pipe(duplex=False)
            own = place | {"RANK": str(number), "LOCAL_RANK": str(number)}
            process = context.Process(
                target=_join_in, args=(work, own, level, sender), daemon=True, name=f"train-{number}"
            )
            process.start()
            sender.close()  # or its end would never be seen
            members.append(process)
            answers.append(answer)
        made: Made = _gather(answers, members)[0]
        return made
    finally:
        for member in members:
            member.terminate()
        until = time.monotonic() + _GRACE_S
        for member in members:
            member.join(max(until - time.monotonic(), 0))
            member.kill()
            member.join()


def _gather(answers: Sequence[Connection], processes: Sequence[BaseProcess]) -> list[Any]:
    """What each process made; raises at once what the first to fail did."""
    made: dict[int, Any] = {}
    waiting = dict(enumerate(answers))
    while waiting:
        failures = []
        ready = wait(list(waiting.values()))
        for number in [number for number, answer in waiting.items() if answer in ready]:
            try:
                made[number] = waiting.pop(number).recv()
            except EOFError:
                made[number] = _Failure(1, 0.0, _vanished(number, processes))
            if isinstance(made[number], _Failure):
                failures.append(made[number])
        if failures:
            raise min(failures, key=lambda failure: (failure.rank, failure.time_s)).error
    return [made[number] for number in range(len(answers))]


def _vanished(number: int, processes: Sequence[BaseProcess]) -> ProcessError:
    process = processes[number]
    process.join(_GRACE_S)
    code = process.exitcode or 0
    by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return ProcessError(
        f"Process {number + 1} of {len(processes)} was ended by {by}, and the training with it. With "
        "--resume it goes on from its last validation."
    )


def _join_in(work: Callable[[], Any], place: dict[str, str], level: int, sender: Connection) -> None:
    """Do ``work`` as one of several processes, and send back what it makes."""
    os.environ |= place
    # Ctrl-C in a terminal reaches all of them; the one that began them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    tqdm.set_lock(threading.RLock())  # its own one, for several processes, outlives one that is killed
    first = place["RANK"] == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("geodeploy").setLevel(level if first else logging.CRITICAL)
    made: Any
    try:
        made = work()
    except GeodeployError as error:
        made = _Failure(0, time.monotonic(), error)
    except Exception:
        made = _Failure(2, time.monotonic(), RuntimeError(traceback.format_exc()))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to remove, and nothing to say
    sender.send(made)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)  # it waits for another process, and hears no signal


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
