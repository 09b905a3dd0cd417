"""Four maps of any backbone, each half as fine as the one before."""

# B batch, C channel, H row, W column

from collections.abc import Sequence

from torch import Tensor, nn

from geodeploy.train.backbone import Taps

_LEVELS = 4


class Levels(nn.Module):
    """The last four maps of a convolutional network, or as many as it has; a transformer's resampled.

    A transformer's maps all have the patch's stride. They are projected, and from the first to the last
    become four times as fine, twice as fine, stay, and half as fine, as in DPT (arXiv 2103.13413).
    """

    widths: tuple[int, ...]
    """Channels of each level, the finest first."""
    sides: tuple[int, ...]
    """Rows and columns of each."""

    def __init__(self, taps: Taps, tile: int, channels: int) -> None:
        super().__init__()
        self.widths = taps.widths[-_LEVELS:]
        self.sides = tuple(tile // stride for stride in taps.strides[-_LEVELS:])
        self.steps = nn.ModuleList()
        if taps.pyramid:
            return
        grid, count = self.sides[-1], len(self.sides)
        steps: list[list[nn.Module]] = [
            [nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=4)],
            [nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)],
            [],
            [nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)],
        ]
        for wide, step in zip(self.widths, steps, strict=False):
            self.steps.append(nn.Sequential(nn.Conv2d(wide, channels, kernel_size=1), *step))
        self.widths = (channels,) * count
        self.sides = (4 * grid, 2 * grid, grid, -(-grid // 2))[:count]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map a level, the finest first, of all that the backbone gives."""
        last = maps[-len(self.sides) :]
        if not self.steps:
            return list(last)
        return [step(features) for step, features in zip(self.steps, last, strict=True)]
