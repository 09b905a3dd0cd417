"""From a backbone's maps to one score a class at every pixel of the tile, or for all of it."""

# B batch, C channel, K class, H row, W column

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from geodeploy.train.pyramid import convolution


class LinearDecoder(nn.Module):
    """One linear layer on the last tokens, resized to the tile. A probe of what the backbone knows."""

    def __init__(self, width: int, classes: int, tile: int) -> None:
        super().__init__()
        self.tile = tile
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, tokens: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile); the pixels are not looked at."""
        return resize(self.head(tokens[-1]), self.tile)


class PooledDecoder(nn.Module):
    """One linear layer on the mean of the last map: what the tile as a whole shows."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, maps: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K); the pixels are not looked at."""
        logits: Tensor = self.head(maps[-1].mean(dim=(2, 3)))
        return logits


class FcnDecoder(nn.Module):
    """Convolutions on the last map alone, each brought to twice the size, up to the tile's."""

    def __init__(self, width: int, classes: int, tile: int, *, channels: Sequence[int]) -> None:
        super().__init__()
        self.sizes = _climb(tile, len(channels))
        self.levels = nn.ModuleList(
            convolution(below, wide) for below, wide in itertools.pairwise([width, *channels])
        )
        self.head = nn.Conv2d(channels[-1], classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile); the pixels are not looked at."""
        features = maps[-1]
        for size, convolve in zip(self.sizes, self.levels, strict=True):
            features = resize(convolve(features), size)
        logits: Tensor = self.head(features)
        return logits


class UnetDecoder(nn.Module):
    """Climbs from the tokens to the tile's resolution over an eighth, a quarter and half of it.

    Each level joins what comes from below, tokens of an earlier block, and the stem's view of the
    pixels. A patch of 14 does not halve evenly, so every level is resized to its size.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        classes: int,
        tile: int,
        *,
        channels: Sequence[int],
        bands: int,
        stem: bool,
    ) -> None:
        super().__init__()
        self.sizes = _climb(tile, len(channels))
        self.bottom = nn.Conv2d(width, channels[0], kernel_size=1)
        # The block next to the last joins the lowest level, the first the highest that is left.
        joined = channels[: blocks - 1]
        self.laterals = nn.ModuleList(nn.Conv2d(width, wide // 2, 1) for wide in joined)
        self.stem = Stem(bands, list(channels)[::-1]) if stem else None
        self.levels = nn.ModuleList()
        below = channels[0]
        for level, wide in enumerate(channels):
            lateral = wide // 2 if level < len(joined) else 0
            self.levels.append(_double(below + lateral + (wide if stem else 0), wide))
            below = wide
        self.head = nn.Conv2d(below, classes, kernel_size=1)

    def forward(self, tokens: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile) from the tokens of the chosen blocks and the normalised pixels."""
        skips = self.stem(pixels_BCHW) if self.stem is not None else []
        earlier = list(tokens[-2::-1])
        features = self.bottom(tokens[-1])
        for level, (size, convolve) in enumerate(zip(self.sizes, self.levels, strict=True)):
            parts = [resize(features, size)]
            if level < len(self.laterals):
                # Projected first, on the few tokens, and enlarged then: the same map, far cheaper.
                parts.append(resize(self.laterals[level](earlier[level]), size))
            if skips:
                parts.append(skips[-1 - level])
            features = convolve(torch.cat(parts, dim=1))
        logits: Tensor = self.head(features)
        return logits


class PyramidDecoder(nn.Module):
    """Climbs a convolutional network's pyramid level by level.

    The finest level is coarser than the tile, by ``stride``: each of its pixels answers for a square of
    the tile's, one logit a class and pixel, so that detail costs no convolution at full resolution.
    """

    def __init__(
        self, widths: Sequence[int], classes: int, stride: int, *, channels: Sequence[int]
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        below = widths[-1]
        for skipped, wide in zip(widths[-2::-1], channels, strict=True):
            self.levels.append(convolution(below + skipped, wide))
            below = wide
        self.head = nn.Conv2d(below, classes * stride**2, kernel_size=1)
        self.spread = nn.PixelShuffle(stride)

    def forward(self, maps: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile) from the maps, the finest first; the pixels are not looked at."""
        features = maps[-1]
        for level, skipped in zip(self.levels, maps[-2::-1], strict=True):
            features = level(torch.cat([resize(features, skipped.shape[-1]), skipped], dim=1))
        logits: Tensor = self.spread(self.head(features))
        return logits


class Stem(nn.Module):
    """A shallow look at the pixels at full, half, a quarter and an eighth of the resolution."""

    def __init__(self, bands: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList([convolution(bands, channels[0])])
        for above, wide in itertools.pairwise(channels):
            self.levels.append(convolution(above, wide, stride=2))

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """One map a level, the finest first."""
        maps = []
        features = pixels_BCHW
        for level in self.levels:
            features = level(features)
            maps.append(features)
        return maps


def _climb(tile: int, levels: int) -> list[int]:
    """Sizes that end at ``tile``, halved as strided convolutions halve: the stem's need no resizing."""
    sizes = [tile]
    for _ in range(levels - 1):
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))


def resize(features: Tensor, size: int) -> Tensor:
    """``features`` (B, C, H, W) at ``size`` rows and columns, bilinear."""
    if features.shape[-1] == size:
        return features
    return functional.interpolate(features, size=(size, size), mode="bilinear")
