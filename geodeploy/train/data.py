"""Labelled scenes: opened, checked, split into training and validation, read window by window."""

# C band, H row, W column

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.cells import CellGrid
from geodeploy.dataset import open_dataset, reading
from geodeploy.errors import (
    BandError,
    LabelError,
    RangeError,
    RecipeError,
    SourceError,
    require,
)
from geodeploy.labels import (
    IGNORED,
    present_classes,
    stored_positions,
    target_bands,
    target_values,
)
from geodeploy.parts import identify
from geodeploy.raster import Raster, check_range, open_raster, same_place
from geodeploy.spec import Band, Presence, Target
from geodeploy.tally import Moments, add_up
from geodeploy.tiles import Tile, TileGrid
from geodeploy.train.chips import Chip, list_scenes
from geodeploy.train.limits import Limits, Outside, limits_of, tell_of_outside
from geodeploy.train.recipe import Blocks, Data, Recipe, Scene, Statistics, is_vector

log = logging.getLogger(__name__)

_OPEN = 128
"""Scenes whose files stay open; of more, each is opened when it is read."""
NEITHER, TRAINING, VALIDATION, TEST = 0, 1, 2, 3
"""What a pixel of a scene is for."""
_PARTS = {"train": TRAINING, "validation": VALIDATION, "test": TEST}


@dataclass(frozen=True, slots=True)
class TileLabels:
    """What the tiles of a scene show as a whole."""

    classes: int
    presence: Presence
    shown: NDArray[np.uint8] | None = None
    """(K,) Of a chip by its row in a table: 1, 0 or `IGNORED`. None where the codes of a tile tell."""

    def of(self, codes: NDArray[np.uint8], *, inside: float = 1.0) -> NDArray[np.uint8]:
        """(K,) 1, 0 or `IGNORED` of a tile of ``codes``, a share ``inside`` of which the scene has."""
        if self.shown is None:
            return present_classes(codes, self.classes, self.presence, inside=inside)
        return self.shown if (codes != IGNORED).any() else np.full(self.classes, IGNORED, np.uint8)

    @property
    def least(self) -> float:
        """Share of a tile's pixels that must have a label for the tile to have one."""
        return self.presence.labelled if self.shown is None else 0.0


@dataclass(frozen=True, slots=True)
class LabelledScene:
    """An open image with its labels in memory: two bytes a pixel, one a class with teachers, four a
    quantity.
    """

    raster: Raster
    codes: NDArray[np.uint8]
    """(H, W): the position of the class in the recipe, or `IGNORED`, as where the image has no data. Of
    a chip with a row in a table all others are 0."""
    part: NDArray[np.uint8]
    """(H, W): `TRAINING`, `VALIDATION`, `TEST` or `NEITHER`."""
    weight: float | None = None
    """In the draw of windows; None for its pixels to learn from."""
    taught: NDArray[np.uint8] | None = None
    """(K, H, W): what the teachers say of each pixel, 255 being certain; all 0 where it has no data."""
    values: NDArray[np.float32] | None = None
    """(T, H, W): the quantities in their units, NaN where there is no label; None of classes. The codes
    tell which fourth of its range the first of them lies in."""
    tiles: TileLabels | None = None
    """None where each pixel is learned by itself."""
    region: str = ""
    """What its scores are reported under if it is held out: its image, or the folder of its chips."""
    state: str = ""
    """What tells one state of the image's files from another."""
    limits: Limits | None = None
    """Outside of which a pixel holds no data, whatever the image says; None for any numbers."""
    outside: Outside | None = None
    """Pixels that lie there; None without limits."""

    def read_pixels(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``window`` in units, (C, h, w), and which pixels hold data within the limits, (h, w)."""
        pixels, valid = self.raster.read_pixels(window)
        return pixels, valid if self.limits is None else valid & self.limits.hold(pixels)

    def count(self, part: int) -> int:
        """Labelled pixels of that part."""
        return int(((self.part == part) & (self.codes != IGNORED)).sum())

    def counts(self, part: int, classes: int) -> NDArray[np.int64]:
        """Labelled pixels of that part and each class, (classes,); of all classes that a chip shows."""
        if self.tiles is not None and self.tiles.shown is not None:
            return np.where(self.tiles.shown == 1, self.count(part), 0)
        found: NDArray[np.int64] = np.bincount(self.codes[self.part == part], minlength=256)[:classes]
        return found

    def has_class(self, window: Window, position: int) -> NDArray[np.bool_]:
        """Which pixels of ``window`` to train on are of the class, or of a chip that shows it."""
        codes = self.codes_of(window, TRAINING)
        if self.tiles is not None and self.tiles.shown is not None:
            found: NDArray[np.bool_] = (codes != IGNORED) & (self.tiles.shown[position] == 1)
        else:
            found = codes == position
        return found

    def codes_of(self, window: Window, part: int) -> NDArray[np.uint8]:
        """The codes in ``window``, `IGNORED` outside ``part``."""
        area = window.toslices()
        return np.where(self.part[area] == part, self.codes[area], np.uint8(IGNORED))

    def values_of(self, window: Window, codes: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """The values (T, h, w) from the corner of ``window`` on, NaN where ``codes`` (h, w) say so."""
        if self.values is None:
            return None
        inside = self.values[:, *window.toslices()]
        values = np.full((len(inside), *codes.shape), np.nan, np.float32)
        values[:, : inside.shape[1], : inside.shape[2]] = inside
        values[:, codes == IGNORED] = np.nan
        return values

    def teaches(self, window: Window) -> NDArray[np.bool_]:
        """Which pixels of ``window`` teach something: by a label, or by what the teachers say."""
        area = window.toslices()
        known = self.codes[area] != IGNORED
        if self.taught is not None:
            known |= self.taught[:, *area].any(axis=0)
        learned: NDArray[np.bool_] = known & (self.part[area] == TRAINING)
        return learned

    def is_labelled(self, window: Window, part: int) -> bool:
        """Whether a tile of that part there has anything to be scored against."""
        codes = self.codes_of(window, part)
        labels = codes if self.tiles is None else self.tiles.of(codes)
        return bool((labels != IGNORED).any())


@dataclass(frozen=True, slots=True)
class LabelledTile:
    """One tile of the regular grid, as predict would read it."""

    pixels: NDArray[np.float32]
    """(C, tile, tile), invalid pixels filled with the bands' means."""
    codes: NDArray[np.uint8]
    """(tile, tile): what each pixel is scored against."""
    place: Tile
    values: NDArray[np.float32] | None = None
    """(T, tile, tile): the quantities that it is scored against; None of classes."""
    shown: NDArray[np.uint8] | None = None
    """(K,) 1, 0 or `IGNORED`: what it shows as a whole; None where each pixel is scored by itself."""


@contextmanager
def open_scenes(recipe: Recipe) -> Iterator[list[LabelledScene]]:
    """The recipe's scenes with their labels, all checked.

    Raises:
        SourceError, BandError: an image or its labels cannot be read as the recipe says.
        LabelError: labels do not lie on their image, hold values the recipe does not know, or are
            nowhere in the training area where there is data; with teachers, nowhere at all.
        RangeError: an image does not hold values in the recipe's units.
    """
    check_folder(recipe.data)
    with ExitStack() as stack:
        taught = bool(recipe.distillation.teachers)
        scenes = []
        listed = list_scenes(recipe)
        for place, scene in listed:
            if scene.labels is None and not taught:
                log.info("%s (%s) has no labels: left out, it takes a teacher.", place, scene.image)
                continue
            scenes.append(
                stack.enter_context(open_scene(recipe, scene, place, keep_open=len(listed) <= _OPEN))
            )
        if not any(scene.count(TRAINING) or (taught and scene.count(VALIDATION)) for scene in scenes):
            raise LabelError(
                f"No {'scene' if taught else 'training scene'} has a labelled pixel. Check "
                "the scenes' labels and nodata, data.ignore and data.blocks."
            )
        if recipe.task == "multilabel" and not any(
            has_labels(scene, recipe, TRAINING) for scene in scenes
        ):
            raise LabelError(
                f"No tile of {recipe.model.tile} pixels to train on has labels on "
                f"{recipe.data.presence.labelled:.0%} of it. Take a smaller model.tile or "
                "data.presence.labelled, or check the labels and data.blocks."
            )
        counted = [(scene.raster.name, scene.outside) for scene in scenes if scene.outside]
        if outside := tell_of_outside(counted):
            log.warning("%s", outside)
        notes = [note for scene in scenes for note in scene.raster.band_notes]
        if notes:
            more = f" (and so of {len(notes) - 1} more images)" if len(notes) > 1 else ""
            log.warning("%s%s", notes[0], more)
        if not any(has_labels(scene, recipe, VALIDATION) for scene in scenes):
            log.warning("No label validates: the last weights will be kept, and nothing is scored.")
        if recipe.targets:
            scenes = _group_alike(scenes)
        elif not taught:
            _warn_of_absent_classes(scenes, recipe)
        yield scenes


def check_folder(data: Data) -> None:
    """Refuse a recipe whose data are not there.

    Raises:
        SourceError: names the folder and the key.
    """
    if not data.root.is_dir():
        raise SourceError(
            f"The folder of the scenes, {data.root}, does not exist. Name it with "
            "--set data.root=FOLDER or in the recipe."
        )


@contextmanager
def open_scene(recipe: Recipe, scene: Scene, place: str, *, keep_open: bool) -> Iterator[LabelledScene]:
    """The scene at ``place`` in the recipe with its labels, checked as `open_scenes` does."""
    with open_image(recipe, scene, place) as raster:
        check_units(raster, recipe, place)
        labelled = replace(label_scene(recipe, scene, place, raster), state=_state_of(raster))
        if not keep_open:  # from here on: so far the file was read in many pieces
            raster.keep_open = False
            raster.close()
        yield labelled


def _state_of(raster: Raster) -> str:
    # Viewers leave statistics and overviews beside a scene.
    files = [name for name in raster.files() if not name.endswith((".aux.xml", ".ovr"))]
    nodata = [layer.nodata for layer in raster.layers]
    return identify(files, nodata, raster.indexes, raster.scales.tolist(), raster.offsets.tolist())[1]


@contextmanager
def open_image(recipe: Recipe, scene: Scene, place: str) -> Iterator[Raster]:
    """The image of the scene at ``place`` in the recipe, which errors name.

    Raises:
        SourceError: among others: it has fewer dates than the model takes, or more.
    """
    root, timesteps = recipe.data.root, recipe.model.timesteps
    with ExitStack() as stack:
        with _flags_as_keys(place):
            raster = stack.enter_context(
                open_raster(
                    root / scene.image,
                    earlier=[root / image for image in scene.earlier],
                    dates=dates_of(scene),
                    timesteps=1 if scene.earlier else timesteps,
                    band_names=recipe.data.bands,
                    select=scene.bands,
                    scale=scene.scale,
                    offset=scene.offset,
                )
            )
        if raster.dates != timesteps:
            found = f"{raster.dates} date{'s' if raster.dates > 1 else ''}"
            raise SourceError(
                f"{place}: model.timesteps is {timesteps}, and {raster.name} has {found}. Name the "
                f"files of the other dates with {place}.earlier, the oldest first; of one file that "
                f"holds them all, list the bands of every date in {place}.bands."
            )
        yield raster


def dates_of(scene: Scene) -> tuple[str, ...]:
    """Those to take of an image that holds several; none for all."""
    return (scene.date,) if isinstance(scene.date, str) else scene.date or ()


def check_units(raster: Raster, recipe: Recipe, place: str) -> None:
    """Refuse an image that does not hold values in the recipe's units.

    Raises:
        RangeError: names the values seen and the keys that would mend it.
    """
    with _flags_as_keys(place):
        # Mean and deviation are not known yet, and the check asks for neither.
        check_range(
            raster,
            [
                Band(name=name, mean=0, std=1, valid_range=limits)
                for name, limits in zip(recipe.data.bands, recipe.data.valid_ranges, strict=True)
            ]
            * recipe.model.timesteps,
        )


def label_scene(recipe: Recipe, scene: Scene, place: str, raster: Raster) -> LabelledScene:
    """``raster``, the image of ``scene``, with its labels.

    Raises:
        As `scene_labels` and `divide`.
    """
    labels = scene_labels(recipe, scene, raster)
    return divide(recipe, scene, place, raster, *labels, limits=limits_of(recipe))


def scene_labels(
    recipe: Recipe, scene: Scene, raster: Raster
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """The codes of ``scene``, all `IGNORED` where it has no labels, and the values of a regression."""
    if scene.labels is None:
        return np.full((raster.height, raster.width), IGNORED, np.uint8), None
    if isinstance(scene, Chip):
        _check_chip(recipe, scene, raster)
        return np.zeros((raster.height, raster.width), np.uint8), None
    path = recipe.data.find_labels(scene.labels)
    if not recipe.targets:
        return read_codes(path, raster, recipe), None
    values = read_values(path, raster, recipe)
    return group_values(values, _range_of([values])), values


def divide(
    recipe: Recipe,
    scene: Scene,
    place: str,
    raster: Raster,
    codes: NDArray[np.uint8],
    values: NDArray[np.float32] | None,
    *,
    limits: Limits | None,
) -> LabelledScene:
    """The scene with its ``codes`` and ``values`` where the image holds data, each pixel for its part.

    What lies outside of ``limits`` is no data, and is counted.

    Raises:
        SourceError: the image cannot be read to its end.
        RecipeError: the scene is too small for ``data.blocks``.
    """
    outside = None if limits is None else Outside()
    for window in raster.stripes():
        stripe = raster.read(window)
        valid = stripe.valid
        if outside is not None and limits is not None:
            valid = outside.add(stripe, raster, limits)
        codes[window.toslices()][~valid] = IGNORED
    tiles = None
    if recipe.task == "multilabel":
        shown = np.array(scene.shown, np.uint8) if isinstance(scene, Chip) else None
        tiles = TileLabels(len(recipe.classes), recipe.data.presence, shown)
        if shown is not None and (shown == IGNORED).all():
            codes[:] = IGNORED
    part = split(codes, scene, recipe.data.blocks, recipe.groups)
    region = str(scene.image)
    if place.startswith("data.chips"):
        region = str((recipe.data.chips or ())[int(place.rpartition(".")[2])].images)
    return LabelledScene(
        raster,
        codes,
        part,
        scene.weight,
        values=values,
        tiles=tiles,
        region=region,
        limits=limits,
        outside=outside,
    )


def _check_chip(recipe: Recipe, scene: Scene, raster: Raster) -> None:
    """Refuse a chip of which a tile is but a part: the labels are those of all of it."""
    side = recipe.model.tile
    if max(raster.height, raster.width) > side:
        raise LabelError(
            f"{scene.image.name} has {raster.height} x {raster.width} pixels, model.tile is {side}: "
            "the labels in a table are of the whole chip. Take a tile that holds it; what a chip lacks "
            "to a tile is mirrored."
        )


@contextmanager
def _flags_as_keys(place: str) -> Iterator[None]:
    """Let errors that advise the flags of predict name the keys of the scene at ``place``."""
    try:
        yield
    except (BandError, RangeError, SourceError) as error:
        text = re.sub(r"(--scale \d\S*) (--offset)", r"\1 and \2", str(error))
        text = re.sub(r"--date (\d\S*\d)", rf'{place}.date = "\1"', text)
        text = re.sub(r"--(scale|offset) (-?\d\S*)", rf"{place}.\1 = \2", text)
        text = re.sub(r"--(scale|offset|bands|date)", rf"{place}.\1", text)
        raise type(error)(text) from error


def read_codes(path: Path, raster: Raster, recipe: Recipe) -> NDArray[np.uint8]:
    """The labels in ``path`` as positions in the recipe's classes, (H, W).

    Raises:
        LabelError: they do not lie on ``raster``, or hold values the recipe does not know.
        MissingExtraError: they are polygons or points, and the extra ``vector`` is not installed.
    """
    if is_vector(path):
        require("vector", ("shapely", "pyogrio", "pyarrow"))
        from geodeploy.train.vectors import draw_codes

        return draw_codes(path, raster, recipe)
    codes = np.empty((raster.height, raster.width), np.uint8)
    with open_dataset(path) as dataset:
        if dataset.count != 1:
            raise LabelError(f"{path.name} has {dataset.count} bands; labels have one.")
        _check_grid(path, dataset, raster)
        if np.dtype(dataset.dtypes[0]).kind not in "iu":
            raise LabelError(
                f"{path.name} holds {dataset.dtypes[0]} numbers; labels are whole numbers."
            )
        for window in raster.stripes():  # what is done to a pixel takes far more than its byte
            with reading(path, window):
                stored = dataset.read(1, window=window, masked=True)
            codes[window.toslices()] = stored_positions(
                dataset, stored, recipe.classes, recipe.data.ignore, source=path.name
            )
    return codes


def read_values(path: Path, raster: Raster, recipe: Recipe) -> NDArray[np.float32]:
    """The quantities in ``path`` in their units, (T, H, W), NaN where there is no label.

    Raises:
        LabelError: they do not lie on ``raster``, or are not what the recipe says of its targets.
    """
    targets = recipe.targets
    values = np.empty((len(targets), raster.height, raster.width), np.float32)
    with open_dataset(path) as dataset:
        bands = target_bands(dataset, targets, source=path.name)
        _check_grid(path, dataset, raster)
        for window in raster.stripes():
            with reading(path, window):
                stored = dataset.read(bands, window=window, masked=True)
            values[:, *window.toslices()] = target_values(
                stored,
                targets,
                recipe.data.ignore,
                scales=[dataset.scales[band - 1] for band in bands],
                offsets=[dataset.offsets[band - 1] for band in bands],
                source=path.name,
            )
    return values


def group_values(values: NDArray[np.float32], span: tuple[float, float]) -> NDArray[np.uint8]:
    """Which fourth of the ``span`` the first of the values (T, H, W) lies in; `IGNORED` without any."""
    first, (low, high) = values[0], span
    place = (np.nan_to_num(first, nan=low) - low) * (4 / max(high - low, 1e-30))
    labelled = np.isfinite(values).any(axis=0)
    return np.where(labelled, np.clip(place, 0, 3).astype(np.uint8), np.uint8(IGNORED))


def _range_of(several: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """What the first quantity lies in; 0 and 0 where it is nowhere."""
    known = [first[np.isfinite(first)] for first in (values[0] for values in several)]
    known = [first for first in known if first.size]
    if not known:
        return 0.0, 0.0
    return float(min(first.min() for first in known)), float(max(first.max() for first in known))


def _group_alike(scenes: Sequence[LabelledScene]) -> list[LabelledScene]:
    """The ``scenes`` with codes that mean the same in all; blocks were drawn by those of each alone."""
    several = [scene.values for scene in scenes if scene.values is not None]
    span = _range_of(several)
    return [
        scene
        if scene.values is None
        else replace(
            scene,
            codes=np.where(scene.codes == IGNORED, scene.codes, group_values(scene.values, span)),
        )
        for scene in scenes
    ]


def compute_targets(scenes: Sequence[LabelledScene], targets: Sequence[Target]) -> tuple[Target, ...]:
    """The ``targets`` with mean and deviation of the training labels, where they are not given.

    Raises:
        RecipeError: a quantity is not known at any training pixel, or is one number at all of them.
    """
    found = []
    for place, target in enumerate(targets):
        whole, scored = (_moments_of(scenes, place, part) for part in (TRAINING, VALIDATION))
        check_target(place, target, whole)
        if not scored.valid and len(targets) > 1:
            log.warning("No label that validates has %s: it is not scored.", target.name)
        # Seven digits: what float32 holds, and short enough to read.
        computed = {"mean": float(f"{whole.mean:.7g}"), "std": float(f"{whole.deviation:.7g}")}
        given = target.model_dump(include={"mean", "std"}, exclude_none=True)
        found.append(target.model_copy(update=computed | given))
    return tuple(found)


def _moments_of(scenes: Sequence[LabelledScene], target: int, part: int) -> Moments:
    """What the labels of a quantity come to where they are for ``part``."""
    found = [
        Moments.of(scene.values[target][(scene.part == part) & (scene.codes != IGNORED)])
        for scene in scenes
        if scene.values is not None
    ]
    whole: Moments = add_up([Moments(), *found])
    return whole


def check_target(place: int, target: Target, learned: Moments) -> None:
    """Refuse the target at ``place`` where its labels to train on are no good.

    Raises:
        RecipeError: it is not known at any training pixel, or is one number at all of them.
    """
    if not learned.valid or learned.deviation <= 1e-6 * abs(learned.mean):
        what = f"is {learned.mean:g} at every one" if learned.valid else "is known at none"
        raise RecipeError(
            f"targets.{place}: {target.name} {what} of the training pixels: nothing can be learned "
            "from it."
        )


def split(codes: NDArray[np.uint8], scene: Scene, blocks: Blocks, classes: int) -> NDArray[np.uint8]:
    """What each pixel of the scene is for, (H, W)."""
    if scene.split == "blocks":
        return _split_blocks(codes, blocks, classes)
    return np.full(codes.shape, _PARTS[scene.split], np.uint8)


def training_pixels(scenes: Sequence[LabelledScene], bands: int) -> Iterator[NDArray[np.float32]]:
    """The valid training pixels (``bands``, n) of all scenes, labelled or not, stripe by stripe.

    What lies outside ``data.valid_range`` is not valid.
    """
    for scene in scenes:
        if not (scene.part == TRAINING).any():
            continue
        for window in scene.raster.stripes():
            pixels, valid = scene.read_pixels(window)
            yield join_dates(pixels[:, valid & (scene.part[window.toslices()] == TRAINING)], bands)


def join_dates(pixels: NDArray[np.float32], bands: int) -> NDArray[np.float32]:
    """The pixels (dates x ``bands``, n) of all dates as (``bands``, dates x n)."""
    planes, count = pixels.shape
    dates = planes // bands
    return pixels.reshape(dates, bands, count).swapaxes(0, 1).reshape(bands, dates * count)


def compute_statistics(scenes: Sequence[LabelledScene], bands: int) -> Statistics:
    """Mean and deviation of the valid training pixels, labelled or not, read stripe by stripe."""
    count = 0
    total, squares = np.zeros(bands), np.zeros(bands)
    for pixels in training_pixels(scenes, bands):
        values = pixels.astype(np.float64)
        count += values.shape[1]
        total += values.sum(axis=1)
        squares += np.square(values).sum(axis=1)
    return statistics_of(count, total, squares)


def statistics_of(count: int, total: NDArray[np.float64], squares: NDArray[np.float64]) -> Statistics:
    """Mean and deviation of ``count`` pixels from the sums of each band and of its squares.

    Raises:
        LabelError: there is no pixel.
        RecipeError: a band has one value.
    """
    if count == 0:
        raise LabelError("No training pixel holds data: the images are empty where they train.")
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # Sums of one value, rounded, leave some 1e-8 of it.
    flat = deviation <= 1e-6 * np.abs(mean)
    if flat.any():
        raise RecipeError(
            f"Band {int(flat.argmax()) + 1} of data.bands has one value at every training pixel: "
            "nothing can be learned from it. Leave it out."
        )
    # Seven digits: what float32 holds, and short enough to read.
    return Statistics(
        mean=tuple(float(f"{value:.7g}") for value in mean),
        std=tuple(float(f"{value:.7g}") for value in deviation),
    )


def check_scaling(recipe: Recipe, statistics: Statistics) -> None:
    """Refuse statistics that ``model.scaling`` cannot normalise by.

    Raises:
        RecipeError: names the band.
    """
    if recipe.model.scaling == "log" and min(statistics.mean) <= 0:
        lowest = int(np.argmin(statistics.mean))
        raise RecipeError(
            f'model.scaling: "log" needs bands with a positive mean; {recipe.data.bands[lowest]} has '
            f'{statistics.mean[lowest]:g}. Take "zscore".'
        )


def class_shares(scenes: Sequence[LabelledScene], classes: int) -> NDArray[np.float64]:
    """The share of each class among the labelled training pixels."""
    counts = sum(scene.counts(TRAINING, classes) for scene in scenes)
    shares: NDArray[np.float64] = counts / np.maximum(np.sum(counts), 1)
    return shares


def has_labels(scene: LabelledScene, recipe: Recipe, part: int) -> bool:
    """Whether anything of that part can be learned from or scored."""
    if scene.tiles is None:
        return scene.count(part) > 0
    tile, overlap = recipe.model.tile, recipe.model.overlap
    return any(True for _ in labelled_places(scene, tile, overlap, part=part))


def tile_shares(
    scenes: Sequence[LabelledScene], tile: int, overlap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of the grid's training tiles, those that show each class, and those that do not, (K,) each."""
    shown = [
        scene.tiles.of(scene.codes_of(place.window, TRAINING))
        for scene in scenes
        if scene.tiles is not None
        for place in labelled_places(scene, tile, overlap, part=TRAINING)
    ]
    labels = np.array(shown)
    return (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)


def read_square(
    scene: LabelledScene, window: Window, side: int, mean: NDArray[np.float32], *, part: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels (C, side, side), codes and valid pixels (side, side) from the corner of ``window`` on.

    Pixels are the bands' ``mean`` where invalid, and mirrored, as predict does, where ``window`` ends
    before ``side`` because the raster does. Codes are those of ``part``, `IGNORED` in both.
    """
    pixels, valid = read_filled(scene.read_pixels, window, side, mean)
    codes = scene.codes_of(window, part)
    short = [(0, side - size) for size in codes.shape]
    if any(pair != (0, 0) for pair in short):
        codes = np.pad(codes, short, constant_values=IGNORED)
    return pixels, np.where(valid, codes, np.uint8(IGNORED)), valid


def read_filled(
    read: Callable[[Window], tuple[NDArray[np.float32], NDArray[np.bool_]]],
    window: Window,
    side: int,
    mean: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels (C, side, side) and valid pixels (side, side) from the corner of ``window`` on.

    ``read`` gives those in it. Pixels are the bands' ``mean`` where invalid, and mirrored, as predict
    does, where ``window`` ends before ``side`` because the raster does.
    """
    pixels, valid = read(window)
    if not valid.all():
        pixels = np.where(valid, pixels, mean[:, np.newaxis, np.newaxis])
    short = [(0, side - size) for size in valid.shape]
    if any(pair != (0, 0) for pair in short):
        pixels = np.pad(pixels, [(0, 0), *short], mode="reflect")
        valid = np.pad(valid, short, mode="reflect")
    return pixels, valid


def labelled_places(scene: LabelledScene, tile: int, overlap: int, *, part: int) -> Iterator[Tile]:
    """The tiles of the scene's grid that have a label of ``part``."""
    height, width = scene.codes.shape
    grid = TileGrid if scene.tiles is None else CellGrid
    for place in grid(height, width, tile, overlap):
        if scene.is_labelled(place.window, part):
            yield place


def read_tile(
    scene: LabelledScene, place: Tile, tile: int, mean: NDArray[np.float32], *, part: int
) -> LabelledTile:
    """The pixels of one tile and the labels of ``part`` in it, mirrored where the raster ends."""
    pixels, codes, _ = read_square(scene, place.window, tile, mean, part=part)
    values = scene.values_of(place.window, codes)
    shown = None if scene.tiles is None else scene.tiles.of(scene.codes_of(place.window, part))
    return LabelledTile(np.ascontiguousarray(pixels), codes, place, values, shown)


def sample_tiles(
    scenes: Sequence[LabelledScene], recipe: Recipe, mean: NDArray[np.float32], count: int
) -> list[LabelledTile]:
    """Up to ``count`` tiles of the validation area, or of the training area where there is none.

    They are drawn by the hash of their place: the same recipe draws the same tiles.
    """
    tile, overlap = recipe.model.tile, recipe.model.overlap
    part = VALIDATION if any(has_labels(scene, recipe, VALIDATION) for scene in scenes) else TRAINING
    places = [
        (scene, place) for scene in scenes for place in labelled_places(scene, tile, overlap, part=part)
    ]

    def draw(item: tuple[LabelledScene, Tile]) -> bytes:
        scene, place = item
        window = place.window
        return sha256(f"{scene.raster.name} {window.row_off} {window.col_off}".encode()).digest()

    chosen = sorted(places, key=draw)[:count]
    return [read_tile(scene, place, tile, mean, part=part) for scene, place in chosen]


def _check_grid(path: Path, labels: Any, raster: Raster) -> None:
    if (labels.height, labels.width) != (raster.height, raster.width):
        raise LabelError(
            f"{path.name} has {labels.height} x {labels.width} pixels, {raster.name} has "
            f"{raster.height} x {raster.width}. Warp the labels onto the image (nearest neighbour)."
        )
    referenced = labels.crs is not None and raster.crs is not None
    if referenced and labels.crs != raster.crs:
        raise LabelError(
            f"{path.name} is in {labels.crs}, {raster.name} in {raster.crs}. "
            "Warp the labels onto the image (nearest neighbour)."
        )
    # Pictures such as PNG have no place at all: their pixels are taken one for one.
    placed = referenced or not (labels.transform.is_identity or raster.transform.is_identity)
    same = same_place(labels.transform, raster.transform, raster.height, raster.width)
    if placed and not same:
        raise LabelError(
            f"{path.name} lies elsewhere than {raster.name}: it reaches from {_extent(labels)}, the "
            f"image from {_extent(raster)}. Warp the labels onto the image (nearest neighbour)."
        )


def _extent(raster: Any) -> str:
    ends = (raster.transform @ corner for corner in ((0, 0), (raster.width, raster.height)))
    return " to ".join(f"{x:.10g}, {y:.10g}" for x, y in ends)


def _split_blocks(codes: NDArray[np.uint8], blocks: Blocks, classes: int) -> NDArray[np.uint8]:
    height, width = codes.shape
    corners = list(itertools.product(range(0, height, blocks.size), range(0, width, blocks.size)))
    if len(corners) < 2:
        raise RecipeError(
            f"data.blocks.size: a scene of {height} x {width} pixels is one block of {blocks.size}; "
            "take a smaller size, or split by scene."
        )
    counts = np.array(
        [
            np.bincount(codes[row : row + blocks.size, col : col + blocks.size].ravel(), minlength=256)[
                :classes
            ]
            for row, col in corners
        ]
    )
    part = np.full(codes.shape, TRAINING, np.uint8)
    drawn = [corners[number] for number in _draw_blocks(counts, blocks)]
    for row, col in drawn:
        part[
            max(row - blocks.gap, 0) : row + blocks.size + blocks.gap,
            max(col - blocks.gap, 0) : col + blocks.size + blocks.gap,
        ] = NEITHER
    for row, col in drawn:
        part[row : row + blocks.size, col : col + blocks.size] = VALIDATION
    return part


def _draw_blocks(counts: NDArray[np.int64], blocks: Blocks) -> NDArray[np.int64]:
    """Numbers of the blocks that validate: of 64 draws, the one with the most even share of each class.

    A few blocks drawn blindly easily miss a rare class or hold all of it.
    """
    rng = np.random.default_rng(blocks.seed)
    labelled = np.flatnonzero(counts.sum(axis=1))
    counts = counts[:, counts.any(axis=0)]  # a class that the scene lacks tells no draw from another
    # At least one block with labels is left to train on, even if none validates then.
    number = min(max(1, round(blocks.fraction * len(labelled))), max(len(labelled) - 1, 0))
    totals = counts.sum(axis=0)
    draws = [rng.permutation(labelled)[:number] for _ in range(64)]

    def unevenness(draw: NDArray[np.int64]) -> float:
        return float(np.abs(counts[draw].sum(axis=0) / totals - blocks.fraction).max(initial=0))

    return min(draws, key=unevenness)


def _warn_of_absent_classes(scenes: Sequence[LabelledScene], recipe: Recipe) -> None:
    shares = class_shares(scenes, len(recipe.classes))
    made_up = recipe.augmentation.clouds.made_up
    absent = [
        item.name
        for item, share in zip(recipe.classes, shares, strict=True)
        if not share and item.value not in made_up
    ]
    if absent:
        log.warning("No training pixel is labelled %s: it cannot be learned.", ", ".join(absent))
