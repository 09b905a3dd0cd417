"""What a converter of the table is: how a network is made, and how published weights become its own."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geodeploy.bands import STAND_INS
from geodeploy.errors import RecipeError, WeightsError
from geodeploy.train.recipe import Model

Tensors = dict[str, Tensor]
_OF_WIDTH = 16
"""What a width is a multiple of, so that it can be shared out among the parts of a position."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a recipe wants of a network."""

    model: Model
    bands: tuple[str, ...]
    gsd_m: float | None = None
    trained: bool = False
    """Whether the weights are of a network for these very bands in this order, as after fine-tuning."""
    micrometres: tuple[float, ...] | None = None
    """What a network that goes by wavelengths is told of the bands; None for what its table says."""

    @property
    def planes(self) -> int:
        """What one pixel of a tile is made of: the bands of every date."""
        return len(self.bands) * self.model.timesteps

    @property
    def metres(self) -> float:
        """The ground sample distance, for networks that go by it.

        Raises:
            RecipeError: the recipe does not say it.
        """
        if self.gsd_m is None:
            raise RecipeError(
                f"data.gsd_m: {self.model.backbone} places what it sees by metres; give the ground "
                "sample distance."
            )
        return self.gsd_m


@dataclass(frozen=True, slots=True)
class Family:
    """Networks that are made, and get their weights, in one way."""

    create: Callable[[Wanted], nn.Module]
    """The network with random weights. It answers to timm's `forward_intermediates`, and says in timm's
    ``feature_info`` what maps it has."""
    convert: Callable[[Tensors, Any, Wanted], Tensors]
    """The tensors of the network, by its own names, out of those of a published file. A KeyError
    where one is missing."""
    colours: bool = False
    """Whether the weights are for red, green and blue, from which filters for other bands are made."""
    dates: bool = False
    """Whether it takes several dates."""
    ends_normalised: bool = False
    """Whether TerraTorch gives its decoders the last map normalised, and the others as they are."""
    told: bool = False
    """Whether it can be told when and where its scenes were seen."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a vision transformer."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    mlp_ratio: float = 4.0


def vit_options(wanted: Wanted, size: Size) -> dict[str, Any]:
    """What timm's `VisionTransformer` is told for a network of ``size``, as the recipe changes it.

    Raises:
        RecipeError: the tile or the width is not a multiple of what it must be.
    """
    model = wanted.model
    size = replace(size, **model.options.of_timm())
    if size.embed_dim % _OF_WIDTH or size.embed_dim % size.num_heads:
        raise RecipeError(
            f"model.options.embed_dim: {model.backbone} needs a multiple of {_OF_WIDTH} and of its "
            f"{size.num_heads} heads, found {size.embed_dim}."
        )
    check_tile(model, size.patch_size, "the patch")
    return {
        "img_size": model.tile,
        "in_chans": len(wanted.bands),
        "num_classes": 0,
        "global_pool": "",
        **asdict(size),
    }


def check_tile(model: Model, coarsest: int, what: str) -> None:
    """Refuse a tile that is no multiple of ``coarsest`` pixels, which are ``what``."""
    if model.tile % coarsest:
        below = max(model.tile // coarsest, 1) * coarsest
        raise RecipeError(
            f"model.tile: {model.tile} is no multiple of {what} of {coarsest}; "
            f"take {below} or {(model.tile // coarsest + 1) * coarsest}."
        )


def fix_positions(vit: VisionTransformer, positions_1ND: Tensor) -> None:
    """Give ``vit`` positions that are not trained."""
    del vit.pos_embed
    vit.register_buffer("pos_embed", positions_1ND.float())


def find_bands(known: Sequence[str], wanted: Wanted) -> list[int]:
    """Where the bands of the recipe are among those that the weights ``known``.

    Raises:
        WeightsError: there is a band that they never saw.
    """
    named = [name if name in known else STAND_INS.get(name, name) for name in wanted.bands]
    unknown = sorted(
        {band for band, name in zip(wanted.bands, named, strict=True) if name not in known}
    )
    if unknown:
        raise WeightsError(
            f"The weights of {wanted.model.backbone} know the bands {', '.join(known)}, the recipe has "
            f"{', '.join(unknown)} too. Leave it out, or take another backbone."
        )
    return [known.index(name) for name in named]


def pick_bands(filters_DCHW: Tensor, known: Sequence[str], wanted: Wanted) -> Tensor:
    """Patch filters of the recipe's bands from those of the bands ``known``."""
    if wanted.trained:
        return filters_DCHW
    if filters_DCHW.shape[1] != len(known):
        raise WeightsError(
            f"The weights {wanted.model.weights} are for {filters_DCHW.shape[1]} bands, those of "
            f"{wanted.model.backbone} for {len(known)}: {', '.join(known)}."
        )
    return filters_DCHW[:, find_bands(known, wanted)]
