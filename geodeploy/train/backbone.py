"""The backbone for any bands and tile, with its first weights: by its name in the table, or timm's."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from geodeploy.errors import RecipeError, WeightsError, first_line
from geodeploy.train.backbones import FAMILIES, TIMM
from geodeploy.train.backbones.family import Family, Tensors, Wanted, check_tile
from geodeploy.train.backbones.timm_models import RGB, TRANSFORMERS, spread_patches
from geodeploy.train.recipe import LIGHT, Model
from geodeploy.train.weights import load_weights

_DECODED_BLOCKS = 4
_NEAR = 3
"""Names near to one that there is not, of each kind."""
_INSIDE = ("model", "state_dict")
"""Where published files keep their tensors, if not at the top."""


@dataclass(frozen=True, slots=True)
class Taps:
    """Where a decoder taps a backbone: some of the maps that its `forward_intermediates` can give."""

    indices: tuple[int, ...]
    """Of the maps, the last one the deepest."""
    widths: tuple[int, ...]
    """Channels of each."""
    strides: tuple[int, ...]
    """Pixels of the tile to one of the map, for each."""
    normalised: Literal["all", "last", "none"] = "all"
    """Which of a transformer's maps go through the normalisation at its end; ``last`` is that of its
    last block."""

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


def build_backbone(
    model: Model, bands: Sequence[str], *, gsd_m: float | None = None, load: bool = True
) -> Backbone:
    """The network that ``model`` names, for ``bands`` and tiles of ``model.tile``.

    ``gsd_m`` is the ground sample distance, which some networks go by. ``load=False`` leaves random
    weights in it, for callers that have all of them elsewhere.

    Raises:
        RecipeError: there is no such network, or it does not take such tiles.
        WeightsError: the weights are missing, not the ones named, or do not fit.
    """
    _check_name(model.backbone)
    family, wanted = FAMILIES.get(model.backbone, TIMM), Wanted(model, tuple(bands), gsd_m)
    if model.timesteps > 1 and not family.dates:
        raise RecipeError(f"model.timesteps: {model.backbone} takes 1 date, found {model.timesteps}.")
    if not family.told and (told := [key for key in ("dates", "place") if getattr(model, key)]):
        raise RecipeError(
            f"model.{told[0]}: {model.backbone} was not trained with dates and places. Leave it out, "
            f"or take one that was: {', '.join(name for name, one in FAMILIES.items() if one.told)}."
        )
    encoder = family.create(wanted)
    taps = find_taps(encoder, model.terratorch.blocks if model.terratorch else None)
    if model.terratorch:
        taps = replace(taps, normalised="last" if family.ends_normalised else "none")
    first = _first_layer(encoder)
    check_tile(
        model, max(taps.strides), "the pyramid's coarsest level" if taps.pyramid else "the patch"
    )
    if taps.pyramid:
        _check_maps(encoder, taps, model, wanted.planes)
    if model.weights == "random" and model.weights_sha256 is not None:
        raise RecipeError("model.weights_sha256: random weights have none; leave it out.")
    if model.weights == "random" or not load:
        return Backbone(encoder, taps, first, None, new_patches=model.weights == "random")
    weights = load_weights(model.weights, sha256=model.weights_sha256)
    new_patches = _load(encoder, weights.tensors, family, wanted, f"{first}.weight")
    return Backbone(encoder, taps, first, weights.sha256, new_patches)


def _check_name(name: str) -> None:
    """Refuse a name that is neither in the table nor timm's; those that begin with it come first."""
    if name in FAMILIES or timm.is_model(name):
        return
    begun = [known for known in FAMILIES if known.startswith(name)][:_NEAR]
    close = difflib.get_close_matches(name, [*FAMILIES, *timm.list_models()], _NEAR)
    near = ", ".join(dict.fromkeys([*begun, *close])) or "none"
    raise RecipeError(
        f"model.backbone: there is no {name}, here or in timm {timm.__version__}. Near: {near}; "
        f"{LIGHT} is a light convolutional pyramid."
    )


def find_taps(encoder: nn.Module, blocks: Sequence[int] | None = None) -> Taps:
    """The ``blocks`` of a transformer or levels of a pyramid; None for those that decoders ask for.

    Those are four blocks spread evenly over a transformer, and every level of a pyramid.

    Raises:
        RecipeError: there is no such block.
    """
    about: Any = encoder.feature_info
    maps = [(info["num_chs"], info["reduction"]) for info in about]
    alike = isinstance(encoder, TRANSFORMERS)
    indices = tuple(blocks or (decoded_blocks(len(maps)) if alike else range(len(maps))))
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


def _first_layer(encoder: nn.Module) -> str:
    if isinstance(encoder, TRANSFORMERS):
        return "patch_embed.proj"
    about: Any = encoder.pretrained_cfg
    first = about["first_conv"]
    if not isinstance(first, str):  # several side by side, as in FastViT
        raise RecipeError(
            f"model.backbone: {about['architecture']} looks at the pixels through {len(first)} layers; "
            f"one is needed. Take another network: resnet18, {LIGHT}."
        )
    return first


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
    encoder: nn.Module, tensors: Mapping[str, Any], family: Family, wanted: Wanted, first: str
) -> bool:
    """Put ``tensors`` into ``encoder``; whether its ``first`` filters had to be made up."""
    model = wanted.model
    try:
        found = family.convert(_unpack(tensors), encoder, wanted)
    except KeyError as error:
        raise WeightsError(
            f"The weights {model.weights} do not fit {model.backbone}: they have no tensor "
            f"{error.args[0]}; their first are {', '.join(list(_unpack(tensors))[:3])}."
        ) from error
    except (RuntimeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"The weights {model.weights} do not fit {model.backbone} ({first_line(error)})."
        ) from error
    new_patches = family.colours and _spread_colours(found, wanted, first)
    needed = encoder.state_dict()
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
    if broken := [name for name in needed if not found[name].isfinite().all()]:
        raise WeightsError(
            f"The weights {model.weights} hold numbers that are not finite, the first in {broken[0]}: "
            "their training broke. Take those of an earlier step."
        )
    repeated = {name.partition(".")[0] for name in needed if re.match(r"\w+\.\d", name)}
    surplus = sorted(
        name for name in found if name not in needed and name.partition(".")[0] in repeated
    )
    if surplus:
        raise WeightsError(
            f"The weights {model.weights} are of another network than {model.backbone}, which has no "
            f"place for {len(surplus)} of their tensors, the first is {surplus[0]}. Name in "
            "model.backbone the one that they are of."
        )
    encoder.load_state_dict({name: found[name] for name in needed})
    return new_patches


def _unpack(tensors: Mapping[str, Any]) -> Tensors:
    for name in _INSIDE:
        if isinstance(tensors.get(name), Mapping):
            tensors = tensors[name]
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def _spread_colours(found: Tensors, wanted: Wanted, first: str) -> bool:
    """Make the ``first`` filters in ``found`` serve the recipe's bands; whether some are new."""
    if first not in found or found[first].ndim != 4:
        return False
    channels, bands = found[first].shape[1], wanted.bands * wanted.model.timesteps
    # Three channels are red, green and blue, as every published RGB network has them.
    if channels == 3 and bands != RGB:
        found[first] = spread_patches(found[first], bands)
        return set(bands) != set(RGB)
    if channels not in (3, len(bands)):
        raise WeightsError(
            f"The weights {wanted.model.weights} are for {channels} bands, the recipe has "
            f"{len(bands)}: {', '.join(bands)}. Weights for three bands (red, green, blue) or "
            f"{len(bands)} fit."
        )
    return False
