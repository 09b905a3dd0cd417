"""Map a scene: read stripes ahead, cut tiles, run the model, blend, write. The main flow.

Memory does not depend on the scene's height. Beyond the model's own session it is about

    stripes   (tile + 4 x 256) rows x width x bands x bytes a stored value, and a byte for validity;
              four of the file's own blocks where those are taller than 256 rows
    seams     classes x overlap x width x 4
    batches   batch x tile² x (bands + 3 x classes) x 4
    GDAL      its block cache, 16 MiB, and 512 rows of the map
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
)

from geodeploy import __version__
from geodeploy.ahead import read_ahead
from geodeploy.blend import Blend, Mosaic, check_finite, check_probabilities, softmax
from geodeploy.derived import DerivedOptions, check_derived, derive
from geodeploy.errors import GridError, OutputError
from geodeploy.machine import Stopwatch, peak_memory_bytes
from geodeploy.raster import Raster, Stripe, check_range, ground_sample_distance_m, open_raster
from geodeploy.report import BusyShares, ClassArea, Report, UnseenShare
from geodeploy.runtime import Device, Session, open_session
from geodeploy.source import stem
from geodeploy.spec import ModelSpec
from geodeploy.tiles import Tile, TileGrid
from geodeploy.unseen import UnseenCount
from geodeploy.writer import MapWriter, check_output

log = logging.getLogger(__name__)

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

    Raises:
        GeodeployError: one of its kinds, in one line; nothing is left at ``output`` then.
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
        check_output(place, [*scenes, path], overwrite=options.overwrite)
    check_derived(outputs, scenes, options.derived, overwrite=options.overwrite)
    if model is None:
        log.info("No model named: taking the one that comes with geodeploy (%s).", path.name)
    with closing(open_session(path, device=options.device, threads=options.threads)) as session:
        if len(scenes) > 1:  # the last one's fault should not show after hours of work on the others
            for scene in scenes:
                with _opened(scene, session.spec, options):
                    pass
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
) -> Report:
    """`predict` with a model that is loaded and an ``output`` that was checked."""
    spec, begun = session.spec, time.perf_counter()
    overlap = spec.overlap if options.overlap is None else options.overlap
    reading, running, blending, writing = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
    tiles_run = 0
    # rasterio counts the cache in bytes, whatever GDAL itself makes of small numbers.
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES), _opened(source, spec, options) as raster:
        notes = [*raster.notes, *_resolution_notes(raster, spec)]
        for note in notes:
            log.warning(note)
        grid = TileGrid(raster.height, raster.width, spec.tile, overlap)
        # Batches of nearly one size: nine tiles at eight a batch are five and four, not eight and one.
        batch_size = -(-len(grid) // -(-len(grid) // options.batch))
        read = reading.timed(raster.read)
        count = UnseenCount(raster, spec.bands)
        mosaic = Mosaic(grid, spec.class_values, blend=options.blend, nodata=spec.nodata)
        with (
            MapWriter(
                output,
                height=raster.height,
                width=raster.width,
                crs=raster.crs,
                transform=raster.transform,
                classes=spec.classes,
                nodata=spec.nodata,
                tags=_tags(session, raster, options, overlap),
            ) as writer,
            closing(read_ahead(read, raster.stripes(), workers=options.readers, ahead=2)) as stripes,
        ):
            counted = map(count.add, stripes)
            for batch in stack_tiles(cut_tiles(counted, grid), raster, spec, size=batch_size):
                with running:
                    probs = probabilities(session, batch)
                tiles_run += len(batch.run)
                with blending:
                    strips = [
                        strip
                        for tile, valid, place in batch.members
                        if (strip := mosaic.add(tile, None if place is None else probs[place], valid))
                    ]
                with writing:
                    for strip in strips:
                        writer.write(strip.row, strip.classes)
                if progress and strips:
                    progress(strips[-1].row + len(strips[-1].classes), raster.height)
            unseen = count.shares()
            with writing:
                writer.finish(tags={"GEODEPLOY_UNSEEN": _unseen_tag(unseen)})
    seconds = time.perf_counter() - begun
    gsd_m = ground_sample_distance_m(raster.crs, raster.transform)
    valid_pixels = int(writer.counts[spec.class_values].sum())
    if not valid_pixels:
        notes.append(f"{source.name} holds no valid pixel: the whole map is nodata.")
        log.warning(notes[-1])
    for note in _unseen_notes(source.name, unseen):
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
        height=raster.height,
        width=raster.width,
        valid_pixels=valid_pixels,
        nodata_pixels=int(writer.counts[spec.nodata]),
        tile=spec.tile,
        overlap=overlap,
        blend=options.blend,
        batch=batch_size,
        tiles_run=tiles_run,
        tiles_skipped=len(grid) - tiles_run,
        seconds=seconds,
        pixels_per_s=raster.height * raster.width / seconds,
        peak_memory_bytes=peak_memory_bytes(),
        busy=BusyShares(
            read=reading.seconds / options.readers / seconds,
            model=running.seconds / seconds,
            blend=blending.seconds / seconds,
            write=writing.seconds / seconds,
        ),
        classes=tuple(
            ClassArea(
                value=item.value,
                name=item.name,
                pixels=int(writer.counts[item.value]),
                share=float(writer.counts[item.value] / max(valid_pixels, 1)),
                area_m2=None if gsd_m is None else float(writer.counts[item.value] * gsd_m**2),
            )
            for item in spec.classes
        ),
        unseen=unseen,
        warnings=tuple(notes),
    )


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


CutTile = tuple[Tile, NDArray[Any], NDArray[np.bool_]]
"""A tile, its stored values (C, h, w) and its valid pixels (h, w)."""


def cut_tiles(stripes: Iterator[Stripe], grid: TileGrid) -> Iterator[CutTile]:
    """The tiles of ``grid`` in order, holding only the stripes that the row of tiles needs."""
    held: deque[Stripe] = deque()
    cols = grid.cols
    for rows in grid.rows:
        while held and held[0].row + held[0].valid.shape[0] <= rows.start:
            held.popleft()
        while not held or held[-1].row + held[-1].valid.shape[0] < rows.stop:
            held.append(next(stripes))
        for col in cols:
            stored, valid = zip(
                *(
                    (
                        stripe.stored[
                            :,
                            max(rows.start - stripe.row, 0) : rows.stop - stripe.row,
                            col.start : col.stop,
                        ],
                        stripe.valid[
                            max(rows.start - stripe.row, 0) : rows.stop - stripe.row,
                            col.start : col.stop,
                        ],
                    )
                    for stripe in held
                ),
                strict=True,
            )
            yield Tile(rows, col), np.concatenate(stored, axis=1), np.concatenate(valid)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles of the grid, in order, those that the model must see stacked."""

    members: list[tuple[Tile, NDArray[np.bool_], int | None]]
    """Each with its valid pixels and its place in ``pixels``; None for a tile without data."""
    pixels: NDArray[np.float32]
    """(size, C, tile, tile) in the spec's units, finite. Reused: take what you need before the next."""

    @property
    def run(self) -> list[Tile]:
        """The tiles that the model must see."""
        return [tile for tile, _, place in self.members if place is not None]


def stack_tiles(
    tiles: Iterable[CutTile], raster: Raster, spec: ModelSpec, *, size: int
) -> Iterator[Batch]:
    """Batches of ``size`` tiles to run; tiles without a valid pixel ride along and cost nothing.

    All batches have one shape: the last one's surplus holds what the one before it left there.
    """
    fill = np.array([band.mean for band in spec.bands], np.float32).reshape(-1, 1, 1)
    pixels = np.zeros((size, len(spec.bands), spec.tile, spec.tile), np.float32)
    members: list[tuple[Tile, NDArray[np.bool_], int | None]] = []
    used = 0
    for tile, stored, valid in tiles:
        if valid.any():
            values = raster.to_units(stored)
            if not valid.all():
                values = np.where(valid, values, fill)
            below, right = spec.tile - valid.shape[0], spec.tile - valid.shape[1]
            if below or right:
                values = np.pad(values, ((0, 0), (0, below), (0, right)), mode="reflect")
            pixels[used] = values
            members.append((tile, valid, used))
            used += 1
        else:
            members.append((tile, valid, None))
        # An empty region must not gather tiles without end either.
        if used == size or len(members) == 4 * size:
            yield Batch(members, pixels)
            members, used = [], 0
    if members:
        yield Batch(members, pixels)


def probabilities(session: Session, batch: Batch) -> NDArray[np.float32]:
    """What the model says of each place in ``batch.pixels``: (size, K, tile, tile), summing to 1."""
    run = batch.run
    if not run:
        return np.empty(
            (0, len(session.spec.classes), session.spec.tile, session.spec.tile), np.float32
        )
    outputs = session.run(batch.pixels)[: len(run)]
    check_finite(outputs, run)
    if session.spec.output == "logits":
        return softmax(outputs)
    check_probabilities(outputs)
    return outputs


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


def _tags(session: Session, raster: Raster, options: PredictOptions, overlap: int) -> dict[str, str]:
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
        "GEODEPLOY_CLASSES": "; ".join(f"{item.value} {item.name}" for item in spec.classes),
        "GEODEPLOY_LICENCE": spec.licence,
    }
