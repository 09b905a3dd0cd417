"""Convolutional backbones: our light pyramid and those of timm, from the recipe to the map."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
from safetensors.torch import save_file

from geodeploy import predict
from geodeploy.errors import RecipeError
from geodeploy.export import export
from geodeploy.train import train
from geodeploy.train.backbone import build_backbone
from geodeploy.train.data import open_scenes
from geodeploy.train.decoder import PyramidDecoder
from geodeploy.train.goals import goal_of
from geodeploy.train.loop import fit
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.recipe import Model, Recipe, load_recipe
from geodeploy.train.run import Run, load_run
from geodeploy.train.validation import validate

Tune = Callable[..., Path]

LIGHT = (
    "model.backbone=light",
    "model.options={channels=[8, 16, 16]}",
    "model.decoder_channels=[16, 8]",
    "method.name=full",
)
RESNET = ("model.backbone=resnet18", "model.options={}", "model.tile=64", "method.name=full")
PYRAMIDS = pytest.mark.parametrize("overrides", [LIGHT, RESNET], ids=["light", "resnet18"])


def network(recipe: Recipe) -> TunedModel:
    backbone = build_backbone(recipe.model, recipe.data.bands)
    return assemble(recipe, backbone, mean=[0.2] * 6, std=[0.1] * 6)


def rescored(run: Run) -> dict[str, object]:
    """The scores of the network as it was loaded, on the recipe's validation area."""
    with open_scenes(run.recipe) as scenes, torch.inference_mode():
        scores = validate(
            run.model,
            scenes,
            goal_of(run.recipe),
            tile=run.spec.tile,
            overlap=run.spec.overlap,
            batch=2,
            mean=np.array([band.mean for band in run.spec.bands], np.float32),
        )
    return scores.model_dump(mode="json")


@PYRAMIDS
def test_a_run_reloads_as_it_was_trained(tune: Tune, overrides: tuple[str, ...]) -> None:
    path = tune(*overrides)
    assert not (path / "adapter_model.safetensors").exists()
    run, again = load_run(path), load_run(path)
    pixels = torch.from_numpy(run.tiles.pixels[:3])
    with torch.inference_mode():
        logits = run.model(pixels)
        assert torch.equal(logits, again.model(pixels))
    assert logits.shape == (3, 3, run.spec.tile, run.spec.tile)
    metrics = json.loads((path / "metrics.json").read_text())
    assert rescored(run) == metrics["scores"]
    card = (path / "README.md").read_text()
    assert "U-Net decoder" in card
    assert "stem" not in card


@PYRAMIDS
def test_it_exports_and_maps_as_in_pytorch(
    recipe_file: Path, tmp_path: Path, tune: Tune, overrides: tuple[str, ...]
) -> None:
    run, model = tune(*overrides), tmp_path / "model.onnx"
    assert export(run, model).exported.argmax_agreement > 0.999
    image = recipe_file.parent / "image.tif"
    predict(image, model, tmp_path / "onnx.tif")
    predict(image, run, tmp_path / "torch.tif")
    with rasterio.open(tmp_path / "onnx.tif") as one, rasterio.open(tmp_path / "torch.tif") as two:
        assert (one.read(1) == two.read(1)).mean() > 0.999


@PYRAMIDS
def test_all_of_it_is_trained(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    counts = network(load_recipe(recipe_file, overrides)).counts()
    assert counts.trainable == counts.total
    if overrides is LIGHT:
        square, norm = 9 * 16 * 16, 2 * 16
        first = 9 * 6 * 8 + 2 * 8
        second = 9 * 8 * 16 + norm + 2 * (square + norm)
        third = 3 * (square + norm)
        assert counts.backbone == first + second + third
        square_of_the_tile = 2 * 2  # to each of the finest pixels
        last = (8 + 1) * 3 * square_of_the_tile
        assert counts.head == 9 * 32 * 16 + norm + 9 * 24 * 8 + 2 * 8 + last
    else:
        judge = timm.create_model("resnet18", in_chans=6, num_classes=0)
        assert counts.backbone == sum(item.numel() for item in judge.parameters())


@pytest.mark.parametrize("overrides", [LIGHT, RESNET, (*LIGHT, "model.decoder=linear")])
def test_every_level_of_the_pyramid_reaches_the_logits(
    recipe_file: Path, overrides: tuple[str, ...]
) -> None:
    model = network(load_recipe(recipe_file, [*overrides, "model.tile=64"])).train()
    logits = model(torch.rand(2, 6, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    logits.square().sum().backward()
    assert [name for name, item in model.named_parameters() if item.grad is None] == []


@pytest.mark.parametrize(("backbone", "stride"), [("light", 2), ("convnext_atto", 4), ("vgg11", 1)])
def test_each_pixel_of_the_finest_level_answers_for_its_own_square_of_the_tile(
    backbone: str, stride: int
) -> None:
    model = Model(backbone=backbone, weights="random", tile=64, overlap=8)
    taps = build_backbone(model, ["red", "nir"]).taps
    assert taps.strides[0] == stride
    decoder = PyramidDecoder(taps.widths, 3, stride, channels=[4] * (len(taps.widths) - 1)).eval()
    maps = [
        torch.rand(1, wide, 64 // step, 64 // step)
        for wide, step in zip(taps.widths, taps.strides, strict=True)
    ]
    # With one class and place switched on at a time, the score turns up there and nowhere else.
    side = 64 // stride
    for place in range(3 * stride**2):
        with torch.no_grad():
            decoder.head.weight.zero_()
            decoder.head.bias.zero_()
            decoder.head.bias[place] = 1
            logits = decoder(maps, torch.zeros(1, 2, 64, 64))
        assert logits.shape == (1, 3, 64, 64)
        needed = torch.zeros_like(logits)
        row, col = divmod(place % stride**2, stride)
        needed[:, place // stride**2, row::stride, col::stride] = 1
        assert torch.equal(logits, needed)
        assert needed.sum() == side**2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            (*LIGHT, "model.tile=36"),
            "36 is no multiple of the pyramid's coarsest level of 8; take 32 or",
        ),
        (
            (*RESNET, "model.tile=80"),
            "80 is no multiple of the pyramid's coarsest level of 32; take 64",
        ),
        ((*LIGHT, "model.decoder_channels=[16]"), "light has 3 levels, .* but the coarsest; found 1"),
        ((*RESNET, "model.decoder_channels=[8, 8]"), "resnet18 has 5 levels, .*; found 2"),
        (
            (*LIGHT, "method.name=lora"),
            "method.name: lora needs a plain vision transformer, and this network is a LightPyramid",
        ),
        ((*RESNET, "method.name=lora"), "and this network is a ResNet; take full or linear"),
        (
            (*RESNET, "model.backbone=swin_tiny_patch4_window7_224", "method.name=lora"),
            "lora needs a plain vision transformer, and this network is a SwinTransformer; take full",
        ),
        (
            ("model.backbone=light",),
            "model.options: light takes channels alone, found embed_dim, depth",
        ),
        ((*RESNET, "model.options={embed_dim=8}"), "timm cannot make resnet18 .*embed_dim"),
        (("model.backbone=resnet19",), "no resnet19, .* timm .* Near: resnet18, .*; light is a light"),
        ((*RESNET, "model.backbone=mixer_s32_224"), "is a MlpMixer, which gives no maps"),
        ((*RESNET, "model.backbone=levit_128s"), "does not take tiles of 64 .* Take another tile, or"),
        ((*RESNET, "model.backbone=inception_v3", "model.tile=96"), "not the .* that timm says"),
        ((*RESNET, "model.backbone=fastvit_t8"), "looks at the pixels through 2 layers"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_the_key(
    recipe_file: Path, overrides: tuple[str, ...], words: str
) -> None:
    recipe = load_recipe(recipe_file, overrides)
    with pytest.raises(RecipeError, match=words) as caught:
        network(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bands", "moved"), [(6, set()), (3, {"conv1.weight"})])
def test_linear_moves_nothing_in_the_pyramid_but_filters_for_new_bands(
    recipe_file: Path, tmp_path: Path, bands: int, moved: set[str]
) -> None:
    torch.manual_seed(1)
    start = timm.create_model("resnet18", in_chans=bands, num_classes=4).state_dict()
    # As after a training: statistics that are not those of any batch here.
    start |= {name: value + 0.1 for name, value in start.items() if "running" in name}
    save_file(start, tmp_path / "resnet.safetensors")
    overrides = [*RESNET, f"model.weights={tmp_path / 'resnet.safetensors'}", "method.name=linear"]
    recipe = load_recipe(recipe_file, overrides)
    model = network(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with open_scenes(recipe) as scenes:
        fit(model, scenes, recipe)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(before[name], value)
    }
    assert {name for name in changed if name.startswith("backbone.")} == {
        f"backbone.{n}" for n in moved
    }
    assert {name for name in changed if name.startswith("decoder.")} > {"decoder.head.weight"}
    assert model.counts().backbone == (64 * 6 * 49 if moved else 0)

    # And what is saved, and read back with the file, is the network that was scored.
    train(recipe_file, tmp_path / "run", overrides=overrides)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (tmp_path / "run" / "backbone.safetensors").exists() == bool(moved)
    assert rescored(load_run(tmp_path / "run")) == metrics["scores"]
