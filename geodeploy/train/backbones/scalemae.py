"""Scale-MAE: positions in metres, red, green and blue (arXiv 2212.14532)."""

from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geodeploy.train.backbones import timm_models
from geodeploy.train.backbones.family import Size, Tensors, Wanted, fix_positions, vit_options
from geodeploy.train.backbones.positions import plane, rates, with_class_token

VARIANTS = {
    "scalemae_base": Size(768, 12, 12),
    "scalemae_large": Size(1024, 24, 16),
    "scalemae_huge": Size(1280, 32, 16, 14),
}


def create(wanted: Wanted) -> VisionTransformer:
    """See `Family`."""
    options = vit_options(wanted, VARIANTS[wanted.model.backbone])
    vit = VisionTransformer(**options, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    side = vit.patch_embed.grid_size[0]
    positions = plane(side, rates(vit.embed_dim // 4), step=wanted.metres)
    fix_positions(vit, with_class_token(positions))
    return vit


def convert(tensors: Tensors, vit: VisionTransformer, wanted: Wanted) -> Tensors:
    """See `Family`. Positions in the file were never used."""
    plain = {name: value for name, value in tensors.items() if name != "pos_embed"}
    return timm_models.convert(plain, vit, wanted) | {"pos_embed": vit.get_buffer("pos_embed")}
