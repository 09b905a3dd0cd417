"""`geodeploy evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="ONNX file or RUN folder.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The scene.")],
    labels: Annotated[
        Path,
        typer.Argument(
            metavar="LABELS", help="Raster of class values or quantities, on the same or another grid."
        ),
    ],
    earlier: Annotated[list[Path] | None, typer.Option(metavar="SCENE", help="As in predict.")] = None,
    date: Annotated[list[str] | None, typer.Option(metavar="DATE", help="As in predict.")] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.onnx_adapter", help="As in predict.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option(metavar="B02,B03,...", help="The scene's bands in the model's order.")
    ] = None,
    scale: Annotated[float | None, typer.Option(metavar="S", help="Multiply the scene by S.")] = None,
    offset: Annotated[float | None, typer.Option(metavar="O", help="Then add O.")] = None,
    gsd: Annotated[
        str | None, typer.Option(metavar="native|model|METRES", help="As in predict.")
    ] = None,
    overlap: Annotated[int | None, typer.Option(metavar="PX", help="As in predict.")] = None,
    runtime: Annotated[
        Literal["auto", "onnxruntime", "openvino", "tensorrt", "onnxruntime-tensorrt"] | None,
        typer.Option(help="As in predict."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw the confusion matrix.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model against labels, over all pixels of the map that predict makes."""
    from geodeploy.cli.options import one_adapter, print_json, progress_bar, split_names, with_defaults
    from geodeploy.evaluate import evaluate as run
    from geodeploy.predict import PredictOptions

    options = with_defaults(
        PredictOptions,
        earlier=earlier or None,
        date=date or None,
        bands=split_names(bands),
        scale=scale,
        offset=offset,
        gsd=gsd,
        adapter=one_adapter(adapter),
        overlap=overlap,
        runtime=runtime,
    )
    with progress_bar() as progress:
        scores = run(model, image, labels, options=options, picture=picture, progress=progress)
    if as_json:
        print_json([scores])
    else:
        typer.echo(scores)
