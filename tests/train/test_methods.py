from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geodeploy.errors import RecipeError
from geodeploy.train import train
from geodeploy.train.backbone import build_backbone, decoded_blocks
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.recipe import Recipe, load_recipe
from geodeploy.train.run import load_run

WIDTH, DEPTH, PATCH, BANDS, R = 32, 2, 8, 6, 4
PATCHES = WIDTH * BANDS * PATCH**2 + WIDTH
BLOCK = (
    2 * 2 * WIDTH  # two norms
    + 3 * WIDTH * (WIDTH + 1)  # query, key, value
    + WIDTH * (WIDTH + 1)  # projection
    + 4 * WIDTH * (WIDTH + 1)  # fc1
    + WIDTH * (4 * WIDTH + 1)  # fc2
)
ALL = PATCHES + WIDTH + (16 + 1) * WIDTH + DEPTH * BLOCK + 2 * WIDTH
ADAPTERS = DEPTH * R * ((WIDTH + 3 * WIDTH) + 2 * (WIDTH + 4 * WIDTH))


def network(recipe: Recipe) -> TunedModel:
    backbone = build_backbone(recipe.model, recipe.data.bands)
    return assemble(recipe, backbone, mean=[0.2] * BANDS, std=[0.1] * BANDS)


@pytest.mark.parametrize(
    ("override", "trained"),
    [
        ("method.name=lora", ADAPTERS + PATCHES),
        ("method.name=linear", PATCHES),
        ("method.name=full", ALL),
        ("method.targets=['attn.qkv']", DEPTH * R * 4 * WIDTH + PATCHES),
    ],
)
def test_what_is_trainable_is_what_the_method_says(
    recipe_file: Path, override: str, trained: int
) -> None:
    model = network(load_recipe(recipe_file, [override]))
    counts = model.counts()
    head = sum(parameter.numel() for parameter in model.decoder.parameters())
    assert counts.backbone == trained
    assert counts.head == head
    assert counts.trainable == trained + head
    assert counts.total >= ALL + head


def test_a_patch_embedding_that_the_weights_know_is_not_trained(
    recipe_file: Path, tmp_path: Path
) -> None:
    # Weights for just these bands, as a RUN of method full leaves them.
    recipe = load_recipe(recipe_file)
    save_file(
        build_backbone(recipe.model, recipe.data.bands).encoder.state_dict(),
        tmp_path / "vit.safetensors",
    )
    override = f"model.weights={tmp_path / 'vit.safetensors'}"
    for method, trained in (("lora", ADAPTERS), ("linear", 0)):
        counts = network(load_recipe(recipe_file, [override, f"method.name={method}"])).counts()
        assert counts.backbone == trained


def test_adapters_sit_in_the_blocks_and_never_in_the_patch_embedding(recipe_file: Path) -> None:
    model = network(load_recipe(recipe_file, ["method.targets=['attn.proj']"]))
    places = {name for name, _ in model.backbone.named_parameters() if "lora_" in name}
    assert len(places) == 2 * DEPTH
    assert all(".blocks." in name for name in places)


@pytest.mark.parametrize(
    "method", ["{name='eva', r=2}", "{name='adalora', init_r=4, target_r=2, warm=0.1, settled=0.1}"]
)
def test_methods_that_watch_their_adapters_leave_out_blocks_that_are_not_decoded(
    recipe_file: Path, tmp_path: Path, method: str
) -> None:
    decoder = "model.terratorch={name='fcn', blocks=[0]}"
    overrides = [f"method={method}", "model.decoder=terratorch", decoder, "training.steps=6"]
    train(recipe_file, tmp_path / "run", overrides=overrides)
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("blocks.0." in name for name in adapter)
    assert not any("blocks.1." in name for name in adapter)
    load_run(tmp_path / "run")


def test_a_target_that_the_blocks_lack_is_an_error_that_lists_what_they_have(
    recipe_file: Path,
) -> None:
    recipe = load_recipe(recipe_file, ["method.targets=['query']"])
    with pytest.raises(
        RecipeError, match=r"no linear layer query; they have attn\.k, attn\.proj, attn\.q"
    ):
        network(recipe)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_stand_before_the_patches_of_every_block_new_ones_if_deep(
    recipe_file: Path, deep: bool
) -> None:
    recipe = load_recipe(
        recipe_file,
        [f"method={{name='vpt', tokens=3, deep={str(deep).lower()}}}", "model.options.depth=3"],
    )
    backbone = build_backbone(recipe.model, recipe.data.bands)
    plain = deepcopy(backbone.encoder).eval()
    model = assemble(recipe, backbone, mean=[0.2] * BANDS, std=[0.1] * BANDS).eval()
    pixels = torch.rand(2, BANDS, 32, 32)
    with torch.inference_mode():
        tokens = plain.norm_pre(plain._pos_embed(plain.patch_embed(pixels)))
        needed = []
        for number, block in enumerate(plain.blocks):
            if deep or number == 0:
                prompts = model.backbone.blocks[number].prompts.expand(2, -1, -1)
                patches = tokens[:, -16:]
                tokens = torch.cat([tokens[:, :1], prompts, patches], dim=1)
            tokens = block(tokens)
            needed.append(plain.norm(tokens[:, -16:]).transpose(1, 2).unflatten(2, (4, 4)))
        found = model.backbone.forward_intermediates(
            pixels, indices=[0, 1, 2], norm=True, intermediates_only=True
        )
    assert model.backbone.blocks[0].prompts.std() > 0.01
    for one, other in zip(found, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_small_patch14_dino", "vit_small_patch14_dinov2"),
        ("prithvi_eo_v2_30", "prithvi_eo_v2_300"),
        ("clay_v1", "clay_v1_base, clay_v1_5_large"),
        ("galileo", "galileo_nano, galileo_tiny, galileo_base"),
        ("dofa", "dofa_small, dofa_base"),
        ("satmae", "satmae_base, satmae_large"),
        ("ssl4eo_resnet50", "ssl4eo_resnet50_s2"),
        ("scale_mae_large", "scalemae_large"),
        ("quite_another", "none"),
    ],
)
def test_an_unknown_backbone_is_an_error_that_names_near_ones(
    recipe_file: Path, name: str, near: str
) -> None:
    recipe = load_recipe(recipe_file, [f"model.backbone={name}"])
    with pytest.raises(RecipeError, match=f"there is no {name}, .* Near: {near}[,;]"):
        network(recipe)


def test_a_tile_that_is_no_multiple_of_the_patch_is_an_error_that_names_two(
    recipe_file: Path,
) -> None:
    recipe = load_recipe(recipe_file, ["model.tile=36"])
    with pytest.raises(RecipeError, match="take 32 or 40"):
        network(recipe)


@pytest.mark.parametrize("tile", [40, 56])
@pytest.mark.parametrize(
    "override",
    [
        "model.stem=true",
        "model.stem=false",
        "model.decoder=linear",
        "model.decoder_channels=[8]",
        "model.decoder_channels=[8, 8, 8, 8, 8, 8]",
    ],
)
def test_logits_have_the_size_of_the_tile_whatever_the_decoder(
    recipe_file: Path, tile: int, override: str
) -> None:
    model = network(load_recipe(recipe_file, [f"model.tile={tile}", override])).eval()
    with torch.inference_mode():
        logits = model(torch.rand(2, BANDS, tile, tile))
    assert logits.shape == (2, 3, tile, tile)
    assert logits.isfinite().all()


@pytest.mark.parametrize("scaling", ["zscore", "log"])
def test_normalisation_is_inside_and_survives_any_finite_pixel(recipe_file: Path, scaling: str) -> None:
    model = network(load_recipe(recipe_file, [f"model.scaling={scaling}"])).eval()
    at_mean = model.normalise(torch.full((1, BANDS, 32, 32), 0.2))
    torch.testing.assert_close(at_mean, torch.zeros_like(at_mean))
    dark = model.normalise(torch.tensor([-9.0, 0.0, 0.003]).reshape(1, 3, 1, 1).repeat(1, 2, 1, 1))
    assert dark.isfinite().all()
    if scaling == "log":
        assert torch.unique(dark).tolist() == pytest.approx([-3.912023])  # log(1 / 50)


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (5, [0, 1, 2, 4]), (2, [0, 1])]
)
def test_four_blocks_are_decoded_spread_evenly_or_all_there_are(depth: int, blocks: list[int]) -> None:
    assert decoded_blocks(depth) == tuple(blocks)
    assert all(before < after for before, after in pairwise(blocks))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), False),
        (("method.name=full",), False),
        (("method={name='loha', r=64}",), True),
        (("method={name='vpt', tokens=700}",), True),
    ],
)
def test_training_more_beside_a_backbone_than_it_has_is_told(
    recipe_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: tuple[str, ...],
    told: bool,
) -> None:
    # Weights that know the bands: a patch embedding that is made up would count too.
    recipe = load_recipe(recipe_file)
    weights = build_backbone(recipe.model, recipe.data.bands).encoder.state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    known = f"model.weights={tmp_path / 'vit.safetensors'}"
    train(recipe_file, tmp_path / "run", overrides=[known, "training.steps=1", *overrides])
    assert ("more than method.name = full would" in caplog.text) == told
