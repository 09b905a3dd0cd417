"""The network that is tuned: pixels in the spec's units in, one score a class and pixel out."""

# B batch, C band, K class, H row, W column

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geodeploy.train.backbone import Backbone
from geodeploy.train.decoder import LinearDecoder, UnetDecoder
from geodeploy.train.methods import ParameterCounts, apply_method, count_parameters
from geodeploy.train.recipe import Recipe

_DECODED_BLOCKS = 4


class TunedModel(nn.Module):
    """Normalises, encodes and decodes tiles.

    ``backbone`` is a timm vision transformer, or peft's wrapping of one; both answer to timm's
    `forward_intermediates`, so that a merged backbone can take the place of a wrapped one.
    """

    mean: Tensor
    """(C, 1, 1), in the spec's units."""
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        *,
        blocks: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        scaling: Literal["zscore", "log"],
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.decoder = decoder
        self.blocks = list(blocks)
        self.scaling = scaling
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, K, tile, tile) of tiles (B, C, tile, tile), finite and in the spec's units."""
        scaled_BCHW = self.normalise(pixels_BCHW)
        tokens = self.backbone.forward_intermediates(
            scaled_BCHW, indices=self.blocks, norm=True, intermediates_only=True, stop_early=True
        )
        logits: Tensor = self.decoder(tokens, scaled_BCHW)
        return logits

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Numbers around zero, in the manner the spec calls ``scaling``."""
        if self.scaling == "log":
            # Below a fiftieth of the mean is the sensor's dark noise, and negative values have no log.
            return torch.log(torch.maximum(pixels_BCHW, self.mean / 50) / self.mean)
        return (pixels_BCHW - self.mean) / self.std

    def counts(self) -> ParameterCounts:
        """What is trained, and what there is."""
        return count_parameters(self.backbone, self.decoder)


def decoded_blocks(depth: int) -> list[int]:
    """Four blocks spread evenly, the last among them: 2, 5, 8, 11 of 12. All where there are fewer."""
    count = min(_DECODED_BLOCKS, depth)
    return [depth * (place + 1) // count - 1 for place in range(count)]


def assemble(
    recipe: Recipe, backbone: Backbone, *, mean: Sequence[float], std: Sequence[float]
) -> TunedModel:
    """The network of ``recipe`` around ``backbone``, ready to be tuned by the recipe's method."""
    blocks = decoded_blocks(len(backbone.vit.blocks))
    return TunedModel(
        apply_method(backbone, recipe.method),
        build_decoder(recipe, backbone.vit.embed_dim, len(blocks)),
        blocks=blocks,
        mean=mean,
        std=std,
        scaling=recipe.model.scaling,
    )


def build_decoder(recipe: Recipe, width: int, blocks: int) -> nn.Module:
    """The decoder that ``recipe`` names, for tokens of ``width`` numbers from ``blocks`` blocks."""
    classes, tile = len(recipe.classes), recipe.model.tile
    if recipe.model.decoder == "linear":
        return LinearDecoder(width, classes, tile)
    return UnetDecoder(
        width,
        blocks,
        classes,
        tile,
        channels=recipe.model.decoder_channels,
        bands=len(recipe.data.bands),
        stem=recipe.model.stem,
    )
