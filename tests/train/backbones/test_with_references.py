"""Published networks, where they are installed, against ours with the same random weights."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import LARGEST, largest_difference, maps_of, ours
from references import (
    GSD_M,
    REFERENCES,
    ask_for_float32,
    filled,
    galileo_maps,
    heads_of,
    pixels_of,
    published_sizes,
    source_of,
)

from geodeploy.train.backbone import build_backbone
from geodeploy.train.backbones import FAMILIES
from geodeploy.train.backbones.family import Wanted
from geodeploy.train.recipe import Model

pytest.importorskip("terratorch", reason="needs terratorch and torchgeo, too heavy for the extra dev")

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    ask_for_float32()


@pytest.mark.parametrize("patch", [8, 4])
@pytest.mark.parametrize("side", [32, 48])
def test_galileos_real_weights_give_its_own_features(side: int, patch: int) -> None:
    weights = Path(os.environ.get("GEODEPLOY_REFERENCES", "")) / "data/models/nano/encoder.pt"
    if not weights.is_file():
        pytest.skip("needs the repository nasaharvest/galileo in the folder GEODEPLOY_REFERENCES")
    reference = REFERENCES["galileo"]
    network = source_of("single_file_galileo").Encoder(
        embedding_size=128, depth=4, num_heads=8, mlp_ratio=4, max_patch_size=8
    )
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict({name.replace(".backbone", ""): tensors[name] for name in tensors})
    options = {"patch_size": patch}
    model = Model(backbone="galileo_nano", weights=str(weights), options=options, tile=side, overlap=8)
    pixels = pixels_of(len(reference.bands), side)
    with torch.no_grad():
        needed = galileo_maps(network.eval(), reference.given(pixels), patch=patch)
    backbone = build_backbone(model, reference.bands, gsd_m=GSD_M)
    assert largest_difference(maps_of(backbone, pixels), needed) <= LARGEST


@pytest.mark.parametrize("name", REFERENCES)
def test_published_weights_give_the_features_that_the_published_network_gives(
    name: str, tmp_path: Path
) -> None:
    reference = REFERENCES[name]
    native = reference.sides[0]
    try:
        tensors = filled(reference.build(native))
    except ImportError as error:
        pytest.skip(str(error))
    for side in reference.sides:
        pixels = pixels_of(reference.planes, side)
        backbone = ours(reference, tensors, side, tmp_path)
        assert not backbone.new_patches
        found = largest_difference(maps_of(backbone, pixels), reference.answer(tensors, pixels))
        print(f"{name} on tiles of {side}: {found:.1e}")
        assert found <= LARGEST


@pytest.mark.parametrize("name", published_sizes())
def test_every_size_has_the_tensors_and_the_heads_of_the_published_network(name: str) -> None:
    bands = {"s1": ("vv", "vh"), "rgb": ("red", "green", "blue")}
    known = next((bands[key] for key in bands if key in name), ("red", "green", "blue"))
    tile = 252 if "14" in name else 224
    model = Model(backbone=name, weights="random", tile=tile, overlap=8)
    with torch.device("meta"):  # without its memory
        published = published_sizes()[name]()
        encoder: Any = build_backbone(model, known, gsd_m=GSD_M).encoder
        tensors = dict(published.state_dict())
        found = FAMILIES[name].convert(tensors, encoder, Wanted(model, known, GSD_M))
    needed = {key: value.shape for key, value in encoder.state_dict().items()}
    if FAMILIES[name].colours:
        needed = {key: value for key, value in needed.items() if "patch_embed" not in key}
    assert {key: found[key].shape for key in needed if key in found} == needed
    assert heads_of(encoder) == heads_of(published)
