"""ViT-Adapter with the tensors that TerraTorch's was given gives the maps that it gave."""

import json

import torch
from adapted_vit import BANDS, CHANNELS, KEPT, PATCH, POINTS, RATIO, SIDE, TINY, published_name
from comparing import LARGEST
from make_references import sample
from references import fill, pixels_of
from timm.models.vision_transformer import VisionTransformer

from geodeploy.train.vit_adapter import AdaptedVit


def test_the_published_network_s_tensors_give_its_maps() -> None:
    vit = VisionTransformer(
        SIDE, PATCH, BANDS, num_classes=0, global_pool="", class_token=False, **TINY
    )
    adapted = AdaptedVit(vit, points=POINTS, channels=CHANNELS, value_ratio=RATIO).eval()
    for name, value in adapted.state_dict().items():
        if "tracked" not in name:
            value.copy_(fill(published_name(name), tuple(value.shape)))
    with torch.inference_mode():
        maps = adapted.forward_intermediates(pixels_of(BANDS, SIDE), range(4))
    for found, needed in zip(maps, json.loads(KEPT.read_text()), strict=True):
        assert float((sample(found) - torch.tensor(needed)).abs().max()) <= LARGEST
