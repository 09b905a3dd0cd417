"""Do confidence and disagreement tell where a map is wrong?

    python bench/doubt.py MODEL IMAGE LABELS [MODEL IMAGE LABELS ...]

Each MODEL, an ONNX file or a RUN, maps an IMAGE whose LABELS it has not seen, with its own overlap and
with half its tile. Only pixels that lie in more than one tile count. AUROC is how often a wrong pixel
looks more doubtful than a right one, 0.5 being chance; "both" is the mean of the ranks of confidence
and disagreement. The intervals (95 %) are of 1000 draws of blocks of 64 x 64 pixels, since neighbours
are no evidence of their own. ECE is the mean distance between confidence and the share of right pixels,
in 15 bins of confidence. All is taken from the rasters that `predict` writes. RUNs that have not seen a
sensor are made by bench/cloud.py.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from geodeploy import PredictOptions, Report, predict
from geodeploy.runtime import open_session

MERGED = {"background": (1, 2, 3), "cloud": (4,), "cloud shadow": (0,)}
"""Label values of the classes of ukis-csmask, which has neither land nor water."""
BLOCK, DRAWS, BINS = 64, 1000, 15
MEASURES = ("1 - confidence", "entropy", "disagreement", "both")


def main() -> None:
    """Map, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("triples", nargs="+", type=Path, metavar="MODEL IMAGE LABELS")
    triples = parser.parse_args().triples
    if len(triples) % 3:
        parser.error("MODEL, IMAGE and LABELS come in threes.")
    print(
        "| model | scene | overlap | pixels in several tiles | wrong | "
        + " | ".join(f"AUROC {name}" for name in MEASURES)
        + " | disagreement over 1 - confidence | mean confidence | ECE |",
        "|---" * (8 + len(MEASURES)) + "|",
        sep="\n",
    )
    for model, image, labels in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        for line in rows(model, image, labels):
            print(line, flush=True)


def rows(model: Path, image: Path, labels: Path) -> Iterator[str]:
    """The lines of the table of one model and scene."""
    session = open_session(model, device="cpu")
    spec = session.spec
    session.close()
    truth = rasterio.open(labels).read(1)
    with tempfile.TemporaryDirectory() as folder:
        for overlap in (spec.overlap, spec.tile // 2):
            options = PredictOptions(
                overlap=overlap, confidence=True, probabilities=True, disagreement=True, overwrite=True
            )
            report = predict(image, model, Path(folder) / "map.tif", options=options)
            yield f"| {model.stem} | {image.stem} | {overlap} of {spec.tile} " + row(report, truth)


def row(report: Report, truth: NDArray[np.uint8]) -> str:
    """The cells with numbers."""
    (mapped,), (confidence,), probabilities, (disagreement,) = (
        rasterio.open(path).read() for path in (report.map, *report.beside)
    )
    names = {item.name: item.value for item in report.classes}
    merged = MERGED if names.keys() == MERGED.keys() else {name: (names[name],) for name in names}
    wrong = np.ones(truth.shape, bool)
    for name, values in merged.items():
        wrong[np.isin(truth, values) & (mapped == names[name])] = False
    counted = (mapped != 255) & (disagreement != 255)
    shares = probabilities / probabilities.sum(axis=0, dtype=float)
    entropy = -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(axis=0)
    measures = {
        "1 - confidence": 250 - confidence.astype(float),
        "entropy": entropy / np.log(len(shares)) * 250,
        "disagreement": disagreement.astype(float),
    }
    places = [ranks(measures[name][counted], counted) for name in ("1 - confidence", "disagreement")]
    measures["both"] = (places[0] + places[1]) / 2
    counts = {name: histograms(values, wrong, counted) for name, values in measures.items()}
    random = np.random.default_rng(0)
    blocks = len(counts["both"])
    draws = random.multinomial(blocks, np.full(blocks, 1 / blocks), DRAWS)
    drawn = {name: auroc(np.tensordot(draws, each, axes=1)) for name, each in counts.items()}
    cells = [f"{counted.mean():.0%}", f"{wrong[counted].mean():.1%}"]
    for name, each in counts.items():
        low, high = np.nanpercentile(drawn[name], (2.5, 97.5))
        cells.append(f"{auroc(each.sum(axis=0)):.3f} ({low:.2f} to {high:.2f})")
    gain = drawn["disagreement"] - drawn["1 - confidence"]
    low, high = np.nanpercentile(gain, (2.5, 97.5))
    cells.append(f"{low:+.2f} to {high:+.2f}")
    sure, right = confidence[counted] / 250, ~wrong[counted]
    cells += [f"{sure.mean():.2f}", f"{calibration_error(sure, right):.2f}"]
    return "| " + " | ".join(cells) + " |"


def ranks(values: NDArray[np.float64], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The rank of each of ``values`` (N,) from 0 to 250, one for equal ones, laid where ``counted``."""
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middles = np.cumsum(sizes) - sizes / 2
    laid = np.zeros(counted.shape)
    laid[counted] = middles[places] / len(values) * 250
    return laid


def histograms(
    values: NDArray[np.float64], wrong: NDArray[np.bool_], counted: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Pixels by block, whether they are wrong, and value: (blocks, 2, 251)."""
    row, col = np.indices(values.shape) // BLOCK
    block = (row * (col.max() + 1) + col)[counted]
    step = np.rint(values[counted]).astype(int)
    places = (block * 2 + wrong[counted]) * 251 + step
    return np.bincount(places, minlength=(block.max() + 1) * 502).reshape(-1, 2, 251)


def auroc(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often a wrong pixel has more than a right one, of (..., 2, 251); half of the ties count."""
    right, wrong = counts[..., 0, :], counts[..., 1, :]
    below = np.cumsum(right, axis=-1) - right / 2
    pairs = right.sum(axis=-1) * wrong.sum(axis=-1)
    return np.where(pairs, (wrong * below).sum(axis=-1) / np.maximum(pairs, 1), np.nan)


def calibration_error(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """The expected calibration error of Naeini, Cooper and Hauskrecht (2015)."""
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, sure - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(sure))


if __name__ == "__main__":
    main()
