"""The networks that a recipe can name, and how published weights of each become ours.

A new one is a module with ``create`` and ``convert``, as `scalemae` has them, and a line in the table.
"""

from geodeploy.train.backbones import (
    clay,
    dinov3,
    dofa,
    galileo,
    light,
    prithvi,
    satmae,
    scalemae,
    ssl4eo,
    terramind,
    timm_models,
)
from geodeploy.train.backbones.family import Family
from geodeploy.train.recipe import LIGHT

TIMM = Family(timm_models.create, timm_models.convert, colours=True)
"""Of every name that is not in the table."""
FAMILIES = {
    LIGHT: Family(light.create, light.convert, colours=True, dates=True),
    **dict.fromkeys(prithvi.VARIANTS, Family(prithvi.create, prithvi.convert, dates=True)),
    **dict.fromkeys(prithvi.TOLD, Family(prithvi.create, prithvi.convert, dates=True, told=True)),
    **dict.fromkeys(ssl4eo.VARIANTS, Family(ssl4eo.create, ssl4eo.convert)),
    **dict.fromkeys(dinov3.NAMES, Family(timm_models.create, dinov3.convert, colours=True)),
    **dict.fromkeys(dofa.VARIANTS, Family(dofa.create, dofa.convert)),
    **dict.fromkeys(scalemae.VARIANTS, Family(scalemae.create, scalemae.convert, colours=True)),
    **dict.fromkeys(clay.VARIANTS, Family(clay.create, clay.convert, ends_normalised=True)),
    **dict.fromkeys(
        terramind.VARIANTS, Family(terramind.create, terramind.convert, ends_normalised=True)
    ),
    **dict.fromkeys(satmae.VARIANTS, Family(satmae.create, satmae.convert)),
    **dict.fromkeys(galileo.VARIANTS, Family(galileo.create, galileo.convert)),
}
"""By the name in a recipe."""
