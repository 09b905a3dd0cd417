"""The network that is tuned: pixels in the spec's units in, logits of classes or quantities out."""

# B batch, C band, K class, H row, W column

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geodeploy.errors import RecipeError
from geodeploy.spec import Target
from geodeploy.train.backbone import Backbone, Taps
from geodeploy.train.backbones.timm_models import TRANSFORMERS
from geodeploy.train.decoder import (
    FcnDecoder,
    LinearDecoder,
    PooledDecoder,
    PyramidDecoder,
    UnetDecoder,
)
from geodeploy.train.dpt import DptDecoder
from geodeploy.train.method_options import VitAdapter
from geodeploy.train.methods import ParameterCounts, apply_method, count_parameters, taps_of
from geodeploy.train.recipe import Recipe
from geodeploy.train.terratorch import TerraTorchDecoder
from geodeploy.train.upernet import UperDecoder


class TunedModel(nn.Module):
    """Normalises, encodes and decodes tiles.

    ``backbone`` is a timm model, Prithvi, peft's wrapping of one, or our light pyramid; all answer to
    timm's `forward_intermediates`, so that a merged backbone can take the place of a wrapped one.
    """

    mean: Tensor
    """(C, 1, 1), in the spec's units."""
    std: Tensor
    value_mean: Tensor | None
    """(T, 1, 1), what 0 of the decoder stands for in the target's unit; None where it gives logits."""
    value_std: Tensor | None
    """What 1 is more."""

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        *,
        taps: Taps,
        mean: Sequence[float],
        std: Sequence[float],
        scaling: Literal["zscore", "log"],
        targets: Sequence[Target] = (),
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.decoder = decoder
        self.taps = taps
        self.scaling = scaling
        self.register_buffer("mean", torch.zeros(len(mean), 1, 1))
        self.register_buffer("std", torch.ones(len(std), 1, 1))
        self.register_buffer("value_mean", torch.zeros(len(targets), 1, 1) if targets else None)
        self.register_buffer("value_std", torch.ones(len(targets), 1, 1) if targets else None)
        self.set_statistics(mean, std, targets)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits, or quantities in their units, (B, K, tile, tile) of tiles (B, C, tile, tile).

        Of tiles as a whole they are (B, K). The pixels are finite and in the spec's units. Of several
        dates the bands of the oldest come first; ``mean`` and ``std`` are for all of them.
        """
        scaled_BCHW, maps = self.encode(pixels_BCHW)
        outputs = self.decoder(maps, scaled_BCHW)
        return in_units(outputs, self.value_mean, self.value_std)

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the decoder takes: the normalised pixels, and the backbone's maps."""
        scaled_BCHW = self.normalise(pixels_BCHW)
        maps = self.backbone.forward_intermediates(
            scaled_BCHW,
            indices=list(self.taps.indices),
            norm=self.taps.normalised == "all" and not self.taps.pyramid,
            intermediates_only=True,
            stop_early=True,
        )
        if self.taps.normalised == "last":
            last = len(self.backbone.blocks) - 1
            maps = [
                self._normalise_map(one) if index == last else one
                for index, one in zip(self.taps.indices, maps, strict=True)
            ]
        return scaled_BCHW, list(maps)

    def _normalise_map(self, map_BDHW: Tensor) -> Tensor:
        normalised: Tensor = self.backbone.norm(map_BDHW.movedim(1, -1))
        return normalised.movedim(-1, 1)

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Numbers around zero, in the manner the spec calls ``scaling``."""
        if self.scaling == "log":
            # Below a fiftieth of the mean is the sensor's dark noise, and negative values have no log.
            return torch.log(torch.maximum(pixels_BCHW, self.mean / 50) / self.mean)
        return (pixels_BCHW - self.mean) / self.std

    def set_statistics(
        self, mean: Sequence[float], std: Sequence[float], targets: Sequence[Target] = ()
    ) -> None:
        """Normalise by these from now on: one number a band each, in the spec's units.

        ``targets`` are those that the model was made for, with mean and deviation.
        """
        self.mean.copy_(_column(mean))
        self.std.copy_(_column(std))
        if self.value_mean is not None and self.value_std is not None:
            self.value_mean.copy_(_column([target.mean or 0.0 for target in targets]))
            self.value_std.copy_(_column([target.std or 1.0 for target in targets]))

    def train(self, mode: bool = True) -> Self:
        """As in torch, but a normalisation of the backbone that is not tuned keeps its statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm) and not (module.affine and module.weight.requires_grad):
                module.eval()
        return self

    def counts(self) -> ParameterCounts:
        """What is trained, and what there is."""
        return count_parameters(self.backbone, self.decoder)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def in_units(outputs: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """What a decoder gives, in its target's unit where 0 and 1 stand for ``mean`` and ``std`` more."""
    return outputs if mean is None or std is None else outputs * std + mean


def assemble(
    recipe: Recipe,
    backbone: Backbone,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    targets: Sequence[Target] = (),
) -> TunedModel:
    """The network of ``recipe`` around ``backbone``, ready to be tuned by the recipe's method.

    ``targets`` are those of a regression, with mean and deviation.

    Raises:
        RecipeError: the method, the decoder or ``training.checkpointing`` does not fit the backbone.
    """
    if recipe.training.checkpointing:
        _recompute_blocks(backbone.encoder)
    tuned = apply_method(backbone, recipe.method)
    taps = taps_of(tuned, backbone)
    return TunedModel(
        tuned,
        build_decoder(recipe, taps),
        taps=taps,
        mean=mean,
        std=std,
        scaling=recipe.model.scaling,
        targets=targets,
    )


def _recompute_blocks(encoder: nn.Module) -> None:
    if not isinstance(encoder, TRANSFORMERS):
        raise RecipeError(
            "training.checkpointing: computes the blocks of a vision transformer again, and "
            f"{type(encoder).__name__} has none; take false."
        )
    encoder.set_grad_checkpointing()


def build_decoder(recipe: Recipe, taps: Taps) -> nn.Module:
    """The decoder that ``recipe`` names, for the maps that ``taps`` gives.

    Raises:
        RecipeError: ``model.decoder_channels`` has not one number a level.
    """
    classes, model = len(recipe.outputs), recipe.model
    if model.decoder == "linear":
        width = taps.widths[-1]
        whole = recipe.task == "multilabel"
        return PooledDecoder(width, classes) if whole else LinearDecoder(width, classes, model.tile)
    if model.terratorch is not None:
        return TerraTorchDecoder(model.terratorch, taps, classes, model.tile)
    channels = model.decoder_channels
    if model.decoder == "fcn":
        return FcnDecoder(taps.widths[-1], classes, model.tile, channels=channels)
    if model.decoder == "upernet":
        return UperDecoder(taps, classes, model.tile, channels=channels[0])
    if model.decoder == "dpt":
        return DptDecoder(taps, classes, model.tile, channels=channels[0])
    return _build_unet(recipe, taps)


def _build_unet(recipe: Recipe, taps: Taps) -> nn.Module:
    classes, model = len(recipe.outputs), recipe.model
    channels, found = model.decoder_channels, len(model.decoder_channels)
    if taps.pyramid:
        if found != len(taps.widths) - 1:
            adapted = isinstance(recipe.method, VitAdapter)
            source = recipe.method.title if adapted else model.backbone
            raise RecipeError(
                f"model.decoder_channels: {source} has {len(taps.widths)} levels, the decoder "
                f"needs a number for each but the coarsest; found {found}."
            )
        return PyramidDecoder(taps.widths, classes, taps.strides[0], channels=channels)
    return UnetDecoder(
        taps.widths[-1],
        len(taps.widths),
        classes,
        model.tile,
        channels=channels,
        bands=recipe.planes,
        stem=model.stem,
    )
