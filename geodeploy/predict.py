"""Map a scene: read stripes ahead, cut tiles, run the model, blend, write. The main flow.

Memory does not depend on the scene's height. Beyond the model's own session it is about

    stripes   (tile + 4 x 256) rows x width x (bands x bytes a stored value + 1 for validity);
              four of the file's own blocks where those are taller than 256 rows
    seams     classes x overlap x width x 4
    batches   batch x tile² x (bands + 3 x classes) x 4
    map       about 512 rows x width, twice
    GDAL      its block cache, 16 MiB

The width is the scene's, or that of a panel: stripes and seams together stay below `PANEL_BYTES`.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import rasterio
from affine import Affine
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
)
from rasterio.windows import Window

from geodeploy import __version__
from geodeploy.ahead import read_ahead
from geodeploy.aoi import Area, find_area
from geodeploy.batches import Batch, cut_tiles, probabilities, stack_tiles
from geodeploy.blend import Blend, Block, Mosaic
from geodeploy.clean import CleanOptions, clean_raster
from geodeploy.derived import DerivedOptions, check_derived, derive
from geodeploy.errors import GridError, OutputError
from geodeploy.filters import Side, Size
from geodeploy.machine import Stopwatch, peak_memory_bytes
from geodeploy.parts import Journal, Part, clear_finished, identify, missing_regions, plan_parts
from geodeploy.products import ClassMap
from geodeploy.raster import Raster, check_range, ground_sample_distance_m, open_raster
from geodeploy.report import BusyShares, ClassArea, Report, UnseenShare
from geodeploy.runtime import Device, Session, open_session
from geodeploy.source import stem
from geodeploy.spec import ModelSpec
from geodeploy.tiles import TileGrid
from geodeploy.unseen import UnseenCount, sum_unseen
from geodeploy.writer import MapWriter, check_output

log = logging.getLogger(__name__)

_AHEAD = 2
"""Stripes read ahead of the one in use."""
PANEL_BYTES = 384 * 2**20
"""What stripes and seams may take; a wider scene is mapped in panels, one after the other."""
GDAL_CACHE_BYTES = 16 * 2**20
"""GDAL's default, a twentieth of the machine's memory, would be most of ours. Stripes are read block
by block, so one block of every band would do; the rest serves the COG's overviews, at any width."""

Progress = Callable[[int, int], None]
"""Called with the rows written so far and all rows."""


def _gsd(value: Any) -> Any:
    if value in ("native", "model"):
        return value
    try:
        metres = float(value)
    except (TypeError, ValueError):
        metres = 0.0
    if not 0 < metres < math.inf:
        raise ValueError("native, model or a number of metres above 0 is needed")
    return metres


class PredictOptions(BaseModel):
    """How to run a model over a scene."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    overlap: NonNegativeInt | None = None
    """Pixels shared by neighbouring tiles: context at the edge, paid for in more tiles. None takes the
    model's own."""
    blend: Blend = "cosine"
    """How overlapping tiles are weighed; ``crop`` cuts the overlap in the middle."""
    batch: PositiveInt = 8
    """Tiles in one forward pass at most. Memory grows in proportion."""
    device: Device = "auto"
    """Asking for ``cuda`` and getting the CPU is an error."""
    bands: tuple[str, ...] | None = None
    """Names or 1-based numbers of the scene's bands in the model's order."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What values are multiplied with after the file's own scale and offset."""
    offset: FiniteFloat = 0.0
    """What is added then."""
    gsd: Annotated[Literal["native", "model"] | float, PlainValidator(_gsd)] = "native"
    """Metres a pixel to resample the scene to as it is read; ``model`` takes those of the training."""
    aoi: str | None = None
    """The area to map: ``xmin,ymin,xmax,ymax`` in degrees or, after an ``@``, in another CRS; or a file
    of polygons. Its pixels are those of the whole map. None maps the whole scene."""
    smooth: Side | None = None
    """Each pixel takes the majority of a square of so many pixels, an odd number up to 255."""
    sieve: Size | None = None
    """Regions of fewer pixels than this, up to 1000, take the class with the longest common border."""
    derived: DerivedOptions = DerivedOptions()
    """What to make of the map beside it."""
    overwrite: bool = False
    """Replace a map that exists, and what is made of it."""
    readers: PositiveInt = 2
    """Threads that decode ahead of the model; two keep up with any model worth running."""
    threads: PositiveInt | None = None
    """For the model's arithmetic. None takes every core this process may use."""


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
        check_output(place, [*scenes, path], overwrite=options.overwrite)
    check_derived(outputs, scenes, options.derived, overwrite=options.overwrite)
    if model is None:
        log.info("No model named: taking the one that comes with geodeploy (%s).", path.name)
    with closing(open_session(path, device=options.device, threads=options.threads)) as session:
        if len(scenes) > 1:  # the last one's fault should not show after hours of work on the others
            for scene in scenes:
                with _opened(scene, session.spec, options) as raster:
                    _asked_area(raster, options)
        reports = []
        for scene, place in zip(scenes, outputs, strict=True):
            report = map_scene(scene, session, place, options, progress)
            made = derive(place, scene, path, options.derived, overwrite=options.overwrite)
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


def map_scene(
    source: Path,
    session: Session,
    output: Path,
    options: PredictOptions,
    progress: Progress | None,
    *,
    keep: bool = True,
) -> Report:
    """`predict` with a model that is loaded and an ``output`` that was checked.

    ``keep`` says whether the parts of a run that ends early are of use to another one.
    """
    spec, begun, stages = session.spec, time.perf_counter(), Stages()
    # rasterio counts the cache in bytes, whatever GDAL itself makes of small numbers.
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES), _opened(source, spec, options) as raster:
        notes = [*raster.notes, *_resolution_notes(raster, spec)]
        for note in notes:
            log.warning(note)
        overlap = spec.overlap if options.overlap is None else options.overlap
        grid = TileGrid(raster.height, raster.width, spec.tile, overlap)
        area = _asked_area(raster, options)
        window = area.window if area else Window(0, 0, raster.width, raster.height)
        columns = _most_columns(raster, spec, overlap)
        parts = plan_parts(grid, columns=columns, within=window)
        # Batches of nearly one size: nine tiles at eight a batch are five and four, not eight and one.
        tiles = sum(len(part.rows) * len(part.cols) for part in parts)
        batch_size = -(-tiles // -(-tiles // options.batch))
        cleaning = CleanOptions(smooth=options.smooth, sieve=options.sieve)
        job = _job(session, raster, options, overlap, parts, area)
        # An array in memory is gone with the run.
        with Journal(output, job, parts=len(parts), keep=keep and bool(raster.files())) as journal:
            writer = MapWriter(
                output,
                journal=journal,
                parts=parts,
                corner=(window.row_off, window.col_off),
                height=window.height,
                width=window.width,
                crs=raster.crs,
                transform=raster.transform @ Affine.translation(window.col_off, window.row_off),
                classes=spec.classes,
                product=ClassMap(spec.class_values, spec.nodata),
                clean=(lambda joined, to: clean_raster(joined, to, cleaning)[0]) if cleaning else None,
            )
            kept = sum(parts[number].pixels for number in journal.done)
            regions = list(missing_regions(grid, parts, journal.done))
            windows = (window for region, _ in regions for window in raster.stripes(region.source))
            read = stages.read.timed(raster.read)
            with closing(read_ahead(read, windows, workers=options.readers, ahead=_AHEAD)) as stripes:
                for region, missing in regions:
                    unseen = UnseenCount(raster, spec.bands, region)
                    cut = cut_tiles(stripes, region)
                    counted = map(unseen.add, area.needed(cut) if area else cut)
                    batches = stack_tiles(counted, raster, spec, size=batch_size)
                    mosaic = Mosaic(grid, region, len(spec.classes), blend=options.blend)
                    for settled in _run(batches, session, mosaic, stages):
                        block = area.cut(settled) if area else settled
                        with stages.write:
                            if block is None or not writer.add(missing[0], block):
                                continue
                            part = missing.pop(0)
                            writer.save(
                                part, {"unseen": unseen.take(grid.part(part.rows, part.cols).window)}
                            )
                        if progress:
                            done = sum(parts[number].pixels for number in journal.done)
                            total = sum(part.pixels for part in parts)
                            progress(done * window.height // total, window.height)
            unseen_shares = sum_unseen(spec.bands, [noted["unseen"] for noted in journal.done.values()])
            tags = _tags(session, raster, options, overlap, unseen_shares, area)
            with stages.write:
                writer.finish(tags | (cleaning.tags if cleaning else {}))
            counts = writer.counts()
    seconds = time.perf_counter() - begun
    gsd_m = ground_sample_distance_m(raster.crs, raster.transform)
    valid_pixels = int(counts[spec.class_values].sum())
    if not valid_pixels:
        notes.append(f"{source.name} holds no valid pixel: the whole map is nodata.")
        log.warning(notes[-1])
    for note in _unseen_notes(source.name, unseen_shares):
        notes.append(note)
        log.warning(note)
    return Report(
        scene=source,
        map=output,
        model=spec.name,
        model_sha256=session.sha256,
        runtime=session.name,
        device=session.device,
        precision=session.precision,
        height=window.height,
        width=window.width,
        valid_pixels=valid_pixels,
        nodata_pixels=window.height * window.width - valid_pixels,
        tile=spec.tile,
        overlap=overlap,
        blend=options.blend,
        batch=batch_size,
        tiles_run=stages.tiles_run,
        tiles_skipped=stages.tiles_skipped,
        pixels_kept=kept,
        seconds=seconds,
        pixels_per_s=(window.height * window.width - kept) / seconds,
        peak_memory_bytes=peak_memory_bytes(),
        busy=BusyShares(
            read=stages.read.seconds / options.readers / seconds,
            model=stages.model.seconds / seconds,
            blend=stages.blend.seconds / seconds,
            write=stages.write.seconds / seconds,
        ),
        classes=tuple(
            ClassArea(
                value=item.value,
                name=item.name,
                pixels=int(counts[item.value]),
                share=float(counts[item.value] / max(valid_pixels, 1)),
                area_m2=None if gsd_m is None else float(counts[item.value] * gsd_m**2),
            )
            for item in spec.classes
        ),
        unseen=unseen_shares,
        warnings=tuple(notes),
    )


class Stages:
    """The seconds that each stage of a run takes, and what went through."""

    def __init__(self) -> None:
        self.read, self.model, self.blend, self.write = (Stopwatch() for _ in range(4))
        self.tiles_run = self.tiles_skipped = 0


def _run(batches: Iterable[Batch], session: Session, mosaic: Mosaic, stages: Stages) -> Iterator[Block]:
    """The blocks of the map that the ``batches`` settle, one by one."""
    for batch in batches:
        with stages.model:
            probs = probabilities(session, batch)
        stages.tiles_run += len(batch.run)
        stages.tiles_skipped += len(batch.members) - len(batch.run)
        for tile, valid, place in batch.members:
            with stages.blend:
                block = mosaic.add(tile, None if place is None else probs[place], valid)
            if block is not None:
                yield block


def _most_columns(raster: Raster, spec: ModelSpec, overlap: int) -> int:
    """How wide a panel may be for its stripes and seams to stay within `PANEL_BYTES`."""
    rows = min(spec.tile + (_AHEAD + 2) * raster.stripe_rows, raster.height)
    stripes = rows * (len(spec.bands) * raster.dtype.itemsize + 1)
    return PANEL_BYTES // (stripes + 4 * len(spec.classes) * overlap)


_INDIFFERENT = {"overwrite", "batch", "device", "derived", "readers", "threads"}
"""Options that change no byte of the map. The device that was used does, and is looked at itself."""
_RESOLVED = {"scale", "offset"}
"""Options that are looked at together with what the file says."""


def _job(
    session: Session,
    raster: Raster,
    options: PredictOptions,
    overlap: int,
    parts: Sequence[Part],
    area: Area | None,
) -> dict[str, str]:
    """All that the bytes of the map depend on, by the words that tell the user what has changed."""
    # Viewers leave statistics and overviews beside a scene; what else they may hold is looked at below.
    files = [name for name in raster.files() if not name.endswith((".aux.xml", ".ovr"))]
    scene, state = identify(files, [layer.nodata for layer in raster.layers])
    places = repr([part.window.flatten() for part in parts])
    given = options.model_dump(exclude=_INDIFFERENT | _RESOLVED)
    given |= {"overlap": overlap, "bands": raster.indexes}
    return {
        "scene": scene,
        "state of the scene": state,
        "scale": json.dumps(raster.scales.tolist()),
        "offset": json.dumps(raster.offsets.tolist()),
        "model": session.sha256,
        "description of the model": sha256(session.spec.to_json().encode()).hexdigest(),
        "device": session.device,
        "runtime": session.name,
        **{f"--{name}": json.dumps(value) for name, value in given.items()},
        "area": area.digest if area else "",
        "version of geodeploy": __version__,
        "division into parts": sha256(places.encode()).hexdigest(),
    }


def asked_gsd_m(options: PredictOptions, spec: ModelSpec) -> float | None:
    """Metres a pixel that the scene is to be brought to; None for its own."""
    if options.gsd == "model" and spec.gsd_m is None:
        raise GridError(
            f"--gsd model: the model {spec.name} does not say what size of pixel it was trained on. "
            "Give it in metres."
        )
    if options.gsd == "model":
        return spec.gsd_m
    return None if options.gsd == "native" else options.gsd


@contextmanager
def _opened(source: Path, spec: ModelSpec, options: PredictOptions) -> Iterator[Raster]:
    """The scene, with the model's bands and with values that can be in its units."""
    with open_raster(
        source,
        band_names=spec.band_names,
        select=options.bands,
        scale=options.scale,
        offset=options.offset,
        gsd_m=asked_gsd_m(options, spec),
    ) as raster:
        check_range(raster, spec.bands)
        yield raster


def _asked_area(raster: Raster, options: PredictOptions) -> Area | None:
    if options.aoi is None:
        return None
    return find_area(
        options.aoi,
        crs=raster.crs,
        transform=raster.transform,
        height=raster.height,
        width=raster.width,
        scene=raster.name,
    )


def _resolution_notes(raster: Raster, spec: ModelSpec) -> Iterator[str]:
    gsd_m = ground_sample_distance_m(raster.crs, raster.transform)
    if gsd_m and spec.gsd_m and not 0.5 <= gsd_m / spec.gsd_m <= 2:
        yield (
            f"{raster.name} has pixels of {gsd_m:.3g} m, the model was trained on {spec.gsd_m:g} m: "
            "expect a poorer map, or bring the scene to that size with --gsd model."
        )


def _unseen_notes(scene: str, unseen: Sequence[UnseenShare] | None) -> Iterator[str]:
    notable = [str(item) for item in unseen or () if item.is_notable]
    if notable:
        yield (
            f"{scene} holds values that the model hardly ever saw in training, by share of its valid "
            f"pixels: {', '.join(notable)}. Look at the map with care."
        )


def _unseen_tag(unseen: Sequence[UnseenShare] | None) -> str:
    if unseen is None:
        return "unknown"
    return ", ".join(f"{item.band} {item.share:.1%}" for item in unseen)


def _tags(
    session: Session,
    raster: Raster,
    options: PredictOptions,
    overlap: int,
    unseen: Sequence[UnseenShare] | None,
    area: Area | None,
) -> dict[str, str]:
    """What made the map. No time, path or machine: the same job gives the same bytes."""
    spec = session.spec
    return {
        "TIFFTAG_SOFTWARE": f"geodeploy {__version__}",
        "GEODEPLOY_VERSION": __version__,
        "GEODEPLOY_MODEL": spec.name,
        "GEODEPLOY_MODEL_SHA256": session.sha256,
        "GEODEPLOY_PARITY_SHA256": spec.parity.report_sha256 if spec.parity else "none",
        "GEODEPLOY_PRECISION": session.precision,
        "GEODEPLOY_TILE": str(spec.tile),
        "GEODEPLOY_OVERLAP": str(overlap),
        "GEODEPLOY_BLEND": options.blend,
        "GEODEPLOY_BANDS": ",".join(map(str, raster.indexes)),
        "GEODEPLOY_SCALE": repr(options.scale),
        "GEODEPLOY_OFFSET": repr(options.offset),
        "GEODEPLOY_GSD": str(options.gsd),
        "GEODEPLOY_AOI": area.digest if area else "none",
        "GEODEPLOY_CLASSES": "; ".join(f"{item.value} {item.name}" for item in spec.classes),
        "GEODEPLOY_LICENCE": spec.licence,
        "GEODEPLOY_UNSEEN": _unseen_tag(unseen),
    }
