"""What comes with the package is what it says it is."""

import hashlib
import json
from contextlib import closing

import rasterio

from geodeploy.demo import SCENE
from geodeploy.predict import default_model
from geodeploy.runtime import open_session


def test_the_scene_is_small_real_and_has_an_odd_size() -> None:
    labels = SCENE.with_name("landsat8_cloudy_labels.tif")
    assert SCENE.stat().st_size + labels.stat().st_size <= 3_000_000
    with rasterio.open(SCENE) as scene, rasterio.open(labels) as truth:
        assert scene.descriptions == ("blue", "green", "red", "nir", "swir16", "swir22")
        assert set(scene.scales) == {2e-5}
        assert set(scene.offsets) == {-0.1}
        assert scene.crs.to_epsg() == 32616
        assert scene.height % 2 == scene.width % 2 == 1
        assert (truth.shape, truth.transform, truth.crs) == (scene.shape, scene.transform, scene.crs)
        assert "algorithmic" in truth.tags()["ORIGIN"]


def test_the_model_is_small_and_has_its_proof_and_its_card_beside_it() -> None:
    model = default_model()
    assert model.stat().st_size <= 8_000_000
    with closing(open_session(model, device="cpu")) as session:
        spec = session.spec
    assert [item.value for item in spec.classes] == [0, 1, 3, 4]
    report = model.with_suffix(".parity.json").read_bytes()
    assert spec.parity is not None
    assert spec.parity.report_sha256 == hashlib.sha256(report).hexdigest()
    assert json.loads(report)["released"]
    card = model.with_suffix(".md").read_text(encoding="utf-8")
    for item in spec.classes:
        assert f"| {item.name} |" in card
