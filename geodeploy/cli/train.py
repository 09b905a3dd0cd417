"""`geodeploy train`."""

from pathlib import Path
from typing import Annotated

import typer

from geodeploy.cli.training import AsJson, Overrides, Processes, Resume, RunOutput, print_report


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to tune, on what, how.")],
    output: RunOutput = None,
    overrides: Overrides = None,
    resume: Resume = False,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Tune a backbone on labelled scenes: recipe in, RUN folder out."""
    from geodeploy.train import train as run

    report = run(
        recipe,
        output,
        overrides=overrides or [],
        progress=True,
        resume=resume,
        processes=processes,
    )
    print_report(report, as_json=as_json)
