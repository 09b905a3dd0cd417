"""Build a plan, a serialized TensorRT engine, from an ONNX file.

The network is strongly typed: the types in the graph are the precision, and no flag changes it.
Written for `tensorrt` 10 and 11, and for TensorRT for RTX (`tensorrt_rtx`), which builds
without a GPU too. Plans of `tensorrt` are untested: they need a GPU to be built.
"""

import importlib
import importlib.util
import logging
import os
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from geodeploy.errors import ModelError, RecipeError, first_line, missing_extra
from geodeploy.runtime.graph import OnnxFile, input_shape
from geodeploy.spec import first_problem

log = logging.getLogger(__name__)

TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
OPTIONS = "GEODEPLOY_TENSORRT"
"""The variable that names a TOML file of `PlanOptions`: an engine that `export` built is found by
`predict` and the service only if all go by the same."""


class PlanOptions(BaseModel):
    """What a plan is built for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch: PositiveInt = 4
    """Tiles at once at most, which it is tuned for; fewer run too. `predict` keeps two such batches at
    work, 8 tiles in all."""
    version_compatible: bool = False
    """Loads in later versions of TensorRT too; holds a small runtime of its own, which is code."""
    hardware_compatible: bool = False
    """Runs on all GPUs from Ampere on, somewhat slower."""
    refit: bool = False
    """Takes other weights of the same shapes without being built again."""
    workspace_bytes: PositiveInt | None = None
    """Scratch memory on the GPU at most; None for what TensorRT takes by itself."""


def plan_options() -> PlanOptions:
    """What the file that ``GEODEPLOY_TENSORRT`` names says; the usual ones without.

    Raises:
        RecipeError: it cannot be read, or says what is no option.
    """
    if not (name := os.environ.get(OPTIONS)):
        return PlanOptions()
    try:
        return PlanOptions.model_validate(tomllib.loads(Path(name).read_text()))
    except OSError as error:
        raise RecipeError(f"{OPTIONS}={name} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        problem = first_problem(error)
        raise RecipeError(
            f"{name}: {problem}. The options are {', '.join(PlanOptions.model_fields)}."
        ) from error
    except ValueError as error:  # no TOML, or no text
        raise RecipeError(f"{name} is no TOML ({first_line(error)}).") from error


class Plan(NamedTuple):
    """What a build gives."""

    content: bytes
    timings: bytes
    """Of the kernels that were tried; a later build on the same GPU need not try them again."""


def import_tensorrt() -> Any:
    """`tensorrt`, or `tensorrt_rtx` where only that is installed, which is said.

    Raises:
        MissingExtraError: neither is there.
    """
    for name in (TENSORRT, RTX):
        if importlib.util.find_spec(name):
            if name == RTX:
                log.warning(
                    "TensorRT for RTX (%s) stands in for TensorRT, which is not installed: pip install "
                    "'geodeploy-eo[tensorrt]'.",
                    RTX,
                )
            try:
                return importlib.import_module(name)
            except ImportError as error:
                raise ModelError(
                    f"{name} is installed but broken ({first_line(error)}). Install it again, as "
                    "https://docs.nvidia.com/deeplearning/tensorrt says."
                ) from error
    raise missing_extra("tensorrt", TENSORRT)


def build_plan(trt: Any, file: OnnxFile, options: PlanOptions, *, timings: bytes = b"") -> Plan:
    """The plan of ``file`` for the GPU of this machine; for RTX, for every GPU of that kind.

    Minutes for a large model. ``trt`` is what `import_tensorrt` gives.

    Raises:
        ModelError: TensorRT cannot take the graph; the message has its first reason.
    """
    logger = _log(trt)
    builder = trt.Builder(logger)
    # Version 11 has networks of no other kind, and RTX never had.
    old = trt.__name__ == TENSORRT and int(trt.__version__.split(".")[0]) < 11
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if old else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(file.content, str(file.path)):
        reasons = [parser.get_error(place).desc() for place in range(parser.num_errors)]
        raise _refused(trt, file, reasons or logger.told)
    config = _config(trt, builder, file, options, network.get_input(0).name)
    # RTX chooses its kernels when a plan is run.
    cache = None if trt.__name__ == RTX else set_timings(config, timings)
    # What is wrong is logged, and None is returned.
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise _refused(trt, file, logger.told)
    told = b"" if cache is None else bytes(config.get_timing_cache().serialize())
    return Plan(bytes(content), told)


def _config(trt: Any, builder: Any, file: OnnxFile, options: PlanOptions, name: str) -> Any:
    config = builder.create_builder_config()
    tile = input_shape(file.spec)
    profile = builder.create_optimization_profile()
    profile.set_shape(name, (1, *tile), (options.batch, *tile), (options.batch, *tile))
    config.add_optimization_profile(profile)
    # Rounded to 10 bits of fraction, float32 would be the least of our precisions.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    return config


def set_timings(config: Any, timings: bytes) -> Any:
    """Hand over what earlier builds measured; what is damaged or of another GPU is begun afresh.

    Returns the cache, which must live as long as the build; None where TensorRT takes none.
    """
    for earlier in (timings, b""):
        cache = config.create_timing_cache(earlier)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, which `TensorRT` would print."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.told.append(message)

    return Log()


def _refused(trt: Any, file: OnnxFile, reasons: list[str]) -> ModelError:
    reason = first_line(RuntimeError(reasons[0])) if reasons else "it gives no reason"
    return ModelError(
        f"{file.path}: {trt.__name__} {trt.__version__} cannot build it ({reason}). Take --runtime "
        "onnxruntime."
    )
