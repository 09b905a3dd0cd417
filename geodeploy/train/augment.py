"""Training tiles: windows drawn at random, resampled, turned, and lit differently each time."""

# B batch, C band, H row, W column

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rasterio.windows import Window
from torch.nn import functional

from geodeploy.bands import WAVELENGTH_UM
from geodeploy.labels import IGNORED
from geodeploy.train.clouds import CloudMaker
from geodeploy.train.data import TRAINING, LabelledScene, read_square
from geodeploy.train.recipe import Augmentation, Recipe

# Between Rayleigh scattering by air (4) and scattering by coarse dust (0): hazy air is about 2.
_HAZE_EXPONENT = 2.0
_DRAWS = 20
_SQUARE = 64
"""Side of the squares in which labels are counted."""

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Batch:
    """Training tiles, stacked."""

    pixels: torch.Tensor
    """(B, C, tile, tile), in units."""
    labels: torch.Tensor
    """(B, tile, tile) int64: class positions, `IGNORED` where no loss is; or of a regression
    (B, T, tile, tile), NaN there; or of whole tiles (B, K) int64: 1, 0 or `IGNORED`."""
    taught: torch.Tensor | None
    """(B, K, tile, tile): the teachers' probabilities, 0 where they say nothing; None without any."""
    sampler: dict[str, Any]
    """State of the generator that drew it, and will draw the next."""


def training_batches(
    scenes: Sequence[LabelledScene],
    recipe: Recipe,
    mean: NDArray[np.float32],
    *,
    sampler: dict[str, Any] | None = None,
    share: slice = slice(None),
) -> Iterator[Batch]:
    """Batches without end, the same for the same seed; those after the one that had ``sampler``.

    Of each only the tiles in ``share`` are read. They are what they are in the whole batch, however it
    is shared: each draws its augmentations from a seed of its own.
    """
    rng = np.random.default_rng(recipe.seed)
    if sampler is not None:
        rng.bit_generator.state = sampler
    tile, zoom = recipe.model.tile, recipe.augmentation.zoom
    balanced = recipe.training.balanced_windows or 0.0
    sums = [sum_labels(scene) for scene in scenes]
    sizes = scene_sizes(scenes, sums)
    by_class = sum_classes(scenes, recipe.groups) if balanced else []
    light = Light(recipe, mean)
    while True:
        drawn = []
        for _ in range(recipe.training.batch):
            if by_class and rng.random() < balanced:
                scene, window = draw_class_window(scenes, by_class, tile, zoom, rng)
            else:
                number = int(rng.choice(len(scenes), p=sizes / sizes.sum()))
                scene = scenes[number]
                window = draw_window(scene, sums[number], tile, zoom, rng)
            drawn.append((scene, window, int(rng.integers(2**63))))
        tiles = [
            read_training_tile(scene, window, recipe, light, np.random.default_rng(seed))
            for scene, window, seed in drawn[share]
        ]
        pixels, labels, taught = zip(*tiles, strict=True)
        yield Batch(
            torch.from_numpy(np.stack(pixels)),
            torch.from_numpy(np.stack(labels)).to(torch.float32 if recipe.targets else torch.int64),
            torch.from_numpy(np.stack(taught)) if recipe.distillation.teachers else None,
            dict(rng.bit_generator.state),
        )


def scene_sizes(
    scenes: Sequence[LabelledScene], sums: Sequence[NDArray[np.int64]]
) -> NDArray[np.float64]:
    """How much of the draw each scene has: its weight, or the pixels that ``sums`` count."""
    return np.array(
        [
            (scene.weight or float(summed[-1])) if summed[-1] else 0.0
            for scene, summed in zip(scenes, sums, strict=True)
        ]
    )


def sum_classes(
    scenes: Sequence[LabelledScene], classes: int
) -> list[tuple[int, list[NDArray[np.int64]]]]:
    """The positions of the classes that have pixels to train on, with `sum_labels` of every scene."""
    every = [
        (position, [sum_labels(scene, position) for scene in scenes]) for position in range(classes)
    ]
    return [(position, sums) for position, sums in every if any(summed[-1] for summed in sums)]


def sum_labels(scene: LabelledScene, position: int | None = None) -> NDArray[np.int64]:
    """Pixels to learn from in each square of 64 pixels and all before it, row by row of squares.

    Those of the class at ``position``, or of any. With these one label of millions is found by looking
    into one square.
    """
    height, width = scene.codes.shape
    counts = []
    for row in range(0, height, _SQUARE):
        stripe = Window(0, row, width, min(_SQUARE, height - row))
        labelled = _wanted(scene, stripe, position)
        counts.append(np.add.reduceat(labelled.sum(axis=0), np.arange(0, width, _SQUARE)))
    summed: NDArray[np.int64] = np.cumsum(np.concatenate(counts), dtype=np.int64)
    return summed


def draw_window(
    scene: LabelledScene,
    summed: NDArray[np.int64],
    tile: int,
    zoom: tuple[float, float],
    rng: np.random.Generator,
) -> Window:
    """A square window with labels to train on: of several drawn blindly the first that has any.

    ``summed`` are the scene's labels as `sum_labels` gives them. Below and to the right the window may
    stick out of a scene that is smaller than a tile, never by more than a tile would.
    """
    height, width = scene.codes.shape
    side = _draw_side(scene, tile, zoom, rng)
    last_row, last_col = max(height - side, 0), max(width - side, 0)
    for _ in range(_DRAWS):
        row = int(rng.integers(0, last_row + 1))
        col = int(rng.integers(0, last_col + 1))
        window = Window(col, row, side, side)
        taught = scene.teaches(window)
        if taught.any() and (scene.tiles is None or taught.mean() >= scene.tiles.least):
            return window
    # Labels so sparse that luck does not find them: go to one.
    row, col = _find_label(scene, summed, int(rng.integers(0, summed[-1])))
    row = int(np.clip(row - side // 2, 0, last_row))
    col = int(np.clip(col - side // 2, 0, last_col))
    return Window(col, row, side, side)


def draw_class_window(
    scenes: Sequence[LabelledScene],
    by_class: Sequence[tuple[int, list[NDArray[np.int64]]]],
    tile: int,
    zoom: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[LabelledScene, Window]:
    """A scene and a square window of it that holds a pixel of a class, which is drawn first.

    ``by_class`` are the labels as `sum_classes` gives them. The pixel lies anywhere in the window.
    """
    position, sums = by_class[int(rng.integers(len(by_class)))]
    sizes = scene_sizes(scenes, sums)
    number = int(rng.choice(len(scenes), p=sizes / sizes.sum()))
    scene, summed = scenes[number], sums[number]
    row, col = _find_label(scene, summed, int(rng.integers(0, summed[-1])), position)
    side = _draw_side(scene, tile, zoom, rng)
    height, width = scene.codes.shape
    row = int(np.clip(row - rng.integers(0, side), 0, max(height - side, 0)))
    col = int(np.clip(col - rng.integers(0, side), 0, max(width - side, 0)))
    return scene, Window(col, row, side, side)


def _draw_side(
    scene: LabelledScene, tile: int, zoom: tuple[float, float], rng: np.random.Generator
) -> int:
    low, high = np.log(zoom[0]), np.log(zoom[1])
    side = max(round(tile * float(np.exp(rng.uniform(low, high)))), 1)
    height, width = scene.codes.shape
    return int(min(side, max(tile, min(height, width))))  # what is mirrored teaches nothing


def _wanted(scene: LabelledScene, window: Window, position: int | None) -> NDArray[np.bool_]:
    """Which pixels of ``window`` to learn from: of the class at ``position``, or any."""
    if position is None:
        return scene.teaches(window)
    return scene.has_class(window, position)


def _find_label(
    scene: LabelledScene, summed: NDArray[np.int64], number: int, position: int | None = None
) -> tuple[int, int]:
    """Row and column of the label to train on that has this number, in order of the squares."""
    square = int(np.searchsorted(summed, number, side="right"))
    across = -(-scene.codes.shape[1] // _SQUARE)
    top, left = square // across * _SQUARE, square % across * _SQUARE
    window = Window(left, top, _SQUARE, _SQUARE)  # slices end where the scene does
    rows, cols = np.nonzero(_wanted(scene, window, position))
    before = int(summed[square - 1]) if square else 0
    return top + int(rows[number - before]), left + int(cols[number - before])


def read_training_tile(
    scene: LabelledScene,
    window: Window,
    recipe: Recipe,
    light: "Light",
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32] | None]:
    """Pixels (C, tile, tile), labels and teachers' probabilities (K, tile, tile).

    They are those of ``window``, a square, augmented. Labels are codes (tile, tile), the values
    (T, tile, tile) of a regression, or what the tile shows, (K,). The last are None if the recipe names
    no teachers.
    """
    settings, tile, mean = recipe.augmentation, recipe.model.tile, light.mean
    height, width = scene.codes.shape
    inside = window.intersection(Window(0, 0, width, height))
    pixels, codes, valid = read_square(scene, inside, window.height, mean, part=TRAINING)
    taught = _read_taught(scene, inside, window.height, recipe)
    values = scene.values_of(inside, codes)
    pixels, codes, valid = (
        resample_pixels(pixels, tile),
        resample_nearest(codes, tile),
        resample_nearest(valid, tile),
    )
    values = None if values is None else resample_nearest(values, tile)
    taught = None if taught is None else resample_pixels(taught, tile)
    if settings.d4:
        symmetry = int(rng.integers(0, 8))
        pixels, codes, valid = turn(pixels, symmetry), turn(codes, symmetry), turn(valid, symmetry)
        taught = None if taught is None else turn(taught, symmetry)
        values = None if values is None else turn(values, symmetry)
    if settings.clouds.share and rng.random() < settings.clouds.share:
        pixels, codes, changed = light.clouds(pixels, codes, rng)
        codes = np.where(valid, codes, np.uint8(IGNORED))
        taught = None if taught is None else np.where(changed, np.float32(0), taught)
    taught = None if taught is None else np.where(valid, taught, np.float32(0))
    # Each date has its own sun and air.
    dates = [relight(date, settings, light.veil, rng) for date in np.split(pixels, light.dates)]
    pixels = dates[0] if len(dates) == 1 else np.concatenate(dates)
    if settings.band_dropout and rng.random() < settings.band_dropout:
        lost = int(rng.integers(len(pixels)))
        pixels[lost] = mean[lost]
    # What predict fills in is the mean exactly, whatever the light of the rest.
    pixels = np.where(valid, pixels, mean[:, np.newaxis, np.newaxis])
    labels: NDArray[Any] = codes
    if values is not None:
        labels = np.where(codes == IGNORED, np.float32(np.nan), values)
    elif scene.tiles is not None:
        share = inside.height * inside.width / window.height**2
        labels = scene.tiles.of(codes, inside=share)
    return (
        np.ascontiguousarray(pixels, np.float32),
        np.ascontiguousarray(labels),
        None if taught is None else np.ascontiguousarray(taught, np.float32),
    )


class Light:
    """What the augmentations know of the recipe's bands."""

    def __init__(self, recipe: Recipe, mean: NDArray[np.float32]) -> None:
        self.mean = mean
        """(C,), in units."""
        self.veil = haze_by_band(recipe.data.bands)
        """Of each band what haze adds, blue being 1."""
        self.dates = recipe.model.timesteps
        self.clouds = CloudMaker(recipe)


def _read_taught(
    scene: LabelledScene, inside: Window, side: int, recipe: Recipe
) -> NDArray[np.float32] | None:
    """What the teachers say of training pixels from the corner of ``inside`` on, (K, side, side)."""
    if not recipe.distillation.teachers:
        return None
    probabilities = np.zeros((len(recipe.classes), side, side), np.float32)
    if scene.taught is not None:
        area = inside.toslices()
        told = scene.taught[:, *area] * np.float32(1 / 255)
        told *= scene.part[area] == TRAINING
        probabilities[:, : told.shape[1], : told.shape[2]] = told
    return probabilities


def resample_pixels(pixels_CHW: NDArray[np.float32], tile: int) -> NDArray[np.float32]:
    """The square (C, h, h) at (C, tile, tile), bilinear, averaged where it shrinks."""
    if pixels_CHW.shape[-1] == tile:
        return pixels_CHW
    resampled = functional.interpolate(
        torch.from_numpy(pixels_CHW)[None], size=(tile, tile), mode="bilinear", antialias=True
    )
    result: NDArray[np.float32] = resampled[0].numpy()
    return result


def resample_nearest(values: NDArray[Number], tile: int) -> NDArray[Number]:
    """The squares (..., h, h) at (..., tile, tile), each pixel from the one its centre falls into."""
    side = values.shape[-1]
    nearest = (np.arange(tile) * 2 + 1) * side // (2 * tile)
    return values[..., nearest[:, np.newaxis], nearest]


def turn(values: NDArray[Number], symmetry: int) -> NDArray[Number]:
    """One of the eight symmetries of the square, 0 to 7, on the last two axes."""
    turned = np.rot90(values, symmetry % 4, axes=(-2, -1))
    return np.flip(turned, axis=-1) if symmetry >= 4 else turned


def relight(
    pixels_CHW: NDArray[np.float32],
    settings: Augmentation,
    veil: NDArray[np.float32],
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """The same ground under another light, another sensor and another air."""
    bands = len(pixels_CHW)
    gains = np.exp(rng.normal(0, settings.gain) + rng.normal(0, settings.band_gain, bands))
    added = rng.normal(0, settings.offset) + rng.uniform(0, settings.haze) * veil
    shape = (bands, 1, 1)
    return (pixels_CHW * gains.reshape(shape) + added.reshape(shape)).astype(np.float32)


def haze_by_band(bands: Sequence[str]) -> NDArray[np.float32]:
    """How much a veil adds to each band, blue being 1; none to bands of unknown wavelength."""
    blue = WAVELENGTH_UM["blue"]
    return np.array(
        [
            (blue / WAVELENGTH_UM[band]) ** _HAZE_EXPONENT if band in WAVELENGTH_UM else 0.0
            for band in bands
        ],
        np.float32,
    )
