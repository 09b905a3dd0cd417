"""Decoders by name: on transformers and on convolutional networks, from the recipe to ONNX."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from geodeploy.errors import RecipeError
from geodeploy.export import export
from geodeploy.train.backbone import Taps, build_backbone
from geodeploy.train.decoder import FcnDecoder
from geodeploy.train.dpt import DptDecoder, Fusion, ResidualUnit
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import load_run
from geodeploy.train.upernet import UperDecoder, bin_means

Tune = Callable[..., Path]

DECODERS = {
    "fcn": ("model.decoder=fcn",),
    "upernet": ("model.decoder=upernet", "model.decoder_channels=[8]"),
    "dpt": ("model.decoder=dpt", "model.decoder_channels=[8]"),
}
TITLES = {"fcn": "FCN", "upernet": "UPerNet", "dpt": "DPT"}
# A tile that 32 does not divide, with a grid of five by five patches: neither 2, 3 nor 6 divides it.
VIT = ("model.tile=40", "model.options.depth=4")
LIGHT = (
    "model.backbone=light",
    "model.options={channels=[8, 16, 16]}",
    "model.tile=40",
    "method.name=full",
)
BACKBONES = pytest.mark.parametrize("backbone", [VIT, LIGHT], ids=["vit", "light"])
BY_NAME = pytest.mark.parametrize("name", DECODERS)


def network(recipe_file: Path, *overrides: str) -> TunedModel:
    recipe = load_recipe(recipe_file, overrides)
    backbone = build_backbone(recipe.model, recipe.data.bands)
    return assemble(recipe, backbone, mean=[0.2] * 6, std=[0.1] * 6)


@BACKBONES
@BY_NAME
def test_a_run_reloads_and_exports_as_it_was_trained(
    tmp_path: Path, tune: Tune, name: str, backbone: tuple[str, ...]
) -> None:
    path = tune(*backbone, *DECODERS[name], "training.steps=3", "training.validate_every=3")
    run = load_run(path)
    with torch.inference_mode():
        needed = run.model(torch.from_numpy(run.tiles.pixels)).numpy()
    assert needed.shape[1:] == (3, 40, 40)
    assert f"{TITLES[name]} decoder." in (path / "README.md").read_text()

    report = export(path, tmp_path / "model.onnx")
    assert report.released
    assert "openvino" in report.covered or find_spec("openvino") is None
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": run.tiles.pixels})
    np.testing.assert_allclose(logits, needed, rtol=0, atol=2e-5 * np.abs(needed).max())


@pytest.mark.parametrize(
    "backbone", [VIT, ("model.options.depth=1",), ("model.options.depth=3",), LIGHT]
)
@BY_NAME
def test_the_loss_reaches_every_parameter(
    recipe_file: Path, name: str, backbone: tuple[str, ...]
) -> None:
    model = network(recipe_file, "method.name=full", *backbone, *DECODERS[name]).train()
    torch.manual_seed(0)
    side = 40 if "model.tile=40" in backbone else 32
    logits = model(torch.rand(2, 6, side, side))
    assert logits.shape == (2, 3, side, side)
    logits.square().sum().backward()
    still = [key for key, item in model.named_parameters() if item.grad is None or not item.grad.any()]
    assert still == []


@BY_NAME
def test_a_timm_network_with_more_levels_than_are_joined(recipe_file: Path, name: str) -> None:
    resnet = ("model.backbone=resnet18", "model.options={}", "model.tile=96", "method.name=full")
    model = network(recipe_file, *resnet, *DECODERS[name]).eval()
    with torch.inference_mode():
        logits = model(torch.rand(1, 6, 96, 96))
    assert logits.shape == (1, 3, 96, 96)


@pytest.mark.parametrize(("side", "bins"), [(5, 1), (5, 2), (5, 3), (5, 6), (16, 3), (16, 6), (7, 7)])
def test_means_of_bins_are_those_of_adaptive_pooling(side: int, bins: int) -> None:
    features = torch.rand(2, 3, side, side)
    means = bin_means(side, bins)
    torch.testing.assert_close(
        means @ features @ means.T, functional.adaptive_avg_pool2d(features, bins)
    )


def give(judge: nn.Module, ours: nn.Sequential) -> None:
    """Convolution and normalisation of ``ours`` to a module of transformers."""
    judge.conv.load_state_dict(ours[0].state_dict())
    judge.batch_norm.load_state_dict(ours[1].state_dict())


def shaken(decoder: nn.Module) -> nn.Module:
    """In eval mode, with statistics and biases that are not those of the start."""
    for name, value in decoder.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand_like(value) + (0.5 if "var" in name or "weight" in name else 0))
    return decoder.eval()


def pyramid(taps: Taps, tile: int) -> list[Tensor]:
    return [
        torch.randn(2, wide, tile // stride, tile // stride)
        for wide, stride in zip(taps.widths, taps.strides, strict=True)
    ]


PYRAMID = Taps((0, 1, 2, 3), (6, 8, 10, 12), (4, 8, 16, 32))


def test_upernet_is_that_of_transformers() -> None:
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    torch.manual_seed(0)
    ours = shaken(UperDecoder(PYRAMID, 3, 224, channels=7))
    judge = UperNetHead(UperNetConfig(hidden_size=7, num_labels=3), PYRAMID.widths).eval()
    for block, (convolution, _) in zip(judge.psp_modules.blocks, ours.pool.branches, strict=True):
        pooled = block.layers[1]
        pooled.conv.weight.data = convolution.weight.data
        # A normalisation that does nothing but add the bias.
        pooled.batch_norm.weight.data.fill_((1 + pooled.batch_norm.eps) ** 0.5)
        pooled.batch_norm.bias.data = convolution.bias.data
    give(judge.bottleneck, ours.pool.join)
    give(judge.fpn_bottleneck, ours.fuse)
    for theirs, lateral in zip(judge.lateral_convs, ours.laterals, strict=True):
        give(theirs, lateral)
    for theirs, smooth in zip(judge.fpn_convs, ours.smooth, strict=True):
        give(theirs, smooth)
    judge.classifier.load_state_dict(ours.head.state_dict())

    maps = pyramid(PYRAMID, 224)
    with torch.inference_mode():
        logits = functional.interpolate(judge(maps), size=(224, 224), mode="bilinear")
        torch.testing.assert_close(ours(maps, torch.empty(0)), logits)


def test_fusion_is_that_of_transformers() -> None:
    from transformers import DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTFeatureFusionLayer, DPTPreActResidualLayer

    def give_unit(judge: DPTPreActResidualLayer, unit: ResidualUnit) -> None:
        first, second, norm = unit.pair
        judge.convolution1.load_state_dict(first[0].state_dict())
        judge.batch_norm1.load_state_dict(first[1].state_dict())
        judge.convolution2.load_state_dict(second.state_dict())
        judge.batch_norm2.load_state_dict(norm.state_dict())

    torch.manual_seed(0)
    ours = shaken(Fusion(6, 10, joins=True))
    config = DPTConfig(fusion_hidden_size=6, use_batch_norm_in_fusion_residual=True)
    judge = DPTFeatureFusionLayer(config, align_corners=False).eval()
    give_unit(judge.residual_layer1, ours.joined)
    give_unit(judge.residual_layer2, ours.refine)
    judge.projection.load_state_dict(ours.project.state_dict())
    features, level = torch.randn(2, 2, 6, 5, 5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(features, level), judge(features, level))


def test_dpt_fuses_from_the_coarsest_level_to_twice_the_finest() -> None:
    torch.manual_seed(0)
    ours = shaken(DptDecoder(PYRAMID, 3, 96, channels=5))
    assert [fusion.size for fusion in ours.fusions] == [48, 24, 12, 6]
    maps = pyramid(PYRAMID, 96)
    with torch.inference_mode():
        levels = [project(item) for project, item in zip(ours.projections, maps, strict=True)]
        first, second, third, fourth = ours.fusions
        fused = first(second(third(fourth(levels[3]), levels[2]), levels[1]), levels[0])
        needed = functional.interpolate(ours.head(fused), size=(96, 96), mode="bilinear")
        torch.testing.assert_close(ours(maps, torch.empty(0)), needed)


def test_fcn_is_convolutions_that_double_up_to_the_tile() -> None:
    torch.manual_seed(0)
    ours = shaken(FcnDecoder(5, 3, 42, channels=(4, 3, 2)))
    (features,) = maps = [torch.randn(2, 5, 3, 3)]
    with torch.inference_mode():
        found = ours(maps, torch.empty(0))
        for size, level in zip((11, 21, 42), ours.levels, strict=True):
            features = functional.interpolate(level(features), size=(size, size), mode="bilinear")
        torch.testing.assert_close(found, ours.head(features))


@pytest.mark.parametrize("name", ["upernet", "dpt"])
def test_their_width_has_a_default_and_is_one_number(
    recipe_file: Path, tmp_path: Path, name: str
) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text(recipe_file.read_text().replace("decoder_channels = [16, 16, 8, 8]\n", ""))
    assert load_recipe(plain, [f"model.decoder={name}"]).model.decoder_channels == (128,)
    assert load_recipe(plain).model.decoder_channels == (128, 64, 32, 16)
    with pytest.raises(RecipeError) as caught:
        load_recipe(plain, [f"model.decoder={name}", "model.decoder_channels=[8, 8]"])
    words = f"model: decoder_channels must be one number for {name}, found [8, 8]"
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
