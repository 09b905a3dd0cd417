"""`geodeploy export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `geodeploy train` made.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The ONNX file. [default: <name of the RUN>.onnx]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the parity report as JSON.")] = False,
) -> None:
    """Merge the adapter, write ONNX, and prove on real tiles that it does the same."""
    from geodeploy.cli.options import print_json
    from geodeploy.export import export as run_export

    report = run_export(run, output, overwrite=overwrite)
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
