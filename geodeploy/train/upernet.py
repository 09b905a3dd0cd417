"""UPerNet: what lies around, pooled, goes down a feature pyramid whose levels are then joined.

"Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221.
"""

# B batch, C channel, K class, H row, W column

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geodeploy.train.backbone import Taps
from geodeploy.train.decoder import resize
from geodeploy.train.levels import Levels
from geodeploy.train.pyramid import convolution

_BINS = (1, 2, 3, 6)


class UperDecoder(nn.Module):
    """A feature pyramid under a pooling module, its levels joined at the finest one's resolution."""

    def __init__(self, taps: Taps, classes: int, tile: int, *, channels: int) -> None:
        super().__init__()
        self.tile = tile
        self.levels = Levels(taps, tile, channels)
        *finer, coarsest = self.levels.widths
        self.pool = PyramidPooling(coarsest, self.levels.sides[-1], channels)
        self.laterals = nn.ModuleList(convolution(wide, channels, side=1) for wide in finer)
        self.smooth = nn.ModuleList(convolution(channels, channels) for _ in finer)
        self.fuse = convolution(channels * len(self.levels.widths), channels)
        self.head = nn.Conv2d(channels, classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile); the pixels are not looked at."""
        *finer, coarsest = self.levels(maps)
        features = self.pool(coarsest)
        levels = [features]
        for index in reversed(range(len(finer))):
            lateral = self.laterals[index](finer[index])
            features = lateral + resize(features, lateral.shape[-1])
            levels.insert(0, self.smooth[index](features))
        finest = levels[0].shape[-1]
        fused = self.fuse(torch.cat([resize(level, finest) for level in levels], dim=1))
        return resize(self.head(fused), self.tile)


class PyramidPooling(nn.Module):
    """Means over all of a map, over halves, thirds and sixths of its sides, joined to the map.

    The means are not normalised over the batch as in the paper: of the whole there is one a tile, and a
    small batch of them has no statistics.
    """

    def __init__(self, width: int, side: int, channels: int) -> None:
        super().__init__()
        self.side = side
        for bins in _BINS:
            self.register_buffer(f"means_{bins}", bin_means(side, bins), persistent=False)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, kernel_size=1), nn.ReLU(inplace=True))
            for _ in _BINS
        )
        self.join = convolution(width + channels * len(_BINS), channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """(B, channels, side, side)."""
        parts = [features_BCHW]
        for bins, branch in zip(_BINS, self.branches, strict=True):
            means = self.get_buffer(f"means_{bins}")
            parts.append(resize(branch(means @ features_BCHW @ means.T), self.side))
        joined: Tensor = self.join(torch.cat(parts, dim=1))
        return joined


def bin_means(side: int, bins: int) -> Tensor:
    """The matrix (bins, side) that takes the means that adaptive average pooling takes of a side.

    ONNX has no such pooling where ``bins`` does not divide ``side``, and two products with a constant
    run everywhere.
    """
    means = torch.zeros(bins, side)
    for place in range(bins):
        start, stop = place * side // bins, -(-(place + 1) * side // bins)
        means[place, start:stop] = 1 / (stop - start)
    return means
