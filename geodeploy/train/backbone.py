"""The backbone for any bands and tile, with its first weights: of timm, Prithvi or a light pyramid."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from geodeploy.bands import WAVELENGTH_UM
from geodeploy.errors import RecipeError, WeightsError, first_line
from geodeploy.train import prithvi
from geodeploy.train.pyramid import LightPyramid
from geodeploy.train.recipe import LIGHT, Model
from geodeploy.train.weights import load_weights

_RGB = ("red", "green", "blue")
_DECODED_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Taps:
    """Where a decoder taps a backbone: some of the maps that its `forward_intermediates` can give."""

    indices: tuple[int, ...]
    """Of the maps, the last one the deepest."""
    widths: tuple[int, ...]
    """Channels of each."""
    strides: tuple[int, ...]
    """Pixels of the tile to one of the map, for each."""
    raw: bool = False
    """Whether a transformer's maps are taken without the normalisation at its end."""

    @property
    def pyramid(self) -> bool:
        """Whether the maps get coarser with depth, as in a convolutional network."""
        return len(set(self.strides)) > 1


@dataclass(frozen=True, slots=True)
class Backbone:
    """A network ready to be tuned."""

    encoder: nn.Module
    """Answers to timm's `forward_intermediates`."""
    taps: Taps
    first: str
    """Name of the module that takes the pixels."""
    sha256: str | None
    """Of the weights it started from; None for a random start."""
    new_patches: bool
    """Whether ``first`` is made up, for bands that the weights never saw: then it must be trained."""


def build_backbone(model: Model, bands: Sequence[str], *, load: bool = True) -> Backbone:
    """The network that ``model`` names, for ``bands`` and tiles of ``model.tile``.

    ``load=False`` leaves random weights in it, for callers that have all of them elsewhere.

    Raises:
        RecipeError: timm has no such model, or it does not take such tiles.
        WeightsError: the weights are missing, not the ones named, or do not fit.
    """
    encoder: nn.Module
    blocks = model.terratorch.blocks if model.terratorch else None
    if model.timesteps > 1 and model.backbone not in prithvi.VARIANTS:
        raise RecipeError(f"model.timesteps: {model.backbone} takes 1 date, found {model.timesteps}.")
    if model.backbone == LIGHT:
        if model.options.of_timm():
            raise RecipeError(
                f"model.options: {LIGHT} takes channels alone, found "
                f"{', '.join(model.options.of_timm())}."
            )
        encoder = LightPyramid(len(bands), model.options.channels)
        taps, first = Taps(*encoder.levels()), "stages.0.0.0"
    else:
        prithvis = model.backbone in prithvi.VARIANTS
        encoder = (_create_prithvi if prithvis else _create)(model, len(bands))
        taps, first = find_taps(encoder, blocks), _first_layer(encoder)
        taps = replace(taps, raw=model.terratorch is not None)
    _check_tile(model, taps)
    if taps.pyramid:
        _check_maps(encoder, taps, model, len(bands))
    if model.weights == "random" or not load:
        return Backbone(encoder, taps, first, None, new_patches=model.weights == "random")
    weights = load_weights(model.weights, sha256=model.weights_sha256)
    new_patches = _load(encoder, weights.tensors, bands, model, f"{first}.weight")
    return Backbone(encoder, taps, first, weights.sha256, new_patches)


def find_taps(encoder: nn.Module, blocks: Sequence[int] | None = None) -> Taps:
    """The ``blocks`` of a transformer or levels of a pyramid; None for those that decoders ask for.

    Those are four blocks spread evenly over a transformer, and every level of a pyramid.

    Raises:
        RecipeError: there is no such block.
    """
    if isinstance(encoder, VisionTransformer):
        indices = tuple(blocks or decoded_blocks(len(encoder.blocks)))
        wide = encoder.embed_dim * (encoder.dates if isinstance(encoder, prithvi.Prithvi) else 1)
        maps = [(wide, encoder.patch_embed.patch_size[0])] * len(encoder.blocks)
    else:
        about: Any = encoder.feature_info
        maps = [(info["num_chs"], info["reduction"]) for info in about]
        indices = tuple(blocks or range(len(maps)))
    if max(indices) >= len(maps):
        raise RecipeError(
            f"model.terratorch.blocks: the backbone has 0 to {len(maps) - 1}, found {max(indices)}."
        )
    widths, strides = zip(*(maps[index] for index in indices), strict=True)
    return Taps(indices, widths, strides)


def decoded_blocks(depth: int) -> tuple[int, ...]:
    """Four blocks spread evenly, the last among them: 2, 5, 8, 11 of 12. All where there are fewer."""
    count = min(_DECODED_BLOCKS, depth)
    return tuple(depth * (place + 1) // count - 1 for place in range(count))


def spread_patches(filters_OCHW: torch.Tensor, bands: Sequence[str]) -> torch.Tensor:
    """Patch filters for ``bands`` from those for red, green and blue.

    Each band takes the filter of the colour nearest to it in wavelength, or the mean of the three where
    its wavelength is not known, and bands that take the same share it evenly. All are scaled by 3 over
    the number of filters taken, so that a grey of any number of bands gives the activation it gave.
    """
    nearest = [_nearest_colour(band) for band in bands]
    mean_OHW = filters_OCHW.mean(dim=1)
    chosen = [
        (mean_OHW if colour is None else filters_OCHW[:, _RGB.index(colour)]) / nearest.count(colour)
        for colour in nearest
    ]
    return torch.stack(chosen, dim=1) * (3 / len(set(nearest)))


def _nearest_colour(band: str) -> str | None:
    if band not in WAVELENGTH_UM:
        return None
    return min(_RGB, key=lambda colour: abs(WAVELENGTH_UM[colour] - WAVELENGTH_UM[band]))


def _create(model: Model, bands: int) -> nn.Module:
    if not timm.is_model(model.backbone):
        near = difflib.get_close_matches(model.backbone, timm.list_models(), 3)
        raise RecipeError(
            f"model.backbone: timm {timm.__version__} has no {model.backbone}. "
            f"Near: {', '.join(near) or 'none'}; {LIGHT} is a light convolutional pyramid."
        )
    options = model.options.of_timm()
    if is_model_in_modules(model.backbone, {"vision_transformer"}):
        options["img_size"] = model.tile
    try:
        encoder: nn.Module = timm.create_model(
            model.backbone, pretrained=False, in_chans=bands, num_classes=0, global_pool="", **options
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"model.backbone: timm cannot make {model.backbone} with tile {model.tile} and {options} "
            f"({error})."
        ) from error
    strides = {info["reduction"] for info in getattr(encoder, "feature_info", [])}
    plain = isinstance(encoder, VisionTransformer)
    if not plain and not (hasattr(encoder, "forward_intermediates") and len(strides) > 1):
        raise RecipeError(
            f"model.backbone: {model.backbone} is a {type(encoder).__name__}, which gives no maps to "
            "decode. A plain vision transformer (vit_small_patch14_dinov2) or a convolutional network "
            f"(resnet18, {LIGHT}) does."
        )
    return encoder


def _create_prithvi(model: Model, bands: int) -> nn.Module:
    variant = replace(prithvi.VARIANTS[model.backbone], **model.options.of_timm())
    if variant.embed_dim % 16 or variant.embed_dim % variant.num_heads:
        raise RecipeError(
            f"model.options.embed_dim: Prithvi needs a multiple of 16 and of its {variant.num_heads} "
            f"heads, found {variant.embed_dim}."
        )
    _check_multiple(model, variant.patch_size, "the patch")
    return prithvi.Prithvi(variant, bands=bands, tile=model.tile, dates=model.timesteps)


def _first_layer(encoder: nn.Module) -> str:
    if isinstance(encoder, VisionTransformer):
        return "patch_embed.proj"
    about: Any = encoder.pretrained_cfg
    first = about["first_conv"]
    if not isinstance(first, str):  # several side by side, as in FastViT
        raise RecipeError(
            f"model.backbone: {about['architecture']} looks at the pixels through {len(first)} layers; "
            f"one is needed. Take another network: resnet18, {LIGHT}."
        )
    return first


def _check_tile(model: Model, taps: Taps) -> None:
    _check_multiple(
        model, max(taps.strides), "the pyramid's coarsest level" if taps.pyramid else "the patch"
    )


def _check_multiple(model: Model, coarsest: int, what: str) -> None:
    if model.tile % coarsest:
        below = max(model.tile // coarsest, 1) * coarsest
        raise RecipeError(
            f"model.tile: {model.tile} is no multiple of {what} of {coarsest}; "
            f"take {below} or {(model.tile // coarsest + 1) * coarsest}."
        )


def _check_maps(encoder: nn.Module, taps: Taps, model: Model, bands: int) -> None:
    """Send one empty tile through: not every pyramid takes every tile, or gives what timm says."""
    forward: Any = encoder.eval().forward_intermediates
    tile = torch.zeros(1, bands, model.tile, model.tile)
    try:
        with torch.no_grad():
            maps = forward(tile, indices=list(taps.indices), intermediates_only=True)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"model.backbone: {model.backbone} does not take tiles of {model.tile} "
            f"({first_line(error)}). Take another tile, or another network: resnet18, {LIGHT}."
        ) from error
    found = [tuple(item.shape[1:]) for item in maps]
    sides = [model.tile // stride for stride in taps.strides]
    needed = [(wide, side, side) for wide, side in zip(taps.widths, sides, strict=True)]
    if found != needed:
        raise RecipeError(
            f"model.backbone: {model.backbone} gives maps {found}, not the {needed} that timm says it "
            f"does. Take another network: resnet18, {LIGHT}."
        )
    encoder.train()


def _load(
    encoder: nn.Module,
    tensors: dict[str, torch.Tensor],
    bands: Sequence[str],
    model: Model,
    first: str,
) -> bool:
    """Put ``tensors`` into ``encoder``; whether its ``first`` filters had to be made up."""
    found = dict(tensors)
    try:
        if isinstance(encoder, prithvi.Prithvi):
            found = prithvi.from_published(found, bands, model.weights)
            found["pos_embed"] = encoder.pos_embed
        elif isinstance(encoder, VisionTransformer):
            # Resamples position embedding and patches, and knows the names of timm, DINOv2 and others.
            found = checkpoint_filter_fn(found, encoder)
    except (KeyError, RuntimeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"The weights {model.weights} do not fit {model.backbone} ({error})."
        ) from error
    needed = encoder.state_dict()
    new_patches = False
    # Prithvi's filters have found their bands by name.
    if first in found and found[first].ndim == 4 and not isinstance(encoder, prithvi.Prithvi):
        channels = found[first].shape[1]
        # Three channels are red, green and blue, as every published RGB network has them.
        if channels == 3 and tuple(bands) != _RGB:
            found[first] = spread_patches(found[first], bands)
            new_patches = set(bands) != set(_RGB)
        elif channels not in (3, len(bands)):
            raise WeightsError(
                f"The weights {model.weights} are for {channels} bands, the recipe has {len(bands)}: "
                f"{', '.join(bands)}. Weights for three bands (red, green, blue) or {len(bands)} fit."
            )
    wrong = sorted(
        name for name in needed if name not in found or found[name].shape != needed[name].shape
    )
    if wrong:
        name = wrong[0]
        held = tuple(found[name].shape) if name in found else "absent"
        raise WeightsError(
            f"The weights {model.weights} do not fit {model.backbone}: {len(wrong)} of {len(needed)} "
            f"tensors are missing or of another shape, the first is {name} "
            f"({held}, needed {tuple(needed[name].shape)})."
        )
    encoder.load_state_dict({name: found[name] for name in needed})
    return new_patches
