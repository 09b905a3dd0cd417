"""timm's networks with the bands of a satellite: SSL4EO-S12 and SSL4EO-L, DeCUR, FG-MAE, SoftCon.

Which of them it is, the weights say: torchgeo publishes them all under timm's names of the tensors.
"""

from torch import nn

from geodeploy.bands import SENTINEL2
from geodeploy.train.backbones import timm_models
from geodeploy.train.backbones.family import Tensors, Wanted, pick_bands

_SENSORS = {
    "s2": tuple(SENTINEL2.values()),
    "s1": ("vv", "vh"),
    "tm": ("blue", "green", "red", "nir08", "swir16", "lwir", "swir22"),
    "etm": ("blue", "green", "red", "nir08", "swir16", "lwir", "lwir_high", "swir22", "pan"),
    "etm_sr": ("blue", "green", "red", "nir08", "swir16", "swir22"),
    "oli": (
        "coastal", "blue", "green", "red", "nir08", "swir16", "swir22", "pan", "cirrus", "lwir11",
        "lwir12",
    ),
    "oli_sr": ("coastal", "blue", "green", "red", "nir08", "swir16", "swir22"),
}  # fmt: skip
"""In the order of the filters."""
_NETWORKS = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
    "vit_small14": "vit_small_patch14_dinov2",
    "vit_base14": "vit_base_patch14_dinov2",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
}
VARIANTS = {
    f"ssl4eo_{network}_{sensor}": (name, bands)
    for network, name in _NETWORKS.items()
    for sensor, bands in _SENSORS.items()
}
"""The name in timm and the bands, by the name in a recipe."""


def create(wanted: Wanted) -> nn.Module:
    """See `Family`."""
    return timm_models.create(wanted, VARIANTS[wanted.model.backbone][0])


def convert(tensors: Tensors, encoder: nn.Module, wanted: Wanted) -> Tensors:
    """See `Family`."""
    found = timm_models.convert(tensors, encoder, wanted)
    first = "conv1.weight" if "conv1.weight" in found else "patch_embed.proj.weight"
    found[first] = pick_bands(found[first], VARIANTS[wanted.model.backbone][1], wanted)
    return found
