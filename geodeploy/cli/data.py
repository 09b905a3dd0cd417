"""`geodeploy data`: looks at what a recipe would learn from."""

from pathlib import Path
from typing import Annotated

import typer

from geodeploy.cli.training import Overrides

data = typer.Typer(help="Look at the data of a recipe.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    pass


@data.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe of a training.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
) -> None:
    """Say what is wrong with the images and labels before a training; exit 1 if something is."""
    from geodeploy.cli.options import print_json
    from geodeploy.train import check_data

    report = check_data(recipe, overrides=overrides or [])
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
    if report.errors:
        raise typer.Exit(1)
