"""`geodeploy inspect`."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    path: Annotated[Path, typer.Argument(metavar="MODEL|RUN|MAP", help="What to look into.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model, a RUN or a map is: bands, classes, origin, parity."""
    from geodeploy.cli.options import print_json
    from geodeploy.inspect import inspect as run

    found = run(path)
    if as_json:
        print_json([found])
    else:
        typer.echo(found)
