"""SatMAE on Sentinel-2: patches of 8 pixels of each of three groups of bands (arXiv 2207.08051)."""

from functools import partial

import torch
from torch import Tensor, nn

from geodeploy.train.backbones.family import Size, Tensors, Wanted, fix_positions, vit_options
from geodeploy.train.backbones.groups import GroupedViT, groups_of, one_convolution
from geodeploy.train.backbones.positions import plane, rates, resize_positions, waves, with_class_token

VARIANTS = {
    "satmae_base": Size(768, 12, 12, 8),
    "satmae_large": Size(1024, 24, 16, 8),
}
_GROUPS = {
    "0": ("blue", "green", "red", "nir"),
    "1": ("rededge071", "rededge075", "rededge078", "nir08"),
    "2": ("swir16", "swir22"),
}
_OF_GROUP = 256
"""Numbers of a position that say which group it is of; a quarter in networks that are narrow."""


def create(wanted: Wanted) -> GroupedViT:
    """See `Family`."""
    options = vit_options(wanted, VARIANTS[wanted.model.backbone])
    groups = groups_of(_GROUPS, wanted)
    vit = GroupedViT(options | {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}, groups=len(groups))
    wide = _group_width(vit.embed_dim)
    places = plane(vit.patch_embed.grid_size[0], rates((vit.embed_dim - wide) // 4))
    kinds = waves(torch.tensor([int(name) for name in groups]), rates(wide // 2))
    zeros = torch.zeros(1, 1, wide)
    fix_positions(vit, _positions(with_class_token(places), kinds, zeros))
    return vit


def convert(tensors: Tensors, vit: GroupedViT, wanted: Wanted) -> Tensors:
    """See `Family`."""
    groups = groups_of(_GROUPS, wanted)
    filters = {name: tensors[f"patch_embed.{name}.proj.weight"] for name in _GROUPS}
    places = resize_positions(tensors["pos_embed"], vit.patch_embed.grid_size[0])
    kinds = tensors["channel_embed"][0, [int(name) for name in groups]]
    # It came with fine-tuning: the pretrained files have none.
    of_class_token = tensors.get("channel_cls_embed", torch.zeros(1, 1, kinds.shape[1]))
    blocks = {
        name: value
        for name, value in tensors.items()
        if name.startswith(("blocks.", "norm.", "cls_token"))
    }
    return blocks | {
        "patch_embed.proj.weight": one_convolution(filters, _GROUPS, wanted),
        "patch_embed.proj.bias": torch.cat(
            [tensors[f"patch_embed.{name}.proj.bias"] for name in groups]
        ),
        "pos_embed": _positions(places, kinds, of_class_token),
    }


def _group_width(width: int) -> int:
    return _OF_GROUP if width > 2 * _OF_GROUP else width // 4


def _positions(places_1ND: Tensor, kinds_GD: Tensor, kind_of_class_token: Tensor) -> Tensor:
    """Of the class token and of each group's patches: where a patch is, then which group it is of."""
    first, patches = places_1ND[:, :1], places_1ND[:, 1:]
    groups = [torch.cat([patches, kind.expand(1, patches.shape[1], -1)], dim=2) for kind in kinds_GD]
    return torch.cat([torch.cat([first, kind_of_class_token], dim=2), *groups], dim=1)
