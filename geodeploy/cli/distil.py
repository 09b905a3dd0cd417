"""`geodeploy distil`."""

from pathlib import Path
from typing import Annotated

import typer


def distil(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The student, and its scenes.")],
    teachers: Annotated[
        list[Path] | None,
        typer.Option(
            "--teacher", metavar="RUN", help="A tuned model to learn from; several are averaged."
        ),
    ] = None,
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
    """Teach a small model what tuned ones know, on scenes with and without labels."""
    from geodeploy.cli.options import print_json
    from geodeploy.train import distil as run

    report = run(recipe, output, teachers=teachers or [], overrides=overrides or [], progress=True)
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
