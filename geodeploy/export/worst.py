"""The tile in which an exported model is furthest from the tuned one, as a picture."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from geodeploy.export.parity import OtherRuntime, ParityReport, as_on_gpu, judging, logits_of
from geodeploy.export.program import read_program
from geodeploy.pictures import add_legend, coloured, true_colour
from geodeploy.runtime import Session
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.onnx import OnnxSession
from geodeploy.runtime.openvino import IN_BF16, OPENVINO, OpenVinoSession
from geodeploy.spec import ModelSpec
from geodeploy.train.run import Run

_SAME, _OTHER = (235, 235, 235), (204, 51, 17)


def draw_worst(path: Path, tuned: Run, model: Path, report: ParityReport) -> None:
    """Write the worst tile of ``report`` in true colour, what ``tuned`` and ``model`` make of it, and
    where they differ, as PNG. It is that of the runtime that fails, and computed in it.
    """
    shown = _shown(report)
    place = shown.exported.worst_tile if shown.exported else report.exported.worst_tile
    tile = np.ascontiguousarray(judging(tuned, model).pixels[place : place + 1])
    expected, found = logits_of(tuned.model, tile)[0], _outputs(model, tile, shown)[0]
    spec, name = tuned.spec, shown.runtime.partition(" ")[0]
    figure = Figure(figsize=(13, 4), layout="constrained")
    seen, left, middle, right = figure.subplots(1, 4)
    pixels = tile[0, : len(spec.bands)]
    seen.imshow(true_colour(pixels, spec.band_names, np.ones(pixels.shape[1:], bool)))
    if spec.classes:
        classes = expected.argmax(axis=0), found.argmax(axis=0)
        values = np.array(spec.class_values, np.uint8)
        for axis, positions in zip((left, middle), classes, strict=True):
            axis.imshow(coloured(values[positions], spec.classes), interpolation="nearest")
        differs = classes[0] != classes[1]
        right.imshow(np.where(differs[..., None], _OTHER, _SAME), interpolation="nearest")
        right.set_title(f"another class: {differs.mean():.2%}")
        add_legend(figure, spec.classes, [item.name for item in spec.classes])
    else:
        _draw_quantity(figure, (left, middle, right), expected, found, spec)
    for axis, title in zip(
        (seen, left, middle), (f"tile {place}", "tuned", f"exported, {name}"), strict=True
    ):
        axis.set_title(title)
    for axis in (seen, left, middle, right):
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, format="png", dpi=90)


def _draw_quantity(
    figure: Figure,
    axes: tuple[Any, Any, Any],
    expected: NDArray[np.float32],
    found: NDArray[np.float32],
    spec: ModelSpec,
) -> None:
    """The target that differs most."""
    apart = np.abs(found - expected)
    target = int(apart.max(axis=(1, 2)).argmax())
    low, high = float(expected[target].min()), float(expected[target].max())
    axes[0].imshow(expected[target], vmin=low, vmax=high)
    drawn = axes[1].imshow(found[target], vmin=low, vmax=high)
    figure.colorbar(drawn, ax=axes[1], label=str(spec.targets[target]))
    figure.colorbar(axes[2].imshow(apart[target], cmap="magma"), ax=axes[2])
    axes[2].set_title("apart by")


def _shown(report: ParityReport) -> ParityReport | OtherRuntime:
    """The first runtime that fails, or that of the release where none does."""
    runs: list[ParityReport | OtherRuntime] = [report, *report.other_runtimes]
    failed = (item for item in runs if item.problem and item.exported)
    return next(failed, report)


def _outputs(
    model: Path, tile: NDArray[np.float32], shown: ParityReport | OtherRuntime
) -> NDArray[np.float32]:
    if model.suffix == ".pt2":
        return logits_of(read_program(model)[0], tile)
    file, name = read_onnx(model), shown.runtime.partition(" ")[0]
    session: Session
    if name in (OPENVINO, IN_BF16):
        session = OpenVinoSession(file, threads=1, bf16=name == IN_BF16)
    else:
        session = OnnxSession(
            as_on_gpu(file) if isinstance(shown, ParityReport) else file, device="cpu", threads=1
        )
    with closing(session):
        return logits_of(session, tile)
