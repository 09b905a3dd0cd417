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

from geodeploy.dataset import open_dataset, reading
from geodeploy.engine import asked_gsd_m, map_scene
from geodeploy.errors import AreaError, LabelError
from geodeploy.labels import IGNORED, class_positions, ignored_values
from geodeploy.options import PredictOptions, Progress
from geodeploy.raster import open_raster, same_place
from geodeploy.runtime import open_session
from geodeploy.scores import Scores, confusion_matrix
from geodeploy.spec import NODATA, ModelSpec
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
) -> Scores:
    """The scores of ``model`` on ``image``, from one confusion matrix over all labelled pixels.

    Args:
        model: An ONNX file or a RUN.
        image: The scene.
        labels: A raster of class values; on another grid it is brought to the scene's (nearest).
        options: How to run the model, as for `predict`.
        picture: Where to draw the confusion matrix.
        progress: Told of the rows as they are mapped.

    Raises:
        LabelError: a value is no class, or no label lies on the image.
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
        Path(model), runtime=options.runtime, device=options.device, threads=options.threads
    )
    with (
        closing(session),
        tempfile.TemporaryDirectory(prefix="geodeploy-") as folder,
        open_dataset(labels) as label_file,
    ):
        if label_file.count != 1 or np.dtype(label_file.dtypes[0]).kind not in "iu":
            raise LabelError(
                f"{labels.name} has {label_file.count} band(s) of {label_file.dtypes[0]}; labels are "
                "one band of whole numbers."
            )
        found = Path(folder) / "map.tif"
        with _on_grid_of(image, label_file, session.spec, options) as aligned:
            map_scene(image, session, found, options, progress, keep=False)
            with rasterio.open(found) as mapped:
                scores = _compare(mapped, aligned, session.spec, labels)
    if picture is not None:
        from geodeploy.pictures import draw_confusion

        draw_confusion(scores, Path(picture))
    return scores


def _compare(mapped: Any, labels: Any, spec: ModelSpec, source: Path) -> Scores:
    """One confusion matrix over all pixels, a band of rows at a time."""
    ignored_labels = ignored_values(spec.classes, spec.ignore, labels.nodata)
    counts = np.zeros((len(spec.classes),) * 2, np.int64)
    ignored = 0
    for row in range(0, mapped.height, _ROWS):
        window = Window(0, row, mapped.width, min(_ROWS, mapped.height - row))
        with reading(source, window):
            values = labels.read(1, window=window)
        truth = class_positions(values, spec.classes, ignored_labels, source=source.name)
        guess = class_positions(mapped.read(1, window=window), spec.classes, {NODATA}, source="the map")
        scored = (truth != IGNORED) & (guess != IGNORED)
        ignored += int(scored.size - scored.sum())
        counts += confusion_matrix(truth[scored], guess[scored], len(spec.classes))
    if not counts.any():
        raise LabelError(
            f"{source.name} has no label where the scene has data: nothing can be scored. Do both show "
            "the same place, with the right CRS?"
        )
    return Scores.from_confusion(counts, spec.classes, ignored=ignored)


@contextmanager
def _on_grid_of(image: Path, labels: Any, spec: ModelSpec, options: PredictOptions) -> Iterator[Any]:
    """``labels`` as they lie on the grid of ``image``."""
    gsd_m = asked_gsd_m(options, spec)
    with open_raster(image, band_names=spec.band_names, select=options.bands, gsd_m=gsd_m) as scene:
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
    with WarpedVRT(
        labels,
        crs=crs,
        transform=transform,
        width=width,
        height=height,
        resampling=Resampling.nearest,
        src_nodata=nodata,
        nodata=NODATA if nodata is None else nodata,
    ) as warped:
        yield warped
