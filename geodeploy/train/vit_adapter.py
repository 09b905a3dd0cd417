"""ViT-Adapter: a convolutional pyramid beside a plain transformer, each of which looks into the other.

"Vision Transformer Adapter for Dense Predictions", arXiv 2205.08534.
"""

# B batch, C channel, H row, W column, N token, D width

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geodeploy.errors import RecipeError
from geodeploy.train.backbone import Taps, decoded_blocks
from geodeploy.train.backbones.stacked import StackedViT
from geodeploy.train.decoder import resize
from geodeploy.train.deformable import DeformableAttention
from geodeploy.train.pyramid import convolution

STRIDES = (4, 8, 16, 32)
"""Pixels of the tile to one of each map."""
_FEWER = 4
"""A token's width over that of the feed-forward layers."""
_LAST = 3
"""Times that the pyramid looks into the last block's tokens; once into those of the others."""

_norm = partial(nn.LayerNorm, eps=1e-6)


class AdaptedVit(nn.Module):
    """Four maps, at a quarter of the tile's resolution down to a 32nd, of ``vit`` and a pyramid.

    Before each of four groups of its blocks the transformer's patches take in what the pyramid has;
    after it the pyramid takes in what they have become. Other tokens only go through the blocks.
    """

    def __init__(
        self, vit: VisionTransformer, *, points: int, channels: int, value_ratio: float
    ) -> None:
        super().__init__()
        if isinstance(vit, StackedViT) and vit.stacks > 1:
            raise RecipeError(
                f"method.name: vit_adapter needs one token at each place, {type(vit).__name__} has "
                f"{vit.stacks}, of dates or groups of bands; take lora, full or linear."
            )
        tile, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
        if tile % STRIDES[-1]:
            step = math.lcm(patch, STRIDES[-1])
            below = max(tile // step, 1) * step
            raise RecipeError(
                f"model.tile: {tile} is no multiple of {STRIDES[-1]}, ViT-Adapter's coarsest stride; "
                f"with a patch of {patch} take {below} or {below + step}."
            )
        self.vit = vit
        vit.norm.requires_grad_(False)  # at its end, where nothing is taken from
        self.width = width = vit.embed_dim
        self.sides = tuple(tile // stride for stride in STRIDES)
        blocks: Any = vit.blocks
        self.ends = decoded_blocks(len(blocks))
        """The last block of each group."""
        self.prior = SpatialPrior(vit.patch_embed.proj.in_channels, width, channels)
        self.levels = nn.Parameter(torch.randn(len(self.sides) - 1, width))
        """What tells the tokens of the pyramid's levels apart."""
        attention = partial(
            DeformableAttention,
            width,
            heads=next(part.num_heads for part in blocks.modules() if hasattr(part, "num_heads")),
            points=points,
            value_ratio=value_ratio,
        )
        self.grid = tile // patch
        grid, coarser = (self.grid,), self.sides[1:]
        self.injectors = nn.ModuleList(
            Injector(width, attention(of=grid, to=coarser)) for _ in self.ends
        )
        self.extractors = nn.ModuleList(
            Extractor(width, attention(of=coarser, to=grid), coarser)
            for _ in range(len(self.ends) - 1 + _LAST)
        )
        self.enlarge = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in self.sides)

    def taps(self) -> Taps:
        """Where a decoder taps it."""
        return Taps(tuple(range(len(self.sides))), (self.width,) * len(self.sides), STRIDES)

    def forward_intermediates(
        self, pixels_BCHW: Tensor, indices: Sequence[int], **_: object
    ) -> list[Tensor]:
        """The maps at ``indices``, in the manner of timm, whose other arguments change nothing here."""
        finest, pyramid = self._look(pixels_BCHW)
        tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(pixels_BCHW)))
        first = self.vit.num_prefix_tokens
        grid = self.grid
        seen = []
        for number, (start, end) in enumerate(pairwise((-1, *self.ends))):
            patches = self.injectors[number](tokens[:, first:], pyramid)
            tokens = torch.cat([tokens[:, :first], patches], dim=1)
            for block in self.vit.blocks[start + 1 : end + 1]:
                tokens = self._through(block, tokens)
            patches = tokens[:, first:]
            last = number == len(self.ends) - 1
            for extract in self.extractors[number : None if last else number + 1]:
                pyramid = extract(pyramid, patches)
            seen.append(as_map(patches, grid))
        maps = [as_map(part, side) for part, side in split_levels(pyramid, self.sides[1:])]
        maps.insert(0, finest + self.enlarge(maps[0]))
        # Of fewer than four blocks the last one's map goes to all levels that are left.
        seen += [seen[-1]] * (len(maps) - len(seen))
        joined = [
            norm(level + resize(patches, level.shape[-1]))
            for norm, level, patches in zip(self.norms, maps, seen, strict=True)
        ]
        return [joined[index] for index in indices]

    def _look(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The finest map of the pixels, and the tokens of the coarser ones."""
        finest, *coarser = self.prior(pixels_BCHW)
        tokens = [
            level.flatten(2).transpose(1, 2) + told
            for level, told in zip(coarser, self.levels, strict=True)
        ]
        return finest, torch.cat(tokens, dim=1)

    def _through(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.vit.grad_checkpointing and self.training:
            again: Tensor = checkpoint(block, tokens, use_reentrant=False)
            return again
        out: Tensor = block(tokens)
        return out


class SpatialPrior(nn.Module):
    """A convolutional look at the pixels, at four resolutions."""

    def __init__(self, bands: int, width: int, channels: int) -> None:
        super().__init__()
        stem = nn.Sequential(
            convolution(bands, channels, stride=2),
            convolution(channels, channels),
            convolution(channels, channels),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.stages = nn.ModuleList(
            [stem, *(convolution(before, wide, stride=2) for before, wide in pairwise(widths))]
        )
        self.projections = nn.ModuleList(nn.Conv2d(wide, width, kernel_size=1) for wide in widths)

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Maps (B, D, H, W), the finest first."""
        maps, features = [], pixels_BCHW
        for stage, project in zip(self.stages, self.projections, strict=True):
            features = stage(features)
            maps.append(project(features))
        return maps


class Injector(nn.Module):
    """Adds to the transformer's patches what they find in the pyramid: nothing at first."""

    def __init__(self, width: int, attention: DeformableAttention) -> None:
        super().__init__()
        self.patch_norm, self.pyramid_norm = _norm(width), _norm(width)
        self.attention = attention
        self.strength = nn.Parameter(torch.zeros(width))

    def forward(self, patches_BND: Tensor, pyramid_BND: Tensor) -> Tensor:
        """The patches (B, N, D)."""
        found = self.attention(self.patch_norm(patches_BND), self.pyramid_norm(pyramid_BND))
        injected: Tensor = patches_BND + self.strength * found
        return injected


class Extractor(nn.Module):
    """Adds to the pyramid what it finds in the transformer's patches, and mixes what is near."""

    def __init__(self, width: int, attention: DeformableAttention, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.pyramid_norm, self.patch_norm, self.mix_norm = _norm(width), _norm(width), _norm(width)
        self.attention = attention
        inner = max(width // _FEWER, 1)
        self.shrink = nn.Linear(width, inner)
        self.mix = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner)
        self.activate = nn.GELU()
        self.widen = nn.Linear(inner, width)

    def forward(self, pyramid_BND: Tensor, patches_BND: Tensor) -> Tensor:
        """The pyramid's tokens (B, N, D)."""
        found = self.attention(self.pyramid_norm(pyramid_BND), self.patch_norm(patches_BND))
        pyramid = pyramid_BND + found
        shrunk = self.shrink(self.mix_norm(pyramid))
        mixed = [
            self.mix(as_map(part, side)).flatten(2).transpose(1, 2)
            for part, side in split_levels(shrunk, self.sides)
        ]
        extracted: Tensor = pyramid + self.widen(self.activate(torch.cat(mixed, dim=1)))
        return extracted


def split_levels(tokens_BND: Tensor, sides: Sequence[int]) -> list[tuple[Tensor, int]]:
    """The tokens of each level, with the side of its map."""
    return list(zip(torch.split(tokens_BND, [side**2 for side in sides], dim=1), sides, strict=True))


def as_map(tokens_BND: Tensor, side: int) -> Tensor:
    """(B, D, side, side)."""
    return tokens_BND.transpose(1, 2).reshape(-1, tokens_BND.shape[-1], side, side)
