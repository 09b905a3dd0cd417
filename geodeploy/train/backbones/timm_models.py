"""timm's networks by name, whose weights are for red, green and blue."""

import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geodeploy.bands import WAVELENGTH_UM
from geodeploy.errors import RecipeError
from geodeploy.train.backbones.family import Tensors, Wanted
from geodeploy.train.recipe import LIGHT

RGB = ("red", "green", "blue")
TRANSFORMERS = (VisionTransformer, Eva)
"""Plain ones: all their blocks are alike, and so are the sizes of their maps."""
_OF_ONE_TILE = {"eva", "swin_transformer", "swin_transformer_v2", "vision_transformer"}
"""timm's modules whose networks are made for a size of the image."""


def create(wanted: Wanted, name: str | None = None) -> nn.Module:
    """See `Family`; ``name`` where timm has another for it than the recipe."""
    model = wanted.model
    name = name or model.backbone
    if not timm.is_model(name):
        raise RecipeError(
            f"model.backbone: timm {timm.__version__} has no {name}. pip install --upgrade timm."
        )
    options = model.options.of_timm()
    if is_model_in_modules(name, _OF_ONE_TILE):
        options["img_size"] = model.tile
    if is_model_in_modules(name, {"eva"}):
        options["dynamic_img_size"] = False
    try:
        encoder: nn.Module = timm.create_model(
            name, pretrained=False, in_chans=len(wanted.bands), num_classes=0, global_pool="", **options
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"model.backbone: timm cannot make {name} with tile {model.tile} and {options} ({error})."
        ) from error
    strides = {info["reduction"] for info in getattr(encoder, "feature_info", [])}
    plain = isinstance(encoder, TRANSFORMERS)
    if not plain and not (hasattr(encoder, "forward_intermediates") and len(strides) > 1):
        raise RecipeError(
            f"model.backbone: {name} is a {type(encoder).__name__}, which gives no maps to "
            "decode. A plain vision transformer (vit_small_patch14_dinov2) or a convolutional network "
            f"(resnet18, {LIGHT}) does."
        )
    for module in encoder.modules():
        if isinstance(module, EvaAttention):
            # Otherwise the layer's weight is taken without the layer, and so without its adapter.
            module.qkv_bias_separate = True
    return encoder


def convert(tensors: Tensors, encoder: nn.Module, wanted: Wanted) -> Tensors:
    """See `Family`.

    timm resamples positions and patches, and knows the names of those who published its networks.
    """
    module: Any = sys.modules[type(encoder).__module__]
    known = getattr(module, "checkpoint_filter_fn", None)
    return dict(known(tensors, encoder)) if known else dict(tensors)


def spread_patches(filters_OCHW: torch.Tensor, bands: Sequence[str]) -> torch.Tensor:
    """Patch filters for ``bands`` from those for red, green and blue.

    Each band takes the filter of the colour nearest to it in wavelength, or the mean of the three where
    its wavelength is not known, and bands that take the same share it evenly. All are scaled by 3 over
    the number of filters taken, so that a grey of any number of bands gives the activation it gave.
    """
    nearest = [_nearest_colour(band) for band in bands]
    mean_OHW = filters_OCHW.mean(dim=1)
    chosen = [
        (mean_OHW if colour is None else filters_OCHW[:, RGB.index(colour)]) / nearest.count(colour)
        for colour in nearest
    ]
    return torch.stack(chosen, dim=1) * (3 / len(set(nearest)))


def _nearest_colour(band: str) -> str | None:
    if band not in WAVELENGTH_UM:
        return None
    return min(RGB, key=lambda colour: abs(WAVELENGTH_UM[colour] - WAVELENGTH_UM[band]))
