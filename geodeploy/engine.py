"""Map a scene: read stripes ahead, cut tiles, run the model, blend, write. The main flow.

Memory does not depend on the scene's height. Beyond the model's own session it is, by `memory_bytes`,

    stripes   (tile + 4 x 256) rows x width x (bands x bytes a stored value + 1 for validity);
              four of the file's own blocks where those are taller than 256 rows; of files that are
              resampled, the blocks of three stripes besides
    seams     (outputs + 2) x overlap x width x 4; with the disagreement as for one output more, or, of
              quantities, as for twice as many
    batches   (2 x streams + 1) x share x tile² x (bands + 2 x outputs) x 4, a share being the part of a
              batch that one of the session's streams runs: each runs one while another waits, and one
              is blended (where a tile has one answer as a whole, neither seams nor outputs count)
    map       about 512 rows x width x bytes a stored value, twice; as much for each band of the rasters
              beside it
    GDAL      its block cache, 16 MiB; or, if that is more, one of the file's own blocks, decoded, for
              each thread that reads

The width is the scene's, or that of a panel: stripes, seams and what is written together stay below
`PANEL_BYTES`.
"""

import json
import logging
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy import __version__
from geodeploy.ahead import read_ahead
from geodeploy.aoi import Area, find_area
from geodeploy.batches import Batch, answers, cut_tiles, stack_tiles, whole_answers
from geodeploy.blend import Block
from geodeploy.cells import coarse
from geodeploy.clean import CleanOptions, clean_raster, cut_raster
from geodeploy.cog import Frame
from geodeploy.derived import check_grid
from geodeploy.errors import GridError, MemoryLimitError, OutputError, SourceError, first_line
from geodeploy.holes import Holes
from geodeploy.machine import Stopwatch, peak_memory_bytes, usable_memory_bytes
from geodeploy.options import PredictOptions, Progress
from geodeploy.parts import (
    ROWS,
    Journal,
    Part,
    differences,
    has_holes,
    identify,
    missing_regions,
    noted_job,
    plan_parts,
)
from geodeploy.products import Product
from geodeploy.raster import Raster, check_range, ground_sample_distance_m, open_raster
from geodeploy.report import BusyShares, Hole, Report, UnseenShare
from geodeploy.runtime import Session
from geodeploy.spec import ModelSpec
from geodeploy.tasks import Canvas, Task, task_of
from geodeploy.tiles import TileGrid
from geodeploy.unseen import UnseenCount, sum_unseen
from geodeploy.writer import MapWriter, beside

log = logging.getLogger(__name__)

_AHEAD = 2
"""Stripes read ahead of the one in use."""
_BATCHES_AHEAD = 2
"""Batches for each stream that the model works on or that wait for it, while one is blended."""
PANEL_BYTES = 384 * 2**20
"""What all that is as wide as the scene may take; a wider one is mapped in panels, one after the
other."""
_MOST_PIXELS = 10**13
"""Twice the Earth in pixels of 10 m; what lists of parts can hold."""
GDAL_CACHE_BYTES = 16 * 2**20
"""GDAL's default, a twentieth of the machine's memory, would be most of ours. Stripes are read block
by block, so one block of every band would do; the rest serves the COG's overviews, at any width."""


def map_scene(
    source: Path,
    session: Session,
    output: Path,
    options: PredictOptions,
    progress: Progress | None,
    *,
    keep: bool = True,
    left_out_after: tuple[type[BaseException], ...] = (),
) -> Report:
    """`predict` with a model that is loaded and an ``output`` that was checked.

    ``keep`` says whether the parts of a run that ends early are of use to another one; after the errors
    ``left_out_after`` they are not.
    """
    spec, stages = session.spec, Stages()
    # rasterio counts the cache in bytes, whatever GDAL itself makes of small numbers.
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES), opened(source, spec, options) as raster:
        notes = [*raster.notes, *_resolution_notes(raster, spec)]
        for note in notes:
            log.warning(note)
        plan = _plan(raster, spec, options, session.streams)
        job = _job(session, raster, options, plan)
        # An array in memory is gone with the run.
        keep = keep and bool(raster.files())
        with (
            _memory_told(raster, spec, plan),
            Journal(
                output,
                job,
                parts=len(plan.parts),
                keep=keep,
                holes=options.on_error == "skip",
                anew=options.overwrite,
                useless_after=left_out_after,
            ) as journal,
        ):
            was_there = journal.finished is not None
            kept = sum(plan.parts[number].pixels for number in journal.done)
            writer = _writer(output, journal, raster, spec, plan)
            if journal.finished is None:
                _map_missing(raster, session, plan, journal, writer, options, stages, progress)
            unseen = sum_unseen(spec.planes, [noted["unseen"] for noted in journal.done.values()])
            holes = _holes(journal)
            failed = sum(noted["failed"] for noted in journal.done.values())
            if journal.finished is None:
                tags = _tags(session, raster, options, plan, unseen, holes)
                with stages.write:
                    writer.finish(tags | (plan.cleaning.tags if plan.cleaning else {}))
            tallies = writer.tallies()
            stored = {product.name: writer.tallies(product) for product in plan.others}
    if not tallies[0].valid and not holes:
        notes.append(f"{source.name} holds no valid pixel: the whole map is nodata.")
        log.warning(notes[-1])
    elif "disagreement" in stored and not stored["disagreement"][0].valid:
        notes.append(f"No pixel of {source.name} lies in two tiles: the disagreement is nodata.")
        log.warning(notes[-1])
    for note in _unseen_notes(source.name, unseen):
        notes.append(note)
        log.warning(note)
    report = _report(
        source, output, session, raster, options, plan, stages, kept, tallies, unseen, notes
    )
    return report.model_copy(update={"holes": holes, "tiles_failed": failed, "was_there": was_there})


def check_scene(source: Path, session: Session, output: Path, options: PredictOptions) -> None:
    """Refuse, before any work, a scene that cannot be mapped, or a map that another job made.

    Raises:
        GeodeployError: what `map_scene` would raise before it reads the scene.
        OutputError: there is a map at ``output`` and it is not to be replaced.
    """
    with opened(source, session.spec, options) as raster:
        plan = _plan(raster, session.spec, options, session.streams)
        if options.overwrite or not output.exists():
            return
        found, job = noted_job(output), _job(session, raster, options, plan)
        if found == job and (options.on_error == "skip" or not has_holes(output)):
            return
    why = f"was made with {differences(found, job)}" if found != job else "has holes"
    raise OutputError(f"{output} exists, and {why}. Choose another place with -o, or add --overwrite.")


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a scene is mapped, and how it is divided."""

    grid: TileGrid
    """Of the whole scene, whatever area is asked for."""
    area: Area | None
    around: Area | None
    """The area with what a pixel of it may depend on when the map is made clean."""
    window: Window
    """The map, in the scene's pixels; where it is coarse, in its cells, from the scene's corner on."""
    parts: list[Part]
    """With windows in the same."""
    batch: int
    """Tiles in work at once."""
    streams: int
    """Of the session: threads in which shares of that are in work."""
    readers: int
    """Threads that read at most."""
    task: Task
    others: list[Product]
    """What is written beside the map."""
    cleaning: CleanOptions

    @property
    def share(self) -> int:
        """Tiles in one forward pass."""
        return -(-self.batch // self.streams)

    @property
    def ahead(self) -> int:
        """Forward passes that are in work or wait for it while what came of one is blended."""
        return _BATCHES_AHEAD * self.streams


def _plan(raster: Raster, spec: ModelSpec, options: PredictOptions, streams: int = 1) -> Plan:
    overlap = spec.overlap if options.overlap is None else options.overlap
    task = task_of(spec)
    grid = task.grid(raster.height, raster.width, spec.tile, overlap)
    others = _others(task, overlap, options)
    area = asked_area(raster, options)
    window = area.window if area else Window(0, 0, raster.width, raster.height)
    if window.height * window.width > _MOST_PIXELS:
        raise GridError(
            f"{raster.name}: {window.height} x {window.width} pixels are more than a run maps "
            f"({_MOST_PIXELS:.0e}). Map it piece by piece with --aoi."
        )
    columns = PANEL_BYTES // _column_bytes(raster, spec, overlap, task, others)
    cleaning = CleanOptions(smooth=options.smooth, sieve=options.sieve)
    around = area
    if area and cleaning:
        around = area.with_margin(cleaning.reach, raster.height, raster.width)
    parts = [
        replace(part, window=coarse(part.window, grid.cell))
        for part in plan_parts(grid, columns=columns, within=around.window if around else window)
    ]
    # Batches of nearly one size: nine tiles at eight a batch are five and four, not eight and one.
    tiles = sum(len(part.rows) * len(part.cols) for part in parts)
    batch = -(-tiles // -(-tiles // options.batch))
    cells = coarse(window, grid.cell)
    streams = min(streams, batch)
    plan = Plan(
        grid, area, around, cells, parts, batch, streams, options.readers, task, others, cleaning
    )
    _check_memory(memory_bytes(raster, spec, plan), batch)
    return plan


def _others(task: Task, overlap: int, options: PredictOptions) -> list[Product]:
    """What is to be written beside the map."""
    others = task.others(options)
    if options.disagreement and (options.blend == "crop" or not overlap):
        raise GridError(
            "--disagreement compares tiles where they overlap and are mixed, but "
            + ("--blend crop takes each pixel from one: use cosine." if overlap else "--overlap is 0.")
        )
    return others


def _writer(output: Path, journal: Journal, raster: Raster, spec: ModelSpec, plan: Plan) -> MapWriter:
    area, around, cleaning = plan.area, plan.around, plan.cleaning
    about: dict[str, Any] = {}
    if cleaning:
        about["clean"] = lambda joined, to: clean_raster(joined, to, cleaning)[0]
    if area and around and around is not area:
        about |= {
            "clean": partial(_clean_and_cut, plan),
            "around": _frame(raster, plan, around.window),
            "inside": area.inside,
        }
    return MapWriter(
        output,
        journal=journal,
        parts=plan.parts,
        frame=_frame(raster, plan),
        classes=plan.task.classes,
        product=plan.task.product,
        others=plan.others,
        **about,
    )


def _clean_and_cut(plan: Plan, joined: Path, to: Path) -> NDArray[np.int64]:
    """Make what is around the area clean as well, and write the area alone."""
    area, around = plan.area, plan.around
    assert area is not None
    assert around is not None
    row, col = around.window.row_off, around.window.col_off

    def inside(window: Window) -> NDArray[np.bool_]:
        return area.inside(_shifted(window, row, col))

    whole = to.with_name("whole.tif")
    clean_raster(joined, whole, plan.cleaning)
    counts = cut_raster(whole, to, _shifted(area.window, -row, -col), inside)
    whole.unlink()
    return counts


def _shifted(window: Window, rows: int, cols: int) -> Window:
    """``window`` so many rows and columns further on."""
    return Window(window.col_off + cols, window.row_off + rows, window.width, window.height)


def _frame(raster: Raster, plan: Plan, window: Window | None = None) -> Frame:
    window, cell = window or plan.window, plan.grid.cell
    corner = Affine.translation(window.col_off * cell, window.row_off * cell)
    return Frame(window, raster.crs, raster.transform @ corner @ Affine.scale(cell))


def _map_missing(
    raster: Raster,
    session: Session,
    plan: Plan,
    journal: Journal,
    writer: MapWriter,
    options: PredictOptions,
    stages: "Stages",
    progress: Progress | None,
) -> None:
    """Map and save the parts that the journal does not have, region by region."""
    spec, grid, area = session.spec, plan.grid, plan.around
    holes = Holes(area)
    total = sum(part.pixels for part in plan.parts)
    mapped = sum(plan.parts[number].pixels for number in journal.done)
    regions = list(missing_regions(grid, plan.parts, journal.done))
    windows = (window for region, _ in regions for window in raster.stripes(region.source))
    read = stages.read.timed(raster.read)
    with closing(read_ahead(read, windows, workers=options.readers, ahead=_AHEAD)) as stripes:
        for region, missing in regions:
            unseen = UnseenCount(raster, spec.planes, region)
            cut = cut_tiles(holes.watch(stripes), region)
            counted = map(unseen.add, area.needed(cut) if area else cut)
            batches = stack_tiles(counted, raster, spec, size=plan.share, memories=plan.ahead + 1)
            canvas = plan.task.canvas(grid, region, area, options)
            skip = options.on_error == "skip"
            with closing(_settle(batches, session, canvas, plan, stages, holes, skip=skip)) as settled:
                for whole in settled:
                    block = area.cut(whole) if area and not spec.whole_tiles else whole
                    with stages.write:
                        if block is None or not writer.add(missing[0], block):
                            continue
                        part = missing.pop(0)
                        settling = grid.part(part.rows, part.cols).window
                        found, failed = holes.take(part.window, settling)
                        facts = {
                            "unseen": unseen.take(settling),
                            "holes": [hole.model_dump() for hole in found],
                            "failed": failed,
                        }
                        writer.save(part, facts)
                    mapped += part.pixels
                    if progress:
                        progress(mapped * plan.window.height // total, plan.window.height)


def _report(
    source: Path,
    output: Path,
    session: Session,
    raster: Raster,
    options: PredictOptions,
    plan: Plan,
    stages: "Stages",
    kept: int,
    tallies: Sequence[Any],
    unseen: tuple[UnseenShare, ...] | None,
    notes: Sequence[str],
) -> Report:
    spec, seconds = session.spec, stages.elapsed
    height, width = plan.window.height, plan.window.width
    valid_pixels = tallies[0].valid
    return Report(
        scene=source,
        map=output,
        beside=tuple(beside(output, product.name) for product in plan.others),
        model=spec.name,
        model_sha256=session.sha256,
        base_sha256=spec.base_sha256,
        runtime=session.name,
        device=session.device,
        precision=session.precision,
        height=height,
        width=width,
        valid_pixels=valid_pixels,
        nodata_pixels=height * width - valid_pixels,
        tile=spec.tile,
        overlap=plan.grid.overlap,
        blend="none" if spec.whole_tiles else options.blend,
        batch=plan.batch,
        tiles_run=stages.tiles_run,
        tiles_skipped=stages.tiles_skipped,
        pixels_kept=kept,
        seconds=seconds,
        pixels_per_s=(sum(part.pixels for part in plan.parts) - kept) * plan.grid.cell**2 / seconds,
        peak_memory_bytes=peak_memory_bytes(),
        planned_memory_bytes=memory_bytes(raster, spec, plan),
        busy=BusyShares(
            read=stages.read.seconds / options.readers / seconds,
            model=stages.model.seconds / plan.streams / seconds,
            blend=stages.blend.seconds / seconds,
            write=stages.write.seconds / seconds,
        ),
        **plan.task.told(tallies, _frame(raster, plan), output),
        unseen=unseen,
        warnings=tuple(notes),
    )


class Stages:
    """The seconds that each stage of a run takes, and what went through."""

    def __init__(self) -> None:
        self.read, self.model, self.blend, self.write = (Stopwatch() for _ in range(4))
        self.tiles_run = self.tiles_skipped = 0
        self._begun = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Wall time since the run began."""
        return time.perf_counter() - self._begun


def _holes(journal: Journal) -> tuple[Hole, ...]:
    """Those of all parts, from the top."""
    noted = [Hole(**hole) for facts in journal.done.values() for hole in facts["holes"]]
    return tuple(sorted(noted, key=lambda hole: (hole.row, hole.column)))


def _settle(
    batches: Iterable[Batch],
    session: Session,
    canvas: Canvas,
    plan: Plan,
    stages: Stages,
    holes: Holes,
    *,
    skip: bool,
) -> Generator[Block, None, None]:
    """The blocks of the map that the ``batches`` settle, one by one.

    The model works on the next ones in threads of their own while the last one is blended and written.
    With ``skip`` the tiles for which it has no answer are left out.
    """

    def infer(batch: Batch) -> tuple[Batch, NDArray[np.float32], dict[int, str]]:
        return batch, *(answers(session, batch) if skip else (whole_answers(session, batch), {}))

    timed = stages.model.timed(infer)
    with closing(read_ahead(timed, batches, workers=plan.streams, ahead=plan.ahead)) as inferred:
        for batch, probs, faults in inferred:
            stages.tiles_run += len(batch.run)
            stages.tiles_skipped += len(batch.members) - len(batch.run)
            for tile, valid, place in batch.members:
                fault = None if place is None else faults.get(place)
                answer = None if place is None or fault else probs[place]
                with stages.blend:
                    block = canvas.add(tile, answer, valid, failed=fault is not None)
                if block is not None:
                    yield holes.without(block, fault)


@contextmanager
def _memory_told(raster: Raster, spec: ModelSpec, plan: Plan) -> Iterator[None]:
    """Say of a MemoryError, wherever it comes from, what was planned and what would help."""
    try:
        yield
    except MemoryError as error:
        asked = f" ({first_line(error)})" if str(error) else ""
        raise MemoryLimitError(
            f"Memory ran out while {raster.name} was mapped{asked}. "
            f"{memory_bytes(raster, spec, plan) / 2**20:.0f} MiB were planned beyond the model's own. "
            + _less_memory(plan.batch)
        ) from error


def _check_memory(planned: int, batch: int) -> None:
    """Refuse, before any work, what this machine cannot hold."""
    there = usable_memory_bytes()
    if planned > there:
        raise MemoryLimitError(
            f"The run would take {planned / 2**30:.1f} GiB beyond the model's own, and there are "
            f"{there / 2**30:.1f} GiB in all. " + _less_memory(batch)
        )


def _less_memory(batch: int) -> str:
    smaller = f"Take a --batch of less than {batch}, which changes no byte of the map, or give"
    return f"{smaller if batch > 1 else 'Give'} it more memory."


def memory_bytes(raster: Raster, spec: ModelSpec, plan: Plan) -> int:
    """What a run holds at its fullest beyond the model's session: the sum at the top of this module."""
    widest = max(int(plan.grid.part(part.rows, part.cols).source.width) for part in plan.parts)
    planes = len(spec.planes) + (0 if spec.whole_tiles else 2 * len(spec.outputs))
    values = plan.share * spec.tile**2 * planes
    columns = widest * _column_bytes(raster, spec, plan.grid.overlap, plan.task, plan.others)
    at_once = min(plan.readers, -(-raster.height // raster.stripe_rows))
    decoded = at_once * max(layer.block_bytes for layer in raster.layers)
    return columns + 4 * values * (plan.ahead + 1) + max(decoded, GDAL_CACHE_BYTES)


def _column_bytes(
    raster: Raster, spec: ModelSpec, overlap: int, task: Task, others: Sequence[Product]
) -> int:
    """What a column takes of all that is as wide as the panel: stripes, seams, rows to be written."""
    rows = min(spec.tile + (_AHEAD + 2) * raster.stripe_rows, raster.height)
    stripes = rows * (len(spec.planes) * raster.dtype.itemsize + 1)
    stripes += math.ceil(sum(layer.held_bytes for layer in raster.layers))
    apart = task.apart if any(product.name == "disagreement" for product in others) else 0
    planes = 0 if spec.whole_tiles else len(spec.outputs) + 2 + apart
    stored = sum(len(product.bands) for product in (task.product, *others))
    written = 2 * ROWS * stored * np.dtype(task.product.dtype).itemsize
    return stripes + 4 * planes * overlap + written


_INDIFFERENT = {
    "overwrite", "on_error", "batch", "adapter", "runtime", "device", "derived", "readers", "threads"
}  # fmt: skip
"""Options that change no byte of the map. The adapter, the runtime and the device that were used do,
and are looked at themselves."""
_RESOLVED = {"scale", "offset", "earlier"}
"""Options that are looked at together with what the files say."""


def _job(session: Session, raster: Raster, options: PredictOptions, plan: Plan) -> dict[str, str]:
    """All that the bytes of the map depend on, by the words that tell the user what has changed."""
    # Viewers leave statistics and overviews beside a scene; what else they may hold is looked at below.
    files = [name for name in raster.files() if not name.endswith((".aux.xml", ".ovr"))]
    scene, state = identify(files, [layer.nodata for layer in raster.layers])
    places = repr([part.window.flatten() for part in plan.parts])
    given = options.model_dump(exclude=_INDIFFERENT | _RESOLVED)
    given |= {"overlap": plan.grid.overlap, "bands": raster.indexes}
    given["earlier"] = [identify([str(date)])[0] for date in options.earlier]  # in their order
    told = {
        "scene": scene,
        "state of the scene": state,
        "scale": json.dumps(raster.scales.tolist()),
        "offset": json.dumps(raster.offsets.tolist()),
        "model": session.sha256,
        "description of the model": session.spec.to_json(),
        "device": session.device,
        "runtime": session.name,
        **{f"--{name}": json.dumps(value) for name, value in given.items()},
        "area": plan.area.digest if plan.area else "",
        "version of geodeploy": __version__,
        "division into parts": places,
    }
    # Digests: a map that goes to others remembers its job, and need not tell where its scene lay.
    return {name: sha256(text.encode()).hexdigest()[:16] for name, text in told.items()}


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
def opened(source: Path, spec: ModelSpec, options: PredictOptions) -> Iterator[Raster]:
    """The scene, with the model's bands, values that can be in its units, and the CRS it takes."""
    if options.earlier and options.date:
        raise SourceError(
            "--earlier names scenes of one date each, --date those of one scene: give one."
        )
    if options.earlier:
        _check_dates(len(options.earlier) + 1, spec, options)
    with open_raster(
        source,
        earlier=options.earlier,
        dates=options.date,
        timesteps=1 if options.earlier else spec.timesteps,
        band_names=spec.band_names,
        select=options.bands,
        scale=options.scale,
        offset=options.offset,
        gsd_m=asked_gsd_m(options, spec),
        skip=options.on_error == "skip",
    ) as raster:
        _check_dates(raster.dates, spec, options)
        check_range(raster, spec.planes)
        check_grid(source.name, raster.crs, raster.transform, options.derived)
        yield raster


def _check_dates(found: int, spec: ModelSpec, options: PredictOptions) -> None:
    if found == spec.timesteps:
        return
    advice = "Name all but the last, oldest first, with --earlier."
    if options.date:
        advice = f"Choose {'one' if spec.timesteps == 1 else spec.timesteps} with --date."
    elif spec.timesteps == 1:
        advice = "Leave out --earlier."
    raise SourceError(
        f"The model {spec.name} takes {_dates(spec.timesteps)} of a place, found {_dates(found)}. "
        + advice
    )


def _dates(count: int) -> str:
    return f"{count} date{'s' if count > 1 else ''}"


def asked_area(raster: Raster, options: PredictOptions) -> Area | None:
    """What of the scene is to be mapped; None for all of it."""
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
    plan: Plan,
    unseen: Sequence[UnseenShare] | None,
    holes: Sequence[Hole],
) -> dict[str, str]:
    """What made the map. No time, path or machine: the same job gives the same bytes."""
    spec, cell = session.spec, plan.grid.cell
    return {
        "TIFFTAG_SOFTWARE": f"geodeploy {__version__}",
        "GEODEPLOY_VERSION": __version__,
        "GEODEPLOY_MODEL": spec.name,
        "GEODEPLOY_MODEL_SHA256": session.sha256,
        "GEODEPLOY_BASE_SHA256": spec.base_sha256 or "none",
        "GEODEPLOY_PARITY_SHA256": spec.parity.report_sha256 if spec.parity else "none",
        "GEODEPLOY_RUNTIME": session.name,
        "GEODEPLOY_PRECISION": session.precision,
        "GEODEPLOY_TILE": str(spec.tile),
        "GEODEPLOY_OVERLAP": str(plan.grid.overlap),
        "GEODEPLOY_BLEND": "none" if spec.whole_tiles else options.blend,
        "GEODEPLOY_SCENE_SIZE": f"{plan.grid.height} x {plan.grid.width}",
        "GEODEPLOY_CORNER": f"{plan.window.row_off * cell}, {plan.window.col_off * cell}",
        "GEODEPLOY_BANDS": ",".join(map(str, raster.indexes)),
        "GEODEPLOY_SCALE": repr(options.scale),
        "GEODEPLOY_OFFSET": repr(options.offset),
        "GEODEPLOY_GSD": str(options.gsd),
        "GEODEPLOY_AOI": plan.area.digest if plan.area else "none",
        **plan.task.tags(),
        "GEODEPLOY_LICENCE": spec.licence,
        "GEODEPLOY_UNSEEN": _unseen_tag(unseen),
        "GEODEPLOY_HOLES": str(sum(hole.pixels for hole in holes)),
    }
