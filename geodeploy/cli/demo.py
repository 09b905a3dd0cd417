"""`geodeploy demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A folder for the map, the picture and the report.")
    ] = Path("demo"),
) -> None:
    """Map the scene that comes along with the model that comes along."""
    from geodeploy.demo import demo as run

    typer.echo(run(output))
