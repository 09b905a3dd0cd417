"""`geodeploy distil`."""

from pathlib import Path
from typing import Annotated

import typer

from geodeploy.cli.training import AsJson, Overrides, Processes, Resume, RunOutput, print_report


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
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Teach a small model what tuned ones know, on scenes with and without labels."""
    from geodeploy.train import distil as run

    report = run(
        recipe,
        output,
        teachers=teachers or [],
        overrides=overrides or [],
        progress=True,
        resume=resume,
        processes=processes,
    )
    print_report(report, as_json=as_json)
