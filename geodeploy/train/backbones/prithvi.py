"""Prithvi-EO: a vision transformer over the bands of one date or several (arXiv 2412.02732)."""

# B batch, T date, C band, H row, W column, N token, D width

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodeploy.train.backbones.family import (
    Size,
    Tensors,
    Wanted,
    fix_positions,
    pick_bands,
    vit_options,
)
from geodeploy.train.backbones.positions import rates, resize_positions, waves, with_class_token
from geodeploy.train.backbones.stacked import StackedViT

BANDS = ("blue", "green", "red", "nir08", "swir16", "swir22")
"""What it was trained on (HLS), in the order of its patch filters."""
_TILE = 224
"""What it was trained on; positions of other tiles are interpolated."""
_PREFIXES = ("encoder.", "_timm_module.")
_NOT_OURS = ("decoder", "mask_token", "temporal_embed", "location_embed", "pos_embed")
"""Parts of the published files that do without: the decoder that fills in what was masked, times and
places, and positions, which are computed."""

VARIANTS = {
    "prithvi_eo_tiny": Size(256, 4, 4),
    "prithvi_eo_v1_100": Size(768, 12, 12),
    "prithvi_eo_v2_tiny": Size(192, 12, 3),
    "prithvi_eo_v2_100": Size(768, 12, 12),
    "prithvi_eo_v2_300": Size(1024, 24, 16),
    "prithvi_eo_v2_600": Size(1280, 32, 16, 14),
}
"""By the name in a recipe."""
NAMES = (*VARIANTS, *(f"{name}_tl" for name in VARIANTS if "_v2_" in name))
"""Those called TL are the same networks where nobody tells them time and location."""


class Prithvi(StackedViT):
    """A plain vision transformer with fixed positions in time and space.

    The patches of all dates are tokens beside one another; the maps of the dates are stacked.
    """

    def __init__(self, options: dict[str, Any], *, dates: int) -> None:
        super().__init__(**options, norm_layer=partial(nn.LayerNorm, eps=1e-5))
        self.stacks = dates
        patch: int = options["patch_size"]
        native = positions(dates, _TILE // patch, self.embed_dim)
        fix_positions(self, resample(native, dates, options["img_size"] // patch))
        self.feature_info = [info | {"num_chs": dates * self.embed_dim} for info in self.feature_info]

    def cut(self, pixels_BCHW: Tensor) -> Tensor:
        """Of pixels (B, T C, H, W), date after date."""
        height, width = pixels_BCHW.shape[-2:]
        dates = pixels_BCHW.reshape(-1, self.in_chans, height, width)
        patches: Tensor = self.patch_embed(dates)
        return patches.reshape(len(pixels_BCHW), -1, self.embed_dim)

    def join(self, stacks_BSDHW: Tensor) -> Tensor:
        """The maps of the dates beside one another: (B, T D, H, W)."""
        return stacks_BSDHW.flatten(1, 2)


def create(wanted: Wanted) -> Prithvi:
    """See `Family`."""
    options = vit_options(wanted, VARIANTS[wanted.model.backbone.removesuffix("_tl")])
    return Prithvi(options, dates=wanted.model.timesteps)


def convert(tensors: Tensors, encoder: Prithvi, wanted: Wanted) -> Tensors:
    """See `Family`."""
    found = {"pos_embed": encoder.pos_embed}
    for name, value in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)  # noqa: PLW2901
        if not name.startswith(_NOT_OURS):
            found[name] = value
    patches = "patch_embed.proj.weight"
    found[patches] = pick_bands(flat_filters(found[patches]), BANDS, wanted)
    return found


def positions(dates: int, side: int, width: int) -> Tensor:
    """(1, 1 + dates * side * side, width): sines and cosines of column, row and date; zeros at first.

    Column and row take 6 of 16 parts of the width each, the date the other 4.
    """
    date, row, col = torch.meshgrid(
        torch.arange(dates), torch.arange(side), torch.arange(side), indexing="ij"
    )
    parts = [
        waves(place.flatten(), rates(share * width // 32))
        for place, share in ((col, 6), (row, 6), (date, 4))
    ]
    return with_class_token(torch.cat(parts, dim=1)).float()


def resample(positions_1ND: Tensor, dates: int, side: int) -> Tensor:
    """Positions for ``side`` by ``side`` patches of each date from those of another square of them."""
    # As Prithvi's own code does it, corners on corners.
    return resize_positions(positions_1ND, side, stacks=dates, align_corners=True)


def flat_filters(filters: Tensor) -> Tensor:
    """Filters (D, C, H, W) of those that span one date (D, C, 1, H, W); others as they are."""
    return filters.squeeze(2) if filters.ndim == 5 and filters.shape[2] == 1 else filters
