"""`geodeploy train`."""

from pathlib import Path
from typing import Annotated

import typer

from geodeploy.cli.training import Overrides, Resume, RunOutput


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to tune, on what, how.")],
    output: RunOutput = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Tune a backbone on labelled scenes: recipe in, RUN folder out."""
    from geodeploy.cli.options import print_json
    from geodeploy.train import train as run

    report = run(recipe, output, overrides=overrides or [], progress=True, resume=resume)
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
