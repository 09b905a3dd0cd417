"""`geodeploy train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to tune, on what, how.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The RUN folder. [default: runs/<name of the recipe>]"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. training.lr=1e-3."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Tune a backbone on labelled scenes: recipe in, RUN folder out."""
    from geodeploy.cli.options import print_json
    from geodeploy.train import train as run

    report = run(recipe, output, overrides=overrides or [], progress=True)
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
