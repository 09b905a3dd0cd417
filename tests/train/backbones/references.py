"""Published networks in their own implementations, made tiny: what ours are held against.

They come from torchgeo, terratorch and transformers. Those of SatMAE and Galileo are in no package: the
folder of their sources (`models_vit_group_channels.py` and `util/` of sustainlab-group/SatMAE,
`single_file_galileo.py` of nasaharvest/galileo) is named by GEODEPLOY_REFERENCES.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PATCH = 8
NATIVE, OTHER = 32, 48
"""Sides of the tiles that are compared."""
GSD_M = 20.0
S2 = (
    "coastal", "blue", "green", "red", "rededge071", "rededge075", "rededge078", "nir", "nir08",
    "nir09", "cirrus", "swir16", "swir22",
)  # fmt: skip
NAMES = {
    "blue": "BLUE", "green": "GREEN", "red": "RED", "nir08": "NIR_NARROW", "swir16": "SWIR_1",
    "swir22": "SWIR_2", "coastal": "COASTAL_AEROSOL", "vv": "VV", "nir": "NIR_BROAD",
}  # fmt: skip
"""TerraTorch's of some bands."""


@dataclass(frozen=True)
class Reference:
    """A network, and how to ask it."""

    backbone: str
    """Its name in a recipe."""
    bands: tuple[str, ...]
    """Those of the recipe: fewer than the network knows, in another order."""
    build: Callable[[int], nn.Module]
    """The network for tiles of a side."""
    maps: Callable[[nn.Module, Tensor], list[Tensor]]
    """Its maps (B, D, H, W) of every block or level, the last one normalised at the end."""
    takes: tuple[str, ...] | None = None
    """The bands that it is given, zeros for those that the recipe has not; None for the recipe's."""
    options: dict[str, Any] = field(default_factory=dict)
    resized: Callable[[nn.Module, dict[str, Tensor], int], dict[str, Tensor]] | None = None
    """Its own way to fit a file's tensors to tiles of another side; None if they fit as they are."""
    packed: Callable[[dict[str, Tensor]], Any] = dict
    """The file as it is published, of the network's tensors."""
    sides: tuple[int, int] = (NATIVE, OTHER)
    dates: int = 1
    told: dict[str, Any] = field(default_factory=dict)
    """More of the recipe's table ``model``."""
    computed: tuple[str, ...] = ()
    """Of its tensors those that it computes: nothing of a file's is taken for them."""

    @property
    def planes(self) -> int:
        """What one pixel is made of: the bands of every date."""
        return len(self.bands) * self.dates

    def answer(self, tensors: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
        """The maps of ``pixels``, the recipe's bands, in the network with ``tensors``."""
        side = pixels.shape[-1]
        network = self.build(side).eval()
        if side != self.sides[0] and self.resized:
            tensors = self.resized(network, dict(tensors), side)
        network.load_state_dict(tensors)
        with torch.no_grad():
            return [item.clone() for item in self.maps(network, self.given(pixels))]

    def given(self, pixels: Tensor) -> Tensor:
        """What the network is shown for ``pixels``, the recipe's bands of one date after another."""
        if self.takes is None:
            return pixels
        each = pixels.reshape(-1, len(self.bands), *pixels.shape[2:])
        shown = torch.zeros(len(each), len(self.takes), *pixels.shape[2:])
        shown[:, [self.takes.index(band) for band in self.bands]] = each
        return shown.reshape(len(pixels), -1, *pixels.shape[2:])


def ask_for_float32() -> None:
    """A module of terratorch asks for less once it is imported, and gets bfloat16 where there is."""
    import terratorch.models.backbones.clay_v15.model  # noqa: F401

    torch.set_float32_matmul_precision("highest")


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that look random and are the same on every machine; of norms around one."""
    count = int(np.prod(shape))
    seed = np.uint64(sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**63)
    bits = (np.arange(count, dtype=np.uint64) + seed) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    values = torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)
    if len(shape) > 1:
        return values * (3 / np.prod(shape[1:])) ** 0.5
    around_one = name.endswith(("weight", "running_var", "gamma", "gamma_1", "gamma_2"))
    return (1 if around_one else 0) + values / 4


def filled(network: nn.Module) -> dict[str, Tensor]:
    """The network's tensors with values of `fill`; constants stay."""
    parameters = dict(network.named_parameters())
    return {
        name: fill(name, tuple(value.shape)) if name in parameters else value.clone()
        for name, value in network.state_dict().items()
    }


def pixels_of(bands: int, side: int) -> Tensor:
    """(2, bands, side, side), around zero."""
    return 2 * fill(f"pixels {side}", (2 * bands * side * side,)).reshape(2, bands, side, side)


def grid(tokens: Tensor, prefix: int = 1, groups: int = 1) -> Tensor:
    """Tokens as a map, the mean of ``groups`` that stand one after the other."""
    patches = tokens[:, prefix:]
    side = round((patches.shape[1] / groups) ** 0.5)
    stacks = patches.reshape(len(patches), groups, side, side, -1)
    return stacks.mean(1).permute(0, 3, 1, 2)


def of_timm(network: Any, pixels: Tensor) -> list[Tensor]:
    """Of a network that is one of timm's, or a subclass."""
    last, maps = network.forward_intermediates(pixels)
    if hasattr(network, "blocks"):
        maps[-1] = grid(last, network.num_prefix_tokens)
    return list(maps)


def block_outputs(look: Callable[[Any], Any], blocks: Any, pixels: Any) -> list[Tensor]:
    """What each of ``blocks`` gives while their network looks at ``pixels``."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *told: found.append(told[2])) for block in blocks]
    look(pixels)
    for hook in hooks:
        hook.remove()
    return found


def build_prithvi(_: int, *, dates: int = 1, patch: int = 16, told: bool = True) -> nn.Module:
    from terratorch.models.backbones.prithvi_mae import PrithviViT

    # As in a file: positions of another tile are resampled as it is looked at.
    return PrithviViT(
        img_size=224, patch_size=patch, num_frames=dates, in_chans=6, coords_scale_learn=True,
        coords_encoding=["time", "location"] if told else [], **TINY,
    )  # fmt: skip


def prithvi_maps(
    network: Any,
    pixels: Tensor,
    days: list[list[float]] | None = None,
    place: list[float] | None = None,
) -> list[Tensor]:
    """Of pixels (B, T C, H, W), of which it is told year and day of each, latitude and longitude."""
    dates = pixels.reshape(len(pixels), -1, 6, *pixels.shape[2:]).swapaxes(1, 2)
    told = [None if one is None else torch.tensor([one] * len(pixels)) for one in (days, place)]
    features = network.forward_features(dates, temporal_coords=told[0], location_coords=told[1])
    maps: list[Tensor] = network.prepare_features_for_image_model(features)
    return maps


def of_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the file of a whole masked autoencoder has them."""
    return {f"encoder.{name}": value for name, value in tensors.items()}


def build_dofa(side: int) -> nn.Module:
    from torchgeo.models.dofa import DOFA

    return DOFA(img_size=side, patch_size=PATCH, num_classes=0, **TINY)


def dofa_maps(network: nn.Module, pixels: Tensor) -> list[Tensor]:
    from terratorch.models.backbones.dofa_vit import DOFAEncoderWrapper, get_wavelenghts

    names = [NAMES[band] for band in REFERENCES["dofa"].bands]
    wrapped = DOFAEncoderWrapper(network, get_wavelenghts(names), out_indices=[0, 1])
    return [grid(tokens) for tokens in wrapped(pixels)]


def dofa_resized(network: Any, tensors: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    from terratorch.models.backbones.dofa_vit import resize_pos_embed

    old = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    new = (side // PATCH, side // PATCH)
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], new, (old, old), "bilinear")
    return tensors


def build_scalemae(side: int) -> nn.Module:
    from torchgeo.models.scale_mae import ScaleMAE

    norm = partial(nn.LayerNorm, eps=1e-6)
    return ScaleMAE(
        GSD_M, img_size=side, patch_size=PATCH, num_classes=0, qkv_bias=True, norm_layer=norm, **TINY
    )


def scalemae_resized(network: nn.Module, tensors: dict[str, Tensor], _: int) -> dict[str, Tensor]:
    from torchgeo.models.scale_mae import interpolate_pos_embed

    return interpolate_pos_embed(network, tensors)


def build_vit_small(side: int) -> nn.Module:
    from torchgeo.models import vit_small_patch16_224

    # Positions of other tiles are resampled as the tile is looked at.
    return vit_small_patch16_224(
        in_chans=13, num_classes=0, img_size=NATIVE, patch_size=PATCH, dynamic_img_size=True, **TINY
    )


def build_resnet18(_: int) -> nn.Module:
    from torchgeo.models import resnet18

    return resnet18(in_chans=7, num_classes=0)


def build_resnet50(_: int) -> nn.Module:
    from torchgeo.models import resnet50

    return resnet50(in_chans=13, num_classes=0)


def build_softcon(_: int) -> nn.Module:
    from torchgeo.models import vit_small_patch14_dinov2

    return vit_small_patch14_dinov2(
        in_chans=13, num_classes=0, img_size=56, dynamic_img_size=True, **TINY
    )


def build_clay_v1(side: int) -> nn.Module:
    from terratorch.models.backbones.clay_v1.modules import EmbeddingEncoder

    return EmbeddingEncoder(
        img_size=side, patch_size=PATCH, dim=32, depth=2, heads=2, dim_head=16, mlp_ratio=4.0
    )


def clay_v1_maps(network: nn.Module, pixels: Tensor) -> list[Tensor]:
    from terratorch.models.backbones.clay_v1.modules import Datacuber

    cube = Datacuber(bands=["swir16", "red", "nir"])(pixels, gsd=GSD_M)
    return [grid(tokens) for tokens in network(cube)]


def build_clay_v15(_: int) -> nn.Module:
    from terratorch.models.backbones.clay_v15.model import Encoder

    return Encoder(
        mask_ratio=0.0, shuffle=False, patch_size=PATCH, dim=32, depth=2, heads=2, dim_head=16,
        mlp_ratio=4.0,
    )  # fmt: skip


def clay_v15_maps(network: Any, pixels: Tensor) -> list[Tensor]:
    from terratorch.models.backbones.clay_v1.modules import Datacuber

    cube = Datacuber(bands=["swir16", "red", "nir"])(pixels, gsd=torch.tensor(GSD_M))
    # It gives the last tokens alone.
    return [torch.empty(0), grid(network(cube)[0])]


def build_terramind(_: int, *, modality: str = "S2L2A", gated: bool = True) -> nn.Module:
    from terratorch.models.backbones.terramind.model.terramind_vit import TerraMindViT
    from terratorch.models.backbones.terramind.model.tm_utils import LayerNorm

    return TerraMindViT(
        img_size=64, modalities=[modality], dim=32, encoder_depth=2, num_heads=2, qkv_bias=not gated,
        proj_bias=not gated, mlp_bias=not gated, norm_layer=partial(LayerNorm, eps=1e-6, bias=False),
        act_layer=nn.SiLU if gated else nn.GELU, gated_mlp=gated,
    )  # fmt: skip


def source_of(module: str) -> Any:
    """A module of the folder that GEODEPLOY_REFERENCES names.

    Raises:
        ImportError: there is none.
    """
    folder = os.environ.get("GEODEPLOY_REFERENCES", "")
    if not (Path(folder) / f"{module}.py").is_file():
        raise ImportError(
            f"{module}.py is not in the folder GEODEPLOY_REFERENCES ({folder or 'unset'})"
        )
    np.float = float  # type: ignore[attr-defined]  # as numpy called it when that was written
    sys.path.insert(0, folder)
    try:
        return __import__(module)
    finally:
        sys.path.remove(folder)


def build_satmae(side: int) -> nn.Module:
    network = source_of("models_vit_group_channels").GroupChannelsVisionTransformer
    return network(
        channel_embed=8, img_size=side, patch_size=PATCH, in_chans=10, num_classes=0, mlp_ratio=4,
        qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), **TINY,
    )  # fmt: skip


def satmae_maps(network: Any, pixels: Tensor) -> list[Tensor]:
    first, last = block_outputs(network.forward_features, network.blocks, pixels)
    return [grid(first, groups=3), grid(network.norm(last), groups=3)]


def satmae_resized(network: nn.Module, tensors: dict[str, Tensor], _: int) -> dict[str, Tensor]:
    sys.path.insert(0, os.environ["GEODEPLOY_REFERENCES"])
    from util.pos_embed import interpolate_pos_embed

    interpolate_pos_embed(network, tensors)
    return tensors


def build_galileo(_: int) -> nn.Module:
    return source_of("single_file_galileo").Encoder(
        max_patch_size=PATCH, embedding_size=32, depth=2, mlp_ratio=4, num_heads=2
    )


def galileo_maps(network: Any, pixels: Tensor, *, patch: int = PATCH) -> list[Tensor]:
    """Of Sentinel-2's bands without NDVI, groups of bands that are all zeros left out."""
    galileo = source_of("single_file_galileo")
    batch, _, side, _ = pixels.shape
    seen = torch.zeros(batch, side, side, 1, len(galileo.SPACE_TIME_BANDS))
    places = [galileo.SPACE_TIME_BANDS.index(band) for band in galileo.S2_BANDS]
    seen[:, :, :, 0, places] = pixels.permute(0, 2, 3, 1)
    groups = list(galileo.SPACE_TIME_BANDS_GROUPS_IDX.values())
    used = [bool(seen[..., group].any()) for group in groups]
    masks = torch.tensor([0.0 if given else 1.0 for given in used]).expand(batch, side, side, 1, -1)
    others = [
        torch.zeros(batch, side, side, len(galileo.SPACE_BANDS)),
        torch.zeros(batch, 1, len(galileo.TIME_BANDS)),
        torch.zeros(batch, len(galileo.STATIC_BANDS)),
    ]
    other_masks = [
        torch.ones(batch, side, side, len(galileo.SPACE_BAND_GROUPS_IDX)),
        torch.ones(batch, 1, len(galileo.TIME_BAND_GROUPS_IDX)),
        torch.ones(batch, len(galileo.STATIC_BAND_GROUPS_IDX)),
    ]
    months = torch.full((batch, 1), 5)
    maps = []
    for depth in range(1, len(network.blocks) + 1):
        tokens = network(
            seen, *others, masks, *other_masks, months, patch, input_resolution_m=GSD_M,
            exit_after=depth, add_layernorm_on_exit=depth == len(network.blocks),
        )[0]  # fmt: skip
        maps.append(tokens[:, :, :, 0][..., used, :].mean(3).permute(0, 3, 1, 2))
    return maps


def build_dinov3(_: int, **options: Any) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(
        DINOv3ViTConfig(
            **{"intermediate_size": 128} | options, patch_size=16, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_register_tokens=4,
        )
    )  # fmt: skip


def dinov3_maps(network: Any, pixels: Tensor) -> list[Tensor]:
    told = network(pixels, output_hidden_states=True)
    return [grid(told.hidden_states[1], 5), grid(told.last_hidden_state, 5)]


_PRITHVI = ("blue", "green", "red", "nir08", "swir16", "swir22")

REFERENCES = {
    "prithvi_v1": Reference(
        "prithvi_eo_v1_100",
        ("swir16", "blue", "nir08"),
        partial(build_prithvi, told=False),
        prithvi_maps,
        takes=_PRITHVI,
        sides=(224, 96),
        computed=("pos_embed",),
    ),
    "prithvi_v2_dates": Reference(
        "prithvi_eo_v2_300",
        ("swir16", "blue", "nir08"),
        partial(build_prithvi, dates=3),
        prithvi_maps,
        takes=_PRITHVI,
        packed=of_encoder,
        sides=(224, 96),
        dates=3,
        computed=("pos_embed",),
    ),
    "prithvi_v2_told": Reference(
        "prithvi_eo_v2_300_tl",
        ("swir16", "blue", "nir08"),
        partial(build_prithvi, dates=2),
        # Days of the year are counted from 0.
        partial(prithvi_maps, days=[[2018.0, 199.0], [2020.0, 60.0]], place=[-12.5, 130.25]),
        takes=_PRITHVI,
        packed=of_encoder,
        sides=(224, 96),
        dates=2,
        told={"dates": ("2018-07-19", "2020-03-01"), "place": {"lat": -12.5, "lon": 130.25}},
        computed=("pos_embed",),
    ),
    "prithvi_v2_patch14": Reference(
        "prithvi_eo_v2_600_tl",
        ("swir22", "red"),
        partial(build_prithvi, patch=14),
        prithvi_maps,
        takes=_PRITHVI,
        packed=of_encoder,
        sides=(224, 98),
        computed=("pos_embed",),
    ),
    "dofa": Reference(
        "dofa_base",
        ("swir16", "vv", "blue", "red", "coastal"),
        build_dofa,
        dofa_maps,
        options={"patch_size": PATCH},
        resized=dofa_resized,
    ),
    "scalemae": Reference(
        "scalemae_large",
        ("red", "green", "blue"),
        build_scalemae,
        of_timm,
        options={"patch_size": PATCH},
        resized=scalemae_resized,
        packed=lambda tensors: {"model": tensors},
    ),
    "ssl4eo_vit": Reference(
        "ssl4eo_vit_small_s2",
        ("nir", "red", "swir22", "coastal"),
        build_vit_small,
        of_timm,
        takes=S2,
        options={"patch_size": PATCH},
    ),
    "ssl4eo_resnet": Reference(
        "ssl4eo_resnet18_oli_sr",
        ("nir", "red", "swir22"),
        build_resnet18,
        of_timm,
        takes=("coastal", "blue", "green", "red", "nir", "swir16", "swir22"),
        sides=(64, 96),
    ),
    "ssl4eo_resnet50": Reference(
        "ssl4eo_resnet50_s2",
        ("nir", "red", "swir22", "coastal"),
        build_resnet50,
        of_timm,
        takes=S2,
        sides=(64, 96),
    ),
    "softcon": Reference(
        "ssl4eo_vit_small14_s2",
        ("nir", "red", "swir22", "coastal"),
        build_softcon,
        of_timm,
        takes=S2,
        sides=(56, 84),
    ),
    "clay_v1": Reference(
        "clay_v1_base",
        ("swir16", "red", "nir"),
        build_clay_v1,
        clay_v1_maps,
        packed=lambda tensors: {
            "state_dict": {f"model.encoder.{name}": value for name, value in tensors.items()}
        },
    ),
    "clay_v15": Reference(
        "clay_v1_5_large",
        ("swir16", "red", "nir"),
        build_clay_v15,
        clay_v15_maps,
        packed=lambda tensors: {
            "state_dict": {f"model.encoder.{name}": value for name, value in tensors.items()}
        },
    ),
    "terramind": Reference(
        "terramind_v1_base",
        ("swir16", "blue", "nir"),
        build_terramind,
        lambda network, pixels: [grid(tokens, 0) for tokens in network(pixels)],
        takes=tuple(band for band in S2 if band != "cirrus"),
        sides=(64, 96),
    ),
    "terramind_s1": Reference(
        "terramind_v1_base_s1grd",
        ("vh", "vv"),
        partial(build_terramind, modality="S1GRD"),
        lambda network, pixels: [grid(tokens, 0) for tokens in network(pixels)],
        takes=("vv", "vh"),
        sides=(64, 96),
    ),
    "terramind_rgb": Reference(
        "terramind_v1_tiny_rgb",
        ("blue", "red", "green"),
        partial(build_terramind, modality="RGB", gated=False),
        lambda network, pixels: [grid(tokens, 0) for tokens in network(pixels)],
        takes=("red", "green", "blue"),
        sides=(64, 96),
    ),
    "satmae": Reference(
        "satmae_large",
        ("swir16", "blue", "nir08", "nir"),
        build_satmae,
        satmae_maps,
        takes=tuple(band for band in S2 if band not in ("coastal", "nir09", "cirrus")),
        resized=satmae_resized,
        packed=lambda tensors: {"model": tensors},
    ),
    "galileo": Reference(
        "galileo_nano",
        ("swir16", "blue", "red", "nir"),
        build_galileo,
        galileo_maps,
        takes=tuple(band for band in S2 if band not in ("coastal", "nir09", "cirrus")),
    ),
    "dinov3": Reference(
        "vit_small_patch16_dinov3_qkvb",
        ("red", "green", "blue"),
        build_dinov3,
        dinov3_maps,
        sides=(64, 96),
    ),
    "dinov3_plain": Reference(
        "vit_large_patch16_dinov3",
        ("red", "green", "blue"),
        partial(build_dinov3, query_bias=False, value_bias=False),
        dinov3_maps,
        sides=(64, 96),
    ),
    "dinov3_gated": Reference(
        "vit_huge_plus_patch16_dinov3_qkvb",
        ("red", "green", "blue"),
        partial(build_dinov3, use_gated_mlp=True, hidden_act="silu"),
        dinov3_maps,
        sides=(64, 96),
    ),
    "dinov3_7b": Reference(
        "vit_7b_patch16_dinov3",
        ("red", "green", "blue"),
        partial(
            build_dinov3,
            use_gated_mlp=True,
            hidden_act="silu",
            intermediate_size=64,
            query_bias=False,
            value_bias=False,
        ),
        dinov3_maps,
        sides=(64, 96),
    ),
}


def build_terramind_whole(name: str, modality: str) -> nn.Module:
    from terratorch.registry import BACKBONE_REGISTRY

    with torch.device("cpu"):  # it reads numbers out of tensors as it is made
        built: nn.Module = BACKBONE_REGISTRY.build(name, pretrained=False, modalities=[modality])
    return built.to("meta")


def published_sizes() -> dict[str, Callable[[], Any]]:
    """By the name in a recipe, the published network in its own size."""
    ask_for_float32()
    import torchgeo.models as torchgeo
    from terratorch.models.backbones import scalemae
    from terratorch.models.backbones.clay_v1.embedder import Embedder
    from terratorch.models.backbones.clay_v15.model import Encoder
    from terratorch.registry import BACKBONE_REGISTRY

    build = partial(BACKBONE_REGISTRY.build, pretrained=False)
    sizes = {
        "clay_v1_base": lambda: Embedder(img_size=224).clay_encoder,
        "clay_v1_5_large": lambda: Encoder(
            mask_ratio=0.0, shuffle=False, patch_size=8, dim=1024, depth=24, heads=16, dim_head=64,
            mlp_ratio=4.0,
        ),
        "dofa_huge": partial(torchgeo.dofa_huge_patch14_224),
        "scalemae_base": partial(scalemae.vit_base_patch16, img_size=224),
        "scalemae_large": partial(torchgeo.scalemae_large_patch16),
        "scalemae_huge": partial(scalemae.vit_huge_patch14, img_size=224),
        "ssl4eo_vit_huge_s2": partial(torchgeo.vit_huge_patch14_224, in_chans=13, num_classes=0),
    }  # fmt: skip
    of_prithvi = (
        "tiny",
        "v1_100",
        "v2_tiny_tl",
        "v2_100_tl",
        "v2_300",
        "v2_300_tl",
        "v2_600",
        "v2_600_tl",
    )
    for name in of_prithvi:
        sizes[f"prithvi_eo_{name}"] = partial(build, f"prithvi_eo_{name}", num_frames=1)
    for size in ("tiny", "small", "base", "large"):
        name = f"terramind_v1_{size}"
        sizes[name] = partial(build_terramind_whole, name, "S2L2A")
    for modality in ("S2L1C", "S1GRD", "S1RTC", "RGB"):
        name = f"terramind_v1_base_{modality.lower()}"
        sizes[name] = partial(build_terramind_whole, "terramind_v1_base", modality)
    for size in ("small", "base", "large"):
        sizes[f"dofa_{size}"] = partial(getattr(torchgeo, f"dofa_{size}_patch16_224"))
        vit = getattr(torchgeo, f"vit_{size}_patch16_224")
        sizes[f"ssl4eo_vit_{size}_s2"] = partial(vit, in_chans=13, num_classes=0)
    for size in ("small", "base"):
        vit = getattr(torchgeo, f"vit_{size}_patch14_dinov2")
        sizes[f"ssl4eo_vit_{size}14_s2"] = partial(vit, in_chans=13, num_classes=0)
    for size in ("resnet18", "resnet50"):
        sizes[f"ssl4eo_{size}_s2"] = partial(getattr(torchgeo, size), in_chans=13, num_classes=0)
    return sizes


def heads_of(network: nn.Module) -> set[int]:
    """How many its attentions have, those aside that make filters."""
    modules = [
        module
        for name, module in network.named_modules()
        if "ttention" in type(module).__name__ and "generator" not in name
    ]
    counts = [getattr(one, "num_heads", None) or getattr(one, "heads", None) for one in modules]
    return {count for count in counts if count}
