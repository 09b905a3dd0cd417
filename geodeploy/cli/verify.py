"""`geodeploy verify`."""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `geodeploy train` made.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="What was exported of it.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.onnx_adapter", help="The RUN's own, where MODEL is a base."),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Name the first layer that drifts, whether the model is refused or not."
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --bisect, what a value may be off by itself, of its root mean square. "
            "[default: that of the release, where the outputs do not hold]",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw the tile that differs most, and where."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare an exported model with its RUN, on the real tiles that the RUN keeps."""
    from geodeploy.cli.options import one_adapter, print_json
    from geodeploy.export import bisect as run_bisect
    from geodeploy.export import verify as run_verify

    if bisect and adapter:
        raise typer.BadParameter("--bisect looks into whole models: leave --adapter out.")
    if picture is not None and (bisect or adapter):
        raise typer.BadParameter("--picture is of a whole model: leave --bisect and --adapter out.")
    if tolerance is not None and not bisect:
        raise typer.BadParameter("--tolerance does nothing without --bisect.")
    if bisect:
        found = run_bisect(run, model, tolerance=tolerance)
        if as_json:
            print_json(found)
        else:
            typer.echo("\n".join(map(str, found)))
        if any(item.first_drift or item.problem for item in found):
            raise typer.Exit(1)
        return
    report = run_verify(run, model, adapter=one_adapter(adapter), picture=picture)
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
