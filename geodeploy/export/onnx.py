"""Write a tuned model in a file that says what it is: ONNX by itself or for Triton, or a program."""

import ast
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from geodeploy.errors import OutputError, ParityError, RecipeError
from geodeploy.export import triton
from geodeploy.export.deepness import deepness_metadata, deepness_spec, stretch
from geodeploy.export.half import write_half
from geodeploy.export.int8 import INT8, write_int8
from geodeploy.export.item import write_model_item
from geodeploy.export.merge import merge_checked
from geodeploy.export.options import ExportOptions
from geodeploy.export.parity import AIM, ParityReport, PutBack, Quantisation, compare, judging
from geodeploy.export.program import onnx_program, trace, write_program
from geodeploy.export.progress import Steps
from geodeploy.export.proof import as_told, prove, reference_text
from geodeploy.export.threads import one_thread
from geodeploy.export.worst import draw_worst
from geodeploy.item import item_path
from geodeploy.runtime import hold
from geodeploy.runtime.cuda import Cuda
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.plan import import_tensorrt, plan_options
from geodeploy.runtime.tensorrt import TensorRtSession
from geodeploy.spec import METADATA_KEY, ModelSpec, Parity
from geodeploy.train.run import Run, load_run
from geodeploy.writer import check_new_folder, check_output

log = logging.getLogger(__name__)

_FILES = {
    "onnx": (".onnx", "an ONNX file"),
    "tensorrt": (".onnx", "an ONNX file"),
    "torch-export": (".pt2", "a program of torch.export"),
}


@one_thread()
def export_run(run: Path, output: Path, *, overwrite: bool, options: ExportOptions) -> ParityReport:
    """See `geodeploy.export.export`."""
    _check_options(options)
    _check_place(output, options, overwrite=overwrite)
    steps = Steps(log, 4 if options.precision == "fp32" else 5)
    steps.begin(f"loading {run}")
    tuned = load_run(run)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        if options.to == "triton":
            model = folder / "model"
            (model / triton.MODEL).parent.mkdir(parents=True)
            spec, report = _write_proved(tuned, model / triton.MODEL, output, options, steps)
            triton.write_beside(model, output.name, spec, tuned.tiles.pixels[0])
            _replace_folder(model, output, folder / "old")
        else:
            spec, report = _write_proved(tuned, folder / output.name, output, options, steps)
            for beside in (parity_path, item_path, Path):  # the model last: it makes them true
                beside(folder / output.name).replace(beside(output))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    forget_refusal(output)
    log.info("Wrote %s in %.0f s.", output, steps.seconds)
    if options.to == "tensorrt":
        hold(read_onnx(output), TensorRtSession).close()
    if options.profile:
        bands = ", ".join(spec.band_names)
        log.info("Bands in this order: %s. From %s: %s", bands, spec.units, stretch(spec))
    return report


def _write_proved(
    tuned: Run, draft: Path, output: Path, options: ExportOptions, steps: Steps
) -> tuple[ModelSpec, ParityReport]:
    """Write the model to ``draft``, report and item beside it, if it does the same as ``tuned``.

    Else only the report is left, as ``<name>.refused.json`` beside ``output``, and a picture of the
    worst tile: under names of their own, for an older model may be there, whose report must stay.
    """
    spec = tuned.spec.model_copy(update={"precision": options.precision})
    if spec.task != "segmentation" and (options.profile or options.precision in INT8):
        flag = f"--profile {options.profile}" if options.profile else f"--precision {options.precision}"
        raise RecipeError(f"{flag} is for models of classes of pixels: leave it out.")
    if options.precision != "fp32" and spec.targets:
        raise RecipeError(f"--precision {options.precision} is for models of classes: leave it out.")
    if options.profile:
        spec = deepness_spec(spec, options)
    pixels, labels = tuned.tiles.pixels, tuned.tiles.labels
    quantisation = None
    steps.begin("merging the adapter, on a copy")
    merged, merged_diff = merge_checked(tuned.model, tuned.spec, pixels, labels)
    steps.begin(f"tracing the merged model, whose outputs differ by {merged_diff:.2g} at most")
    if options.to == "torch-export":
        program = trace(merged, spec)
        write_program(program, spec, draft)
    else:
        modules = write_onnx(as_told(merged, spec), spec, draft)
        if spec.precision != "fp32":
            steps.begin(f"bringing the graph to {spec.precision}")
        if spec.precision in INT8:
            quantisation = _write_int8(tuned, spec, draft, modules)
        elif spec.precision != "fp32":
            write_half(draft, spec, pixels)
    judges = len(judging(tuned, draft).pixels)
    steps.begin(f"comparing it with the tuned model on {judges} real tiles")
    report = prove(tuned, merged, draft, merged_max_abs_diff=merged_diff)
    report = report.model_copy(update={"quantisation": quantisation})
    if report.problem:
        refusal = refusal_path(output)
        parity_path(draft).write_text(report.to_json())
        parity_path(draft).replace(refusal)
        draw_worst(refusal.with_suffix(".png"), tuned, draft, report)
        drift = f" {report.first_drift}." if report.first_drift else ""
        raise ParityError(
            f"The exported model differs from the tuned one: {report.problem}.{drift} It was not "
            f"written; {refusal} says more, and the picture beside it shows the worst tile."
        )
    parity_path(draft).write_text(report.to_json())
    parity = Parity(
        argmax_agreement=report.exported.argmax_agreement,
        spread_diff=report.exported.spread_diff,
        probability_diff=report.exported.probability_diff,
        report_sha256=report.sha256,
        runtimes=report.covered,
    )
    spec = spec.model_copy(update={"parity": parity})
    if options.to == "torch-export":
        write_program(program, spec, draft)
    else:
        foreign = deepness_metadata(spec) if options.profile else {}
        describe(draft, spec, foreign | reference_text(tuned, spec))
    write_model_item(spec, draft, parameters=sum(weights.numel() for weights in merged.parameters()))
    return spec, report


def _write_int8(tuned: Run, spec: ModelSpec, draft: Path, modules: Mapping[str, str]) -> Quantisation:
    """Make the graph in ``draft`` compute in int8, by half of the tiles of ``tuned``."""
    if len(tuned.tiles.pixels) < 2:
        raise RecipeError(
            f"{tuned.path} keeps one tile: int8 needs one for its ranges and another to be judged by. "
            f"Train with a larger validation area, or leave --precision {spec.precision} out."
        )
    tiles = tuned.tiles.every_other(0)
    log.info("Taking ranges for int8 from %d of the RUN's tiles ...", len(tiles.pixels))

    def holds(expected: NDArray[np.float32], found: NDArray[np.float32]) -> bool:
        return AIM.problem(compare(expected, found, tiles.labels, spec)) is None

    made = write_int8(draft, spec, tiles.pixels, holds)
    put_back = (
        PutBack(module=modules.get(layer.output, layer.output), drift=layer.drift or 0.0)
        for layer in made.float32
    )
    return Quantisation(
        calibrated_on=len(tiles.pixels),
        int8_layers=len(made.int8),
        float32_layers=tuple(put_back),
    )


def parity_path(model: Path) -> Path:
    """Where the report of ``model`` lies."""
    return model.with_suffix(".parity.json")


def refusal_path(output: Path) -> Path:
    """Where the report of a model lies that was not written to ``output``."""
    return output.with_suffix(".refused.json")


def forget_refusal(output: Path) -> None:
    """Remove what an earlier refusal left, for it would be taken to be of the model written since."""
    refusal = refusal_path(output)
    for beside in (refusal, refusal.with_suffix(".png")):
        beside.unlink(missing_ok=True)


def _check_options(options: ExportOptions) -> None:
    if options.precision == "int8" and options.to == "tensorrt":
        raise RecipeError("--precision int8 is for CPUs: for TensorRT take int8-tensorrt.")
    if options.to == "tensorrt":  # before any work
        plan_options()
        import_tensorrt()
        Cuda()
    if options.range and not options.profile:
        raise RecipeError("--range says what 8-bit values stand for: it needs --profile deepness.")
    if options.profile and options.to != "onnx":
        raise RecipeError(f"--profile {options.profile} is an ONNX file: leave --to {options.to} out.")
    if options.precision != "fp32" and (options.profile or options.to == "torch-export"):
        form = f"--profile {options.profile}" if options.profile else f"--to {options.to}"
        raise RecipeError(f"{form} is float32: leave --precision {options.precision} out.")


def _check_place(output: Path, options: ExportOptions, *, overwrite: bool) -> None:
    if options.to == "triton":
        if not (overwrite and (output / triton.CONFIG).exists()):
            check_new_folder(output)
        output.absolute().parent.mkdir(exist_ok=True)
        return
    suffix, kind = _FILES[options.to]
    if output.suffix != suffix:
        raise OutputError(f"{output}: the name of {kind} ends in {suffix}.")
    # quick.onnx and quick.pt2 would have one report and one item.
    for written in (output, parity_path(output), item_path(output)):
        check_output(written, [], overwrite=overwrite)


def _replace_folder(new: Path, output: Path, aside: Path) -> None:
    """Put the folder ``new`` in the place of ``output``, whose old content goes ``aside``."""
    if output.exists():
        output.rename(aside)
    try:
        new.rename(output)
    except OSError:
        if aside.exists():
            aside.rename(output)
        raise


def write_onnx(model: nn.Module, spec: ModelSpec, path: Path) -> dict[str, str]:
    """Trace ``model`` into ``path``: ``pixels`` to outputs, any batch, fixed tile, spec inside.

    Returns the part of ``model`` that each value of the graph was made of.
    """
    program = onnx_program(model, spec)
    program.save(str(path), external_data=False)
    describe(path, spec)
    return {
        name: ast.literal_eval(item.value)[-2]  # the last is the operation
        for node in program.model_proto.graph.node
        for item in node.metadata_props
        for name in node.output
        if item.key == "pkg.torch.onnx.name_scopes"
    }


def describe(path: Path, spec: ModelSpec, more: Mapping[str, str] | None = None) -> None:
    """Write ``spec`` and ``more`` into the ONNX file; take out what the exporter noted of our code."""
    model = onnx.load(path)
    strip(model)
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json(), **(more or {})})
    onnx.save(model, path)


def strip(model: onnx.ModelProto) -> None:
    """Take out what the exporter noted of our code."""
    graph = model.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.value_info, *graph.input, *graph.output):
        del value.metadata_props[:]
    del graph.metadata_props[:]
