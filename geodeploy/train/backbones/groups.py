"""A vision transformer that gives each group of bands a token of its own."""

# B batch, C band, G group, H row, W column, N token, D width

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor

from geodeploy.train.backbones.family import Wanted, find_bands
from geodeploy.train.backbones.stacked import StackedViT

Groups = Mapping[str, Sequence[str]]


class GroupedViT(StackedViT):
    """All groups' patches come of one convolution, which holds zeros between bands of different groups.

    A map is the mean of its groups.
    """

    def __init__(self, options: dict[str, Any], *, groups: int) -> None:
        super().__init__(**options)
        self.stacks = groups
        self.patch_embed = PatchEmbed(
            options["img_size"],
            options["patch_size"],
            options["in_chans"],
            groups * self.embed_dim,
        )

    def cut(self, pixels_BCHW: Tensor) -> Tensor:
        """Group after group."""
        patches: Tensor = self.patch_embed(pixels_BCHW)
        count, width = patches.shape[1], self.embed_dim
        return patches.reshape(-1, count, self.stacks, width).swapaxes(1, 2).flatten(1, 2)

    def join(self, stacks_BSDHW: Tensor) -> Tensor:
        """Their mean."""
        return stacks_BSDHW.mean(dim=1)


def groups_of(groups: Groups, wanted: Wanted) -> list[str]:
    """The names of those groups of which the recipe has bands.

    Raises:
        WeightsError: a band is in no group.
    """
    known = [band for bands in groups.values() for band in bands]
    named = {known[place] for place in find_bands(known, wanted)}
    return [name for name, bands in groups.items() if not named.isdisjoint(bands)]


def one_convolution(filters: Mapping[str, Tensor], groups: Groups, wanted: Wanted) -> Tensor:
    """Filters (G D, C, H, W) of the recipe's bands, from the filters (D, bands, H, W) of each group."""
    known = [band for bands in groups.values() for band in bands]
    named = [known[place] for place in find_bands(known, wanted)]
    parts = []
    for name in groups_of(groups, wanted):
        taken = filters[name]
        columns = [
            taken[:, groups[name].index(band)]
            if band in groups[name]
            else torch.zeros_like(taken[:, 0])
            for band in named
        ]
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)
