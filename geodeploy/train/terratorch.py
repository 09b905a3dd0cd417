"""TerraTorch's decoders, for models that come from there: the same arithmetic in modules of ours."""

# B batch, C channel, K class, H row, W column

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from geodeploy.errors import RecipeError
from geodeploy.train.backbone import Taps
from geodeploy.train.decoder import resize
from geodeploy.train.pyramid import convolution
from geodeploy.train.recipe import TerraTorch
from geodeploy.train.upernet import bin_means


class TerraTorchDecoder(nn.Module):
    """Neck, decoder and head; what they give is resized to the tile."""

    def __init__(self, table: TerraTorch, taps: Taps, outputs: int, tile: int) -> None:
        super().__init__()
        self.tile = tile
        neck = NECKS[table.neck](table, Maps(taps.widths, tuple(tile // side for side in taps.strides)))
        decoder = DECODERS[table.name](table, neck.maps)
        self.neck, self.decoder = neck, decoder
        self.side: int = decoder.side
        """Rows and columns before they are brought to the tile's."""
        self.head = _head(decoder.width, table, outputs)

    def forward(self, maps: Sequence[Tensor], pixels_BCHW: Tensor) -> Tensor:
        """Logits or quantities (B, K, tile, tile); the pixels are not looked at."""
        return resize(self.head(self.decoder(self.neck(maps))), self.tile)


class Maps:
    """Widths and sides of maps, in their order."""

    def __init__(self, widths: Sequence[int], sides: Sequence[int]) -> None:
        self.widths, self.sides = tuple(widths), tuple(sides)


class Plain(nn.Module):
    """Maps as they are."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The same."""
        return list(maps)


class Learned(nn.Module):
    """Four maps of one size become four times as fine, twice as fine, stay, and half as fine."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        if len(maps.widths) != 4:
            raise RecipeError(
                f"model.terratorch.neck: learned takes 4 maps, there are {len(maps.widths)}. Say which "
                "with model.terratorch.blocks."
            )
        first, second, *coarser = maps.widths
        self.finest = nn.Sequential(
            nn.ConvTranspose2d(first, first // 2, kernel_size=2, stride=2),
            nn.BatchNorm2d(first // 2),
            nn.GELU(),
            nn.ConvTranspose2d(first // 2, first // 4, kernel_size=2, stride=2),
        )
        self.finer = nn.ConvTranspose2d(second, second // 2, kernel_size=2, stride=2)
        self.coarser = nn.MaxPool2d(kernel_size=2, stride=2)
        factors = zip(maps.sides, (4, 2, 1, 0.5), strict=True)
        self.maps = Maps(
            (first // 4, second // 2, *coarser), [int(side * factor) for side, factor in factors]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The finest first."""
        first, second, third, fourth = maps
        return [self.finest(first), self.finer(second), third, self.coarser(fourth)]


class Interpolated(nn.Module):
    """Maps of one size, the last ``scale`` times as fine, the one before it that much finer again."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        count = len(maps.sides)
        sides = [side * table.scale ** (count - place) for place, side in enumerate(maps.sides)]
        self.maps = Maps(maps.widths, sides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The finest first."""
        return [_nearest(item, side) for item, side in zip(maps, self.maps.sides, strict=True)]


class Pooled(nn.Module):
    """Maps of one size, each but the first ``scale`` times as coarse as the one before it."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        self.scale = table.scale
        sides = [side // table.scale**place for place, side in enumerate(maps.sides)]
        self.maps = Maps(maps.widths, sides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The finest first."""
        first, *rest = maps
        return [
            first,
            *(functional.max_pool2d(item, self.scale**place) for place, item in enumerate(rest, 1)),
        ]


class Fcn(nn.Module):
    """Transposed convolutions, each to twice the size, on one map."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        self.map, self.width = table.map, table.channels[0]
        self.side = maps.sides[table.map] * 2**table.convolutions
        inputs = [maps.widths[table.map], *[self.width] * (table.convolutions - 1)]
        self.levels = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(wide, self.width, kernel_size=2, stride=2),
                    nn.Conv2d(self.width, self.width, kernel_size=3, padding=1),
                    LayerNorm2d(self.width, eps=1e-6),
                    nn.GELU(),
                )
                for wide in inputs
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, width, H, W)."""
        features: Tensor = self.levels(maps[self.map])
        return features


class Unet(nn.Module):
    """Climbs from the last map to the first; the last level joins nothing and stays at that size."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        if len(table.channels) != len(maps.widths):
            raise RecipeError(
                f"model.terratorch.channels: unet needs one number a map, {len(maps.widths)}; found "
                f"{len(table.channels)}."
            )
        below, *skipped = maps.widths[::-1]
        self.width, self.side = table.channels[-1], maps.sides[0]
        self.levels = nn.ModuleList()
        for wide, skip in zip(table.channels, [*skipped, 0], strict=True):
            level = nn.Sequential(convolution(below + skip, wide), convolution(wide, wide))
            self.levels.append(level)
            below = wide

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, width, H, W) at the first map's size."""
        features, *skipped = maps[::-1]
        for level, skip in itertools.zip_longest(self.levels, skipped):
            if skip is not None:
                features = torch.cat([_nearest(features, skip.shape[-1]), skip], dim=1)
            features = level(features)
        return features


class Uper(nn.Module):
    """UPerNet (arXiv 1807.10221), means normalised over the batch and corners on corners."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        self.width = wide = table.channels[0]
        self.side = maps.sides[0]
        self.corners = table.align_corners
        *finer, coarsest = maps.widths
        self.bins = table.bins
        for bins in self.bins:
            means = bin_means(maps.sides[-1], bins)
            self.register_buffer(f"means_{bins}", means, persistent=False)
        self.branches = nn.ModuleList(convolution(coarsest, wide, side=1) for _ in self.bins)
        self.join = convolution(coarsest + wide * len(self.bins), wide)
        self.laterals = nn.ModuleList(convolution(inputs, wide, side=1) for inputs in finer)
        self.smooth = nn.ModuleList(convolution(wide, wide) for _ in finer)
        self.fuse = convolution(wide * len(maps.widths), wide)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, width, H, W) at the first map's size."""
        *finer, coarsest = maps
        levels = [self._pool(coarsest)]
        for lateral, item in zip(self.laterals[::-1], finer[::-1], strict=True):
            here = lateral(item)
            levels.insert(0, here + self._to(levels[0], here.shape[-1]))
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        finest = levels[0].shape[-1]
        joined = torch.cat([self._to(level, finest) for level in (*smoothed, levels[-1])], dim=1)
        features: Tensor = self.fuse(joined)
        return features

    def _pool(self, coarsest: Tensor) -> Tensor:
        parts = [coarsest]
        for bins, branch in zip(self.bins, self.branches, strict=True):
            means = self.get_buffer(f"means_{bins}")
            parts.append(self._to(branch(means @ coarsest @ means.T), coarsest.shape[-1]))
        pooled: Tensor = self.join(torch.cat(parts, dim=1))
        return pooled

    def _to(self, features: Tensor, side: int) -> Tensor:
        if features.shape[-1] == side:
            return features
        return functional.interpolate(
            features, size=(side, side), mode="bilinear", align_corners=self.corners
        )


class Linear(nn.Module):
    """One transposed convolution of a map."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        self.map, self.width = table.map, table.channels[0]
        self.side = maps.sides[table.map] * table.scale
        self.spread = nn.ConvTranspose2d(
            maps.widths[table.map], self.width, kernel_size=table.scale, stride=table.scale
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, width, H, W)."""
        features: Tensor = self.spread(maps[self.map])
        return features


class Only(nn.Module):
    """One map as it is, for the head."""

    def __init__(self, table: TerraTorch, maps: Maps) -> None:
        super().__init__()
        self.map, self.width = table.map, maps.widths[table.map]
        self.side = maps.sides[table.map]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, width, H, W)."""
        return maps[self.map]


NECKS: dict[str, Callable[[TerraTorch, Maps], Any]] = {
    "none": Plain, "learned": Learned, "interpolated": Interpolated, "pooled": Pooled,
}  # fmt: skip
DECODERS: dict[str, Callable[[TerraTorch, Maps], Any]] = {
    "fcn": Fcn, "unet": Unet, "upernet": Uper, "linear": Linear, "identity": Only,
}  # fmt: skip


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus,
}  # fmt: skip


def _head(width: int, table: TerraTorch, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, wide in itertools.pairwise((width, *table.head)):
        if table.head_norm:
            layers.append(convolution(before, wide))
        else:
            layers += [nn.Conv2d(before, wide, kernel_size=3, padding=1), nn.ReLU()]
    last = nn.Conv2d(table.head[-1] if table.head else width, outputs, kernel_size=1)
    activation = ACTIVATIONS[table.activation]()
    return nn.Sequential(*layers, nn.Dropout(table.dropout), last, activation)


def _nearest(features: Tensor, side: int) -> Tensor:
    if features.shape[-1] == side:
        return features
    return functional.interpolate(features, size=(side, side), mode="nearest")
