"""Run a model on tiles, whatever runs it. Nothing outside this package knows which runtime does."""

import logging
import platform
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError, ModelError, ParityError, require
from geodeploy.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from geodeploy.runtime.adapter import Base
    from geodeploy.runtime.graph import OnnxFile

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Runtime = Literal["auto", "onnxruntime", "openvino", "tensorrt", "onnxruntime-tensorrt"]
"""``tensorrt`` is our own use of TensorRT, ``onnxruntime-tensorrt`` that of ONNX Runtime."""


class Session(Protocol):
    """A model, loaded and ready; any number of threads may run it."""

    spec: ModelSpec
    name: str
    """Of the runtime, with its version."""
    device: str
    """Where it really runs: ``cpu`` or ``cuda``."""
    precision: str
    sha256: str
    """Of the model's file or files."""
    streams: int
    """How many callers it works for at once, each in its own thread; one is served by all of them."""

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of pixels (B, C, tile, tile), finite and in the spec's units.

        They are (B, K, tile, tile), or (B, K) where the model answers for whole tiles.
        """
        ...

    def close(self) -> None:
        """Give back what the model holds."""
        ...


def open_session(
    model: Path,
    *,
    adapter: Path | None = None,
    runtime: Runtime = "auto",
    device: Device = "auto",
    threads: int | None = None,
    batch: int | None = None,
) -> Session:
    """Load ``model``: an ONNX file with its spec inside or beside it, or a RUN folder.

    Args:
        model: The file or folder.
        adapter: What makes a model of ``model``, if that is a base.
        runtime: What runs an ONNX file; ``auto`` takes the fastest that its parity report covers. A RUN
            runs in PyTorch.
        device: ``auto`` takes a GPU if the installed runtime can use one.
        threads: For the model's own arithmetic; None for as many as the process may use.
        batch: Tiles that will be in work at once, among which threads of a processor are shared out;
            None for what `predict` takes by itself. Any number run.

    Raises:
        ModelError: it is neither, or it cannot be loaded.
        SpecError: its description is absent, broken or newer than this program.
        DeviceError: the device asked for is not there, or no such runtime or device is known.
        ParityError: its parity report does not cover the runtime asked for, or on this GPU it does not
            do what the tuned model does.
        MissingExtraError: the runtime is not installed.
    """
    _check_is_one_of("runtime", runtime, Runtime)
    _check_is_one_of("device", device, Device)
    if not model.exists():
        raise ModelError(
            f"The model {model} does not exist. Give an ONNX file made by `geodeploy export`, or a RUN."
        )
    if adapter is not None:
        base = open_base(model, runtime=runtime, device=device, threads=threads, batch=batch)
        return base.session(adapter)
    if model.is_dir():
        if runtime != "auto":
            raise ModelError(
                f"{model} is a RUN, which PyTorch runs. Leave --runtime {runtime} out, or make an ONNX "
                "file of it with `geodeploy export`."
            )
        from geodeploy.runtime.torch import TorchSession

        return TorchSession(model, device=device, threads=threads)
    if model.suffix == ".pt2":
        raise ModelError(
            f"{model} is a program of torch.export, which PyTorch runs without geodeploy. Give the RUN "
            "that it was made of, or an ONNX file."
        )
    from geodeploy.runtime.graph import read_onnx

    file = read_onnx(model)
    if runtime in ("tensorrt", "onnxruntime-tensorrt"):
        if device == "cpu":
            raise DeviceError(
                f"--runtime {runtime} needs a GPU. Leave --device cpu out, or the runtime."
            )
        if file.spec.precision == "int8":
            raise ModelError(
                f"{model} is in int8 for CPUs, whose values are unsigned, and TensorRT has signed ones "
                "alone. Export the RUN with --precision int8-tensorrt, or take --runtime onnxruntime."
            )
    if runtime == "tensorrt":
        from geodeploy.runtime.tensorrt import TensorRtSession

        return hold(file, TensorRtSession)
    if _takes_openvino(model, file.spec, runtime, device):
        from geodeploy.runtime.openvino import OpenVinoSession

        return OpenVinoSession(file, threads=threads, bf16=_takes_bf16(file), batch=batch)
    from geodeploy.runtime.onnx import OnnxSession

    with_tensorrt = runtime == "onnxruntime-tensorrt"

    def open_file(file: "OnnxFile") -> OnnxSession:
        return OnnxSession(file, device=device, threads=threads, tensorrt=with_tensorrt, batch=batch)

    return hold(file, open_file)


def hold(file: "OnnxFile", open_file: "Callable[[OnnxFile], Session]") -> Session:
    """The session of ``file``; on a GPU only if it does there what the tuned model does.

    Halves that go wrong on this GPU are computed in float32 instead, which is said aloud.

    Raises:
        ParityError: it goes wrong in float32 too.
    """
    session = open_file(file)
    if session.device == "cpu":  # the report covers it
        return session
    from geodeploy.runtime.reference import difference, reference_of

    reference = reference_of(file)
    if reference is None:
        log.warning("%s keeps no tiles to be tried on this GPU: nothing proves it here.", file.path)
        return session
    problem = difference(session, reference)
    if problem is None:
        return session
    session.close()
    precision = file.spec.precision
    if precision not in ("fp16", "bf16"):
        # Adapters run in no other runtime.
        advice = "Take " if file.spec.base_sha256 else "Take another --runtime, or "
        raise ParityError(
            f"{file.path} does not do what the tuned model does in {session.name} on this GPU: "
            f"{problem}. {advice}--device cpu."
        )
    log.warning(
        "%s in %s is refused in %s on this GPU: %s. It is computed in float32 instead.",
        file.path,
        precision,
        session.name,
        problem,
    )
    require("gpu", ("onnx",))
    from geodeploy.runtime.float32 import widened

    session = hold(widened(file), open_file)
    session.sha256 = file.sha256
    return session


def open_base(
    path: Path,
    *,
    runtime: Runtime = "auto",
    device: Device = "auto",
    threads: int | None = None,
    batch: int | None = None,
) -> "Base":
    """The base at ``path``, which ONNX Runtime runs: no other runtime takes adapters.

    Raises:
        ModelError: it is no base, or another runtime is asked for.
        DeviceError: the device asked for is not there.

    On a GPU each of its models is held against the tiles that its adapter keeps, as by `hold`.
    """
    from geodeploy.runtime.adapter import Base

    _check_is_one_of("device", device, Device)
    if path.is_dir():
        raise ModelError(f"{path} is a RUN, whose adapter is its own: leave --adapter out.")
    if runtime not in ("auto", "onnxruntime"):
        raise ModelError(f"Adapters run in ONNX Runtime: leave --runtime {runtime} out.")
    return Base(path, device=device, threads=threads, batch=batch)


def _takes_openvino(model: Path, spec: ModelSpec, runtime: Runtime, device: Device) -> bool:
    """Whether OpenVINO runs ``model``, not ONNX Runtime.

    ``auto`` goes by a rule, not by a stopwatch: the two differ in the last bits of a logit, and the
    same job has to give the same map. OpenVINO was the faster one wherever both were measured, which
    was on x86 (bench/runtimes.py).
    """
    proved = spec.parity.runtimes if spec.parity else ()
    if runtime == "openvino":
        if device == "cuda":
            raise DeviceError("OpenVINO runs on the CPU. Take --device cpu, or --runtime onnxruntime.")
        if spec.parity and "openvino" not in proved:
            advice = "Export it again where openvino is installed"
            if spec.precision == "int8-tensorrt":
                advice = "Export the RUN with --precision int8"
            if spec.precision != "bf16":  # which ONNX Runtime has on GPUs alone
                advice += ", or take --runtime onnxruntime"
            raise ParityError(
                f"Nothing proves that {model} does the same in OpenVINO: its parity report covers "
                f"{', '.join(proved) or 'GPUs'}. {advice}."
            )
        if not spec.parity:
            log.warning("%s has no parity report: nothing proves what it does in OpenVINO.", model)
        return True
    if runtime != "auto" or device == "cuda" or not proved:
        return False
    from geodeploy.runtime.driver import is_loaded

    may_use_gpu = device == "auto" and _is_installed("onnxruntime-gpu") and is_loaded()
    if may_use_gpu or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if "openvino" not in proved:
        log.info("Running %s in ONNX Runtime: its parity report does not cover OpenVINO.", model.name)
        return False
    if find_spec("openvino") is None:
        log.info("OpenVINO would run %s faster: pip install 'geodeploy-eo[cpu]'.", model.name)
        return False
    log.info("Running %s in OpenVINO, the fastest that its parity report covers.", model.name)
    return True


def _takes_bf16(file: "OnnxFile") -> bool:
    """Whether OpenVINO computes in bfloat16 what is not int8 in ``file``."""
    from geodeploy.runtime.openvino import IN_BF16, MAY_TAKE_BF16, has_bf16

    if file.spec.precision not in MAY_TAKE_BF16 or not has_bf16():
        return False
    if file.spec.parity and IN_BF16 in file.spec.parity.runtimes:
        log.info("%s is computed in bfloat16, in which its parity report covers it.", file.path.name)
        return True
    log.info(
        "%s is computed in float32: its parity report does not cover bfloat16, in which this processor "
        "is faster. Export it again on this machine.",
        file.path.name,
    )
    return False


def _check_is_one_of(name: str, given: str, kind: Any) -> None:
    """Whoever misspells what is to run a model must not get another one in silence."""
    if given not in get_args(kind):
        raise DeviceError(f"{name}={given!r} is none of {', '.join(get_args(kind))}.")


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
