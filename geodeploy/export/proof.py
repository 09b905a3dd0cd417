"""Hold an exported model against the tuned one; where it differs, say from which layer on."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from geodeploy.blend import softmax
from geodeploy.errors import ModelError, ParityError, RecipeError
from geodeploy.export.deepness import DeepnessModel
from geodeploy.export.drift import Bisection, Drift, bisect, reference_of
from geodeploy.export.merge import merge
from geodeploy.export.parity import (
    OtherRuntime,
    ParityReport,
    as_on_gpu,
    judging,
    logits_of,
    report_on,
    tolerance,
)
from geodeploy.export.worst import draw_worst
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.reference import Reference, pixels_to_keep, thinned
from geodeploy.spec import REFERENCE_KEY, ModelSpec
from geodeploy.train.run import Run, load_run
from geodeploy.writer import check_output


def verify_model(run: Path, model: Path, picture: Path | None) -> ParityReport:
    """See `geodeploy.export.verify`."""
    if picture:
        check_output(picture, [model], overwrite=True, flag="--picture")
    tuned = load_run(run)
    report = prove(tuned, merge(tuned.model), model)
    if picture:
        draw_worst(picture, tuned, model, report)
    proved: tuple[str, ...] = ()
    if model.suffix != ".pt2" and (parity := read_onnx(model).spec.parity):
        proved = parity.runtimes
    for item in _in_all_runtimes(report):
        if item.problem and (item is report or _name(item.runtime) in proved):
            raise ParityError(
                f"{model} is not the model of {run} in {item.runtime}: {item.problem}."
                + (f" {item.first_drift}." if item.first_drift else "")
            )
    return report


def bisect_model(run: Path, model: Path, allowed: float | None) -> list[Bisection]:
    """See `geodeploy.export.bisect`."""
    if allowed is not None and not 0 <= allowed < math.inf:  # NaN too
        raise RecipeError(
            f"--tolerance {allowed}: a share of 0 or more is needed, such as 0.01, or leave it out."
        )
    if model.suffix != ".onnx":
        raise ModelError(f"{model}: values are looked at in ONNX files. Export the RUN as one.")
    tuned = load_run(run)
    merged = merge(tuned.model)
    tiles = judging(tuned, model)
    report = report_on(tuned.model, tuned.spec, model, tiles.pixels, tiles.labels)
    return _bisections(
        tuned, merged, model, [item for item in _compared(report) if item.exported], allowed
    )


def prove(
    tuned: Run, merged: nn.Module, model: Path, *, merged_max_abs_diff: float | None = None
) -> ParityReport:
    """The report on the file ``model``, with the first layer that drifts in each runtime that fails.

    ``merged`` is the model of ``tuned`` that the file was, or should have been, made of.
    """
    tiles = judging(tuned, model)
    report = report_on(
        tuned.model,
        tuned.spec,
        model,
        tiles.pixels,
        tiles.labels,
        merged_max_abs_diff=merged_max_abs_diff,
    )
    failed = [
        item for item in _compared(report) if item.problem and item.exported and model.suffix == ".onnx"
    ]
    if not failed:
        return report
    found = _bisections(tuned, merged, model, failed, None)
    return _told(
        report, {item.runtime: told.first_drift for item, told in zip(failed, found, strict=True)}
    )


def reference_text(tuned: Run, spec: ModelSpec) -> dict[str, str]:
    """The metadata that a GPU is held against: real tiles, and outputs as ``spec`` has them."""
    pixels = pixels_to_keep(tuned.tiles.pixels)
    outputs = logits_of(tuned.model, pixels)
    if spec.output == "probabilities":
        outputs = softmax(outputs)
    return {REFERENCE_KEY: Reference(pixels, thinned(outputs)).to_text()}


def _bisections(
    tuned: Run,
    merged: nn.Module,
    model: Path,
    compared: Sequence[ParityReport | OtherRuntime],
    allowed: float | None,
) -> list[Bisection]:
    """The graph of ``model`` beside PyTorch on the tile in which each of ``compared`` is furthest off.

    Where the outputs hold, no value is held to more than ``allowed`` says.
    """
    file, tiles, found = as_on_gpu(read_onnx(model)), judging(tuned, model), []
    reference = reference_of(as_told(merged, file.spec), file.spec)
    for item in compared:
        assert item.exported is not None
        worst = item.exported.worst_tile
        tile = np.ascontiguousarray(tiles.pixels[worst : worst + 1])
        bound = tolerance(file.spec).relative_diff if item.problem else None
        found.append(
            bisect(
                reference(tile),
                file,
                tile,
                runtime=_name(item.runtime),
                tolerance=bound if allowed is None else allowed,
                problem=item.problem,
            )
        )
    return found


def as_told(merged: nn.Module, spec: ModelSpec) -> nn.Module:
    """``merged`` with what ``spec`` says of the graph's input and output."""
    return DeepnessModel(merged, spec) if spec.input_range else merged


def _told(report: ParityReport, drifts: dict[str, Drift | None]) -> ParityReport:
    others = tuple(
        item.model_copy(update={"first_drift": drifts.get(item.runtime) if item.problem else None})
        for item in report.other_runtimes
    )
    return report.model_copy(
        update={"first_drift": drifts.get(report.runtime), "other_runtimes": others}
    )


def _compared(report: ParityReport) -> list[ParityReport | OtherRuntime]:
    """Halves are told of as a GPU computes them, in which the release is decided."""
    return [report] if report.rounded else _in_all_runtimes(report)


def _in_all_runtimes(report: ParityReport) -> list[ParityReport | OtherRuntime]:
    return [report, *report.other_runtimes]


def _name(runtime: str) -> str:
    """Without its version."""
    return runtime.partition(" ")[0]
