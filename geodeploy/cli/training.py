"""What the commands that train have alike. Nothing heavy: `--help` imports it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from geodeploy.train.report import TrainReport

RunOutput = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="The RUN folder. [default: runs/<name of the recipe>]"),
]
"""Where a training goes."""
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. training.lr=1e-3."),
]
"""What is said in place of the recipe."""
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep the state beside the RUN, and go on from it after a kill."),
]
"""Whether a training can be gone on with."""
Processes = Annotated[
    int,
    typer.Option(
        "--processes", min=1, metavar="N", help="Share each batch among N processes, a GPU each."
    ),
]
"""How many train together."""
AsJson = Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")]
"""How the report is printed."""


def print_report(report: "TrainReport", *, as_json: bool) -> None:
    """Print it once, by the first of the processes that a launcher may have begun."""
    from geodeploy.cli.options import print_json
    from geodeploy.train.processes import is_first

    if not is_first():
        return
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
