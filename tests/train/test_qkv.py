"""Query and value tuned apart from the key, and one layer again at export."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from geodeploy.errors import RecipeError
from geodeploy.export import export
from geodeploy.export.merge import merge
from geodeploy.train.backbone import build_backbone
from geodeploy.train.model import assemble
from geodeploy.train.qkv import SplitQkv
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import load_run

Tune = Callable[..., Path]

SHORT = ("training.steps=2", "training.validate_every=2", "training.lr=1e-2", "model.decoder=linear")
TARGETS = "method.targets=['attn.q', 'attn.v', 'mlp.fc1']"
WIDTH, DEPTH, R = 32, 2, 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_split_does_the_same_and_comes_back_to_the_bit(bias: bool) -> None:
    fused = nn.Linear(6, 15, bias=bias)
    split = SplitQkv(fused)
    tokens = torch.randn(2, 3, 6)
    torch.testing.assert_close(split(tokens), fused(tokens))
    again = split.fused().state_dict()
    assert again.keys() == fused.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in fused.state_dict().items())


def test_the_rows_of_the_key_stay_as_they_were_to_the_bit(tune: Tune) -> None:
    path = tune(TARGETS, *SHORT)
    start = load_file(path / "backbone.safetensors")
    merged = merge(load_run(path).model).backbone.state_dict()
    assert merged.keys() == start.keys()
    for block in range(DEPTH):
        name = f"blocks.{block}.attn.qkv.weight"
        still = (merged[name] == start[name]).all(dim=1)
        assert still.tolist() == [False] * WIDTH + [True] * WIDTH + [False] * WIDTH
    moved = {name for name in merged if not torch.equal(merged[name], start[name])}
    blocks = {name for name in moved if name.startswith("blocks.")}
    layers = [
        f"blocks.{block}.{layer}.weight" for block in range(DEPTH) for layer in ("attn.qkv", "mlp.fc1")
    ]
    assert blocks == set(layers)


def test_two_products_take_the_place_of_one(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, [TARGETS])
    model = assemble(
        recipe, build_backbone(recipe.model, recipe.data.bands), mean=[0.2] * 6, std=[0.1] * 6
    )
    patches = WIDTH * 6 * 8**2 + WIDTH
    assert model.counts().backbone == DEPTH * R * (2 * (WIDTH + WIDTH) + WIDTH + 4 * WIDTH) + patches


def test_the_exported_graph_has_the_one_layer(tmp_path: Path, tune: Tune) -> None:
    def graph(path: Path) -> tuple[Counter[str], list[list[int]]]:
        assert export(path, tmp_path / f"{path.parent.name}.onnx").released
        found = onnx.load(tmp_path / f"{path.parent.name}.onnx").graph
        shapes = sorted(sorted(item.dims) for item in found.initializer)
        return Counter(node.op_type for node in found.node), shapes

    assert graph(tune(TARGETS, *SHORT)) == graph(tune("method.targets=['attn.qkv']", *SHORT))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("['attn.q', 'attn.qkv']", "attn.qkv is attn.q, attn.k, attn.v together; name it, or some of"),
        (
            "['attn.q', 'attn.w']",
            "no linear layer attn.w; they have attn.k, attn.proj, attn.q, attn.qkv",
        ),
        ("['attn.qkv.q']", "no linear layer attn.qkv.q; they have attn.k, attn.proj, attn.q, attn.qkv"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "ssl"])
def test_what_cannot_be_targeted_is_one_line(
    recipe_file: Path, method: str, targets: str, words: str
) -> None:
    recipe = load_recipe(recipe_file, [f"method.name={method}", f"method.targets={targets}"])
    with pytest.raises(RecipeError) as caught:
        assemble(recipe, build_backbone(recipe.model, recipe.data.bands), mean=[0.2] * 6, std=[0.1] * 6)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
