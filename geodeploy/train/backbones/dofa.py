"""DOFA: a vision transformer whose patch filters come of the bands' wavelengths (arXiv 2403.15356)."""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geodeploy.bands import WAVELENGTH_UM
from geodeploy.train.backbones.family import Size, Tensors, Wanted, fix_positions, vit_options
from geodeploy.train.backbones.positions import plane, rates, resize_positions, waves, with_class_token
from geodeploy.train.backbones.wavelengths import below, generate_filters, linear, wavelengths_of

VARIANTS = {
    "dofa_small": Size(384, 12, 6),
    "dofa_base": Size(768, 12, 12),
    "dofa_large": Size(1024, 24, 16),
    "dofa_huge": Size(1280, 32, 16, 14),
}
_MICROMETRES = WAVELENGTH_UM | {
    "coastal": 0.44, "red": 0.665, "rededge075": 0.74, "nir": 0.832, "nir08": 0.864, "cirrus": 1.373,
    "lwir11": 10.9, "lwir12": 12.0, "vv": 5.405, "vh": 5.405,
}  # fmt: skip
"""What TerraTorch tells it of each band."""
_SHRUNK = 0.01
"""What filters and biases are multiplied with."""


def create(wanted: Wanted) -> VisionTransformer:
    """See `Family`. There is no normalisation at the end: the published weights have none."""
    options = vit_options(wanted, VARIANTS[wanted.model.backbone])
    vit = VisionTransformer(**options, norm_layer=partial(nn.LayerNorm, eps=1e-6), final_norm=False)
    # A pixel of padding, as in the published network: each patch lies a pixel up and to the left.
    vit.patch_embed.proj.padding = (1, 1)
    positions = plane(vit.patch_embed.grid_size[0], rates(vit.embed_dim // 4))
    fix_positions(vit, with_class_token(positions))
    return vit


def convert(tensors: Tensors, vit: VisionTransformer, wanted: Wanted) -> Tensors:
    """See `Family`."""
    found = {name: value for name, value in tensors.items() if not name.startswith("patch_embed.")}
    embedding = below(tensors, "patch_embed.")
    generator = below(embedding, "weight_generator.")
    nanometres = wavelengths_of(wanted, _MICROMETRES) * 1000
    width = generator["weight_tokens"].shape[1]
    # In single precision, which shows at thousands of nanometres, as it was trained.
    encoded = waves(nanometres, 1 / 10_000 ** (torch.arange(width // 2) / (width / 2)))
    hidden = linear(encoded, embedding, "fclayer.w1").relu()
    encoded = encoded + linear(hidden, embedding, "fclayer.w2").relu()
    filters, bias = generate_filters(generator, encoded, encoder="transformer_encoder")
    patch = vit.patch_embed.patch_size[0]
    filters = filters.reshape(len(wanted.bands), patch, patch, -1).permute(3, 0, 1, 2)
    return found | {
        "patch_embed.proj.weight": _SHRUNK * filters,
        "patch_embed.proj.bias": _SHRUNK * bias,
        # As TerraTorch resizes them.
        "pos_embed": resize_positions(
            tensors["pos_embed"], vit.patch_embed.grid_size[0], mode="bilinear"
        ),
    }
