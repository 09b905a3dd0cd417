"""Clay 1 and 1.5: patches of 8 pixels, filters of wavelengths, positions in metres (Clay Foundation).

Time and place, which take 8 numbers of each position, are zeros: nobody tells them.
"""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from geodeploy.train.backbones.family import Size, Tensors, Wanted, fix_positions, vit_options
from geodeploy.train.backbones.positions import plane, waves, with_class_token
from geodeploy.train.backbones.wavelengths import below, generate_filters, linear, wavelengths_of

VARIANTS = {
    "clay_v1_base": Size(768, 12, 12, 8),
    "clay_v1_5_large": Size(1024, 24, 16, 8),
}
_MICROMETRES = {
    "blue": 0.493, "green": 0.56, "red": 0.665, "rededge071": 0.704, "rededge075": 0.74,
    "rededge078": 0.783, "nir": 0.842, "nir08": 0.865, "swir16": 1.61, "swir22": 2.19, "vv": 3.5,
    "vh": 4.0,
}  # fmt: skip
"""Of Sentinel-2's bands, as Clay was told; radar has numbers of its own."""
_SHRUNK = 0.02
"""What filters are multiplied with."""
_TIME_AND_PLACE = 8
_BLOCK = {
    "0.norm": "norm1",
    "0.to_qkv": "attn.qkv",
    "0.to_out": "attn.proj",
    "1.net.0": "norm2",
    "1.net.1": "mlp.fc1",
    "1.net.3": "mlp.fc2",
}
_ENCODERS = ("model.encoder.", "clay_encoder.", "encoder.")


def create(wanted: Wanted) -> VisionTransformer:
    """See `Family`."""
    options = vit_options(wanted, VARIANTS[wanted.model.backbone])
    vit = VisionTransformer(**options, norm_layer=partial(nn.LayerNorm, eps=1e-5), qkv_bias=False)
    positions = _positions(vit.patch_embed.grid_size[0], vit.embed_dim, wanted.metres)
    fix_positions(vit, positions)
    return vit


def convert(tensors: Tensors, vit: VisionTransformer, wanted: Wanted) -> Tensors:
    """See `Family`."""
    for prefix in _ENCODERS:
        tensors = below(tensors, prefix) or tensors
    embedding = below(tensors, "patch_embedding.")
    generator = below(embedding, "weight_generator.")
    width = generator["weight_tokens"].shape[1]
    encoded = waves(wavelengths_of(wanted, _MICROMETRES), _rates(width // 2)).float()
    hidden = functional.gelu(linear(encoded, embedding, "fclayer.l1"))
    encoded = encoded + functional.gelu(linear(hidden, embedding, "fclayer.l2"))
    filters, bias = generate_filters(generator, encoded, encoder="encoder")
    patch = vit.patch_embed.patch_size[0]
    filters = filters.reshape(len(wanted.bands), -1, patch, patch).swapaxes(0, 1)
    found = {
        "cls_token": tensors["cls_token"],
        "pos_embed": vit.get_buffer("pos_embed"),
        "patch_embed.proj.weight": _SHRUNK * filters,
        "patch_embed.proj.bias": bias,
        "norm.weight": tensors["transformer.norm.weight"],
        "norm.bias": tensors["transformer.norm.bias"],
    }
    for number in range(len(vit.blocks)):
        for theirs, ours in _BLOCK.items():
            part = below(tensors, f"transformer.layers.{number}.{theirs}.")
            found |= {f"blocks.{number}.{ours}.{name}": value for name, value in part.items()}
        # The published layer has no bias.
        found[f"blocks.{number}.attn.proj.bias"] = torch.zeros(vit.embed_dim)
    return found


def _positions(side: int, width: int, metres: float) -> Tensor:
    """(1, 1 + side * side, width): column, row, then zeros for time and place."""
    place = width - _TIME_AND_PLACE
    count = place // 4
    slower = 10_000.0 ** -(2 * torch.arange(count, dtype=torch.float64) / (count - 1) / place)
    known = plane(side, slower, step=metres)
    return with_class_token(functional.pad(known, (0, _TIME_AND_PLACE)))


def _rates(count: int) -> Tensor:
    return 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / (count - 1))
