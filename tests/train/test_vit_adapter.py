"""ViT-Adapter: deformable attention by an independent judge, and a pyramid from recipe to runtimes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from geodeploy.errors import RecipeError
from geodeploy.export.merge import merge
from geodeploy.train.backbone import build_backbone
from geodeploy.train.deformable import DeformableAttention, look_up
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import load_run
from geodeploy.train.vit_adapter import STRIDES

ADAPTER = ("method.name=vit_adapter", "method.channels=4", "model.options.depth=5")
UPERNET = ("model.decoder=upernet", "model.decoder_channels=[8]")
TILE = ("model.tile=64",)


def network(recipe_file: Path, *overrides: str) -> TunedModel:
    recipe = load_recipe(recipe_file, overrides)
    torch.manual_seed(0)
    backbone = build_backbone(recipe.model, recipe.data.bands)
    return assemble(recipe, backbone, mean=[0.2] * 6, std=[0.1] * 6)


def looked_up(values: Tensor, sides: list[int], places: Tensor, weights: Tensor) -> np.ndarray:
    """Point by point and corner by corner, as arXiv 2010.04159 has it in formula 3."""
    tiles, queries, heads, levels, points, _ = places.shape
    found = np.zeros((tiles, queries, heads, values.shape[-1]))
    starts = np.cumsum([0, *(side**2 for side in sides)])
    for at in np.ndindex(tiles, queries, heads, levels, points):
        tile, query, head, level, _ = at
        side = sides[level]
        # A pixel's value stands in its middle.
        x, y = (share * side - 0.5 for share in places[at].tolist())
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for col in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < side and 0 <= col < side:
                    near = (1 - abs(y - row)) * (1 - abs(x - col))
                    value = values[tile, starts[level] + row * side + col, head].numpy()
                    found[tile, query, head] += float(weights[at]) * near * value
    return found.reshape(tiles, queries, -1)


def looks() -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Values of two tiles on maps of two sides, places within and beyond the rim, weights."""
    random = torch.Generator().manual_seed(4)
    sides = [5, 2]
    values = torch.randn(2, 29, 3, 4, generator=random, dtype=torch.float64)
    places = torch.rand(2, 6, 3, 2, 2, 2, generator=random, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(2, 6, 3, 2, 2, generator=random, dtype=torch.float64)
    return values, sides, places, weights


def test_what_is_looked_up_is_what_a_loop_over_points_and_corners_finds() -> None:
    values, sides, places, weights = looks()
    found = look_up(values, sides, places, weights)
    np.testing.assert_allclose(found, looked_up(values, sides, places, weights), atol=1e-12)


def test_what_is_looked_up_is_what_transformers_finds() -> None:
    module = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    values, sides, places, weights = looks()
    needed = module.multi_scale_deformable_attention(
        values, [(side, side) for side in sides], places, weights
    )
    torch.testing.assert_close(look_up(values, sides, places, weights), needed)


def test_each_head_looks_first_in_a_direction_of_its_own_and_further_at_each_point() -> None:
    attention = DeformableAttention(8, heads=4, points=2, value_ratio=0.5, of=[3], to=[6, 3])
    offsets = attention.offsets.bias.reshape(4, 2, 2, 2).detach()
    ways = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float32)
    for level in (0, 1):
        torch.testing.assert_close(offsets[:, level, 0], ways, atol=1e-6, rtol=0)
        torch.testing.assert_close(offsets[:, level, 1], 2 * ways, atol=1e-6, rtol=0)
    assert attention.values.out_features == 4
    centre = attention.places[4].flatten()
    assert centre.tolist() == [0.5, 0.5]


def test_four_maps_and_a_transformer_that_is_untouched_at_first(recipe_file: Path) -> None:
    model = network(recipe_file, *ADAPTER, *UPERNET, *TILE).eval()
    adapted, pixels = model.backbone, torch.rand(2, 6, 64, 64)
    assert model.taps.strides == STRIDES == (4, 8, 16, 32)
    seen: list[Tensor] = []
    adapted.vit.blocks[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.inference_mode():
        scaled, maps = model.encode(pixels)
        needed = adapted.vit.forward_intermediates(scaled, norm=False, output_fmt="NLC")[1][-1]
    assert [tuple(item.shape) for item in maps] == [(2, 32, 64 // side, 64 // side) for side in STRIDES]
    torch.testing.assert_close(seen[0][:, 1:], needed)

    for injector in adapted.injectors:
        injector.strength.data.fill_(0.5)
    with torch.inference_mode():
        model.encode(pixels)
    assert (seen[-1][:, 1:] - needed).abs().max() > 0.01


@pytest.mark.parametrize(
    ("more", "depth"),
    [
        (UPERNET, 1),
        (("model.decoder=dpt", "model.decoder_channels=[8]"), 3),
        (("model.decoder_channels=[8, 8, 8]",), 5),
        ((*UPERNET, "model.backbone=prithvi_eo_v2_tiny", "model.options={}"), 2),
    ],
)
def test_the_loss_reaches_every_trained_parameter(
    recipe_file: Path, more: tuple[str, ...], depth: int
) -> None:
    model = network(recipe_file, *ADAPTER, f"model.options.depth={depth}", *more).train()
    for injector in model.backbone.injectors:
        injector.strength.data.fill_(0.5)  # at 0 nothing behind it has a gradient in the first step
    model(torch.rand(2, 6, 32, 32)).square().sum().backward()
    trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert {name for name, item in trained.items() if item.grad is None} == set()
    inside = {name for name in trained if ".vit." in name}
    assert inside == {f"backbone.vit.patch_embed.proj.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize("option", ["method.lora_r=4", "method.full=true"])
def test_a_transformer_that_is_tuned_too_reloads_and_merges_as_it_was_trained(
    tune: Callable[..., Path], option: str
) -> None:
    few = ("model.options.depth=2", "training.steps=2", "training.validate_every=2", "training.lr=1e-2")
    run = load_run(tune(*ADAPTER, *UPERNET, *few, option))
    pixels = torch.from_numpy(run.tiles.pixels)
    plain = build_backbone(run.recipe.model, run.spec.band_names, load=False).encoder.state_dict()
    with torch.inference_mode():
        needed = run.model(pixels)
        merged = merge(run.model)
        torch.testing.assert_close(
            merged(pixels), needed, rtol=0, atol=1e-5 * float(needed.abs().max())
        )
    assert set(merged.backbone.vit.state_dict()) == set(plain)
    assert (len(run.model.backbone.vit.state_dict()) > len(plain)) == ("lora" in option)
    assert "ViT-Adapter (points=4, channels=4" in (run.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("model.tile=40",), "model.tile: 40 is no multiple of 32, .* with a patch of 8 take 32 or 64"),
        (("model.tile=24",), "model.tile: 24 is no multiple of 32, .* take 32 or 64"),
        (("model.decoder=linear",), "model.decoder: linear does not join .*; take unet, upernet, dpt"),
        ((), "model.decoder_channels: ViT-Adapter has 4 levels, .* found 4"),
        (("model.backbone=light", "model.options={channels=[4, 4]}"), "take full or linear"),
        (
            ("model.backbone=resnet18", "model.options={}"),
            "this network is a ResNet; take full or linear",
        ),
        (
            ("model.backbone=eva02_tiny_patch14_224", "model.options={depth=1}", "model.tile=28"),
            "take lora or full for one of rotary",
        ),
        (
            ("model.backbone=prithvi_eo_v2_tiny", "model.options={depth=1}", "model.timesteps=2"),
            "one token at each place, Prithvi has 2, of dates",
        ),
        (("model.backbone=satmae_base", "model.options={depth=1}"), "GroupedViT has 2, of dates or gr"),
        (("method.full=true", "method.lora_r=4"), "lora_r = 4 leaves frozen what full = true tunes"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    recipe_file: Path, more: tuple[str, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        network(recipe_file, "method.name=vit_adapter", *more)
    assert "\n" not in str(caught.value)
