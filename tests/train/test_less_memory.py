"""Steps over several batches, and blocks that are computed again: as without, in less memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geodeploy.errors import RecipeError
from geodeploy.train.augment import Batch, training_batches
from geodeploy.train.backbone import build_backbone
from geodeploy.train.data import open_scenes
from geodeploy.train.loop import Learner
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.recipe import Recipe, load_recipe
from geodeploy.train.run import load_run


def network(recipe: Recipe) -> TunedModel:
    torch.manual_seed(0)
    backbone = build_backbone(recipe.model, recipe.data.bands)
    return assemble(recipe, backbone, mean=[0.2] * 6, std=[0.1] * 6)


def first_step(
    recipe: Recipe, cut: Callable[[Batch], Sequence[Batch]] = lambda batch: [batch]
) -> tuple[float, dict[str, Tensor], list[int]]:
    """The loss, a tenth of the clipped gradients, and the tiles in each call of the first block."""
    model = network(recipe)
    seen: list[int] = []
    block = next(part for name, part in model.backbone.named_modules() if name.endswith("blocks.0"))
    block.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with open_scenes(recipe) as scenes:
        batch = next(training_batches(scenes, recipe, model.mean.numpy().ravel()))
        learner = Learner(model, scenes, recipe, 10)
        loss = learner.learn(cut(batch), 1)
    _, tensors = learner.state()
    return loss, {name: value for name, value in tensors.items() if name.endswith("exp_avg")}, seen


def test_a_step_over_two_batches_is_one_over_a_batch_of_twice_the_size(recipe_file: Path) -> None:
    # Cross-entropy of batches with as many labels, and no normalisation over the batch.
    overrides = ["training.batch=4", "training.dice=0", "model.decoder=linear"]
    recipe = load_recipe(recipe_file, overrides)

    def labelled(batch: Batch, part: slice) -> Batch:
        return Batch(batch.pixels[part], batch.labels[part].clamp(max=2), None, batch.sampler)

    whole, needed, once = first_step(recipe, lambda batch: [labelled(batch, slice(4))])
    halves = [slice(0, 2), slice(2, 4)]
    loss, found, twice = first_step(recipe, lambda batch: [labelled(batch, half) for half in halves])
    assert (once, twice) == ([4], [2, 2])
    assert loss == pytest.approx(whole, rel=1e-6)
    assert len(needed) > 4
    torch.testing.assert_close(found, needed, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "method",
    [
        ["method.name=full"],
        ["method.dropout=0.2"],
        ["method.name=vpt", "method.tokens=3"],
        ["method.name=vit_adapter", "model.decoder_channels=[8, 8, 8]"],
    ],
)
def test_blocks_computed_again_give_the_same_gradients(recipe_file: Path, method: list[str]) -> None:
    loss, needed, once = first_step(load_recipe(recipe_file, method))
    again = first_step(load_recipe(recipe_file, [*method, "training.checkpointing=true"]))
    assert (once, again[2]) == ([2], [2, 2])
    assert again[0] == loss
    assert again[1].keys() == needed.keys()
    assert all(torch.equal(again[1][name], value) for name, value in needed.items())


def test_a_training_with_both_leaves_the_weights_it_would_have_left(tune: Callable[..., Path]) -> None:
    short = ("training.accumulate=2", "training.steps=2", "training.validate_every=1")
    kept, again = tune(*short), tune(*short, "training.checkpointing=true")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (kept / name).read_bytes() == (again / name).read_bytes()
    assert "2 steps of 4 tiles" in (again / "README.md").read_text()
    assert not load_run(again).model.backbone.base_model.model.grad_checkpointing


def test_a_network_without_blocks_has_none_to_compute_again(recipe_file: Path) -> None:
    light = ["model.backbone=light", "model.options={channels=[8, 16]}", "method.name=full"]
    recipe = load_recipe(
        recipe_file, [*light, "model.decoder_channels=[8]", "training.checkpointing=true"]
    )
    with pytest.raises(RecipeError) as caught:
        network(recipe)
    assert str(caught.value) == (
        "training.checkpointing: computes the blocks of a vision transformer again, and LightPyramid "
        "has none; take false."
    )
