"""A plain timm vision transformer for any bands and tile, with its first weights."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from geodeploy.errors import RecipeError, WeightsError
from geodeploy.train.recipe import Model
from geodeploy.train.weights import load_weights

_RGB = ("red", "green", "blue")
_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True, slots=True)
class Backbone:
    """A vision transformer ready to be tuned."""

    vit: VisionTransformer
    sha256: str | None
    """Of the weights it started from; None for a random start."""
    new_patches: bool
    """Whether the patch embedding is made up, for bands that the weights never saw: then it must be
    trained."""


def build_backbone(model: Model, bands: Sequence[str], *, load: bool = True) -> Backbone:
    """The timm model that ``model`` names, for ``bands`` and tiles of ``model.tile``.

    ``load=False`` leaves random weights in it, for callers that have all of them elsewhere.

    Raises:
        RecipeError: timm has no such model, or it does not take such tiles.
        WeightsError: the weights are missing, not the ones named, or do not fit.
    """
    vit = _create(model, len(bands))
    if model.weights == "random" or not load:
        return Backbone(vit, None, new_patches=model.weights == "random")
    weights = load_weights(model.weights, sha256=model.weights_sha256)
    new_patches = _load(vit, weights.tensors, bands, model)
    return Backbone(vit, weights.sha256, new_patches)


def spread_patches(filters_OCHW: torch.Tensor, bands: Sequence[str]) -> torch.Tensor:
    """Patch filters for ``bands`` from those for red, green and blue.

    The three keep their own by name, any other band takes their mean, and all are scaled by 3 over the
    number of bands, so that the sum over bands, and with it the activation, keeps its size.
    """
    mean_OHW = filters_OCHW.mean(dim=1)
    chosen = [filters_OCHW[:, _RGB.index(band)] if band in _RGB else mean_OHW for band in bands]
    return torch.stack(chosen, dim=1) * (3 / len(bands))


def _create(model: Model, bands: int) -> VisionTransformer:
    if not timm.is_model(model.backbone):
        near = difflib.get_close_matches(model.backbone, timm.list_models("vit_*"), 3)
        raise RecipeError(
            f"model.backbone: timm {timm.__version__} has no {model.backbone}. "
            f"Near: {', '.join(near) or 'none'}."
        )
    options = model.options.model_dump(exclude_none=True)
    try:
        vit = timm.create_model(
            model.backbone,
            pretrained=False,
            img_size=model.tile,
            in_chans=bands,
            num_classes=0,
            global_pool="",
            **options,
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"model.backbone: timm cannot make {model.backbone} with tile {model.tile} and {options} "
            f"({error})."
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise RecipeError(
            f"model.backbone: {model.backbone} is a {type(vit).__name__}, a plain vision transformer "
            "is needed, for instance vit_small_patch14_dinov2."
        )
    patch = vit.patch_embed.patch_size[0]
    if model.tile % patch:
        raise RecipeError(
            f"model.tile: {model.tile} is no multiple of the patch of {patch}; "
            f"take {max(model.tile // patch, 1) * patch} or {(model.tile // patch + 1) * patch}."
        )
    return vit


def _load(
    vit: VisionTransformer,
    tensors: dict[str, torch.Tensor],
    bands: Sequence[str],
    model: Model,
) -> bool:
    """Put ``tensors`` into ``vit``; whether its patch embedding had to be made up."""
    try:
        # Resamples position embedding and patches, and knows the names of timm, DINOv2 and others.
        found = checkpoint_filter_fn(dict(tensors), vit)
    except (KeyError, RuntimeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"The weights {model.weights} do not fit {model.backbone} ({error})."
        ) from error
    found = {name: value for name, value in found.items() if not name.startswith(("head.", "fc_"))}
    needed = vit.state_dict()
    new_patches = False
    if _PATCHES in found and found[_PATCHES].ndim == 4:
        channels = found[_PATCHES].shape[1]
        # Three channels are red, green and blue, as every published RGB transformer has them.
        if channels == 3 and tuple(bands) != _RGB:
            found[_PATCHES] = spread_patches(found[_PATCHES], bands)
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
    vit.load_state_dict({name: found[name] for name in needed})
    return new_patches
