"""DINOv3, of satellite images (sat493m) or others (arXiv 2508.10104): timm's networks, by timm's names.

Files by timm, by Meta and by the transformers library fit.
"""

import re

import torch
from torch import nn

from geodeploy.errors import WeightsError
from geodeploy.train.backbones import timm_models
from geodeploy.train.backbones.family import Tensors, Wanted

_SIZES = ("small", "small_plus", "base", "large", "huge_plus")
NAMES = (
    *(f"vit_{size}_patch16_dinov3{biases}" for size in _SIZES for biases in ("", "_qkvb")),
    "vit_7b_patch16_dinov3",
)
"""Those called qkvb have biases in query and value; in others' published weights they are zeros."""
_TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "gamma_1",
    "layer_scale2.lambda1": "gamma_2",
    "mlp.down_proj": "mlp.fc2",
    "attention.q_proj.bias": "attn.q_bias",
    "attention.v_proj.bias": "attn.v_bias",
}
"""The library's names of parts, and timm's."""


def convert(tensors: Tensors, encoder: nn.Module, wanted: Wanted) -> Tensors:
    """See `Family`.

    Raises:
        WeightsError: the weights have biases that the network has not.
    """
    if "embeddings.cls_token" in tensors:
        tensors = _of_transformers(tensors)
    biases = [
        value for name, value in tensors.items() if name.endswith(("q_bias", "v_bias", "attn.qkv.bias"))
    ]
    if not wanted.model.backbone.endswith("_qkvb") and any(value.any() for value in biases):
        raise WeightsError(
            f"The weights {wanted.model.weights} have biases in query and value: take "
            f"{wanted.model.backbone}_qkvb."
        )
    plain = {name: value for name, value in tensors.items() if not _is_zero_bias(name, wanted)}
    return timm_models.convert(plain, encoder, wanted)


def _is_zero_bias(name: str, wanted: Wanted) -> bool:
    return name.endswith("attn.qkv.bias") and not wanted.model.backbone.endswith("_qkvb")


def _of_transformers(tensors: Tensors) -> Tensors:
    found = {}
    gated = any(".mlp.gate_proj." in name for name in tensors)
    parts = _TRANSFORMERS | {
        "mlp.up_proj": "mlp.fc1_x" if gated else "mlp.fc1",
        "mlp.gate_proj": "mlp.fc1_g",
    }
    for name, value in tensors.items():
        ours = re.sub(r"^(model\.)?layer\.", "blocks.", name)
        if "attention.q_proj.weight" in name:
            three = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[ours.replace("attention.q_proj", "attn.qkv")] = torch.cat(three)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            continue
        for theirs, part in parts.items():
            ours = ours.replace(theirs, part)
        found[ours] = value
    return found
