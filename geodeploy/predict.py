"""The verb: check what can be checked, load the model once, map each scene, make what is wanted."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path

from geodeploy.derived import check_derived, derive
from geodeploy.engine import check_scene, map_scene
from geodeploy.errors import AreaError, BandError, GridError, OutputError, RangeError, SourceError
from geodeploy.options import PredictOptions, Progress
from geodeploy.parts import forget, is_finished, noted_derived, settle
from geodeploy.report import Failure, Report
from geodeploy.runtime import Session, open_session
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
    assert isinstance(report, Report)  # what is wrong with one scene alone is raised
    return report


def predict_scenes(
    sources: Sequence[Path | str],
    model: Path | str | None = None,
    output: Path | str | None = None,
    *,
    options: PredictOptions | None = None,
    progress: Progress | None = None,
) -> list[Report | Failure]:
    """`predict` for several scenes, one after the other with the model loaded once.

    With more than one scene ``output`` is a folder, and each map is ``<stem>_map.tif`` in it. Names
    that exist or collide are refused before any work. Where a call like this one was stopped, the maps
    that it finished are taken as done if nobody has changed them, the scene or the job since.

    With ``on_error="skip"`` a scene of several that cannot be mapped gives a `Failure`.
    """
    options = options or PredictOptions()
    scenes = [Path(source) for source in sources]
    if options.earlier and len(scenes) > 1:
        raise SourceError("--earlier is of one place, several scenes are named. Map them one by one.")
    outputs = map_paths(scenes, None if output is None else Path(output))
    path = default_model() if model is None else Path(model)
    check_places(scenes, outputs, path, options)
    if model is None:
        log.info("No model named: taking the one that comes with geodeploy (%s).", path.name)
    session = open_session(
        path,
        adapter=options.adapter,
        runtime=options.runtime,
        device=options.device,
        threads=options.threads,
        batch=options.batch,
    )
    with closing(session):
        return map_scenes(scenes, session, options.adapter or path, outputs, options, progress)


def check_places(
    scenes: Sequence[Path], outputs: Sequence[Path], model: Path, options: PredictOptions
) -> None:
    """Refuse, before any work, what must not be written at ``outputs`` or beside them.

    Raises:
        OutputError: says which, and the flag.
    """
    inputs = [*options.earlier, *scenes, model, *([options.adapter] if options.adapter else [])]
    for place in outputs:
        there = options.overwrite or settle(place)
        for written in (place, *(beside(place, name) for name in options.beside)):
            check_output(written, inputs, overwrite=there)
    way = options.derived.digest
    made = {file for place in outputs if is_finished(place) for file in noted_derived(place, way)}
    check_derived(
        outputs, scenes, options.derived, inputs=inputs, overwrite=options.overwrite, made=made
    )


def map_scenes(
    scenes: Sequence[Path],
    session: Session,
    model: Path,
    outputs: Sequence[Path],
    options: PredictOptions,
    progress: Progress | None,
) -> list[Report | Failure]:
    """`predict_scenes` with the model in the file ``model`` loaded, and `check_places` done."""
    reports: dict[Path, Report | Failure] = {}
    pairs = list(zip(scenes, outputs, strict=True))
    skip = options.on_error == "skip" and len(scenes) > 1
    for scene, place in pairs:
        # The last one's fault should not show after hours of work on the others.
        if len(scenes) > 1 or place.exists():
            with _left_out(scene, place, reports, skip=skip):
                check_scene(scene, session, place, options)
    for scene, place in pairs:
        if place in reports:
            continue
        with _left_out(scene, place, reports, skip=skip):
            report = map_scene(scene, session, place, options, progress)
            files = derive(
                place,
                scene,
                model,
                options.derived,
                beside=report.beside,
                overwrite=options.overwrite,
            )
            reports[place] = report.model_copy(update={"derived": files})
    if not any(isinstance(report, Failure) for report in reports.values()):
        for place in outputs:
            forget(place)
    return [reports[place] for place in outputs]


@contextmanager
def _left_out(
    scene: Path, place: Path, reports: dict[Path, Report | Failure], *, skip: bool
) -> Iterator[None]:
    """With ``skip``, put what is wrong with ``scene`` into ``reports`` instead of raising it."""
    try:
        yield
    except (SourceError, BandError, RangeError, GridError, AreaError) as error:
        if not skip:
            raise
        reports[place] = Failure(scene=scene, map=place, error=str(error))
        log.warning("%s is left out: %s", scene, error)


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
