"""Every converter against what its reference once gave, and from a recipe to a map."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from comparing import KEPT, LARGEST, kept_tensors, maps_of, ours
from make_references import sample
from references import GSD_M, REFERENCES, TINY, pixels_of

from geodeploy.errors import GeodeployError, RecipeError, WeightsError
from geodeploy.export import export
from geodeploy.train.backbone import build_backbone
from geodeploy.train.backbones import FAMILIES, dinov3, ssl4eo
from geodeploy.train.recipe import Model
from geodeploy.train.run import load_run


@pytest.mark.parametrize("name", sorted(path.stem for path in KEPT.glob("*.json")))
def test_published_weights_give_what_the_published_network_gave(name: str, tmp_path: Path) -> None:
    reference, tensors = REFERENCES[name], kept_tensors(name)
    kept = json.loads((KEPT / f"{name}.json").read_text())["maps"]
    assert len(kept) == 2
    for side, needed in kept.items():
        pixels = pixels_of(reference.planes, int(side))
        maps = maps_of(ours(reference, tensors, int(side), tmp_path), pixels)
        for values, wanted in zip(maps, needed, strict=True):
            if wanted:
                assert float((sample(values) - torch.tensor(wanted)).abs().max()) <= LARGEST


@pytest.mark.parametrize("patch", [8, 4])
@pytest.mark.parametrize("side", [32, 48])
def test_galileos_real_weights_give_the_features_of_its_formulas(side: int, patch: int) -> None:
    # Kept in galileo_nano.json: what the encoder's formulas, written out apart from ours by Galileo's
    # source (277458f), give of the real weights. For random ones they give what that source gave
    # (references/galileo.json) within 1e-6. Some of the values of each map.
    weights = Path(__file__).parents[4] / "shared/data/galileo-nano-weights/encoder.pt"
    if not weights.is_file():
        pytest.skip(f"needs Galileo's weights (nasaharvest/galileo, models/nano) in {weights.parent}")
    reference = REFERENCES["galileo"]
    kept = json.loads((KEPT.parent / "galileo_nano.json").read_text())[f"{patch} {side}"]
    model = Model(
        backbone="galileo_nano",
        weights=str(weights),
        options={"patch_size": patch},
        tile=side,
        overlap=8,
    )
    backbone = build_backbone(model, reference.bands, gsd_m=GSD_M)
    maps = maps_of(backbone, pixels_of(len(reference.bands), side))
    for values, wanted in zip(maps, kept, strict=True):
        assert float(values.std()) > 0.05
        assert float((sample(values) - torch.tensor(wanted)).abs().max()) <= LARGEST


@pytest.mark.parametrize("name", ["dofa", "satmae", "dinov3"])
def test_it_is_tuned_by_adapters_merged_and_exported(
    name: str, tune: Callable[..., Path], tmp_path: Path
) -> None:
    reference = REFERENCES[name]
    torch.save(reference.packed(kept_tensors(name)), tmp_path / "published.pth")
    options = ", ".join(f"{key}={value}" for key, value in (TINY | reference.options).items())
    run = tune(
        f"model.backbone={reference.backbone}",
        f"model.weights={tmp_path / 'published.pth'}",
        f"model.options={{{options}}}",
        "model.tile=32",
        "method.name=lora",
        'method.targets=["attn.qkv", "mlp.fc2"]',
    )
    pixels = torch.from_numpy(load_run(run).tiles.pixels[:2])
    with torch.inference_mode():
        model: Any = load_run(run).model
        assert torch.equal(model(pixels), load_run(run).model(pixels))
    assert any("lora_B" in key for key in model.backbone.state_dict())
    tuned = [value for key, value in model.backbone.named_parameters() if "lora_B" in key]
    assert all(value.any() for value in tuned)  # each of them has learned
    assert export(run, tmp_path / "model.onnx").exported.argmax_agreement > 0.999


@pytest.mark.parametrize(
    ("backbone", "bands", "error", "complaint"),
    [
        ("dofa_base", ("red", "ndvi"), WeightsError, "makes its filters of wavelengths, .* ndvi"),
        ("ssl4eo_vit_small_s2", ("red", "vv"), WeightsError, "know the bands coastal, .* has vv too"),
        ("satmae_large", ("red", "cirrus"), WeightsError, "know the bands blue, .* has cirrus too"),
        ("clay_v1_base", ("red",), RecipeError, "data.gsd_m: clay_v1_base places what it sees"),
    ],
)
def test_bands_and_distances_that_a_network_cannot_take_are_said(
    backbone: str, bands: tuple[str, ...], error: type[GeodeployError], complaint: str, tmp_path: Path
) -> None:
    names = {"dofa_base": "dofa", "ssl4eo_vit_small_s2": "ssl4eo_vit", "satmae_large": "satmae"}
    if backbone in names:
        reference = REFERENCES[names[backbone]]
        torch.save(reference.packed(kept_tensors(names[backbone])), tmp_path / "published.pth")
    options = TINY | {"patch_size": 8}
    model = Model(
        backbone=backbone, weights=str(tmp_path / "published.pth"), options=options, tile=32, overlap=8
    )
    with pytest.raises(error, match=complaint):
        build_backbone(model, bands)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm, as it resizes Swin's windows
@pytest.mark.parametrize(
    ("name", "options", "tile"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, 96),
        ("convnext_atto", {}, 96),
        ("resnet18", {}, 96),
        ("eva02_tiny_patch14_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 98),
        ("eva_giant_patch14_224", TINY, 98),
    ],
)
def test_any_network_of_timm_with_maps_takes_its_weights_another_tile_and_other_bands(
    name: str, options: dict[str, Any], tile: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(name, global_pool="", **options).state_dict(), tmp_path / "rgb.pth")
    model = Model(
        backbone=name, options=options, weights=str(tmp_path / "rgb.pth"), tile=tile, overlap=8
    )
    backbone = build_backbone(model, ("nir", "red", "green", "blue"))
    assert backbone.new_patches
    taps, encoder = backbone.taps, backbone.encoder.eval()
    with torch.inference_mode():
        maps = encoder.forward_intermediates(
            torch.zeros(2, 4, tile, tile), indices=list(taps.indices), intermediates_only=True
        )
    sides = [tile // stride for stride in taps.strides]
    assert [tuple(item.shape) for item in maps] == [
        (2, wide, side, side) for wide, side in zip(taps.widths, sides, strict=True)
    ]


def test_every_name_in_the_table_makes_a_network_of_its_width() -> None:
    ours_alone = [name for name in FAMILIES if not name.startswith(("light", "ssl4eo", "vit_"))]
    for name in ours_alone:
        bands = ("vv",) if "s1" in name else ("red", "green")
        model = Model(backbone=name, weights="random", options={"depth": 1}, tile=16 * 14, overlap=8)
        with torch.device("meta"):  # without its memory
            assert build_backbone(model, bands, gsd_m=10.0).taps.widths[0] >= 128, name
    assert all(timm.is_model(name) for name, _ in ssl4eo.VARIANTS.values())
    assert all(timm.is_model(name) for name in dinov3.NAMES)
