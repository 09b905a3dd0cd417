"""`geodeploy import`: models that others' programs tuned become RUNs."""

from pathlib import Path
from typing import Annotated

import typer

importing = typer.Typer(
    help="Bring in models that others' programs tuned.", no_args_is_help=True, rich_markup_mode=None
)


@importing.callback()
def _group() -> None:
    pass


@importing.command()
def terratorch(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Lightning's checkpoint, or its weights alone.")
    ],
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML that it was trained by.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The RUN folder.")],
    scenes: Annotated[
        list[Path] | None,
        typer.Option(
            "--scene",
            metavar="IMAGE",
            help="An image whose tiles prove an export. [default: those that CONFIG names]",
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Of the model's bands in order: blue,green,red,..."),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Of each band: 0.14,0.13,...")
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Standard deviation of each band.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="What values stored in images are multiplied with.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Of the classes from 0 on.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a regression's quantity, and its unit: canopy_height:m."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of the square the model takes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a RUN of a model that TerraTorch fine-tuned, whole or with LoRA."""
    from geodeploy.cli.options import print_json, split_names, with_defaults
    from geodeploy.imports import import_terratorch
    from geodeploy.imports.options import ImportOptions

    options = with_defaults(
        ImportOptions,
        scenes=tuple(scenes) if scenes else None,
        bands=split_names(bands),
        mean=split_names(mean),
        std=split_names(std),
        scale=scale,
        classes=split_names(classes),
        target=target,
        tile=tile,
    )
    report = import_terratorch(checkpoint, config, output, options=options)
    if as_json:
        print_json([report])
    else:
        typer.echo(report)
