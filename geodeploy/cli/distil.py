"""`geodeploy distil`."""

from pathlib import Path
from typing import Annotated

import typer

from geodeploy.cli.training import Overrides, Resume, RunOutput


def distil(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The student, and its scenes.")],
    teachers: Annotated[
        list[Path] | None,
        typer.Option(
            "--teacher", metavar="RUN", help="A tuned model to learn from; several are averaged."
        ),
    ] = None,
    output: RunOutput = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Teach a small model what tuned ones know, on scenes with and without labels."""
    from geodeploy.cli.options import print_json
    from geodeploy.train import distil as run

    report = run(
        recipe,
        output,
        teachers=teachers or [],
        overrides=overrides or [],
        progress=True,
        resume=resume,
    )
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
