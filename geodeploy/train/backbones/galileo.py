"""Galileo on one date of Sentinel-1 and Sentinel-2 (arXiv 2502.09356): a token for each group of bands.

The month is June, as Galileo takes it where nobody tells it; all else that Galileo could be told, such
as weather and place, is left out.
"""

import math
from functools import partial

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from geodeploy.train.backbones.family import Size, Tensors, Wanted, fix_positions, vit_options
from geodeploy.train.backbones.groups import GroupedViT, groups_of, one_convolution
from geodeploy.train.backbones.positions import plane

VARIANTS = {
    "galileo_nano": Size(128, 4, 8, 8),
    "galileo_tiny": Size(192, 12, 3, 8),
    "galileo_base": Size(768, 12, 12, 8),
}
_GROUPS = {
    "S1": ("vv", "vh"),
    "S2_RGB": ("blue", "green", "red"),
    "S2_Red_Edge": ("rededge071", "rededge075", "rededge078"),
    "S2_NIR_10m": ("nir",),
    "S2_NIR_20m": ("nir08",),
    "S2_SWIR": ("swir16", "swir22"),
    "NDVI": ("ndvi",),
}
_MONTH = 5
"""Counted from 0."""
_METRES = 10
"""What a patch's place is counted in."""


def create(wanted: Wanted) -> GroupedViT:
    """See `Family`."""
    options = vit_options(wanted, VARIANTS[wanted.model.backbone])
    options |= {"class_token": False, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    groups = groups_of(_GROUPS, wanted)
    vit = GroupedViT(options, groups=len(groups))
    quarter = vit.embed_dim // 4
    angle = 2 * math.pi * _MONTH / 12
    first_date, month = (
        torch.tensor([math.sin(turn), math.cos(turn)]).repeat_interleave(quarter // 2)
        for turn in (0.0, angle)
    )
    kinds = torch.zeros(len(groups), quarter)
    fix_positions(vit, _positions(vit, wanted, kinds, first_date, month))
    return vit


def convert(tensors: Tensors, vit: GroupedViT, wanted: Wanted) -> Tensors:
    """See `Family`."""
    tensors = {name.replace(".backbone", ""): value for name, value in tensors.items()}
    groups = groups_of(_GROUPS, wanted)
    filters = {
        name: resample_patch_embed(
            tensors[f"space_time_embed.{name}.proj.weight"], list(vit.patch_embed.patch_size)
        )
        for name in groups
    }
    kinds = tensors["s_t_channel_embed"][[list(_GROUPS).index(name) for name in groups]]
    found = {
        "norm.weight": tensors["norm.weight"],
        "norm.bias": tensors["norm.bias"],
        "patch_embed.proj.weight": one_convolution(filters, _GROUPS, wanted),
        "patch_embed.proj.bias": torch.cat(
            [tensors[f"space_time_embed.{name}.proj.bias"] for name in groups]
        ),
        "pos_embed": _positions(
            vit, wanted, kinds, tensors["pos_embed"][0], tensors["month_embed.weight"][_MONTH]
        ),
    }
    for name, value in tensors.items():
        if not name.startswith("blocks."):
            continue
        before, _, part = name.partition(".attn.")
        if part.startswith("q."):
            three = [tensors[f"{before}.attn.{kind}{part[1:]}"] for kind in "qkv"]
            found[f"{before}.attn.qkv{part[1:]}"] = torch.cat(three)
        elif not part.startswith(("k.", "v.")):
            found[name] = value
    return found


def _positions(
    vit: GroupedViT, wanted: Wanted, kinds_GD: Tensor, date_D: Tensor, month_D: Tensor
) -> Tensor:
    """Four quarters: the group, the date among dates, the month, and the place."""
    side, patch = vit.patch_embed.grid_size[0], vit.patch_embed.patch_size[0]
    count = vit.embed_dim // 16
    # Slower than others' waves, as published.
    slow = 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / count / 4)
    places = plane(side, slow, step=wanted.metres * patch / _METRES).float()
    parts = [
        torch.cat([torch.cat([kind, date_D, month_D]).expand(len(places), -1), places], dim=1)
        for kind in kinds_GD
    ]
    return torch.cat(parts)[None]
