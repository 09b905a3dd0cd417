"""`geodeploy predict`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def predict(
    scenes: Annotated[list[Path], typer.Argument(metavar="SCENE...", help="Rasters to map.")],
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="ONNX file or RUN; without it the model that comes along."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.onnx_adapter", help="What makes a model of a base (`export --adapters`)."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The map, or a folder for the maps of several scenes. [default: <stem>_map.tif]",
        ),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(
            help="skip leaves out, as nodata, what cannot be read or computed; exits 3. [default: stop]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace maps that exist.")] = False,
    overlap: Annotated[
        int | None,
        typer.Option(metavar="PX", help="What neighbouring tiles share. [default: the model's]"),
    ] = None,
    blend: Annotated[
        Literal["cosine", "flat", "crop"] | None,
        typer.Option(help="How overlapping tiles are weighed. [default: cosine]"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Tiles in one forward pass at most. [default: 8]")
    ] = None,
    runtime: Annotated[
        Literal["auto", "onnxruntime", "openvino", "tensorrt", "onnxruntime-tensorrt"] | None,
        typer.Option(
            help="What runs an ONNX file. [default: auto, the fastest that its parity report covers]"
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option(help="cuda is an error where it cannot be used. [default: auto]"),
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SCENE",
            help="The place at an earlier date, oldest first, for a model that takes several.",
        ),
    ] = None,
    date: Annotated[
        list[str] | None,
        typer.Option(
            metavar="2024-05-31",
            help="Which date of a NetCDF file or Zarr store; again for each that the model takes.",
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="B02,B03,...", help="The scene's bands in the model's order, by name or number."
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(metavar="S", help="Multiply values by S, after the file's own scale."),
    ] = None,
    offset: Annotated[float | None, typer.Option(metavar="O", help="Then add O.")] = None,
    gsd: Annotated[
        str | None,
        typer.Option(
            metavar="native|model|METRES", help="Resample the scene as it is read. [default: native]"
        ),
    ] = None,
    aoi: Annotated[
        str | None,
        typer.Option(
            metavar="AREA",
            help="Map an area alone: xmin,ymin,xmax,ymax[@CRS] or a GeoJSON or GeoPackage file.",
        ),
    ] = None,
    smooth: Annotated[
        int | None, typer.Option(metavar="N", help="Take the majority of N x N pixels; N is odd.")
    ] = None,
    sieve: Annotated[
        int | None,
        typer.Option(metavar="N", help="Give regions of fewer than N pixels to their neighbours."),
    ] = None,
    confidence: Annotated[
        bool,
        typer.Option("--confidence", help="A raster of the chosen class's probability beside the map."),
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="One of every class's probability, a band each.")
    ] = False,
    disagreement: Annotated[
        bool, typer.Option("--disagreement", help="One of how far overlapping tiles are apart.")
    ] = False,
    polygons: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The map's polygons: .gpkg, .geojson or .parquet. A suffix alone: beside the map.",
        ),
    ] = None,
    min_area: Annotated[
        float | None, typer.Option(metavar="M2", help="Leave out polygons of fewer square metres.")
    ] = None,
    simplify: Annotated[
        float | None,
        typer.Option(metavar="METRES", help="Simplify outlines; neighbours keep a common one."),
    ] = None,
    area: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="A table of the area of each class.")
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="A small picture with a legend.")
    ] = None,
    stac: Annotated[bool, typer.Option("--stac", help="A STAC item beside the map.")] = False,
    acquired: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="When the scene was taken, for --stac. [default: by its own item or name]",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON; a list for several scenes.")
    ] = False,
) -> None:
    """Map scenes of any size with a model: georeferenced class maps (COG)."""
    from geodeploy.cli.options import one_adapter, print_json, progress_bar, split_names, with_defaults
    from geodeploy.derived import DerivedOptions
    from geodeploy.predict import PredictOptions, predict_scenes
    from geodeploy.report import Report

    derived = with_defaults(
        DerivedOptions,
        polygons=polygons,
        min_area=min_area,
        simplify=simplify,
        area=area,
        preview=preview,
        stac=stac or None,
        acquired=acquired,
    )
    options = with_defaults(
        PredictOptions,
        smooth=smooth,
        sieve=sieve,
        confidence=confidence or None,
        probabilities=probabilities or None,
        disagreement=disagreement or None,
        derived=derived,
        overwrite=overwrite or None,
        on_error=on_error,
        adapter=one_adapter(adapter),
        overlap=overlap,
        blend=blend,
        batch=batch,
        runtime=runtime,
        device=device,
        earlier=earlier or None,
        date=date or None,
        bands=split_names(bands),
        scale=scale,
        offset=offset,
        gsd=gsd,
        aoi=aoi,
    )
    with progress_bar() as progress:
        reports = predict_scenes(scenes, model, output, options=options, progress=progress)
    if as_json:
        print_json(reports)
    else:
        typer.echo("\n".join(map(str, reports)))
    if not any(isinstance(report, Report) for report in reports):
        raise typer.Exit(1)
    if not all(report.is_whole for report in reports):
        raise typer.Exit(3)
