"""Prithvi-EO: a vision transformer over the bands of one date or several (arXiv 2412.02732)."""

# B batch, T date, C band, H row, W column, N token, D width

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from geodeploy.errors import WeightsError

BANDS = ("blue", "green", "red", "nir08", "swir16", "swir22")
"""What it was trained on (HLS), in the order of its patch filters."""
_TILE = 224
"""What it was trained on; positions of other tiles are interpolated."""
_PREFIXES = ("encoder.", "_timm_module.")
_NOT_OURS = ("decoder", "mask_token", "temporal_embed", "location_embed", "pos_embed")
"""Parts of the published files that do without: the decoder that fills in what was masked, times and
places, and positions, which are computed."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The size of a network."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    mlp_ratio: float = 4.0


VARIANTS = {
    "prithvi_eo_tiny": Variant(256, 4, 4),
    "prithvi_eo_v1_100": Variant(768, 12, 12),
    "prithvi_eo_v2_tiny": Variant(192, 12, 3),
    "prithvi_eo_v2_100": Variant(768, 12, 12),
    "prithvi_eo_v2_300": Variant(1024, 24, 16),
    "prithvi_eo_v2_600": Variant(1280, 32, 16, 14),
}
"""By the name in a recipe. Those called TL are these where nobody tells them time and location."""


class Prithvi(VisionTransformer):
    """A plain vision transformer with fixed positions in time and space.

    The patches of all dates are tokens beside one another; the maps of the dates are stacked. The last
    block gives its tokens normalised, all others as they are.
    """

    pos_embed: Tensor  # type: ignore[assignment]
    """(1, 1 + N, D), the class token's first; not trained."""

    def __init__(self, variant: Variant, *, bands: int, tile: int, dates: int = 1) -> None:
        super().__init__(
            img_size=tile,
            patch_size=variant.patch_size,
            in_chans=bands,
            num_classes=0,
            global_pool="",
            embed_dim=variant.embed_dim,
            depth=variant.depth,
            num_heads=variant.num_heads,
            mlp_ratio=variant.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
        self.dates = dates
        native = positions(dates, _TILE // variant.patch_size, variant.embed_dim)
        del self.pos_embed
        self.register_buffer("pos_embed", resample(native, dates, tile // variant.patch_size))

    def forward_intermediates(  # type: ignore[override]
        self, pixels_BCHW: Tensor, indices: Sequence[int], **_: object
    ) -> list[Tensor]:
        """Maps (B, T D, H, W) of the blocks ``indices``, of pixels (B, T C, H, W), date after date.

        In the manner of timm, whose other arguments change nothing here.
        """
        height, width = pixels_BCHW.shape[-2:]
        dates = pixels_BCHW.reshape(-1, self.in_chans, height, width)
        patches = self.patch_embed(dates).reshape(len(pixels_BCHW), -1, self.embed_dim)
        tokens = self._pos_embed(patches)
        maps = {}
        for number, block in enumerate(self.blocks[: max(indices) + 1]):
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if number in indices:
                last = number == len(self.blocks) - 1
                maps[number] = self._as_map(self.norm(tokens) if last else tokens)
        return [maps[index] for index in indices]

    def _as_map(self, tokens_BND: Tensor) -> Tensor:
        rows, cols = self.patch_embed.grid_size
        patches = tokens_BND[:, self.num_prefix_tokens :]
        grid = patches.reshape(-1, self.dates, rows, cols, self.embed_dim)
        return grid.permute(0, 1, 4, 2, 3).reshape(-1, self.dates * self.embed_dim, rows, cols)


def positions(dates: int, side: int, width: int) -> Tensor:
    """(1, 1 + dates * side * side, width): sines and cosines of column, row and date; zeros at first.

    Column and row take 6 of 16 parts of the width each, the date the other 4.
    """
    date, row, col = torch.meshgrid(
        torch.arange(dates), torch.arange(side), torch.arange(side), indexing="ij"
    )
    parts = [
        _waves(place.flatten(), share * width // 16) for place, share in ((col, 6), (row, 6), (date, 4))
    ]
    patches = torch.cat(parts, dim=1)
    return torch.cat([torch.zeros(1, width), patches.float()])[None]


def _waves(places: Tensor, width: int) -> Tensor:
    """(places, width) in float64: sines, then cosines, as in arXiv 1706.03762."""
    rates = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def resample(positions_1ND: Tensor, dates: int, side: int) -> Tensor:
    """Positions for ``side`` by ``side`` patches of each date from those of another square of them."""
    count, width = positions_1ND.shape[1:]
    old = round(((count - 1) / dates) ** 0.5)
    if old == side:
        return positions_1ND
    first, patches = positions_1ND[:, :1], positions_1ND[:, 1:]
    grid = patches.reshape(dates, old, old, width).permute(0, 3, 1, 2)
    # As Prithvi's own code does it, corners on corners.
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=True)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)


def from_published(tensors: Mapping[str, Any], bands: Sequence[str], source: str) -> dict[str, Tensor]:
    """The encoder's tensors in a file as it is published, its patch filters those of ``bands``.

    Raises:
        WeightsError: there is a band that Prithvi does not know.
    """
    found = {}
    for name, value in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)  # noqa: PLW2901
        if not name.startswith(_NOT_OURS):
            found[name] = value
    known = [{"nir": "nir08"}.get(band, band) for band in bands]
    if unknown := set(known) - set(BANDS):
        raise WeightsError(
            f"The weights {source} know the bands {', '.join(BANDS)}, the recipe has "
            f"{', '.join(sorted(unknown))} too. Leave it out, or start from other weights."
        )
    patches = "patch_embed.proj.weight"
    if patches in found and found[patches].shape[1] == len(BANDS):
        filters = flat_filters(found[patches])
        found[patches] = filters[:, [BANDS.index(band) for band in known]]
    return found


def flat_filters(filters: Tensor) -> Tensor:
    """Filters (D, C, H, W) of those that span one date (D, C, 1, H, W); others as they are."""
    return filters.squeeze(2) if filters.ndim == 5 and filters.shape[2] == 1 else filters
