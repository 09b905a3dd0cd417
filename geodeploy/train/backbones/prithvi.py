"""Prithvi-EO: a vision transformer over the bands of one date or several (arXiv 2412.02732)."""

# B batch, T date, C band, H row, W column, N token, D width

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodeploy.errors import WeightsError
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
from geodeploy.train.recipe import Model

BANDS = ("blue", "green", "red", "nir08", "swir16", "swir22")
"""What it was trained on (HLS), in the order of its patch filters."""
_TILE = 224
"""What it was trained on; positions of other tiles are interpolated."""
_PREFIXES = ("encoder.", "_timm_module.")
_TIME, _PLACE = "temporal_embed_enc.scale", "location_embed_enc.scale"
"""What encodings of dates and of the place are multiplied with."""
_FIRST_SCALE = 0.1
"""Of both, before they learned another."""
_NOT_OURS = ("decoder", "mask_token", "temporal_embed", "location_embed", "pos_embed")
"""Parts of the published files that do without: the decoder that fills in what was masked, and what is
computed: positions, and the encodings of dates and of the place, which are added to them."""

VARIANTS = {
    "prithvi_eo_tiny": Size(256, 4, 4),
    "prithvi_eo_v1_100": Size(768, 12, 12),
    "prithvi_eo_v2_tiny": Size(192, 12, 3),
    "prithvi_eo_v2_100": Size(768, 12, 12),
    "prithvi_eo_v2_300": Size(1024, 24, 16),
    "prithvi_eo_v2_600": Size(1280, 32, 16, 14),
}
"""By the name in a recipe."""
TOLD = tuple(f"{name}_tl" for name in VARIANTS if "_v2_" in name)
"""Those called TL were trained with dates and places, and without. Where nobody tells them, they are
the same networks."""


class Prithvi(StackedViT):
    """A plain vision transformer with fixed positions in time and space.

    The patches of all dates are tokens beside one another; the maps of the dates are stacked.
    """

    def __init__(self, options: dict[str, Any], *, dates: int) -> None:
        super().__init__(**options, norm_layer=partial(nn.LayerNorm, eps=1e-5))
        self.stacks = dates
        fix_positions(self, self.positions())
        self.feature_info = [info | {"num_chs": dates * self.embed_dim} for info in self.feature_info]

    def positions(self) -> Tensor:
        """(1, 1 + N, D), of all patches, as nobody tells it more of them."""
        side = _TILE // self.patch_embed.patch_size[0]
        native = positions(self.stacks, side, self.embed_dim)
        return resample(native, self.stacks, self.patch_embed.grid_size[0])

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
    vit = Prithvi(options, dates=wanted.model.timesteps)
    first = torch.tensor(_FIRST_SCALE)
    vit.pos_embed = vit.pos_embed + _told(wanted.model, vit, {_TIME: first, _PLACE: first})
    return vit


def convert(tensors: Tensors, encoder: Prithvi, wanted: Wanted) -> Tensors:
    """See `Family`."""
    found = {}
    scales = {}
    for name, value in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)  # noqa: PLW2901
        if name in (_TIME, _PLACE):
            scales[name] = value
        if not name.startswith(_NOT_OURS):
            found[name] = value
    found["pos_embed"] = encoder.positions() + _told(wanted.model, encoder, scales)
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


def _told(model: Model, vit: Prithvi, scales: Tensors) -> Tensor:
    """(1, 1 + N, D): what a recipe tells of dates and place, added to the positions of all patches.

    Raises:
        WeightsError: the weights have no scale for what is told.
    """
    for key, scale, given in (("dates", _TIME, model.dates), ("place", _PLACE, model.place)):
        if given is not None and scale not in scales:
            raise WeightsError(
                f"The weights {model.weights} were trained without {key}: they have no {scale}. Leave "
                f"out model.{key}, or take the weights of a Prithvi called TL."
            )
    width = vit.embed_dim
    patches = (vit.pos_embed.shape[1] - 1) // vit.stacks
    told = torch.zeros(vit.stacks, width)
    if model.dates:
        # Days are counted from 0, as TerraTorch's datasets count them.
        days = [(day.year, day.timetuple().tm_yday - 1) for day in model.dates]
        told = told + scales[_TIME] * _pairs(torch.tensor(days), width)
    if model.place:
        place = torch.tensor([[model.place.lat, model.place.lon]])
        told = told + scales[_PLACE] * _pairs(place, width)
    return with_class_token(told.repeat_interleave(patches, dim=0))


def _pairs(numbers_N2: Tensor, width: int) -> Tensor:
    """(N, width): waves of the first number, then of the second."""
    # In single precision, which shows in years, as it was trained.
    turns = 1 / 10_000 ** (torch.arange(width // 4) / (width / 4))
    return torch.cat([waves(numbers_N, turns) for numbers_N in numbers_N2.unbind(1)], dim=1)


def resample(positions_1ND: Tensor, dates: int, side: int) -> Tensor:
    """Positions for ``side`` by ``side`` patches of each date from those of another square of them."""
    # As Prithvi's own code does it, corners on corners.
    return resize_positions(positions_1ND, side, stacks=dates, align_corners=True)


def flat_filters(filters: Tensor) -> Tensor:
    """Filters (D, C, H, W) of those that span one date (D, C, 1, H, W); others as they are."""
    return filters.squeeze(2) if filters.ndim == 5 and filters.shape[2] == 1 else filters
