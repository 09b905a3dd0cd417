"""Engines of TensorRT, and of OpenVINO, kept between runs.

Each lies behind a line that says what it was made of and for. Bytes in files, no more: nothing here
needs a GPU or a runtime.
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from geodeploy.runtime.graph import OnnxFile
from geodeploy.runtime.plan import Plan, PlanOptions
from geodeploy.runtime.refit import graph_hash

log = logging.getLogger(__name__)

Facts = Mapping[str, str]
"""What an engine is made of and for."""
Engine = TypeVar("Engine")


def engine_facts(file: OnnxFile, runtime: str, device: str, options: PlanOptions) -> Facts:
    """The graph, with its precision, the versions, the GPU, and the options.

    Less what these make all one: the weights of an engine that is refitted, the version and the GPU of
    one that is compatible. A version from before the engine's does not load it, and builds its own.
    """
    return {
        "model": graph_hash(file) if options.refit else file.sha256,
        "runtime": runtime.partition(" ")[0] if options.version_compatible else runtime,
        "device": "Ampere or later" if options.hardware_compatible else device,
        "options": options.model_dump_json(),
    }


def kept_engine(
    folder: Path,
    facts: Facts,
    *,
    machine: str,
    load: Callable[[bytes], Engine | None],
    fit: Callable[[Engine], bool],
    build: Callable[[bytes], Plan],
) -> Engine | None:
    """What ``load`` makes of the plan that ``folder`` keeps for ``facts``.

    ``fit`` then makes the engine this model's, or says that it cannot. ``build`` makes a plan where
    there is none or it is of no use: it takes the timings of earlier builds on the same ``machine``, or
    nothing. One process builds, the others wait for it.
    """
    path = engine_path(folder, facts)
    with _locked(path.with_suffix(".lock")):
        kept = _read(path, facts)
        engine = None if kept is None else load(kept)
        if engine is not None and fit(engine):
            return engine
        timings = folder / f"{_hash(machine)}.timings"
        plan = build(timings.read_bytes() if timings.exists() else b"")
        if plan.timings:
            _write(timings, plan.timings)
        _write(path, _head(facts, plan.content) + plan.content)
    return load(plan.content)


def engine_path(folder: Path, facts: Facts) -> Path:
    """Where ``folder`` keeps the engine of ``facts``."""
    return folder / f"{_hash(facts)}.engine"


def _read(path: Path, facts: Facts) -> bytes | None:
    """The plan in ``path``; None where there is none, or it is not whole or not that of ``facts``.

    The name of a file is no proof: somebody copies a cache, or a disk loses the end of it. What is in
    it would be run as it is, and of another model it would map something else in silence.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        head, plan = file.readline(), file.read()
    if head == _head(facts, plan):
        return plan
    log.warning("%s is not the engine that it should be, or not whole: it is built again.", path)
    return None


def _head(facts: Facts, plan: bytes) -> bytes:
    return json.dumps({**facts, "sha256": sha256(plan).hexdigest()}, sort_keys=True).encode() + b"\n"


def _hash(facts: Facts | str) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one at a time, whatever process it is in, works under the lock of ``path``."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
