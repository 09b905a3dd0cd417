"""`geodeploy doctor`."""

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this installation: what is there, what is broken, and how to mend it."""
    from geodeploy.cli.options import print_json
    from geodeploy.doctor import examine

    diagnosis = examine()
    if as_json:
        print_json([diagnosis])
    else:
        typer.echo(diagnosis)
    if diagnosis.broken:
        raise typer.Exit(1)
