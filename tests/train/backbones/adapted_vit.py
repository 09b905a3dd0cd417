"""ViT-Adapter as TerraTorch has it, made tiny: ask it once, and keep a part of what it gives.

python tests/train/backbones/adapted_vit.py

Its deformable attention is a CUDA kernel; the same library's formula for tests takes its place.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from make_references import sample
from references import fill, pixels_of
from torch import Tensor, nn

KEPT = Path(__file__).with_name("adapted_vit.json")
SIDE, PATCH, BANDS, CHANNELS, POINTS, RATIO = 64, 16, 3, 4, 3, 0.5
TINY = {"embed_dim": 32, "depth": 5, "num_heads": 2}
GROUPS = [[0, 0], [1, 1], [2, 2], [3, 4]]
"""First and last block of each."""
_PARTS = {
    "attention.offsets": "attn.sampling_offsets",
    "attention.weights": "attn.attention_weights",
    "attention.values": "attn.value_proj",
    "attention.join": "attn.output_proj",
    "shrink": "ffn.fc1",
    "mix": "ffn.dwconv.dwconv",
    "widen": "ffn.fc2",
    "mix_norm": "ffn_norm",
    "strength": "gamma",
}


def published_name(name: str) -> str:
    """The name that the tensor ``name`` of ours has there."""
    name = name.removeprefix("vit.")
    if found := re.fullmatch(r"(injector|extractor)s\.(\d)\.(.+?)(\.weight|\.bias)?", name):
        kind, number, part, end = found.groups()
        norms = {
            "injector": ("patch_norm", "pyramid_norm"),
            "extractor": ("pyramid_norm", "patch_norm"),
        }
        parts = _PARTS | dict(zip(norms[kind], ("query_norm", "feat_norm"), strict=True))
        last = len(GROUPS) - 1
        extra = int(number) - last - 1
        place = f"{last}.extra_extractors.{extra}" if extra >= 0 else f"{number}.{kind}"
        return f"interactions.{place}.{parts[part]}{end or ''}"
    if found := re.fullmatch(r"prior\.stages\.0\.(\d)\.(\d)\.(.+)", name):
        return f"spm.stem.{3 * int(found[1]) + int(found[2])}.{found[3]}"
    for ours, there in (
        (r"prior\.stages\.(\d)", "spm.conv"),
        (r"prior\.projections\.(\d)", "spm.fc"),
        (r"norms\.(\d)", "norm"),
    ):
        name = re.sub(rf"^{ours}", lambda found, there=there: f"{there}{int(found[1]) + 1}", name)
    return re.sub("^levels$", "level_embed", re.sub("^enlarge", "up", name))


def build() -> nn.Module:
    """TerraTorch's network."""
    kernel: Any = ModuleType("MultiScaleDeformableAttention")
    sys.modules["MultiScaleDeformableAttention"] = kernel
    from terratorch.models.backbones.detr_ops.functions import ms_deform_attn_func
    from terratorch.models.backbones.prithvi_vit_adapter import PrithviViTAdapter

    def attend(values: Tensor, shapes: Tensor, _: Tensor, *rest: Any) -> Tensor:
        return ms_deform_attn_func.ms_deform_attn_core_pytorch(values, shapes.tolist(), *rest[:2])

    kernel.ms_deform_attn_forward = attend
    return PrithviViTAdapter(
        interaction_indexes=GROUPS,
        conv_inplane=CHANNELS,
        add_vit_feature=True,
        deform_num_heads=TINY["num_heads"],
        n_points=POINTS,
        init_values=0.0,
        with_cffn=True,
        cffn_ratio=0.25,
        deform_ratio=RATIO,
        use_extra_extractor=True,
        with_cp=False,
        img_size=SIDE,
        patch_size=(1, PATCH, PATCH),
        in_chans=BANDS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **TINY,
    )


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    network: Any = build().eval()
    tensors = {
        name: value if "tracked" in name else fill(name, tuple(value.shape))
        for name, value in network.state_dict().items()
    }
    # The first is that of a class token, which it has not.
    patches = fill("pos_embed", (1, (SIDE // PATCH) ** 2, TINY["embed_dim"]))
    tensors["pos_embed"] = nn.functional.pad(patches, (0, 0, 1, 0))
    network.load_state_dict(tensors)
    with torch.no_grad():
        maps = network.forward_features(pixels_of(BANDS, SIDE))
    kept = [[round(float(item), 6) for item in sample(values)] for values in maps]
    KEPT.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
