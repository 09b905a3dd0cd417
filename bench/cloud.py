"""Does tuning a foundation model pay? Learn on one Landsat sensor, score on the other.

    python bench/cloud.py FOLDER_OF_THE_SCENES              every method, both ways, three seeds
    python bench/cloud.py FOLDER --methods light forest     some of them
    python bench/cloud.py FOLDER --table                    the table of what has been run so far

Every run writes one JSON file into bench/results/cloud and is not run again while that file is there,
so that hours of runs can be stopped and taken up again; the table in bench/results/cloud.md is made of
those files. Steps, augmentation and recipes are the same both ways, no epoch is chosen (the last
weights count), and nothing was ever chosen by a score on the sensor left out. Needs the extra
``train``; the random forest needs scikit-learn.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cloud"
CHIPS = {5: "landsat5", 7: "landsat7"}
WAYS = ((5, 7), (7, 5))
VALUES, NAMES = (0, 1, 3, 4), ("shadow", "water", "land", "cloud")
MERGED = {"shadow": (0,), "clear": (1, 2), "cloud": (3,)}
"""Positions of the classes in each of the three that cloud masks are compared by."""

STUDENT, TEACHER = ROOT / "train" / "cloud-student.toml", ROOT / "train" / "cloud-teacher.toml"
LIGHT = (
    "training.steps=300",
    "model.tile=192",
    "model.decoder_channels=[96,64,32,24]",
    "augmentation.zoom=[0.53,1.73]",
)
VIT = ("training.steps=150", "model.tile=168", "augmentation.zoom=[0.61,1.98]")
GALILEO = (
    "training.steps=150",
    "model.backbone=galileo_nano",
    "model.weights={root}/galileo-nano-weights/encoder.pt",
    "data.gsd_m=30",
    "model.tile=128",
    "augmentation.zoom=[0.8,2.6]",
)
"""All cut windows of 102 to 333 pixels, into smaller tiles than the recipes: hours, not days."""
PLAIN = ("augmentation.clouds.share=0", "training.class_weights=[1,10,1,1]")
LEVERS = (
    "augmentation.clouds={share=0.5, cloud=4, shadow=0, unshaded=[1]}",
    "training.class_weights=[1,1,1,1]",
)
"""A chip alone has one or two pixels of water in a hundred, which no method learns unweighted; the
clear scene has plenty."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    title: str
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    levers: bool = False
    """Whether it also sees the clear Sentinel-2 scene, and clouds made up over both."""
    teachers: tuple[str, ...] = ()
    """The methods whose RUNs of the same way and seed it is distilled from."""
    quarter: bool = False
    """Whether the chip has labels in one of its four corners alone, each seed in another."""


METHODS = {
    "forest": Method("random forest, pixel by pixel"),
    "light": Method("light convolutional U-Net, from scratch", STUDENT, LIGHT),
    "resnet18": Method(
        "ResNet-18 U-Net, from scratch",
        STUDENT,
        (
            *LIGHT,
            "model.backbone=resnet18",
            "model.decoder_channels=[256,128,64,32]",
            "training.lr=1e-3",
        ),
    ),
    "vit-linear": Method(
        "DINOv2 ViT-S/14, linear probe",
        TEACHER,
        (*VIT, "method.name=linear", "model.decoder=linear"),
    ),
    "vit-lora": Method("DINOv2 ViT-S/14, LoRA r 16, U-Net decoder", TEACHER, VIT),
    "vit-full": Method(
        "DINOv2 ViT-S/14, full tuning, U-Net decoder",
        TEACHER,
        (*VIT, "method.name=full", "training.lr=1e-4", "training.lr_head=8e-4"),
    ),
    "light-levers": Method("light convolutional U-Net, with the levers", STUDENT, LIGHT, levers=True),
    "vit-lora-levers": Method("DINOv2 ViT-S/14, LoRA r 16, with the levers", TEACHER, VIT, levers=True),
    "galileo-levers": Method(
        "Galileo-nano, frozen, U-Net decoder, with the levers",
        TEACHER,
        (*GALILEO, "method.name=linear"),
        levers=True,
    ),
    "galileo-lora-levers": Method(
        "Galileo-nano, LoRA r 16, with the levers", TEACHER, GALILEO, levers=True
    ),
    "student": Method(
        "light convolutional U-Net distilled from that DINOv2",
        STUDENT,
        LIGHT,
        levers=True,
        teachers=("vit-lora-levers",),
    ),
    "student-both": Method(
        "light convolutional U-Net distilled from Galileo-nano with LoRA and from the light network",
        STUDENT,
        LIGHT,
        levers=True,
        teachers=("galileo-lora-levers", "light-levers"),
    ),
    "light-levers-quarter": Method(
        "light convolutional U-Net, with the levers, a quarter of the chip's labels",
        STUDENT,
        LIGHT,
        levers=True,
        quarter=True,
    ),
    "vit-lora-levers-quarter": Method(
        "DINOv2 ViT-S/14, LoRA r 16, with the levers, a quarter of the chip's labels",
        TEACHER,
        VIT,
        levers=True,
        quarter=True,
    ),
}


def main() -> None:
    """Run what has not been run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="holds the scenes and Galileo's weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-cloud")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        for name in arguments.methods:
            for seed in arguments.seeds:
                for train, test in WAYS:
                    run(name, train, test, seed, arguments.root.resolve(), arguments.runs)
    table = write_table()
    (RESULTS.parent / "cloud.md").write_text(table, encoding="utf-8")
    print(table)


def record_of(name: str, train: int, test: int, seed: int) -> Path:
    """The file of one run."""
    return RESULTS / f"{name}-{train}-to-{test}-s{seed}.json"


def run(name: str, train: int, test: int, seed: int, root: Path, runs: Path) -> None:
    """One method, one way, one seed; nothing if it was done before."""
    record = record_of(name, train, test, seed)
    if record.exists():
        return
    method, begun = METHODS[name], time.perf_counter()
    if method.recipe is None:
        counts, facts = grow_forest(root, train, test, seed), {}
    else:
        counts, facts = tune(name, train, test, seed, root, runs)
    found = {
        "method": name, "train": train, "test": test, "seed": seed,
        **facts, "seconds": round(time.perf_counter() - begun, 1), "confusion": counts.tolist(),
    }  # fmt: skip
    record.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"{record.name}: accuracy {accuracy(merge(counts)):.3f}", flush=True)


def tune(
    name: str, train: int, test: int, seed: int, root: Path, runs: Path
) -> tuple[NDArray[np.int64], dict[str, object]]:
    """Train or distil, and score the sensor left out."""
    from geodeploy import distil, evaluate
    from geodeploy import train as tune_recipe

    method = METHODS[name]
    output = runs / f"{name}-{train}-to-{test}-s{seed}"
    labels = f"{root}/cloud-landsat-ukis/{CHIPS[train]}_labels.tif"
    if method.quarter:
        labels = str(keep_corner(Path(labels), seed, runs / f"{CHIPS[train]}_corner{seed}.tif"))
    overrides = [
        *(override.replace("{root}", str(root)) for override in method.overrides),
        *scenes(train, labels, root, levers=method.levers),
        f"seed={seed}",
    ]
    overrides += LEVERS if method.levers else PLAIN
    if not output.exists():
        if method.teachers:
            teachers = [runs / f"{teacher}-{train}-to-{test}-s{seed}" for teacher in method.teachers]
            for teacher in method.teachers:
                # A record without its RUN is of an earlier time, or of another machine.
                tune(teacher, train, test, seed, root, runs)
            distil(method.recipe, output, teachers=teachers, overrides=overrides)
        else:
            tune_recipe(method.recipe, output, overrides=overrides)
    chip = root / "cloud-landsat-ukis" / CHIPS[test]
    scores = evaluate(output, f"{chip}_6band.tif", f"{chip}_labels.tif")
    metrics = json.loads((output / "metrics.json").read_text())
    facts = {key: metrics[key] for key in ("steps", "trainable_parameters", "parameters")}
    return np.array(scores.confusion), facts


def keep_corner(labels: Path, corner: int, output: Path) -> Path:
    """The labels of one quarter of the chip; elsewhere there are none."""
    with rasterio.open(labels) as source:
        values, profile = source.read(1), source.profile | {"nodata": 255}
    (row, col), (height, width) = divmod(corner % 4, 2), (side // 2 for side in values.shape)
    part = np.s_[row * height : (row + 1) * height, col * width : (col + 1) * width]
    kept = np.full_like(values, 255)
    kept[part] = values[part]
    with rasterio.open(output, "w", **profile) as target:
        target.write(kept, 1)
    return output


def scenes(train: int, labels: str, root: Path, *, levers: bool) -> list[str]:
    """Overrides that leave one sensor out, and the clear scene too unless there are levers."""
    chip = CHIPS[train]
    listed = [
        f"{{image='cloud-landsat-ukis/{chip}_6band.tif', split='train', weight=1.0, labels='{labels}'}}"
    ]
    if levers:
        listed.append(
            "{image='s2-virginia-coast/s2_l1c_6band_10m.tif', bands=['1','2','3','4','5','6'], "
            f"labels='{ROOT}/train/labels/virginia-coast.tif', scale=1e-4, split='train', weight=0.25}}"
        )
    return [f"data.root={root}", f"data.scene=[{', '.join(listed)}]"]


def grow_forest(root: Path, train: int, test: int, seed: int) -> NDArray[np.int64]:
    """A hundred trees on the logarithms of the six bands."""
    from sklearn.ensemble import RandomForestClassifier

    pixels, labels = read_chip(root, train)
    drawn = np.random.default_rng(seed).choice(len(labels), 100_000, replace=False)
    forest = RandomForestClassifier(100, min_samples_leaf=5, n_jobs=-1, random_state=seed)
    forest.fit(pixels[drawn], labels[drawn])
    pixels, labels = read_chip(root, test)
    predicted = forest.predict(pixels)
    pairs = labels.astype(np.int64) * len(VALUES) + predicted
    return np.bincount(pairs, minlength=len(VALUES) ** 2).reshape(len(VALUES), -1)


def read_chip(root: Path, number: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Logarithms (N, 6) and class positions (N,) of one chip's pixels."""
    chip = root / "cloud-landsat-ukis" / CHIPS[number]
    with rasterio.open(f"{chip}_6band.tif") as image, rasterio.open(f"{chip}_labels.tif") as labels:
        pixels = np.log(np.maximum(image.read(), 0.002)).reshape(6, -1).T
        return pixels, np.searchsorted(VALUES, labels.read(1).ravel())


def merge(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of shadow, clear and cloud from those of the four classes."""
    groups = [list(group) for group in MERGED.values()]
    return np.array([[counts[np.ix_(row, column)].sum() for column in groups] for row in groups])


def accuracy(counts: NDArray[np.int64]) -> float:
    """The share of pixels that are right."""
    return float(np.trace(counts) / counts.sum())


def ious(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each class; 0 for one that is labelled and never found."""
    hits = np.diagonal(counts)
    return hits / np.maximum(counts.sum(axis=0) + counts.sum(axis=1) - hits, 1)


def write_table() -> str:
    """All that has been run, in Markdown."""
    lines = ["# One sensor left out: cloud, shadow, water and land", ""]
    lines += [line for line in __doc__.splitlines()[2:] if line]
    for train, test in WAYS:
        lines += [
            "",
            f"## Learned on Landsat {train}, scored on Landsat {test}",
            "",
            "Mean over the seeds, and the largest difference from it. IoU of all four classes, and of "
            "the three there are when land and water count as clear.",
            "",
            "| method | trained parameters | seeds | mIoU of 4 | accuracy | "
            + " | ".join(f"IoU {name}" for name in NAMES)
            + " | mIoU of 3 | accuracy of 3 |",
            "|---" * (7 + len(NAMES)) + "|",
        ]
        lines += [row for name in METHODS if (row := _row(name, train, test))]
    return "\n".join(lines) + "\n"


def _row(name: str, train: int, test: int) -> str | None:
    files = sorted(RESULTS.glob(f"{name}-{train}-to-{test}-s*.json"))
    if not files:
        return None
    records = [json.loads(file.read_text()) for file in files]
    counts = [np.array(record["confusion"]) for record in records]
    trained = records[0].get("trainable_parameters")
    per_class = np.array([ious(each) for each in counts])
    cells = [
        spread([float(ious(each).mean()) for each in counts]),
        spread([accuracy(each) for each in counts]),
        *(f"{value:.2f}" for value in per_class.mean(axis=0)),
        spread([float(ious(merge(each)).mean()) for each in counts]),
        spread([accuracy(merge(each)) for each in counts]),
    ]
    size = "-" if trained is None else f"{trained / 1e6:.2f} M"
    return f"| {METHODS[name].title} | {size} | {len(files)} | {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """The mean, and the largest difference from it."""
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {max(abs(value - mean) for value in values):.3f}"


if __name__ == "__main__":
    main()
