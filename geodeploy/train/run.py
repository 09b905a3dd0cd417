"""The RUN folder: what a training leaves, written whole or not at all, and read back."""

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geodeploy.errors import ModelError, OutputError, first_line
from geodeploy.labels import IGNORED
from geodeploy.spec import NODATA, ModelSpec
from geodeploy.train.adapters import quiet
from geodeploy.train.backbone import Backbone, build_backbone
from geodeploy.train.data import LabelledTile
from geodeploy.train.method_options import AdaLora, Adapter
from geodeploy.train.methods import apply_method, taps_of
from geodeploy.train.model import TunedModel, build_decoder
from geodeploy.train.qkv import split_qkv
from geodeploy.train.recipe import IMPORTED, Recipe, load_recipe, recipe_text
from geodeploy.train.weights import file_sha256
from geodeploy.writer import check_new_folder

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, BACKBONE = "head.safetensors", "backbone.safetensors"
SPEC, RECIPE, TILES = "spec.json", "recipe.toml", "tiles.npz"

_TILES_BYTES = 10_000_000
"""Most that ``tiles.npz`` takes."""
_BACKBONE_PREFIX = "backbone."


@dataclass(frozen=True, slots=True)
class RealTiles:
    """Tiles of the validation area, for parity and calibration without the training data."""

    pixels: NDArray[np.float32]
    """(N, C, tile, tile) in the spec's units, invalid pixels filled with the bands' means."""
    labels: NDArray[Any]
    """(N, tile, tile) bytes: class values as in maps, 255 where there is no label; or of a regression
    (N, T, tile, tile) float32: quantities in their units, NaN there; or of whole tiles (N, K) bytes: 1,
    0, and 255 where nobody knows."""

    def every_other(self, first: int) -> "RealTiles":
        """Half of them: those from ``first`` on, 0 or 1, in steps of two."""
        return RealTiles(self.pixels[first::2], self.labels[first::2])


@dataclass(frozen=True, slots=True)
class Run:
    """A tuned model, ready to be run, merged or exported."""

    path: Path
    spec: ModelSpec
    recipe: Recipe
    model: TunedModel
    """In eval mode, fp32, on the CPU, its adapter not merged."""
    tiles: RealTiles
    sha256: str
    """Of the files that hold the tuned weights."""


@contextmanager
def new_run(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``output`` at the end, or vanishes if anything goes wrong."""
    beside = output.absolute().with_name(f".{output.name}.{os.getpid()}.part")
    try:
        beside.parent.mkdir(exist_ok=True)
        beside.mkdir()
        yield beside
        _share_alike(beside)
        check_new_folder(output)  # it may have come up while we trained
        beside.rename(output)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{output} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_weights(folder: Path, model: TunedModel, recipe: Recipe, start: Mapping[str, Tensor]) -> None:
    """Write adapter, backbone and head into ``folder``, as far as they exist nowhere else.

    ``start`` is the backbone that adapters sit on.
    """
    backbone: Mapping[str, Tensor] = {}
    if isinstance(recipe.method, Adapter):
        _save_adapter(folder, model.backbone, recipe)
        if _is_complete(recipe):
            backbone = start
    elif _is_complete(recipe):
        backbone = model.backbone.state_dict()
    else:
        backbone = _tuned_tensors(model.backbone)
    if backbone:
        save_file(_plain(backbone), folder / BACKBONE)
    head = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(_BACKBONE_PREFIX)
    }
    save_file(_plain(head), folder / HEAD)


def save_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe as run, overrides and defaults included, paths absolute."""
    (folder / RECIPE).write_text(recipe_text(recipe), encoding="utf-8")


def save_tiles(folder: Path, tiles: Sequence[LabelledTile], spec: ModelSpec) -> None:
    """Write as many of ``tiles`` as fit, the first ones first."""
    labels: NDArray[Any]
    if spec.targets:
        labels = np.stack([item.values for item in tiles if item.values is not None])
    elif spec.whole_tiles:
        labels = np.stack([item.shown for item in tiles if item.shown is not None])
    else:
        values = np.full(256, NODATA, np.uint8)
        values[: len(spec.classes)] = spec.class_values
        labels = values[np.stack([item.codes for item in tiles])]
        assert values[IGNORED] == NODATA
    pixels = _shorten(np.stack([item.pixels for item in tiles]))
    kept = len(tiles)
    while True:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, pixels=pixels[:kept], labels=labels[:kept])
        size = buffer.tell()
        if size <= _TILES_BYTES or kept == 1:
            break
        kept = max(min(kept * _TILES_BYTES // size, kept - 1), 1)
    (folder / TILES).write_bytes(buffer.getvalue())


def load_run(path: Path) -> Run:
    """The tuned model in the RUN folder ``path``.

    Raises:
        ModelError: it is no RUN, or one of its files is missing or broken.
        SpecError: its description is broken or newer than this program.
        WeightsError: the backbone's weights are missing, or not those it was tuned on.
    """
    _require(path, SPEC, RECIPE, HEAD, TILES)
    spec = ModelSpec.read(path / SPEC)
    recipe = load_recipe(path / RECIPE)
    _check_same_task(path, spec, recipe)
    backbone = _build_backbone(spec, recipe)
    tuned, files = _read_tuned(path, backbone, recipe)
    taps = taps_of(tuned, backbone)
    model = TunedModel(
        tuned,
        build_decoder(recipe, taps),
        taps=taps,
        mean=[band.mean for band in spec.planes],
        std=[band.std for band in spec.planes],
        scaling=spec.scaling,
        targets=spec.targets,
    )
    needed = {name for name in model.state_dict() if not name.startswith(_BACKBONE_PREFIX)}
    _load(model, path / HEAD, needed)
    return Run(
        path=path,
        spec=spec,
        recipe=recipe,
        model=model.eval().requires_grad_(False),
        tiles=_read_tiles(path / TILES, spec),
        sha256=_sha256_of([path / name for name in [*files, HEAD]]),
    )


def load_start(run: Run) -> nn.Module:
    """The encoder that ``run`` began with.

    Where the RUN holds a whole backbone, and not beside an adapter, it is the one that it ended with.
    """
    backbone = _build_backbone(run.spec, run.recipe)
    if _is_complete(run.recipe):
        _read_backbone(run.path, backbone.encoder, set(backbone.encoder.state_dict()))
    return backbone.encoder.eval().requires_grad_(False)


def _share_alike(folder: Path) -> None:
    """Give every file the mode the user's umask gives; safetensors writes for the owner alone."""
    mode = (folder / RECIPE).stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)


def _require(path: Path, *names: str) -> None:
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise ModelError(
            f"{path} is no whole RUN: it has no {', '.join(absent)}. "
            "Name a folder that `geodeploy train` made."
        )


def _check_same_task(path: Path, spec: ModelSpec, recipe: Recipe) -> None:
    for what, described, trained in (
        ("bands", spec.band_names, list(recipe.data.bands)),
        ("classes", spec.class_values, [item.value for item in recipe.classes]),
        ("targets", [item.name for item in spec.targets], [item.name for item in recipe.targets]),
        ("task", spec.task, recipe.task),
        ("tile", spec.tile, recipe.model.tile),
        ("timesteps", spec.timesteps, recipe.model.timesteps),
    ):
        if described != trained:
            raise ModelError(
                f"{path}: {SPEC} has {what} {described}, {RECIPE} has {trained}. One of the two was "
                "changed after training; train again or restore it."
            )


def _is_complete(recipe: Recipe) -> bool:
    """Whether the RUN holds the whole backbone, so that its first weights are needed no more."""
    return recipe.model.weights in ("random", IMPORTED) or recipe.method.tunes_all


def _tuned_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """What a method trains in ``backbone``: parameters, and statistics of normalisations it trains."""
    tensors: dict[str, Tensor] = {
        name: value for name, value in backbone.named_parameters() if value.requires_grad
    }
    for place, module in backbone.named_modules():
        if isinstance(module, _BatchNorm) and module.affine and module.weight.requires_grad:
            tensors |= {f"{place}.{name}": value for name, value in module.named_buffers()}
    return tensors


def _build_backbone(spec: ModelSpec, recipe: Recipe) -> Backbone:
    named = recipe.model
    if spec.backbone is not None and spec.backbone.sha256 is not None:
        named = named.model_copy(update={"weights_sha256": spec.backbone.sha256})
    return build_backbone(
        named, spec.band_names, gsd_m=recipe.data.gsd_m, load=not _is_complete(recipe)
    )


def _read_tuned(path: Path, backbone: Backbone, recipe: Recipe) -> tuple[nn.Module, list[str]]:
    """The backbone as it was tuned, and the files of the RUN that say how."""
    if isinstance(recipe.method, Adapter):
        needed = set(backbone.encoder.state_dict()) if _is_complete(recipe) else set()
        files = _read_backbone(path, backbone.encoder, needed)
        split_qkv(backbone.encoder, recipe.method.targets)
        return _read_adapter(path, backbone.encoder), [ADAPTER, ADAPTER_CONFIG, *files]
    tuned = apply_method(backbone, recipe.method)
    needed = set(tuned.state_dict() if _is_complete(recipe) else _tuned_tensors(tuned))
    return tuned, _read_backbone(path, tuned, needed)


def _read_backbone(path: Path, module: nn.Module, needed: set[str]) -> list[str]:
    if not needed:
        return []
    _require(path, BACKBONE)
    _load(module, path / BACKBONE, needed)
    return [BACKBONE]


def _save_adapter(folder: Path, backbone: Any, recipe: Recipe) -> None:
    config = backbone.peft_config["default"]
    config.base_model_name_or_path = recipe.model.backbone
    # How it started is past: a reload must neither ask for data nor take the weights apart again.
    if isinstance(recipe.method, AdaLora):
        config.rank_pattern = None  # of the last step, which need not be the one kept
    elif isinstance(config, peft.LoraConfig):
        config.init_lora_weights, config.eva_config = True, None
    # There are no embeddings of words here, and looking for them would ask the hub.
    backbone.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def _read_adapter(path: Path, vit: nn.Module) -> nn.Module:
    _require(path, ADAPTER, ADAPTER_CONFIG)
    try:
        with quiet():
            wrapped: nn.Module = peft.PeftModel.from_pretrained(vit, path)
        found = set(load_file(path / ADAPTER))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: peft cannot load the adapter ({first_line(error)}). Train again, or restore "
            f"{ADAPTER} and {ADAPTER_CONFIG}."
        ) from error
    needed = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if found != needed:
        raise _other_tensors(path / ADAPTER, found, needed)
    return wrapped


def _load(module: nn.Module, file: Path, needed: set[str]) -> None:
    """Put the tensors of ``file`` into ``module``; they must be just those ``needed``."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} cannot be read ({first_line(error)}). Train again, or restore it."
        ) from error
    if set(tensors) != needed:
        raise _other_tensors(file, set(tensors), needed)
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # of other shapes
        raise ModelError(
            f"{file} does not fit the recipe beside it ({first_line(error)}). Restore both."
        ) from error


def _other_tensors(file: Path, found: set[str], needed: set[str]) -> ModelError:
    odd = sorted(found ^ needed)
    return ModelError(
        f"{file} does not hold the tensors that the recipe beside it asks for: {len(odd)} differ, the "
        f"first is {odd[0]}. Restore both."
    )


def _read_tiles(file: Path, spec: ModelSpec) -> RealTiles:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays["pixels"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{file} cannot be read ({first_line(error)}). Train again, or restore it."
        ) from error
    side = spec.tile
    needed: tuple[int, ...] = (len(pixels), side, side)
    if spec.targets:
        needed = (len(pixels), len(spec.targets), side, side)
    elif spec.whole_tiles:
        needed = (len(pixels), len(spec.classes))
    if pixels.shape[1:] != (len(spec.planes), side, side) or labels.shape != needed:
        raise ModelError(
            f"{file} holds pixels {pixels.shape} and labels {labels.shape}; {len(spec.planes)} bands "
            f"and tiles of {side} are needed. Restore it."
        )
    return RealTiles(pixels.astype(np.float32), labels.astype(np.float32 if spec.targets else np.uint8))


def _shorten(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same numbers with 11 of 23 bits after the point, rounded: they pack into half the bytes."""
    bits = pixels.view(np.uint32)
    return ((bits + np.uint32(0x800)) & np.uint32(0xFFFFF000)).view(np.float32)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Safetensors refuses views of one another and wants whole rows.
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _sha256_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
