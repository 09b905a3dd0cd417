"""TerraTorch itself, where it is installed, trains models and is asked about them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

pytest.importorskip("terratorch", reason="needs terratorch, which is too heavy for the extra dev")

from make_checkpoints import KEPT, OTHERS, QUANTITIES, SIDE, train_tiny

from geodeploy.export import export
from geodeploy.imports import import_terratorch
from geodeploy.predict import predict
from geodeploy.train.backbone import build_backbone
from geodeploy.train.backbones.prithvi import BANDS
from geodeploy.train.recipe import Model
from geodeploy.train.run import load_run

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", sorted((KEPT | OTHERS).keys() - {"dates"}))  # chips are of one date
def test_a_model_that_terratorch_trained_does_the_same_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    import_terratorch("model.ckpt", "config.yaml", "run")
    with np.load("told.npz") as told:
        pixels, logits = told[f"pixels_{SIDE}"], told[f"logits_{SIDE}"]
    with torch.inference_mode():
        found = load_run(Path("run")).model(torch.from_numpy(pixels)).numpy()
    print(f"{name}: {np.abs(found - logits).max():.1e} of {np.abs(logits).max():.1f}")
    assert np.abs(found - logits).max() <= 1e-4
    assert export("run", "model.onnx").released
    with rasterio.open("chips/1_image.tif") as chip:
        profile = chip.profile | {"count": 6, "dtype": "float32"}
    with rasterio.open("scene.tif", "w", **profile) as scene:
        scene.write(pixels[0])
    predict("scene.tif", "model.onnx", "map.tif")
    with rasterio.open("map.tif") as written:
        found = written.read(1)
    if name in QUANTITIES:
        assert np.abs(found - logits[0, 0]).max() <= 1e-4
    else:
        assert (found == logits[0].argmax(axis=0)).mean() >= 0.999


@pytest.mark.parametrize("side", [224, 96])
@pytest.mark.parametrize("dates", [1, 3])
def test_prithvis_published_weights_give_the_same_features(
    side: int, dates: int, tmp_path: Path
) -> None:
    from terratorch.models.backbones.prithvi_mae import PrithviMAE
    from terratorch.registry import BACKBONE_REGISTRY

    torch.manual_seed(1)
    published = PrithviMAE(
        num_frames=4, embed_dim=192, depth=12, num_heads=3, coords_encoding=["time", "location"]
    )
    torch.save(published.state_dict(), tmp_path / "published.pt")
    names = ["SWIR_1", "RED", "NIR_NARROW"]
    theirs: Any = BACKBONE_REGISTRY.build(
        "prithvi_eo_v2_tiny_tl",
        pretrained=True,
        ckpt_path=str(tmp_path / "published.pt"),
        bands=names,
        num_frames=dates,
    ).eval()
    bands = [BANDS[place] for place in (4, 2, 3)]
    model = Model(
        backbone="prithvi_eo_v2_tiny",
        weights=str(tmp_path / "published.pt"),
        tile=side,
        timesteps=dates,
    )
    ours: Any = build_backbone(model, bands)
    pixels = torch.randn(2, 3, dates, side, side)
    with torch.inference_mode():
        features = theirs.prepare_features_for_image_model(theirs(pixels))
        maps = ours.encoder.eval().forward_intermediates(
            pixels.swapaxes(1, 2).flatten(1, 2), indices=ours.taps.indices
        )
    assert not ours.new_patches
    for index, found in zip(ours.taps.indices, maps, strict=True):
        assert (found - features[index]).abs().max() <= 1e-4
