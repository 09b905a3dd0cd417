"""Is the exported model the tuned one? Compared on real tiles: outputs, classes, scores."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from geodeploy.blend import sigmoid
from geodeploy.errors import ModelError, ParityError
from geodeploy.export.drift import Drift
from geodeploy.export.half import HALVES
from geodeploy.export.int8 import INT8
from geodeploy.export.program import read_program
from geodeploy.export.threads import one_thread, tiles_at_once, workers
from geodeploy.labels import IGNORED, class_positions, ignored_values
from geodeploy.runtime import Session
from geodeploy.runtime.float32 import in_float32, load
from geodeploy.runtime.graph import OnnxFile, read_onnx
from geodeploy.runtime.onnx import OnnxSession
from geodeploy.runtime.openvino import IN_BF16, MAY_TAKE_BF16, OPENVINO, OpenVinoSession, has_bf16
from geodeploy.scores import Scores, confusion_matrix
from geodeploy.spec import ModelSpec
from geodeploy.train.model import TunedModel
from geodeploy.train.run import RealTiles, Run
from geodeploy.train.weights import file_sha256

_BATCH = 8


class Comparison(BaseModel):
    """How far one model's outputs are from another's on the same tiles."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    tiles: int
    max_abs_diff: float
    """Of the outputs."""
    relative_diff: float
    """The same over the largest output of the reference."""
    cosine: float
    """Of the two sets of outputs as one long vector each."""
    argmax_agreement: float | None = None
    """Share of pixels with the same class; None of quantities."""
    spread_diff: float | None = None
    """Largest difference in standard deviations of the training labels, of the worst target; None of
    classes."""
    mean_spread_diff: float | None = None
    """The mean difference in the same measure, of the worst target."""
    probability_diff: float | None = None
    """Largest difference of a probability; None but of whole tiles."""
    decision_agreement: float | None = None
    """Share of decisions, one a tile and class, on the same side of 0.5; None but of whole tiles."""
    worst_tile: int
    """Position of the tile with the largest difference."""
    miou_reference: float | None = None
    """Against the labels of the tiles; None where they have none, and of quantities."""
    miou_exported: float | None = None
    iou_change: dict[str, float] | None = None
    """By the names of the classes that are in the labels or in either map; None as for the mean."""

    def __str__(self) -> str:
        apart = f"max |diff| {self.max_abs_diff:.2g}, cosine {self.cosine:.6f}"
        if self.probability_diff is not None:
            return (
                f"{apart}, of probabilities {self.probability_diff:.2g}, "
                f"{self.decision_agreement:.4%} of decisions agree"
            )
        if self.argmax_agreement is None:
            return (
                f"{apart}, up to {self.spread_diff:.2g} standard deviations of the labels, "
                f"{self.mean_spread_diff:.2g} in the mean"
            )
        scores = (
            f", mean IoU {self.miou_reference:.4f} -> {self.miou_exported:.4f}"
            if self.miou_reference is not None and self.miou_exported is not None
            else ""
        )
        if self.iou_change:
            points = (f"{name} {100 * change:+.2f}" for name, change in self.iou_change.items())
            scores += f" (points of IoU: {', '.join(points)})"
        return f"{apart}, {self.argmax_agreement:.4%} of pixels agree{scores}"


class OtherRuntime(BaseModel):
    """How the same file does in a runtime that may take the place of ONNX Runtime."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    runtime: str
    """With its version."""
    problem: str | None
    """Why nothing runs the model in it."""
    exported: Comparison | None
    """Against the unmerged model in PyTorch, fp32; None if it could not be run."""
    first_drift: Drift | None = None
    """Where there is a problem, and the layer could be told."""

    def __str__(self) -> str:
        if self.problem:
            drift = f" ({self.first_drift})" if self.first_drift else ""
            return f"not on {self.runtime}: {self.problem}{drift}"
        assert self.exported is not None
        return f"on {self.runtime} {self.exported}"


class PutBack(BaseModel):
    """A layer that int8 would have harmed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    module: str
    """The part of the PyTorch model that it was made of."""
    drift: float
    """How far int8 in it alone moves the model's outputs: root mean square of the difference, over
    that of the outputs."""


class Quantisation(BaseModel):
    """What of a model is in int8."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    calibrated_on: int
    """Tiles of the RUN that ranges were taken from; the report is of the others."""
    int8_layers: int
    float32_layers: tuple[PutBack, ...]
    """Those by which it moved the outputs most: so many that on the calibration's tiles half of what
    may differ does."""

    def __str__(self) -> str:
        layers = self.int8_layers + len(self.float32_layers)
        put_back = "".join(f", {item.module} ({item.drift:.2%})" for item in self.float32_layers)
        return f"{self.int8_layers} of {layers} layers in int8" + (
            f"; in float32, for int8 in them moves the outputs most:{put_back[1:]}" if put_back else ""
        )


class ParityReport(BaseModel):
    """The proof that travels beside a model."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    model: str
    precision: str
    runtime: str
    rounded: bool = False
    """Whether `exported` is not of the file itself but of the same graph with each half rounded, which
    is what a GPU computes and no runtime on a CPU does (`geodeploy.runtime.float32`)."""
    graph_sha256: str
    """Of the exported file before this report's own hash was written into it."""
    base_sha256: str | None = None
    """Of the base, where that file is an adapter."""
    released: bool
    """Whether all tolerances hold."""
    problem: str | None
    first_drift: Drift | None = None
    """Where there is a problem, and the layer could be told."""
    merged_max_abs_diff: float | None
    """Between the logits of the merged and the unmerged model, both in PyTorch."""
    exported: Comparison
    """Against the unmerged model in PyTorch, fp32."""
    other_runtimes: tuple[OtherRuntime, ...] = ()
    """Those that were installed. The model is released without them."""
    eight_bit: Comparison | None = None
    """The same in ONNX Runtime, but of pixels rounded to 8 bits, for a model made for them."""
    tolerances: dict[str, float]
    quantisation: Quantisation | None = None
    """Of a model in int8."""

    @property
    def missed(self) -> str | None:
        """How a model in int8 that is released misses what it should hold; None if it does not."""
        if self.precision not in INT8 or self.problem:
            return None
        runs: list[ParityReport | OtherRuntime] = [self, *self.other_runtimes]
        told = (
            f"{problem} (on {item.runtime})"
            for item in runs
            if item.exported and not item.problem and (problem := GOAL.problem(item.exported))
        )
        return next(told, None)

    @property
    def covered(self) -> tuple[str, ...]:
        """The names, without versions, of the runtimes in which the model may be run."""
        own = [] if self.rounded else [self.runtime]
        found = [*own, *(item.runtime for item in self.other_runtimes if not item.problem)]
        return tuple(name.partition(" ")[0] for name in found)

    @property
    def sha256(self) -> str:
        """Of the report as it is written."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The document beside the model."""
        return self.model_dump_json(indent=1) + "\n"

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.precision} against PyTorch on {self.exported.tiles} real tiles",
            f"{'rounded as on a GPU' if self.rounded else f'on {self.runtime}'} {self.exported}",
            *map(str, self.other_runtimes),
        ]
        if self.precision in INT8 and not self.problem:
            goal = f"{GOAL.argmax_agreement:.1%} of pixels and {100 * (GOAL.miou_change or 0):g} points"
            lines.append(f"the aim of {goal} is {'missed: ' + self.missed if self.missed else 'met'}")
        if self.quantisation:
            lines.append(str(self.quantisation))
        if self.eight_bit:
            lines.append(f"fed with 8-bit values {self.eight_bit}")
        return "\n  ".join(lines)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What an export may change."""

    argmax_agreement: float
    relative_diff: float
    miou_change: float | None = None
    """None where the agreement says enough."""

    def problem(self, found: Comparison) -> str | None:
        """What lies outside, in words; None if nothing does."""
        # Written so that NaN, which compares false to everything, is outside.
        assert found.argmax_agreement is not None
        if not found.argmax_agreement >= self.argmax_agreement:
            return (
                f"{found.argmax_agreement:.4%} of pixels have the same class, at least "
                f"{self.argmax_agreement:.2%} must; worst is tile {found.worst_tile}, where outputs "
                f"differ by up to {found.max_abs_diff:.3g}"
            )
        if not found.relative_diff <= self.relative_diff:
            return (
                f"outputs differ by up to {found.max_abs_diff:.3g} ({found.relative_diff:.2g} of the "
                f"largest, at most {self.relative_diff:g} may be) in tile {found.worst_tile}"
            )
        if self.miou_change is None or found.miou_reference is None or found.miou_exported is None:
            return None
        change = found.miou_exported - found.miou_reference
        if not abs(change) <= self.miou_change:
            return (
                f"the mean IoU changes by {100 * change:+.2f} points ({found.miou_reference:.4f} -> "
                f"{found.miou_exported:.4f}), at most by {100 * self.miou_change:g} may it"
            )
        return None


# In fp32 rounding alone gives a relative difference near 1e-6, in fp16 near 1e-3, in bf16 near 1e-2, in
# int8 near 0.05: the bounds on it catch faults that happen not to move a class.
TOLERANCES = {
    "fp32": Tolerance(argmax_agreement=0.9999, relative_diff=1e-4),
    "fp16": Tolerance(argmax_agreement=0.999, relative_diff=1e-2),
    "bf16": Tolerance(argmax_agreement=0.999, relative_diff=5e-2),
    **dict.fromkeys(INT8, Tolerance(argmax_agreement=0.99, relative_diff=0.2, miou_change=5e-3)),
}
TOLERANCE = TOLERANCES["fp32"]
GOAL = Tolerance(argmax_agreement=0.995, relative_diff=0.2, miou_change=3e-3)
"""What int8 should hold of a model on real tiles. One that does not, but is within the tolerance, is
released all the same, and told of."""
AIM = Tolerance(argmax_agreement=0.995, relative_diff=0.1, miou_change=2.5e-3)
"""What int8 has to hold on the tiles that its ranges are taken from: others will differ by more."""


@dataclass(frozen=True, slots=True)
class SpreadTolerance:
    """What an export may change of quantities, in standard deviations of the training labels."""

    spread_diff: float
    mean_spread_diff: float
    relative_diff: float
    """Of values between pixels and outputs, over the largest of each."""

    def problem(self, found: Comparison) -> str | None:
        """What lies outside, in words; None if nothing does."""
        assert found.spread_diff is not None
        assert found.mean_spread_diff is not None
        for what, far, most in (
            ("by up to", found.spread_diff, self.spread_diff),
            ("in the mean by", found.mean_spread_diff, self.mean_spread_diff),
        ):
            if not far <= most:  # NaN too
                return (
                    f"outputs differ {what} {far:.2g} standard deviations of the training labels, at "
                    f"most {most:g} may be; worst is tile {found.worst_tile}, by "
                    f"{found.max_abs_diff:.3g}"
                )
        return None


# A thousandth of the labels' spread moves no score: R2 by less than a millionth. It is a hundred times
# what rounding in fp32 gives; a fault in weights, bands or units moves outputs by far more.
SPREAD_TOLERANCE = SpreadTolerance(spread_diff=1e-3, mean_spread_diff=1e-4, relative_diff=1e-4)


@dataclass(frozen=True, slots=True)
class LabelTolerance:
    """What an export may change of what whole tiles show."""

    probability_diff: float
    """Decisions further than this from their threshold stay what they are."""
    relative_diff: float
    """Of values between pixels and outputs, over the largest of each."""

    def problem(self, found: Comparison) -> str | None:
        """What lies outside, in words; None if nothing does."""
        assert found.probability_diff is not None
        if not found.probability_diff <= self.probability_diff:  # NaN too
            return (
                f"probabilities differ by up to {found.probability_diff:.2g}, at most "
                f"{self.probability_diff:g} may be; worst is tile {found.worst_tile}, where outputs "
                f"differ by up to {found.max_abs_diff:.3g}"
            )
        return None


# Maps have probabilities in steps of 0.004.
LABEL_TOLERANCES = {
    "fp32": LabelTolerance(probability_diff=1e-4, relative_diff=1e-4),
    "fp16": LabelTolerance(probability_diff=1e-2, relative_diff=1e-2),
    "bf16": LabelTolerance(probability_diff=5e-2, relative_diff=5e-2),
}


def tolerance(spec: ModelSpec) -> Tolerance | SpreadTolerance | LabelTolerance:
    """What the export of ``spec`` may change."""
    if spec.whole_tiles:
        return LABEL_TOLERANCES.get(spec.precision, LABEL_TOLERANCES["fp32"])
    return SPREAD_TOLERANCE if spec.targets else TOLERANCES.get(spec.precision, TOLERANCE)


def compare(
    reference: NDArray[np.float32],
    exported: NDArray[np.float32],
    labels: NDArray[Any],
    spec: ModelSpec,
) -> Comparison:
    """How far ``exported`` is from ``reference``, both of one kind of outputs (N, K, H, W) or (N, K).

    ``labels`` are class values (N, H, W); those of other tasks are not looked at.
    """
    difference = np.abs(exported - reference)
    per_tile = difference.reshape(len(difference), -1).max(axis=1)
    a, b = reference.astype(np.float64).ravel(), exported.astype(np.float64).ravel()
    # Not by BLAS, whose sums hang on the number of threads.
    norm = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    alike = _ALIKE[spec.task]
    return Comparison(
        tiles=len(reference),
        max_abs_diff=float(difference.max()),
        relative_diff=float(difference.max() / max(float(np.abs(reference).max()), 1e-12)),
        cosine=float((a * b).sum()) / norm if norm else 0.0,
        worst_tile=int(np.where(np.isnan(per_tile), np.inf, per_tile).argmax()),
        **alike(reference, exported, labels, spec),
    )


def _agreement(
    reference: NDArray[np.float32], exported: NDArray[np.float32], labels: NDArray[Any], spec: ModelSpec
) -> dict[str, Any]:
    classes = reference.argmax(axis=1), exported.argmax(axis=1)
    reference_scores, scores = (_scores(labels, positions, spec) for positions in classes)
    change = {
        after.name: after.iou - before.iou
        for before, after in zip(reference_scores.classes, scores.classes, strict=True)
        if before.iou is not None and after.iou is not None
    }
    return {
        "argmax_agreement": float((classes[0] == classes[1]).mean()),
        "miou_reference": reference_scores.miou,
        "miou_exported": scores.miou,
        "iou_change": change or None,
    }


def _spreads(
    reference: NDArray[np.float32], exported: NDArray[np.float32], labels: NDArray[Any], spec: ModelSpec
) -> dict[str, Any]:
    # Where nobody says what the labels' spread is, that of the outputs stands for it.
    spreads = [
        target.std or max(float(values.std()), 1e-12)
        for target, values in zip(spec.targets, np.moveaxis(reference, 1, 0), strict=True)
    ]
    difference = np.abs(exported.astype(np.float64) - reference) / np.reshape(spreads, (-1, 1, 1))
    return {
        "spread_diff": float(difference.max()),
        "mean_spread_diff": float(difference.mean(axis=(0, 2, 3)).max()),
    }


def _decisions(
    reference: NDArray[np.float32], exported: NDArray[np.float32], labels: NDArray[Any], spec: ModelSpec
) -> dict[str, Any]:
    one, other = sigmoid(reference), sigmoid(exported)
    return {
        "probability_diff": float(np.abs(one - other).max()),
        "decision_agreement": float(((one >= 0.5) == (other >= 0.5)).mean()),
    }


_ALIKE = {"segmentation": _agreement, "regression": _spreads, "multilabel": _decisions}


def logits_of(model: torch.nn.Module | Session, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (N, K, H, W) or (N, K) of ``pixels`` (N, C, H, W): logits, or what the model gives.

    On a CPU they do not depend on the number of cores, if a session has one thread a tile.
    """
    on_cpu = isinstance(model, torch.nn.Module) or model.device == "cpu"
    # OpenVINO works on the tiles of a batch side by side, and others on one in each thread.
    batch = 1 if on_cpu and not isinstance(model, OpenVinoSession) else _BATCH

    def outputs(start: int) -> NDArray[np.float32]:
        tiles = pixels[start : start + batch]
        if not isinstance(model, torch.nn.Module):
            return model.run(tiles)
        with torch.inference_mode():
            found: NDArray[np.float32] = model(torch.from_numpy(tiles)).numpy()
        return found

    with one_thread(), workers(tiles_at_once() if on_cpu else 1) as pool:
        return np.concatenate(list(pool.map(outputs, range(0, len(pixels), batch))))


def judging(tuned: Run, model: Path) -> RealTiles:
    """The tiles of ``tuned`` that ``model`` is judged by: none that its ranges are taken from."""
    is_int8 = model.suffix != ".pt2" and read_onnx(model).spec.precision in INT8
    return tuned.tiles.every_other(1) if is_int8 else tuned.tiles


def report_on(
    reference: TunedModel,
    spec: ModelSpec,
    model: Path,
    pixels: NDArray[np.float32],
    labels: NDArray[Any],
    *,
    merged_max_abs_diff: float | None = None,
) -> ParityReport:
    """Run ``model`` on ``pixels`` in each runtime and say how it compares with ``reference``."""
    if model.suffix == ".pt2":
        return _report_on_program(
            reference, spec, model, pixels, labels, merged_max_abs_diff=merged_max_abs_diff
        )
    file = read_onnx(model)
    check_is_alike(model, file.spec, spec)
    expected = logits_of(reference, pixels)
    if file.spec.output == "probabilities":
        expected = torch.from_numpy(expected).softmax(dim=1).numpy()
    with closing(OnnxSession(as_on_gpu(file), device="cpu", threads=1)) as session:
        found = compare(expected, logits_of(session, pixels), labels, spec)
        eight_bit = None
        if file.spec.input_range:
            bytes_of = _rounded_to_8_bits(pixels, file.spec.input_range)
            eight_bit = compare(expected, logits_of(session, bytes_of), labels, spec)
    allowed = tolerance(file.spec)
    problem = allowed.problem(found)
    return ParityReport(
        model=spec.name,
        precision=session.precision,
        runtime=session.name,
        rounded=file.spec.precision in HALVES,
        graph_sha256=file.sha256,
        released=problem is None,
        problem=problem,
        merged_max_abs_diff=merged_max_abs_diff,
        exported=found,
        other_runtimes=_other_runtimes(file, expected, pixels, labels),
        eight_bit=eight_bit,
        tolerances=told(allowed),
    )


def told(allowed: Tolerance | SpreadTolerance | LabelTolerance) -> dict[str, float]:
    """The bounds of ``allowed`` by name, as a report holds them."""
    return {name: bound for name, bound in asdict(allowed).items() if bound is not None}


def _report_on_program(
    reference: TunedModel,
    spec: ModelSpec,
    model: Path,
    pixels: NDArray[np.float32],
    labels: NDArray[Any],
    *,
    merged_max_abs_diff: float | None,
) -> ParityReport:
    program, found_spec = read_program(model)
    check_is_alike(model, found_spec, spec)
    found = compare(logits_of(reference, pixels), logits_of(program, pixels), labels, spec)
    problem = tolerance(spec).problem(found)
    return ParityReport(
        model=spec.name,
        precision="fp32",
        runtime=f"torch.export {torch.__version__}",
        graph_sha256=file_sha256(model),
        released=problem is None,
        problem=problem,
        merged_max_abs_diff=merged_max_abs_diff,
        exported=found,
        tolerances=told(tolerance(spec)),
    )


def check_is_alike(model: Path, found: ModelSpec, spec: ModelSpec) -> None:
    """Refuse a ``model`` whose outputs cannot be compared with those of the RUN."""
    what, needed = (
        (item.task, item.band_names, item.classes, item.targets, item.tile) for item in (found, spec)
    )
    if what != needed:
        outputs = "quantities" if spec.targets else "classes"
        raise ParityError(f"{model} has other bands, {outputs} or tiles than the RUN. Export it again.")


def _other_runtimes(
    file: OnnxFile,
    expected: NDArray[np.float32],
    pixels: NDArray[np.float32],
    labels: NDArray[Any],
) -> tuple[OtherRuntime, ...]:
    sessions: dict[str, Callable[[], Session]] = {}
    if file.spec.precision in HALVES:
        sessions["onnxruntime"] = lambda: OnnxSession(file, device="cpu", threads=1)
    # What OpenVINO makes of signed values depends on the processor, and those are for GPUs.
    if find_spec("openvino") and file.spec.precision != "int8-tensorrt":
        sessions[OPENVINO] = lambda: OpenVinoSession(file, threads=tiles_at_once())
        if file.spec.precision in MAY_TAKE_BF16 and has_bf16():
            sessions[IN_BF16] = lambda: OpenVinoSession(file, threads=tiles_at_once(), bf16=True)
    others = []
    for name, open_file in sessions.items():
        try:
            with closing(open_file()) as session:
                found = compare(expected, logits_of(session, pixels), labels, file.spec)
        except ModelError as error:
            problem = str(error).replace(str(file.path), "the model")  # wherever it lies
            others.append(OtherRuntime(runtime=name, problem=problem, exported=None))
        else:
            problem_found = tolerance(file.spec).problem(found)
            others.append(OtherRuntime(runtime=session.name, problem=problem_found, exported=found))
    return tuple(others)


def as_on_gpu(file: OnnxFile) -> OnnxFile:
    """``file``, its halves rounded where it has any."""
    if file.spec.precision not in HALVES:
        return file
    model = in_float32(load(file), rounded=True)
    return replace(file, content=model.SerializeToString())


def _rounded_to_8_bits(pixels: NDArray[np.float32], limits: tuple[float, float]) -> NDArray[np.float32]:
    """``pixels`` after `gdal_translate -ot Byte -scale LOW HIGH 0 255`, brought back to their units."""
    low, high = limits
    values = np.rint(np.clip((pixels - low) / (high - low), 0, 1) * 255)
    restored: NDArray[np.float32] = (low + values / 255 * (high - low)).astype(np.float32)
    return restored


def _scores(labels: NDArray[np.uint8], positions: NDArray[np.int64], spec: ModelSpec) -> Scores:
    ignored = ignored_values(spec.classes, spec.ignore, None)
    truth = class_positions(labels, spec.classes, ignored, source="the RUN's tiles")
    scored = truth != IGNORED
    counts = confusion_matrix(truth[scored], positions[scored], len(spec.classes))
    return Scores.from_confusion(counts, spec.classes)
