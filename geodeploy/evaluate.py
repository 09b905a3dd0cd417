"""Score a model against labels, over the map that `predict` makes: what is scored is what ships."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geodeploy.cells import CellGrid
from geodeploy.dataset import open_dataset, reading
from geodeploy.engine import asked_gsd_m, map_scene, opened
from geodeploy.errors import AreaError, LabelError, RecipeError
from geodeploy.labels import IGNORED, present_classes
from geodeploy.options import PredictOptions, Progress
from geodeploy.raster import open_raster, same_place
from geodeploy.runtime import open_session
from geodeploy.scores import AnyScores, ScoreCount, Scores
from geodeploy.spec import NODATA, ModelSpec
from geodeploy.tasks import Task, task_of
from geodeploy.writer import check_output

_ROWS = 512


def evaluate(
    model: Path | str,
    image: Path | str,
    labels: Path | str,
    *,
    options: PredictOptions | None = None,
    picture: Path | str | None = None,
    progress: Progress | None = None,
) -> AnyScores:
    """The scores of ``model`` on ``image``, over all labelled pixels.

    Args:
        model: An ONNX file or a RUN.
        image: The scene.
        labels: A raster of class values, or of quantities, a band each; on another grid it is brought
            to the scene's (nearest). For what whole tiles show, class values too: the model says which
            share of a tile counts.
        options: How to run the model, as for `predict`.
        picture: Where to draw the confusion matrix, of classes alone.
        progress: Told of the rows as they are mapped.

    Raises:
        LabelError: a value is no class or out of range, or no label lies on the image.
        RecipeError: a confusion matrix is asked for of what has none.
        GeodeployError: what `predict` raises.
    """
    image, labels = Path(image), Path(labels)
    options = options or PredictOptions()
    if picture is not None:
        sources = [*options.earlier, image, labels, Path(model)]
        check_output(Path(picture), sources, overwrite=True, flag="--picture")
    if options.aoi is not None:
        raise AreaError("A model is scored on all labels: cut the labels to the area instead of --aoi.")
    session = open_session(
        Path(model),
        adapter=options.adapter,
        runtime=options.runtime,
        device=options.device,
        threads=options.threads,
        batch=options.batch,
    )
    with (
        closing(session),
        tempfile.TemporaryDirectory(prefix="geodeploy-") as folder,
        open_dataset(labels) as label_file,
    ):
        task = task_of(session.spec)
        bands = task.label_bands(label_file)
        if picture is not None and session.spec.task != "segmentation":
            raise RecipeError("--picture draws a confusion matrix, of classes of pixels: leave it out.")
        found = Path(folder) / "map.tif"
        with _on_grid_of(image, label_file, session.spec, options) as aligned:
            map_scene(image, session, found, options, progress, keep=False)
            with rasterio.open(found) as mapped:
                if session.spec.whole_tiles:
                    count = _compare_cells(mapped, aligned, image, label_file, session.spec, options)
                else:
                    count = _compare(mapped, aligned, bands, task, label_file)
        scores = count.scores()
        if not scores.pixels:
            raise LabelError(
                f"{labels.name} has no label where the scene has data: nothing can be scored. Do both "
                "show the same place, with the right CRS?"
            )
    if picture is not None and isinstance(scores, Scores):
        from geodeploy.pictures import draw_confusion

        draw_confusion(scores, Path(picture))
    return scores


def _compare(mapped: Any, aligned: Any, bands: list[int], task: Task, labels: Any) -> ScoreCount:
    """What the scores follow from over all pixels, a band of rows at a time.

    ``aligned`` are the ``labels`` on the grid of the map.
    """
    source, count = Path(labels.name), task.count()
    for row in range(0, mapped.height, _ROWS):
        window = Window(0, row, mapped.width, min(_ROWS, mapped.height - row))
        with reading(source, window):
            stored = aligned.read(bands, window=window, masked=True)
        truth, found = task.truth(labels, stored), task.found(mapped.read(window=window))
        count.add(truth, found)
    return count


def _compare_cells(
    mapped: Any, aligned: Any, image: Path, labels: Any, spec: ModelSpec, options: PredictOptions
) -> ScoreCount:
    """The same over all cells, each of which is scored against the labels in its whole tile."""
    task, overlap = task_of(spec), spec.overlap if options.overlap is None else options.overlap
    count, classes = task.count(), len(spec.classes)
    assert spec.presence is not None
    with opened(image, spec, options) as scene:
        grid = CellGrid(scene.height, scene.width, spec.tile, overlap)
        for place, rows in enumerate(grid.rows):
            window = Window(0, rows.start, scene.width, rows.stop - rows.start)
            with reading(Path(labels.name), window):
                stored = aligned.read(task.label_bands(labels), window=window, masked=True)
            positions = task.truth(labels, stored)[0]
            positions[~scene.read(window).valid] = IGNORED
            truth = [
                present_classes(positions[:, cols.start : cols.stop], classes, spec.presence)
                for cols in grid.cols
            ]
            found = task.found(mapped.read(window=Window(0, place, mapped.width, 1)))
            count.add(np.stack(truth, axis=1), found[:, 0])
    return count


@contextmanager
def _on_grid_of(image: Path, labels: Any, spec: ModelSpec, options: PredictOptions) -> Iterator[Any]:
    """``labels`` as they lie on the grid of ``image``."""
    with open_raster(
        image,
        dates=options.date,
        timesteps=1 if options.earlier else spec.timesteps,
        band_names=spec.band_names,
        select=options.bands,
        gsd_m=asked_gsd_m(options, spec),
    ) as scene:
        crs, transform, width, height = scene.crs, scene.transform, scene.width, scene.height
    same_size = (labels.width, labels.height) == (width, height)
    if (
        same_size
        and (crs == labels.crs or crs is None or labels.crs is None)
        and (
            crs is None or labels.crs is None or same_place(labels.transform, transform, height, width)
        )
    ):
        yield labels
        return
    if crs is None or labels.crs is None:
        raise LabelError(
            f"{Path(labels.name).name} has {labels.height} x {labels.width} pixels, the scene "
            f"{height} x {width}, and {'the scene has' if crs is None else 'the labels have'} no CRS "
            "to bring them together by. Give both a CRS, or labels of the scene's size."
        )
    # A tag that is a listed class is no nodata, and must not fill what lies beyond the labels.
    nodata = None if labels.nodata in spec.class_values else labels.nodata
    beyond: dict[str, Any] = {"nodata": NODATA if nodata is None else nodata}
    if spec.targets:  # no number of their own is left over to say it
        beyond = {"nodata": np.nan, "dtype": "float64"}
    with WarpedVRT(
        labels,
        crs=crs,
        transform=transform,
        width=width,
        height=height,
        resampling=Resampling.nearest,
        src_nodata=nodata,
        **beyond,
    ) as warped:
        yield warped
