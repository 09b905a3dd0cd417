"""DPT's fusion: from the coarsest map to the finest, each joined by residual units.

"Vision Transformers for Dense Prediction", arXiv 2103.13413.
"""

# B batch, C channel, K class, H row, W column

from collections.abc import Sequence

from torch import Tensor, nn

from geodeploy.train.backbone import Taps
from geodeploy.train.decoder import resize
from geodeploy.train.levels import Levels
from geodeploy.train.pyramid import convolution, convolution_pair


class DptDecoder(nn.Module):
    """Four maps of one width are fused from the coarsest on, at twice the size each time."""

    def __init__(self, taps: Taps, classes: int, tile: int, *, channels: int) -> None:
        super().__init__()
        self.tile = tile
        self.levels = Levels(taps, tile, channels)
        self.projections = nn.ModuleList(
            nn.Conv2d(wide, channels, kernel_size=3, padding=1, bias=False)
            for wide in self.levels.widths
        )
        sides = self.levels.sides
        # Each ends at the size of the next finer level, the last at twice the finest.
        sizes = (min(2 * sides[0], tile), *sides[:-1])
        self.fusions = nn.ModuleList(
            Fusion(channels, size, joins=level < len(sides) - 1) for level, size in enumerate(sizes)
        )
        self.head = nn.Sequential(
            convolution(channels, channels), nn.Conv2d(channels, classes, kernel_size=1)
        )

    def forward(self, maps: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile); the pixels are not looked at."""
        levels = [
            project(level) for project, level in zip(self.projections, self.levels(maps), strict=True)
        ]
        features = self.fusions[-1](levels[-1])
        for fusion, level in zip(self.fusions[-2::-1], levels[-2::-1], strict=True):
            features = fusion(features, level)
        return resize(self.head(features), self.tile)


class Fusion(nn.Module):
    """Adds a map to what comes from below, refines the sum and brings it to another size."""

    def __init__(self, channels: int, size: int, *, joins: bool) -> None:
        super().__init__()
        self.size = size
        self.joined = ResidualUnit(channels) if joins else None
        self.refine = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, features_BCHW: Tensor, level_BCHW: Tensor | None = None) -> Tensor:
        """(B, C, size, size) of maps of one size; the second one where there is one to join."""
        if self.joined is not None:
            features_BCHW = features_BCHW + self.joined(level_BCHW)
        # Projected before it is enlarged: the same map, for less.
        return resize(self.project(self.refine(features_BCHW)), self.size)


class ResidualUnit(nn.Module):
    """Two convolutions of the rectified features beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rectify = nn.ReLU()
        self.pair = convolution_pair(channels)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Of the same shape."""
        added: Tensor = features_BCHW + self.pair(self.rectify(features_BCHW))
        return added
