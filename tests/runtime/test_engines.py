"""The cache of engines. TensorRT is two functions here: what loads bytes and what builds them."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from geodeploy.errors import OutputError
from geodeploy.machine import private_folder
from geodeploy.runtime.engines import Facts, engine_facts, engine_path, kept_engine
from geodeploy.runtime.graph import OnnxFile, read_onnx
from geodeploy.runtime.plan import Plan, PlanOptions

MakeModel = Callable[..., Any]
VERSION, GPU = "tensorrt 10.9", "A, sm 80, driver 1"


@dataclass
class Builder:
    """Builds plans that say whose they are, and counts."""

    name: str
    timings: bytes = b""
    loads: bool = True
    fits: bool = True
    machine: str = f"{VERSION}, {GPU}"
    handed: list[bytes] = field(default_factory=list)
    """Timings of earlier builds, for each build."""
    fitted: list[str] = field(default_factory=list)

    def get(self, folder: Path, facts: Facts) -> str | None:
        return kept_engine(
            folder, facts, machine=self.machine, load=self.load, fit=self.fit, build=self.build
        )

    def load(self, plan: bytes) -> str | None:
        return plan.decode() if self.loads else None

    def fit(self, engine: str) -> bool:
        self.fitted.append(engine)
        return self.fits

    def build(self, timings: bytes) -> Plan:
        self.handed.append(timings)
        return Plan(f"plan of\n{self.name}".encode(), self.timings)


@pytest.fixture
def files(make_model: MakeModel, tmp_path: Path) -> list[OnnxFile]:
    return [
        read_onnx(make_model(tmp_path / f"{name}.onnx", seed=seed).path)
        for seed, name in enumerate(("a", "b"))
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path / "cache"))
    return private_folder("tensorrt")


def test_an_engine_is_known_by_graph_versions_gpu_and_options(
    files: list[OnnxFile], folder: Path
) -> None:
    known = (files[0], VERSION, GPU, PlanOptions())
    paths = {engine_path(folder, engine_facts(*known)) for _ in range(2)}
    assert len(paths) == 1
    others = (files[1], "tensorrt 11.0", "B, sm 90, driver 1", PlanOptions(batch=2))
    for place, value in enumerate(others):
        changed = (value if at == place else item for at, item in enumerate(known))
        paths.add(engine_path(folder, engine_facts(*changed)))
    assert len(paths) == 5


def test_an_engine_is_built_once_and_then_found(files: list[OnnxFile], folder: Path) -> None:
    facts, builder = engine_facts(files[0], VERSION, GPU, PlanOptions()), Builder("a")
    assert [builder.get(folder, facts) for _ in range(3)] == ["plan of\na"] * 3
    assert len(builder.handed) == 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".engine", ".lock"]


@pytest.mark.parametrize("place", range(4))
def test_the_engine_of_another_model_version_gpu_or_option_under_the_name_is_not_run(
    files: list[OnnxFile], folder: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    known = (files[0], VERSION, GPU, PlanOptions())
    others = (files[1], "tensorrt 11.0", "B, sm 90, driver 1", PlanOptions(batch=2))
    mine = engine_facts(*known)
    theirs = engine_facts(*(others[at] if at == place else item for at, item in enumerate(known)))
    Builder("theirs").get(folder, theirs)
    shutil.copy(engine_path(folder, theirs), engine_path(folder, mine))
    builder = Builder("mine")
    assert builder.get(folder, mine) == "plan of\nmine"
    assert "is not the engine that it should be" in caplog.text
    assert builder.get(folder, mine) == "plan of\nmine"
    assert len(builder.handed) == 1


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: b"stale"])
def test_an_engine_that_is_not_whole_is_built_again(
    files: list[OnnxFile], folder: Path, spoil: Callable[[bytes], bytes]
) -> None:
    facts, builder = engine_facts(files[0], VERSION, GPU, PlanOptions()), Builder("a")
    builder.get(folder, facts)
    path = engine_path(folder, facts)
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert builder.get(folder, facts) == "plan of\na"
    assert len(builder.handed) == 2
    assert path.read_bytes() == whole


def test_an_engine_that_does_not_load_is_built_again_and_given_up_if_that_does_not_either(
    files: list[OnnxFile], folder: Path
) -> None:
    facts = engine_facts(files[0], VERSION, GPU, PlanOptions())
    Builder("old").get(folder, facts)
    broken = Builder("new", loads=False)
    assert broken.get(folder, facts) is None
    assert len(broken.handed) == 1


def test_timings_go_from_build_to_build_and_are_not_lost(files: list[OnnxFile], folder: Path) -> None:
    builders = [Builder("a", b"first"), Builder("b", b""), Builder("c", b"third")]
    for number, builder in enumerate(builders, start=1):
        builder.get(folder, engine_facts(files[0], VERSION, GPU, PlanOptions(batch=number)))
    assert [builder.handed for builder in builders] == [[b""], [b"first"], [b"first"]]
    later = Builder("d", machine=f"{VERSION}, B, sm 90, driver 1")
    later.get(folder, engine_facts(files[0], VERSION, "B, sm 90, driver 1", PlanOptions()))
    assert later.handed == [b""], "timings of another GPU"


@pytest.mark.parametrize(
    ("option", "same", "other"),
    [
        ("version_compatible", [(0, "tensorrt 11.0", GPU)], [(0, VERSION, "B, sm 90, driver 1")]),
        ("hardware_compatible", [(0, VERSION, "B, sm 90, driver 1")], [(0, "tensorrt 11.0", GPU)]),
        ("refit", [(1, VERSION, GPU)], [(2, VERSION, GPU), (0, "tensorrt 11.0", GPU)]),
    ],
)
def test_what_an_option_makes_all_one_is_not_asked_for(
    files: list[OnnxFile],
    make_model: MakeModel,
    tmp_path: Path,
    folder: Path,
    option: str,
    same: list[tuple[int, str, str]],
    other: list[tuple[int, str, str]],
) -> None:
    files = [*files, read_onnx(make_model(tmp_path / "deeper.onnx", kernels=(3, 3)).path)]
    options = PlanOptions(**{option: True})

    def path(model: int, version: str, gpu: str) -> Path:
        return engine_path(folder, engine_facts(files[model], version, gpu, options))

    mine = path(0, VERSION, GPU)
    assert {path(*known) for known in same} == {mine}
    assert mine not in {path(*known) for known in other}
    assert mine != engine_path(folder, engine_facts(files[0], VERSION, GPU, PlanOptions()))


def test_an_engine_of_the_same_graph_is_fitted_and_built_again_only_where_it_does_not_fit(
    files: list[OnnxFile], folder: Path
) -> None:
    mine, theirs = (
        engine_facts(file, VERSION, GPU, PlanOptions(refit=True)) for file in reversed(files)
    )
    builder = Builder("theirs")
    builder.get(folder, theirs)
    assert builder.fitted == [], "it was built with these weights"
    fitting, stubborn = Builder("mine"), Builder("mine", fits=False)
    assert fitting.get(folder, mine) == "plan of\ntheirs"
    assert (fitting.fitted, fitting.handed) == (["plan of\ntheirs"], [])
    assert stubborn.get(folder, mine) == "plan of\nmine"
    assert (stubborn.fitted, stubborn.handed) == (["plan of\ntheirs"], [b""])


def test_those_who_ask_at_once_wait_for_one_build(files: list[OnnxFile], folder: Path) -> None:
    facts = engine_facts(files[0], VERSION, GPU, PlanOptions())
    builder, together = Builder("a"), threading.Barrier(4)

    def build(timings: bytes) -> Plan:
        time.sleep(0.2)  # long enough for the others to arrive
        return builder.build(timings)

    def ask(_: int) -> str | None:
        together.wait()
        return kept_engine(
            folder, facts, machine="one", load=builder.load, fit=builder.fit, build=build
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["plan of\na"] * 4
    assert len(builder.handed) == 1


def test_the_cache_is_for_its_owner_alone(folder: Path) -> None:
    folder.chmod(0o777)
    assert private_folder("tensorrt") == folder
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_somebody_else_owns_is_not_used(folder: Path) -> None:
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        folder.rmdir()
        folder.symlink_to("/usr")
    with pytest.raises(OutputError, match=r"tensorrt belongs to user .*Set GEODEPLOY_CACHE") as caught:
        private_folder("tensorrt")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot be made \(.*Set GEODEPLOY_CACHE"):
        private_folder("tensorrt")
