"""`geodeploy export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="A folder that `geodeploy train` made; several with --adapters."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file, or the folder for Triton or adapters. "
            "[default: <RUN>.onnx, <RUN>.pt2, models/<RUN> or adapters]",
        ),
    ] = None,
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters",
            help="base.onnx for RUNs of one backbone, and a small <RUN>.onnx_adapter for each.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that exists.")
    ] = False,
    to: Annotated[
        Literal["onnx", "tensorrt", "triton", "torch-export"] | None,
        typer.Option(
            "--to",
            help="onnx, tensorrt (the same, and an engine for this GPU in the cache), triton (a folder "
            "for its model repository) or torch-export (.pt2). [default: onnx]",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8", "int8-tensorrt"] | None,
        typer.Option(
            "--precision",
            help="fp32, for GPUs fp16, bf16 or int8-tensorrt, or for CPUs int8 and, where the "
            "processor has it, bf16; input and output stay float32. [default: fp32]",
        ),
    ] = None,
    profile: Annotated[
        Literal["deepness"] | None,
        typer.Option("--profile", help="deepness: runs in QGIS (Deepness) and in GeoDeep."),
    ] = None,
    limits: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LOW HIGH",
            help="With deepness, what 0 and 255 of 8-bit bands stand for, in the model's units. "
            "[default: what the training pixels lay in]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the parity report as JSON.")] = False,
) -> None:
    """Merge the adapter, write the model, and prove on real tiles that it does the same."""
    from geodeploy.cli.options import print_json, with_defaults
    from geodeploy.export import export as run_export
    from geodeploy.export import export_adapters
    from geodeploy.export.options import ExportOptions

    options = with_defaults(ExportOptions, to=to, precision=precision, profile=profile, range=limits)
    if adapters:
        if options != ExportOptions():
            raise typer.BadParameter(
                "--adapters writes plain ONNX: leave out what asks for another form."
            )
        reports = export_adapters(runs, output or "adapters", overwrite=overwrite)
    elif len(runs) > 1:
        raise typer.BadParameter(
            f"{len(runs)} RUNs are named: one is exported at a time, or --adapters."
        )
    else:
        reports = [run_export(runs[0], output, overwrite=overwrite, options=options)]
    if as_json:
        print_json(reports)
    else:
        typer.echo("\n".join(map(str, reports)))
