"""A corner of the real scene with its labels, and a recipe that learns from it in a second."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.windows import Window

from geodeploy.train import train

RECIPE = """
name = "tiny"
seed = 3
[data]
bands = ["blue", "green", "red", "nir", "swir16", "swir22"]
valid_range = [-0.2, 1.6]
[data.blocks]
size = 32
gap = 4
fraction = 0.2
[[data.scene]]
image = "image.tif"
labels = "labels.tif"
[[classes]]
value = 0
name = "clear"
color = "#8fae6b"
[[classes]]
value = 1
name = "cloud"
color = "#ffffff"
[[classes]]
value = 2
name = "cirrus"
color = "#9fc5e8"
[model]
backbone = "vit_tiny_patch16_224"
weights = "random"
tile = 32
overlap = 8
scaling = "log"
decoder_channels = [16, 16, 8, 8]
[model.options]
embed_dim = 32
depth = 2
num_heads = 2
patch_size = 8
[method]
name = "lora"
r = 4
alpha = 4
[training]
steps = 4
validate_every = 2
batch = 2
warmup = 0
device = "cpu"
[augmentation]
gain = 0.1
zoom = [0.8, 1.3]
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small only wait for one another's threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Path:
    """Beside 131 x 117 pixels of the scene that ships, all three classes among them."""
    folder = tmp_path_factory.mktemp("recipe")
    window = Window(200, 150, 131, 117)
    labels = real_scene.with_name("landsat8_cloudy_labels.tif")
    for source, name in ((real_scene, "image.tif"), (labels, "labels.tif")):
        with rasterio.open(source) as whole:
            profile = whole.profile | {
                "height": window.height,
                "width": window.width,
                "transform": whole.transform @ Affine.translation(window.col_off, window.row_off),
            }
            with rasterio.open(folder / name, "w", **profile) as corner:
                corner.write(whole.read(window=window))
                corner.descriptions = whole.descriptions
                corner.scales, corner.offsets = whole.scales, whole.offsets
    with rasterio.open(folder / "labels.tif") as corner:
        assert {0, 1, 2} <= set(np.unique(corner.read(1)))
    path = folder / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def tune(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A RUN of the tiny recipe with overrides; the same overrides give the same RUN, trained once."""
    made: dict[str, Path] = {}

    def tuned(*overrides: str) -> Path:
        key = json.dumps(overrides)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "run"
            train(recipe_file, made[key], overrides=overrides)
        return made[key]

    return tuned
