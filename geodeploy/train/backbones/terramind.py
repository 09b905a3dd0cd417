"""The encoder of TerraMind 1.0 on one of its modalities (arXiv 2504.11171)."""

import re
from functools import partial

import torch
from timm.layers.mlp import SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geodeploy.bands import SENTINEL2
from geodeploy.train.backbones.family import (
    Size,
    Tensors,
    Wanted,
    fix_positions,
    pick_bands,
    vit_options,
)
from geodeploy.train.backbones.positions import cells, rates, resize_positions, waves

_SIZES = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}
_MODALITIES = {
    "s2l2a": ("sen2l2a", tuple(band for band in SENTINEL2.values() if band != "cirrus")),
    "s2l1c": ("sen2l1c", tuple(SENTINEL2.values())),
    "rgb": ("sen2rgb", ("red", "green", "blue")),
    "s1grd": ("sen1grd", ("vv", "vh")),
    "s1rtc": ("sen1rtc", ("vv", "vh")),
}
"""Of the patch filters, by the name's end: what they are called in the file, and their bands."""
VARIANTS = {
    f"terramind_v1_{size}{'' if modality == 's2l2a' else f'_{modality}'}": (size, modality)
    for size in _SIZES
    for modality in _MODALITIES
}
"""Size and modality by the name in a recipe, S2L2A where the name has none."""
_PLAIN = ("tiny", "small")
"""Sizes with biases and plain layers between attentions; the others have gated ones, and no biases."""
_GATED = {"mlp.fc1": "mlp.fc1_g", "mlp.fc3": "mlp.fc1_x"}


def create(wanted: Wanted) -> VisionTransformer:
    """See `Family`."""
    size = VARIANTS[wanted.model.backbone][0]
    options = vit_options(wanted, _SIZES[size])
    width = options["embed_dim"]
    if size not in _PLAIN:
        # Gated layers are two thirds as wide. Half a unit more: timm cuts off what is behind the point.
        hidden = int(2 * int(width * options["mlp_ratio"]) / 3)
        options |= {"mlp_ratio": (hidden + 0.5) / width, "mlp_layer": SwiGLU, "act_layer": nn.SiLU}
        options |= {"qkv_bias": False, "proj_bias": False}
    vit = VisionTransformer(**options, class_token=False, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    row, col = cells(vit.patch_embed.grid_size[0])
    both = [waves(place, rates(width // 4)) for place in (row, col)]
    fix_positions(vit, torch.cat(both, dim=1)[None])
    return vit


def convert(tensors: Tensors, vit: VisionTransformer, wanted: Wanted) -> Tensors:
    """See `Family`. What says which modality it is becomes the bias of the patches."""
    size, kind = VARIANTS[wanted.model.backbone]
    modality, bands = _MODALITIES[kind]
    embedding = f"encoder_embeddings.untok_{modality}@224."
    found = {}
    for name, value in tensors.items():
        if name.startswith(("encoder.", "encoder_norm.")):
            ours = re.sub(r"^encoder\.", "blocks.", name).replace("encoder_norm.", "norm.")
            for theirs, gated in () if size in _PLAIN else _GATED.items():
                ours = ours.replace(theirs, gated)
            found[ours] = value
    patch = vit.patch_embed.patch_size[0]
    # A linear layer on the pixels of a patch, one after the other with all its bands.
    flat = tensors[f"{embedding}proj.weight"]
    filters = flat.reshape(len(flat), patch, patch, -1).permute(0, 3, 1, 2)
    return found | {
        "patch_embed.proj.weight": pick_bands(filters, bands, wanted),
        "patch_embed.proj.bias": tensors[f"{embedding}mod_emb"].flatten(),
        "pos_embed": resize_positions(
            tensors[f"{embedding}pos_emb"], vit.patch_embed.grid_size[0], prefix=0
        ),
    }
