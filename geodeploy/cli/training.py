"""What the commands that train are given alike. Nothing heavy: `--help` imports it."""

from pathlib import Path
from typing import Annotated

import typer

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
