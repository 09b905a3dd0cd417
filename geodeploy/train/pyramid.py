"""A light convolutional pyramid, small and fast enough to travel with a program."""

# B batch, C channel, H row, W column

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class LightPyramid(nn.Module):
    """Maps at half the tile's resolution, a quarter and so on, one for each of ``channels``.

    Nothing is computed at full resolution, where a small network spends most of its time; the first
    stage is one strided convolution, each later one is that and a residual pair.
    """

    pretrained_cfg: ClassVar = {"first_conv": "stages.0.0.0"}
    """As of a network of timm."""

    def __init__(self, bands: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        inputs = (bands, *channels[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(before, wide, stride=2), *([Residual(wide)] if number else []))
            for number, (before, wide) in enumerate(zip(inputs, channels, strict=True))
        )

    @property
    def feature_info(self) -> list[dict[str, int]]:
        """Width and stride of each level, as timm's networks say it."""
        return [{"num_chs": wide, "reduction": 2**level} for level, wide in enumerate(self.channels, 1)]

    def forward_intermediates(
        self, pixels_BCHW: Tensor, indices: Sequence[int], **_: object
    ) -> list[Tensor]:
        """The maps at ``indices``, in the manner of timm, whose other arguments change nothing here."""
        maps = []
        features = pixels_BCHW
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return [maps[index] for index in indices]


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pair = convolution_pair(channels)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Of the same shape."""
        activated: Tensor = self.activate(features_BCHW + self.pair(features_BCHW))
        return activated


def convolution_pair(channels: int) -> nn.Sequential:
    """What is added to the identity in a residual network: rectified between the two, not after."""
    return nn.Sequential(
        convolution(channels, channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def convolution(inputs: int, outputs: int, *, stride: int = 1, side: int = 3) -> nn.Sequential:
    """``side`` by ``side``, an odd number, normalised over the batch, rectified."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
