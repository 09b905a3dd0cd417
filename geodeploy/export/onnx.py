"""Write a tuned model as one ONNX file that says what it is."""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from geodeploy.errors import ParityError, RecipeError
from geodeploy.export.deepness import DeepnessModel, deepness_metadata, deepness_spec, stretch
from geodeploy.export.item import write_model_item
from geodeploy.export.merge import merge_checked
from geodeploy.export.options import ExportOptions
from geodeploy.export.parity import ParityReport, report_on
from geodeploy.item import item_path
from geodeploy.spec import METADATA_KEY, ModelSpec, Parity
from geodeploy.train.run import load_run
from geodeploy.writer import check_output

log = logging.getLogger(__name__)

OPSET = 20
"""Attention stays in plain parts, which every runtime has; LayerNormalization and Gelu are whole."""


def export_run(run: Path, output: Path, *, overwrite: bool, options: ExportOptions) -> ParityReport:
    """See `geodeploy.export.export`."""
    if options.range and not options.profile:
        raise RecipeError("--range says what 8-bit values stand for: it needs --profile deepness.")
    check_output(output, [], overwrite=overwrite)
    tuned = load_run(run)
    spec = deepness_spec(tuned.spec, options) if options.profile else tuned.spec
    pixels, labels = tuned.tiles.pixels, tuned.tiles.labels
    merged, merged_diff = merge_checked(tuned.model, tuned.spec, pixels, labels)
    log.info("Merged; the largest difference in a logit is %.2g. Writing ONNX ...", merged_diff)

    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        draft = folder / output.name
        write_onnx(DeepnessModel(merged, spec) if options.profile else merged, spec, draft)
        log.info("Comparing it with the tuned model on %d real tiles ...", len(pixels))
        report = report_on(
            tuned.model, tuned.spec, draft, pixels, labels, merged_max_abs_diff=merged_diff
        )
        (folder / "parity.json").write_text(report.to_json())
        if report.problem:
            # Under a name of its own: an older model may be there, whose report must stay beside it.
            refusal = output.with_suffix(".refused.json")
            (folder / "parity.json").replace(refusal)
            raise ParityError(
                f"The exported model differs from the tuned one: {report.problem}. It was not written; "
                f"{refusal} says more."
            )
        parity = Parity(
            argmax_agreement=report.exported.argmax_agreement,
            report_sha256=report.sha256,
            runtimes=report.covered,
        )
        spec = spec.model_copy(update={"parity": parity})
        describe(draft, spec, deepness_metadata(spec) if options.profile else None)
        parameters = sum(weights.numel() for weights in merged.parameters())
        item = write_model_item(spec, draft, parameters=parameters)
        (folder / "parity.json").replace(output.with_suffix(".parity.json"))
        item.replace(item_path(output))
        draft.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.profile:
        log.info(
            "Bands in this order: %s. From %s: %s",
            ", ".join(spec.band_names),
            spec.units,
            stretch(spec),
        )
    return report


def write_onnx(model: nn.Module, spec: ModelSpec, path: Path) -> None:
    """Trace ``model`` into ``path``: ``pixels`` to outputs, any batch, fixed tile, spec inside."""
    # A batch of two: the exporter takes a size of one for a constant.
    example = torch.zeros(2, len(spec.bands), spec.tile, spec.tile)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own code, nothing that we could change
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["pixels"],
            output_names=[spec.output],
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)
    describe(path, spec)


def describe(path: Path, spec: ModelSpec, more: Mapping[str, str] | None = None) -> None:
    """Write ``spec`` and ``more`` into the ONNX file; take out what the exporter noted of our code."""
    graph = onnx.load(path)
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]
    del graph.graph.metadata_props[:]
    onnx.helper.set_model_props(graph, {METADATA_KEY: spec.to_json(), **(more or {})})
    onnx.save(graph, path)
