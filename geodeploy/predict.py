"""The verb: check what can be checked, load the model once, map each scene, make what is wanted."""

import logging
from collections.abc import Sequence
from contextlib import closing
from importlib.resources import files
from pathlib import Path

from geodeploy.derived import check_derived, derive
from geodeploy.engine import asked_area, map_scene, opened
from geodeploy.errors import OutputError
from geodeploy.options import PredictOptions, Progress
from geodeploy.parts import clear_finished
from geodeploy.report import Report
from geodeploy.runtime import open_session
from geodeploy.source import stem
from geodeploy.writer import beside, check_output

log = logging.getLogger(__name__)

__all__ = ["PredictOptions", "default_model", "map_paths", "predict", "predict_scenes"]


def predict(
    source: Path | str,
    model: Path | str | None = None,
    output: Path | str | None = None,
    *,
    options: PredictOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the model's class map of ``source`` to ``output``.

    Args:
        source: A raster file that GDAL reads, or what else `find_source` takes for a scene.
        model: An ONNX file with its description, or a RUN; None for the model that comes along.
        output: The map; None for ``<stem>_map.tif`` in the current folder.
        options: How to run; None for the defaults.
        progress: Told of the rows as they are written.

    However a run ends, the parts of the map that were whole by then are kept in a hidden folder beside
    ``output``, and the same call goes on from there.

    Raises:
        GeodeployError: one of its kinds, in one line; what was at ``output`` is untouched then.
    """
    (report,) = predict_scenes([source], model, output, options=options, progress=progress)
    return report


def predict_scenes(
    sources: Sequence[Path | str],
    model: Path | str | None = None,
    output: Path | str | None = None,
    *,
    options: PredictOptions | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """`predict` for several scenes, one after the other with the model loaded once.

    With more than one scene ``output`` is a folder, and each map is ``<stem>_map.tif`` in it. Names
    that exist or collide are refused before any work.
    """
    options = options or PredictOptions()
    scenes = [Path(source) for source in sources]
    outputs = map_paths(scenes, None if output is None else Path(output))
    path = default_model() if model is None else Path(model)
    for place in outputs:
        if not options.overwrite:
            clear_finished(place)
        for written in (place, *(beside(place, name) for name in options.beside)):
            check_output(written, [*scenes, path], overwrite=options.overwrite)
    check_derived(outputs, scenes, options.derived, overwrite=options.overwrite)
    if model is None:
        log.info("No model named: taking the one that comes with geodeploy (%s).", path.name)
    session = open_session(
        path, runtime=options.runtime, device=options.device, threads=options.threads
    )
    with closing(session):
        if len(scenes) > 1:  # the last one's fault should not show after hours of work on the others
            for scene in scenes:
                with opened(scene, session.spec, options) as raster:
                    asked_area(raster, options)
        reports = []
        for scene, place in zip(scenes, outputs, strict=True):
            report = map_scene(scene, session, place, options, progress)
            made = derive(
                place,
                scene,
                path,
                options.derived,
                beside=report.beside,
                overwrite=options.overwrite,
            )
            reports.append(report.model_copy(update={"derived": made}))
        return reports


def default_model() -> Path:
    """The model in the package: cloud, cloud shadow, water and land in six-band optical imagery."""
    return Path(str(files("geodeploy"))) / "assets" / "cloud.onnx"


def map_paths(scenes: Sequence[Path], output: Path | None) -> list[Path]:
    """Where the maps of ``scenes`` go."""
    if len(scenes) == 1 and not (output is not None and output.is_dir()):
        return [output or Path(f"{stem(scenes[0])}_map.tif")]
    if output is None or not output.is_dir():
        found = "none was given" if output is None else f"{output} is not a folder"
        raise OutputError(f"{len(scenes)} scenes need a folder that exists for -o; {found}.")
    outputs = [output / f"{stem(scene)}_map.tif" for scene in scenes]
    for place in outputs:
        if outputs.count(place) > 1:
            raise OutputError(
                f"Two scenes would both be mapped to {place}. Rename one, or map it alone."
            )
    return outputs
