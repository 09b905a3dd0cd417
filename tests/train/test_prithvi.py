"""Prithvi by its name in a recipe: published weights, and a start from nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from geodeploy.errors import RecipeError, WeightsError
from geodeploy.export import export
from geodeploy.train.backbone import build_backbone
from geodeploy.train.backbones.prithvi import BANDS
from geodeploy.train.recipe import Model, load_recipe
from geodeploy.train.run import load_run

TINY: dict[str, Any] = {
    "backbone": "prithvi_eo_v2_tiny",
    "tile": 32,
    "overlap": 8,
    "options": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}


def encoder_of(bands: tuple[str, ...], **more: Any) -> Any:
    return build_backbone(Model(**TINY | more), bands).encoder.eval()


def test_the_published_file_serves_some_of_its_bands_in_any_order(tmp_path: Path) -> None:
    whole = encoder_of(BANDS, weights="random")
    published = {f"encoder.{name}": value for name, value in whole.state_dict().items()}
    patches = "encoder.patch_embed.proj.weight"
    published[patches] = published[patches].unsqueeze(2)  # filters span one date
    published |= {
        "decoder.mask_token": torch.zeros(1),
        "encoder.temporal_embed_enc.scale": torch.ones(1),
    }
    torch.save(published, tmp_path / "prithvi.pt")
    some = encoder_of(("swir16", "nir", "blue"), weights=str(tmp_path / "prithvi.pt"))
    pixels = torch.randn(1, 3, 32, 32)
    among = torch.zeros(1, 6, 32, 32)
    among[:, [4, 3, 0]] = pixels
    with torch.inference_mode():
        found = some.forward_intermediates(pixels, indices=[0, 1])
        expected = whole.forward_intermediates(among, indices=[0, 1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(WeightsError, match=r"know the bands blue, .*, the recipe has cirrus too"):
        encoder_of(("blue", "cirrus"), weights=str(tmp_path / "prithvi.pt"))


def test_dates_change_the_positions_alone_in_their_own_part() -> None:
    one, three = (
        encoder_of(BANDS, weights="random", timesteps=dates).pos_embed[0, 1:] for dates in (1, 3)
    )
    by_date = three.reshape(3, 4, 32)
    torch.testing.assert_close(by_date[0], one)
    assert (by_date[1] - one)[:, :24].abs().max() == 0  # column and row
    assert (by_date[1] - one)[:, 24:].abs().min() >= 0
    assert not torch.equal(by_date[1], by_date[2])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"options": {"embed_dim": 40}}, "embed_dim: prithvi_eo_v2_tiny needs a multiple of 16"),
        ({"dates": ["2020-05-31"]}, "model.dates: prithvi_eo_v2_tiny was not trained with dates"),
        (
            {"backbone": "vit_tiny_patch16_224", "place": {"lat": 50.0, "lon": 8.0}, "options": {}},
            r"model.place: vit_tiny_patch16_224 .* take one that was: prithvi_eo_v2_tiny_tl",
        ),
        ({"tile": 40}, "40 is no multiple of the patch of 16; take 32 or 48"),
        ({"backbone": "vit_tiny_patch16_224", "timesteps": 2}, "takes 1 date, found 2"),
        (
            {"decoder": "terratorch", "terratorch": {"name": "fcn", "blocks": [2]}},
            "the backbone has 0 to 1, found 2",
        ),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        build_backbone(Model(**TINY | {"weights": "random"} | change), BANDS)


def test_it_is_trained_with_a_decoder_of_terratorch(tune: Callable[..., Path], tmp_path: Path) -> None:
    run = tune(
        "model.backbone=prithvi_eo_v2_tiny",
        "model.scaling=zscore",
        "model.decoder=terratorch",
        "model.terratorch.name=upernet",
        "model.terratorch.neck=learned",
        "model.terratorch.blocks=[0, 0, 1, 1]",
        "model.terratorch.channels=[8]",
    )
    assert load_run(run).model.taps.indices == (0, 0, 1, 1)
    assert export(run, tmp_path / "model.onnx").released


TOLD = {"dates": ["2020-05-31"], "place": {"lat": 50.0, "lon": 8.0}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("model.dates=[]", "dates must be one a timestep, 1; found 0"),
        ('model.dates=["2020-05-31", "2020-07-01"]', "dates must be one a timestep, 1; found 2"),
        ('model.dates=["31.5.2020"]', r"model\.dates\.0 must be a valid date"),
        ("model.place={lat=95.0, lon=8.0}", r"model\.place\.lat must be less than or equal to 90"),
        ("model.place={lat=50.0}", r"model\.place\.lon is missing"),
        (
            ["model.timesteps=2", 'model.dates=["2020-07-01", "2020-05-31"]'],
            "dates must begin with the oldest, found 2020-07-01, 2020-05-31",
        ),
    ],
)
def test_dates_and_places_that_cannot_be_are_said(
    change: str | list[str], complaint: str, tmp_path: Path
) -> None:
    recipe = Path(__file__).parents[2] / "train/quickstart.toml"
    changes = [change] if isinstance(change, str) else change
    with pytest.raises(RecipeError, match=complaint) as caught:
        load_recipe(recipe, ["model.backbone=prithvi_eo_v2_tiny_tl", *changes])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "absent"), [("dates", "temporal"), ("place", "location")])
def test_weights_that_were_trained_without_them_are_told_no_dates_and_places(
    key: str, absent: str, tmp_path: Path
) -> None:
    backbone = {"backbone": "prithvi_eo_v2_tiny_tl"}
    published = dict(encoder_of(BANDS, weights="random", **backbone).state_dict())
    published |= {
        f"{name}_embed_enc.scale": torch.tensor([0.3]) for name in {"temporal", "location"} - {absent}
    }
    torch.save(published, tmp_path / "prithvi.pt")
    told = backbone | {"weights": str(tmp_path / "prithvi.pt"), key: TOLD[key]}
    with pytest.raises(WeightsError, match=f"without {key}: they have no {absent}_embed_enc"):
        encoder_of(BANDS, **told)


def test_nobody_tells_a_network_when_and_where_unless_the_recipe_does() -> None:
    plain, silent, told = (
        encoder_of(BANDS, weights="random", **more).pos_embed
        for more in (
            {},
            {"backbone": "prithvi_eo_v2_tiny_tl"},
            {"backbone": "prithvi_eo_v2_tiny_tl", **TOLD},
        )
    )
    assert torch.equal(plain, silent)
    assert torch.equal(told[:, 0], plain[:, 0])  # of the class token
    added = (told - plain)[0, 1:]
    torch.testing.assert_close(added, added[:1].expand_as(added), atol=1e-6, rtol=0)
    assert added.abs().max() > 0.05


def test_what_it_is_told_is_a_part_of_the_run_and_of_its_export(
    tune: Callable[..., Path], tmp_path: Path
) -> None:
    silent = encoder_of(BANDS, weights="random", options={})
    published = {f"encoder.{name}": value for name, value in silent.state_dict().items()}
    published |= {f"encoder.{name}_embed_enc.scale": torch.ones(1) for name in ("temporal", "location")}
    torch.save(published, tmp_path / "prithvi.pt")
    run = tune(
        "model.backbone=prithvi_eo_v2_tiny_tl",
        f"model.weights={tmp_path / 'prithvi.pt'}",
        "model.options={}",
        "model.tile=32",
        'model.dates=["2020-05-31"]',
        "model.place={lat=50.5, lon=-8}",
        "method.name=lora",
    )
    loaded = load_run(run)
    positions = dict(loaded.model.backbone.named_buffers())["base_model.model.pos_embed"]
    assert (positions - silent.pos_embed).abs().max() > 0.5
    assert (
        "told the dates 2020-05-31 and the place 50.5, -8, of every" in (run / "README.md").read_text()
    )
    assert export(run, tmp_path / "model.onnx").released
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert len(graph.input) == 1
