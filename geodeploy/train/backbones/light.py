"""Our own light pyramid, by its name in a recipe."""

from torch import nn

from geodeploy.errors import RecipeError
from geodeploy.train.backbones.family import Tensors, Wanted
from geodeploy.train.pyramid import LightPyramid
from geodeploy.train.recipe import LIGHT


def create(wanted: Wanted) -> LightPyramid:
    """See `Family`."""
    options = wanted.model.options
    if options.of_timm():
        raise RecipeError(
            f"model.options: {LIGHT} takes channels alone, found {', '.join(options.of_timm())}."
        )
    return LightPyramid(wanted.planes, options.channels)


def convert(tensors: Tensors, _: nn.Module, __: Wanted) -> Tensors:
    """See `Family`."""
    return dict(tensors)
