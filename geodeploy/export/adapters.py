"""RUNs of one backbone as a base and a small adapter each, put together when a map is made.

The base is the backbone as it was before any tuning, from pixels to the maps that decoders take. Its
graph takes a low-rank product for each linear layer of the blocks, and all else that belongs to a task:
patch embedding, normalisation of the pixels, and what else one of the RUNs changed.
"""

# B batch, C band, N token, I inputs, O outputs of a layer, R rank

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from geodeploy.errors import OutputError, ParityError, RecipeError
from geodeploy.export.item import BASE, write_model_item
from geodeploy.export.merge import merge
from geodeploy.export.onnx import forget_refusal, parity_path, refusal_path, strip
from geodeploy.export.parity import ParityReport, check_is_alike, compare, logits_of, told, tolerance
from geodeploy.export.program import to_onnx
from geodeploy.export.progress import Steps
from geodeploy.export.proof import reference_text
from geodeploy.export.threads import one_thread
from geodeploy.item import item_path
from geodeploy.runtime.adapter import DECODER, DESCRIPTION, SUFFIX, Adapter, Base, write_adapter
from geodeploy.spec import BASE_KEY, Backbone, BaseSpec, ModelSpec, Parity
from geodeploy.train.method_options import PATCHES, VitAdapter, Vpt
from geodeploy.train.model import TunedModel, in_units
from geodeploy.train.run import Run, load_run, load_start
from geodeploy.writer import check_new_folder, check_output

log = logging.getLogger(__name__)

_BACKBONE = "backbone."
_OF_A_TASK = ("mean", "std", f"{_BACKBONE}{PATCHES}.weight", f"{_BACKBONE}{PATCHES}.bias")
"""What every adapter brings: with other bands it is of another shape."""
_LEAST = 1e-11
"""The share of the largest eigenvalue below which float64 makes one of nothing."""
_SAME = 1e-5
"""Of the largest output. The same sums in another order differ by less than a tenth of that."""

Tensors = dict[str, Tensor]


@one_thread()
def export_runs(runs: Sequence[Path], folder: Path, *, overwrite: bool) -> list[ParityReport]:
    """See `geodeploy.export.export_adapters`."""
    steps = Steps(log, 2 + len(runs))
    places = _places(runs, folder, overwrite=overwrite)
    steps.begin(f"loading {', '.join(map(str, runs))}")
    first = load_run(runs[0])
    _check_shares(first)
    if not isinstance(start := load_start(first), VisionTransformer):
        raise RecipeError(
            f"{runs[0]}: adapters share the blocks of a vision transformer, and {type(start).__name__} "
            "has none. Export it by itself."
        )
    tuned = [first, *map(load_run, runs[1:])]
    for run in tuned:
        _check_same_backbone(run, first, start)
    tasks = [_read_task(run, start) for run in tuned]
    usual = {name: start.state_dict()[name] for task in tasks for name in task.changed}
    drafts = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        steps.begin("tracing the base")
        write_base(first, start, usual, drafts / BASE)
        _check_same_base(drafts / BASE, folder / BASE, overwrite=overwrite)
        base = Base(drafts / BASE, device="cpu", threads=1)
        reports = []
        for task, place in zip(tasks, places, strict=True):
            tiles = len(task.run.tiles.pixels)
            steps.begin(f"writing {place.name} and comparing it with its RUN on {tiles} real tiles")
            reports.append(_write_proved(task, usual, base, drafts / place.name, place))
        folder.mkdir(exist_ok=True)
        (drafts / BASE).replace(folder / BASE)
        for place in places:
            for beside in (parity_path, item_path, Path):  # the adapter last: it makes them true
                beside(drafts / place.name).replace(beside(place))
            forget_refusal(place)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
    log.info(
        "Wrote %s: a base and its adapters, %d, in %.0f s.",
        folder,
        len(places),
        steps.seconds,
    )
    return reports


def verify_adapter(run: Path, base: Path, adapter: Path) -> ParityReport:
    """See `geodeploy.export.verify`."""
    report = _report_on(load_run(run), Base(base, device="cpu", threads=1), adapter)
    if report.problem:
        raise ParityError(f"{base} with {adapter} is not the model of {run}: {report.problem}.")
    return report


def low_rank(change_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (I, R) and (R, O) of the least rank R whose product is ``change_OI`` on its side.

    It is float64; singular values below a few millionths of the largest count as none.
    """
    outputs, inputs = change_OI.shape
    if outputs < inputs:
        wide_OR, tall_RI = low_rank(change_OI.T)
        return tall_RI.T, wide_OR.T
    values, vectors_II = torch.linalg.eigh(change_OI.T @ change_OI)
    a_IR = vectors_II[:, values > _LEAST * values[-1]]
    return a_IR, (change_OI @ a_IR).T


def write_base(run: Run, start: nn.Module, usual: Mapping[str, Tensor], path: Path) -> None:
    """Write the backbone ``start`` of ``run`` to ``path``, to be fed with what an adapter holds.

    Of ``run`` itself nothing is in it: every RUN of the backbone gives the same bytes. ``usual`` are
    the tensors of ``start`` that some RUNs change.
    """
    spec = run.spec
    encoder: Any = deepcopy(start)
    layers = _linear_layers(encoder)
    for name in layers:
        encoder.set_submodule(name, _Adaptable(encoder.get_submodule(name)))
    model = TunedModel(
        encoder,
        nn.Identity(),
        taps=run.model.taps,
        mean=[band.mean for band in spec.bands],
        std=[band.std for band in spec.bands],
        scaling=spec.scaling,
    ).eval()
    products = [f"{_BACKBONE}{name}.{part}" for name in layers for part in ("lora_A", "lora_B")]
    names = sorted({*products, *_OF_A_TASK, *(f"{_BACKBONE}{name}" for name in usual)})
    state = model.state_dict()
    maps = [f"map_{number}" for number in range(len(run.model.taps.indices))]
    tiles = torch.zeros(2, len(spec.planes), spec.tile, spec.tile)
    any_size = torch.export.Dim.AUTO
    free = [dict.fromkeys(_free_axes(name), any_size) for name in names]
    program = to_onnx(
        _Fed(model, names),
        (tiles, [state[name] for name in names]),
        ({0: torch.export.Dim("batch"), 1: any_size}, free),
        inputs=["pixels", *names],
        outputs=["scaled", *maps],
    )
    base = program.model_proto
    strip(base)
    del base.graph.value_info[:]
    backbone = spec.backbone or Backbone(name=run.recipe.model.backbone, weights="random")
    described = BaseSpec(backbone=backbone, tile=spec.tile)
    helper.set_model_props(base, {BASE_KEY: described.to_json()})
    _make_optional(base.graph, {f"{_BACKBONE}{name}": value for name, value in usual.items()})
    onnx.save(base, path)


class _Adaptable(nn.Module):
    """A linear layer beside a product of two thin matrices."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # A rank of one would be taken for a constant of the graph.
        self.register_buffer("lora_A", torch.zeros(linear.in_features, 2))
        self.register_buffer("lora_B", torch.zeros(2, linear.out_features))

    def forward(self, tokens_BNI: Tensor) -> Tensor:
        """(B, N, O)."""
        product_BNO = tokens_BNI @ self.lora_A @ self.lora_B
        return functional.linear(tokens_BNI, self.weight, self.bias) + product_BNO


class _Encoder(nn.Module):
    """What a decoder takes of ``model``."""

    def __init__(self, model: TunedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        """The normalised pixels and the maps."""
        scaled, maps = self.model.encode(pixels_BCHW)
        return (scaled, *maps)


class _Fed(nn.Module):
    """The same with tensors of ``model`` as inputs."""

    def __init__(self, model: TunedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.encoder = _Encoder(model)
        self.names = names

    def forward(self, pixels_BCHW: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """See `_Encoder`; ``tensors`` are those of ``names``."""
        named = {f"model.{name}": value for name, value in zip(self.names, tensors, strict=True)}
        found: tuple[Tensor, ...] = functional_call(self.encoder, named, (pixels_BCHW,))
        return found


class _Decoder(nn.Module):
    """From what `_Encoder` gives to what ``model`` does."""

    value_mean: Tensor | None
    value_std: Tensor | None

    def __init__(self, model: TunedModel) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.register_buffer("value_mean", model.value_mean)
        self.register_buffer("value_std", model.value_std)

    def forward(self, scaled: Tensor, maps: list[Tensor]) -> Tensor:
        """Logits or quantities."""
        return in_units(self.decoder(maps, scaled), self.value_mean, self.value_std)


@dataclass(frozen=True, slots=True)
class _Task:
    """A RUN as far as an adapter needs it."""

    run: Run
    tensors: Tensors
    """By the base's names."""
    changed: Tensors
    """Tensors of the backbone that are not as at the start, by its names."""


def _read_task(run: Run, start: nn.Module) -> _Task:
    merged = merge(run.model, dtype=torch.float64).state_dict()
    before = {name: value.double() for name, value in start.state_dict().items()}
    after = {
        name.removeprefix(_BACKBONE): value
        for name, value in merged.items()
        if name.startswith(_BACKBONE)
    }
    layers = {f"{name}.weight" for name in _linear_layers(start)}
    tensors = {name: merged[name] for name in _OF_A_TASK}
    changed = {}
    for name, value in after.items():
        if name.startswith(PATCHES) or torch.equal(value, before[name]):
            continue
        if name not in layers:
            changed[name] = value
            continue
        layer = name.removesuffix(".weight")
        a_IR, b_RO = low_rank(value - before[name])
        rank, most = len(b_RO), min(value.shape) // 2
        if rank > most:
            raise RecipeError(
                f"{run.path}: {run.recipe.method.title} changes {layer} by a matrix of rank {rank}; an "
                f"adapter holds products of rank {most} at most. Export it by itself."
            )
        tensors |= {f"{_BACKBONE}{layer}.lora_A": a_IR, f"{_BACKBONE}{layer}.lora_B": b_RO}
    return _Task(run, tensors, changed)


def _check_shares(run: Run) -> None:
    """Before its start is asked for, which a RUN of such a method may not hold."""
    method = run.recipe.method
    if method.tunes_all:
        raise RecipeError(
            f"{run.path}: all of the backbone was tuned, so that there is no base to share. Export it "
            "by itself."
        )
    if isinstance(method, VitAdapter | Vpt):
        raise RecipeError(
            f"{run.path}: {method.title} adds tokens or layers, for which a base has no room. "
            "Export it by itself."
        )


def _check_same_backbone(run: Run, first: Run, start: nn.Module) -> None:
    _check_shares(run)
    if run is first:
        return
    for what, mine, other in (
        ("backbone", run.recipe.model.backbone, first.recipe.model.backbone),
        ("weights", _weights(run.spec), _weights(first.spec)),
        ("tile", run.spec.tile, first.spec.tile),
        ("model.options", str(run.recipe.model.options), str(first.recipe.model.options)),
        ("scaling", run.spec.scaling, first.spec.scaling),
    ):
        if mine != other:
            raise RecipeError(
                f"{run.path} and {first.path} have no common base: {what} is {mine} in one and {other} "
                "in the other. Export them apart."
            )
    if _weights(run.spec) == "random":
        began, other_began = load_start(run).state_dict(), start.state_dict()
        kept = [name for name in began if not name.startswith(PATCHES)]
        if not all(torch.equal(began[name], other_began[name]) for name in kept):
            raise RecipeError(
                f"{run.path} and {first.path} have no common base: they were tuned from other random "
                "weights. Export them apart."
            )


def _weights(spec: ModelSpec) -> str:
    return (spec.backbone and spec.backbone.sha256) or "random"


def _linear_layers(vit: nn.Module) -> list[str]:
    return [
        name
        for name, module in vit.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]


def _free_axes(name: str) -> tuple[int, ...]:
    """The axes of a tensor of the base that are of another size from task to task."""
    if name.endswith((".lora_A", f"{PATCHES}.weight")):
        return (1,)
    return (0,) if name.endswith(".lora_B") or name in ("mean", "std") else ()


def _make_optional(graph: onnx.GraphProto, usual: Mapping[str, Tensor]) -> None:
    """Give each input but the pixels a value of its own: of rank 0, of no band, or the usual one."""
    pixels, *others = graph.input
    pixels.type.tensor_type.shape.dim[1].dim_param = "bands"
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "bands"
    for value in others:
        dims = value.type.tensor_type.shape.dim
        for axis in _free_axes(value.name):
            layer, product, _ = value.name.rpartition(".lora_")
            dims[axis].dim_param = f"{layer}.rank" if product else "bands"
        default = np.zeros([dim.dim_value for dim in dims], np.float32)
        if value.name in usual:
            default = usual[value.name].numpy()
        graph.initializer.append(numpy_helper.from_array(default, value.name))
    for name in (DESCRIPTION, DECODER):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [f"{name} bytes"]))
        graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.uint8), name))


def _decoder_graph(run: Run) -> bytes:
    spec, taps = run.spec, run.model.taps
    maps = [
        torch.zeros(2, width, spec.tile // stride, spec.tile // stride)
        for width, stride in zip(taps.widths, taps.strides, strict=True)
    ]
    batch = {0: torch.export.Dim("batch")}
    program = to_onnx(
        _Decoder(run.model),
        (torch.zeros(2, len(spec.planes), spec.tile, spec.tile), maps),
        (batch, [batch] * len(maps)),
        inputs=["scaled", *(f"map_{number}" for number in range(len(maps)))],
        outputs=[spec.output],
    )
    model = program.model_proto
    strip(model)
    helper.set_model_props(model, reference_text(run, spec))
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _write_proved(
    task: _Task, usual: Mapping[str, Tensor], base: Base, draft: Path, place: Path
) -> ParityReport:
    """Write an adapter to ``draft``, report and item beside it, if it does the same as the RUN."""
    run = task.run
    own = {f"{_BACKBONE}{name}": task.changed.get(name, value) for name, value in usual.items()}
    adapter = Adapter(
        run.spec.model_copy(update={"base_sha256": base.sha256}),
        {name: value.float().numpy() for name, value in (task.tensors | own).items()},
        _decoder_graph(run),
    )
    write_adapter(draft, adapter)
    report = _report_on(run, base, draft)
    parity_path(draft).write_text(report.to_json())
    if report.problem:
        refusal = refusal_path(place)
        refusal.parent.mkdir(exist_ok=True)
        parity_path(draft).replace(refusal)
        raise ParityError(
            f"The base with the adapter of {run.path} differs from it: {report.problem}. Nothing was "
            f"written; {refusal} says more."
        )
    parity = Parity(
        argmax_agreement=report.exported.argmax_agreement,
        spread_diff=report.exported.spread_diff,
        probability_diff=report.exported.probability_diff,
        report_sha256=report.sha256,
        runtimes=report.covered,
    )
    spec = adapter.spec.model_copy(update={"parity": parity})
    write_adapter(draft, Adapter(spec, adapter.tensors, adapter.decoder))
    write_model_item(spec, draft, parameters=sum(item.numel() for item in run.model.parameters()))
    return report


def _report_on(run: Run, base: Base, adapter: Path) -> ParityReport:
    session, pixels = base.session(adapter), run.tiles.pixels
    check_is_alike(adapter, session.spec, run.spec)
    found = compare(
        logits_of(run.model, pixels), logits_of(session, pixels), run.tiles.labels, run.spec
    )
    allowed = tolerance(session.spec)
    problem = allowed.problem(found)
    if problem is None and not found.relative_diff <= _SAME:  # NaN too
        problem = (
            f"outputs differ by up to {found.max_abs_diff:.3g} ({found.relative_diff:.2g} of the "
            f"largest, at most {_SAME:g} may be) in tile {found.worst_tile}"
        )
    return ParityReport(
        model=run.spec.name,
        precision=session.precision,
        runtime=session.name,
        graph_sha256=session.sha256,
        base_sha256=base.sha256,
        released=problem is None,
        problem=problem,
        merged_max_abs_diff=None,
        exported=found,
        tolerances=told(allowed) | {"relative_diff": _SAME},
    )


def _places(runs: Sequence[Path], folder: Path, *, overwrite: bool) -> list[Path]:
    places = [folder / f"{run.resolve().name}{SUFFIX}" for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise OutputError(
                f"Two RUNs would both become {place.name}, for adapters are called as their RUNs are. "
                "Rename one."
            )
        for written in (place, parity_path(place), item_path(place)) if folder.exists() else ():
            check_output(written, [], overwrite=overwrite)
    if not folder.exists():
        check_new_folder(folder)
        folder.absolute().parent.mkdir(exist_ok=True)
    return places


def _check_same_base(draft: Path, there: Path, *, overwrite: bool) -> None:
    if there.exists() and not overwrite and there.read_bytes() != draft.read_bytes():
        raise OutputError(
            f"{there} is another base. Choose another folder with -o, or add --overwrite: what else "
            "was made for it will not run then."
        )
