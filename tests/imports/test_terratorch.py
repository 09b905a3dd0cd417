"""Models that TerraTorch 1.2.11 trained (make_checkpoints.py) do here what they did there."""

import json
import os
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from geodeploy.cli import app
from geodeploy.errors import OutputError, RecipeError, WeightsError
from geodeploy.export import export
from geodeploy.imports import import_terratorch
from geodeploy.imports.options import ImportOptions
from geodeploy.predict import PredictOptions, predict
from geodeploy.train.run import load_run

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = ("lora-qkv", "lora", "dates")
BANDS = ("blue", "green", "red", "nir08", "swir16", "swir22")
SIDE, OTHER_SIDE = 32, 48


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, make_raster: Callable[..., Path]) -> Path:
    """Stored whole numbers, as the configurations expect them."""
    pixels = np.random.default_rng(3).integers(200, 5000, (6, 70, 60)).astype(np.uint16)
    return make_raster(tmp_path_factory.mktemp("scene") / "scene.tif", pixels, names=BANDS)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, scene: Path) -> Callable[..., Path]:
    """The RUN of a checkpoint that is kept, for tiles of a side."""
    made: dict[tuple[str, int], Path] = {}

    def run(name: str, tile: int = SIDE) -> Path:
        if (name, tile) not in made:
            made[name, tile] = tmp_path_factory.mktemp("runs") / name
            options = ImportOptions(scenes=(scene,), tile=tile)
            folder = CHECKPOINTS / name
            import_terratorch(
                folder / "model.ckpt", folder / "config.yaml", made[name, tile], options=options
            )
        return made[name, tile]

    return run


def told(name: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels (1, T, C, side, side) and TerraTorch's logits (1, K, side, side)."""
    with np.load(CHECKPOINTS / name / "told.npz") as arrays:
        pixels, logits = arrays[f"pixels_{side}"], arrays[f"logits_{side}"]
    return pixels.swapaxes(1, 2) if pixels.ndim == 5 else pixels[:, np.newaxis], logits


@pytest.mark.chain
@pytest.mark.parametrize("side", [SIDE, OTHER_SIDE])
@pytest.mark.parametrize("name", [*NAMES, "quantity"])
def test_logits_and_quantities_are_those_of_terratorch(
    name: str, side: int, imported: Callable[..., Path]
) -> None:
    pixels, logits = told(name, side)
    with torch.inference_mode():
        found = load_run(imported(name, side)).model(torch.from_numpy(pixels).flatten(1, 2)).numpy()
    assert logits.std() > 0.05
    assert np.abs(found - logits).max() <= 1e-4


@pytest.mark.chain
@pytest.mark.parametrize("name", NAMES)
def test_the_exported_model_maps_as_terratorch_does(
    name: str, imported: Callable[..., Path], make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    pixels, logits = told(name, SIDE)
    dates = [
        make_raster(tmp_path / f"{number}.tif", date, names=BANDS)
        for number, date in enumerate(pixels[0])
    ]
    report = export(imported(name), tmp_path / "model.onnx")
    assert report.released
    *earlier, last = dates
    options = PredictOptions(earlier=tuple(earlier), probabilities=True)
    predict(last, tmp_path / "model.onnx", tmp_path / "map.tif", options=options)
    with rasterio.open(tmp_path / "map.tif") as written:
        classes = written.read(1)
    with rasterio.open(tmp_path / "map_probabilities.tif") as written:
        probs = written.read() * written.scales[0]
    best = np.sort(logits[0], axis=0)
    assert (best[-1] - best[-2]).min() > 1e-5  # no tie that rounding could break
    np.testing.assert_array_equal(classes, logits[0].argmax(axis=0))
    expected = torch.from_numpy(logits[0]).softmax(dim=0).numpy()
    assert np.ptp(expected) > 0.1
    assert np.abs(probs - expected).max() <= 0.003  # half of what a byte tells apart, and rounding


@pytest.mark.chain
def test_an_imported_regression_maps_the_quantity(
    scene: Path, make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    folder = CHECKPOINTS / "quantity"
    options = ImportOptions(scenes=(scene,), target="canopy_height:m")
    report = import_terratorch(
        folder / "model.ckpt", folder / "config.yaml", tmp_path / "run", options=options
    )
    assert "gives canopy_height (m); 6 real tiles" in str(report)
    assert "Maps canopy_height (m) from imagery." in (tmp_path / "run/README.md").read_text()
    assert export(tmp_path / "run", tmp_path / "model.onnx").released
    pixels, quantities = told("quantity", SIDE)
    image = make_raster(tmp_path / "image.tif", pixels[0, 0], names=BANDS)
    predict(image, tmp_path / "model.onnx", tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as written:
        assert written.descriptions == ("canopy_height",)
        assert written.units == ("m",)
        assert np.abs(written.read(1) - quantities[0, 0]).max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "key", "value", "given", "complaint"),
    [
        (
            "quantity",
            "head_final_act",
            "torch.nn.Tanh",
            {},
            r"Tanh cannot be imported; torch\.nn\.ReLU",
        ),
        ("quantity", "head_learned_upscale_layers", 1, {}, "learned_upscale_layers: 1 cannot be"),
        ("quantity", "num_outputs", 2, {}, "num_outputs: 2 cannot be imported; 1 can"),
        ("quantity", "rescale", True, {"classes": ("a", "b")}, "--classes are for a segmentation"),
        ("lora", "rescale", True, {"target": "height"}, "--target is for a regression"),
    ],
)
def test_what_cannot_be_of_a_quantity_is_said_in_one_line(
    name: str, key: str, value: Any, given: Any, complaint: str, scene: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load((CHECKPOINTS / name / "config.yaml").read_text())
    config["model"]["init_args"]["model_args"][key] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RecipeError, match=complaint) as caught:
        import_terratorch(
            CHECKPOINTS / name / "model.ckpt",
            tmp_path / "config.yaml",
            tmp_path / "run",
            options=ImportOptions(scenes=(scene,), **given),
        )
    assert "\n" not in str(caught.value)


TOKENS = [{"name": "ReshapeTokensToImage", "remove_cls_token": False}]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"backbone": "terramind_v1_base"},
            r"backbone_modalities: \[\] cannot be imported; one of S2L2A",
        ),
        (
            {"backbone": "terramind_v1_base", "backbone_modalities": ["S2L2A", "S1GRD"]},
            r"backbone_modalities: \['S2L2A', 'S1GRD'\] cannot be imported; one of",
        ),
        (
            {"backbone": "terramind_v1_tiny", "backbone_modalities": ["S1GRD"], "necks": TOKENS},
            r"is not of the terramind_v1_tiny_s1grd that its YAML describes \(.*sen1grd",
        ),
        (
            {"backbone": "terramind_v1_base", "backbone_modalities": ["RGB"], "necks": None},
            "terramind_v1_base gives tokens, and without ReshapeTokensToImage",
        ),
        (
            {"backbone": "clay_v1_base", "necks": TOKENS},
            "remove_cls_token is False, and clay_v1_base has a class token",
        ),
        (
            {"backbone": "dofa_base_patch16_224", "backbone_model_bands": ["BLUE", "NDVI"]},
            "model_bands: NDVI has no wavelength; COASTAL_AEROSOL, BLUE",
        ),
        (
            {"backbone": "ssl4eos12_resnet50_sentinel2_all_decur", "necks": None},
            r"is not of the (model|ssl4eo_resnet50_s2) that its YAML describes",
        ),
    ],
)
def test_what_cannot_be_of_another_backbone_is_said_in_one_line(
    given: dict[str, Any], complaint: str, scene: Path, tmp_path: Path
) -> None:
    folder = CHECKPOINTS / "quantity"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    network = config["model"]["init_args"]["model_args"]
    sizes = ("bands", "patch_size", "embed_dim", "depth", "num_heads")
    kept = {key: value for key, value in network.items() if key not in [f"backbone_{x}" for x in sizes]}
    four = {"decoder_channels": 8, "decoder": "FCNDecoder"}
    config["model"]["init_args"]["model_args"] = kept | four | given
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(
        torch.load(folder / "model.ckpt", weights_only=True)["state_dict"], tmp_path / "model.ckpt"
    )
    with pytest.raises((RecipeError, WeightsError), match=complaint) as caught:
        import_terratorch(
            tmp_path / "model.ckpt",
            tmp_path / "config.yaml",
            tmp_path / "run",
            options=ImportOptions(scenes=(scene,)),
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_the_yaml_says_is_in_the_run(imported: Callable[..., Path]) -> None:
    run = load_run(imported("lora-qkv"))
    assert run.spec.band_names == list(BANDS)
    assert [band.mean for band in run.spec.bands] == [0.19, 0.2, 0.21, 0.22, 0.2, 0.18]
    assert run.spec.units == "stored values x 0.0001"
    assert [item.name for item in run.spec.classes] == ["land", "water", "cloud"]
    assert (run.spec.tile, run.spec.overlap) == (32, 8)
    method = run.spec.method
    assert method is not None
    assert (method.r, method.alpha) == (2, 4)
    assert set(method.targets) == {"attn.q", "attn.v", "mlp.fc1", "mlp.fc2"}
    assert len(run.tiles.pixels) == 6
    assert 0.019 < run.tiles.pixels.min() < run.tiles.pixels.max() < 0.501  # scaled


def test_the_adapter_stays_one_in_pefts_own_format(imported: Callable[..., Path]) -> None:
    config = json.loads((imported("lora") / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    targets = set(load_run(imported("lora")).recipe.method.model_dump()["targets"])
    assert targets == {"attn.qkv", "attn.proj", "mlp.fc1", "patch_embed.proj"}


class Hostile:
    """Pickles as a call that makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.marker,))


def with_beside(tmp_path: Path, where: str, value: object) -> Path:
    """A checkpoint with ``value`` among its hyper-parameters, or in place of a tensor."""
    content = torch.load(CHECKPOINTS / "lora" / "model.ckpt", weights_only=True)
    content[where][next(iter(content[where]))] = value
    torch.save(content, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict"])
def test_code_in_a_checkpoint_is_never_run(where: str, tmp_path: Path) -> None:
    marker = tmp_path / "made"
    changed = with_beside(tmp_path, where, Hostile(marker))
    with pytest.raises(WeightsError, match="none is called") as caught:
        import_terratorch(changed, CHECKPOINTS / "lora" / "config.yaml", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(changed, weights_only=False)  # it was hostile
    assert marker.exists()


def test_objects_among_the_hyper_parameters_are_left_aside(scene: Path, tmp_path: Path) -> None:
    config, options = CHECKPOINTS / "lora" / "config.yaml", ImportOptions(scenes=(scene,))
    changed = with_beside(tmp_path, "hyper_parameters", [Path("a"), Hidden.ONE])
    import_terratorch(changed, config, tmp_path / "run", options=options)
    changed = with_beside(tmp_path, "state_dict", Hidden.ONE)
    with pytest.raises(WeightsError, match=r"holds an object of a class .* where tensors by name"):
        import_terratorch(changed, config, tmp_path / "other", options=options)


class Hidden(Enum):
    """As TerraTorch has for bands."""

    ONE = "one"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_broken_checkpoint_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "broken.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"broken\.ckpt") as caught:
        import_terratorch(
            tmp_path / "broken.ckpt", CHECKPOINTS / "lora" / "config.yaml", tmp_path / "run"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


DATA, TASK, NETWORK = "data.init_args", "model.init_args", "model.init_args.model_args"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        (f"{DATA}.means", None, "does not say the mean of each band .* with --mean"),
        (f"{DATA}.stds", [0.1] * 5, "5 numbers for the std of 6 bands"),
        (f"{DATA}.output_bands", [0, 1, 2, 3, 4, 5], r"does not name the bands .* with --bands"),
        ("data.class_path", "terratorch.datamodules.Sen1Floods11", None),
        (
            "model.class_path",
            "terratorch.tasks.ScalarRegressionTask",
            "ScalarRegressionTask; SemanticSegmentationTask and PixelwiseRegressionTask can",
        ),
        (f"{TASK}.model_factory", "SatMAEModelFactory", "SatMAEModelFactory; EncoderDecoderFactory"),
        (f"{TASK}.class_names", ["land"], "1 names are given for 3 classes"),
        (f"{NETWORK}.backbone", "satlas_swin_b", "satlas_swin_b cannot be imported; prithvi"),
        (f"{NETWORK}.backbone", "clay_v1_base", "peft_config: adapters of clay_v1_base cannot"),
        (f"{NETWORK}.backbone_vpt", True, "backbone_vpt: True cannot be imported"),
        (f"{NETWORK}.backbone_depth", 3, r"indices: count from 0 to 2 .* found \[0, 1, 2, 3\]"),
        (f"{NETWORK}.backbone_depth", 5, "is not of the model that its YAML describes"),
        (f"{NETWORK}.necks", [{"name": "AggregateTokens"}], "neck AggregateTokens cannot be imported"),
        (f"{NETWORK}.decoder", "ASPPDecoder", "ASPPDecoder cannot be imported; FCNDecoder"),
        (f"{NETWORK}.decoder_anything", 1, "decoder_anything is not known here"),
        (f"{NETWORK}.rescale", False, "the decoder gives maps of 16 for tiles of 32"),
        (f"{NETWORK}.num_classes", 1, "a segmentation has 2 or more"),
        (f"{NETWORK}.peft_config.method", "VERA", "VERA cannot be imported; LORA can"),
        (f"{NETWORK}.peft_config.peft_config_kwargs.r", 3, "adapters of another rank"),
        (f"{NETWORK}.peft_config.peft_config_kwargs.use_dora", True, "use_dora: True cannot"),
        (f"{NETWORK}.peft_config", 3, "peft_config must be a table, found 3"),
        (f"{NETWORK}.backbone_depth", -1, "model_args: depth must be greater than 0, found -1"),
        (f"{NETWORK}.head_dropout", 1.5, r"model_args: dropout must be less than 1, found 1\.5"),
        (f"{NETWORK}.backbone_patch_size", [], "backbone_patch_size must have a whole number"),
        (f"{TASK}.class_names", 3, "1 names are given for 3 classes"),
        (f"{TASK}.tiled_inference_parameters", "x", "tiled_inference_parameters must be a table"),
        (f"{DATA}.constant_scale", "x", "constant_scale must be a number, found 'x'"),
        (f"{DATA}.constant_scale", 0, "constant_scale must be greater than 0, found 0"),
        (f"{DATA}.constant_scale", -0.1, r"constant_scale must be greater than 0, found -0\.1"),
        (f"{DATA}.stds", [0.0] * 6, r"stds must be finite numbers, greater than 0; found 0\.0"),
        (f"{NETWORK}.aux_decoders", [{"name": "aux", "decoder": "FCNDecoder"}], None),
        (f"{DATA}.output_bands", 3, "does not name the bands"),
        (f"{DATA}.means", ["1e-1"] * 6, r"means holds the text '1e-1' .*1\.0e-1"),
        (f"{NETWORK}.peft_config", None, "has adapters, and its YAML no peft_config"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(
    key: str, value: Any, complaint: str | None, scene: Path, tmp_path: Path
) -> None:
    folder = CHECKPOINTS / "lora"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    table = config
    *parents, last = key.split(".")
    for part in parents:
        table = table[part]
    table[last] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # Weights alone, which do not say what the model was made with.
    content = torch.load(folder / "model.ckpt", weights_only=True)
    torch.save(content["state_dict"], tmp_path / "model.ckpt")
    options = ImportOptions(scenes=(scene,))
    run = tmp_path / "run"
    if complaint is None:
        import_terratorch(tmp_path / "model.ckpt", tmp_path / "config.yaml", run, options=options)
        return
    with pytest.raises((RecipeError, WeightsError), match=complaint) as caught:
        import_terratorch(tmp_path / "model.ckpt", tmp_path / "config.yaml", run, options=options)
    assert "\n" not in str(caught.value)
    assert not run.exists()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("backbone_num_heads", 4, r"backbone_num_heads is 4, and .*model\.ckpt was trained with 2\. "),
        ("backbone_num_heads", None, "backbone_num_heads is None, and .* was trained with 2"),
        ("peft_config.peft_config_kwargs.lora_alpha", 8, r"kwargs\.lora_alpha is 8, .* with 4\. "),
        ("peft_config.peft_config_kwargs.r", 4, r"kwargs\.r is 4, .* with 2\. "),
        ("peft_config.peft_config_kwargs.use_rslora", True, "use_rslora is True, .* with none"),
        ("decoder_align_corners", False, "decoder_align_corners is False, .* with none"),
        ("necks.0.indices", [0, 1, 3, 2], r"necks\.0\.indices is \[0, 1, 3, 2\], .*\[0, 1, 2, 3\]"),
        ("head_dropout", 0.3, None),
        ("decoder_align_corners", True, None),
        ("backbone_drop_path", 0.1, None),
        ("aux_decoders", [{"name": "aux", "decoder": "FCNDecoder"}], None),
    ],
)
def test_a_yaml_that_the_checkpoint_was_not_trained_by_is_refused_where_it_computes_something_else(
    key: str, value: Any, complaint: str | None, scene: Path, tmp_path: Path
) -> None:
    folder = CHECKPOINTS / "lora"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    table = config["model"]["init_args"]["model_args"]
    *parents, last = key.split(".")
    for part in parents:
        table = table[int(part) if part.isdecimal() else part]
    table[last] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options, run = ImportOptions(scenes=(scene,)), tmp_path / "run"
    if complaint is None:
        import_terratorch(folder / "model.ckpt", tmp_path / "config.yaml", run, options=options)
        return
    with pytest.raises(RecipeError, match=complaint) as caught:
        import_terratorch(folder / "model.ckpt", tmp_path / "config.yaml", run, options=options)
    assert "\n" not in str(caught.value)
    assert not run.exists()


def test_a_model_that_was_told_time_and_place_of_every_scene_is_refused(tmp_path: Path) -> None:
    folder = CHECKPOINTS / "dates"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["init_args"]["use_metadata"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RecipeError, match="use_metadata tells the model times and places") as caught:
        import_terratorch(folder / "model.ckpt", tmp_path / "config.yaml", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_dates_that_the_checkpoint_has_no_positions_for_are_refused(
    scene: Path, tmp_path: Path
) -> None:
    folder = CHECKPOINTS / "dates"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    network = config["model"]["init_args"]["model_args"]
    network["backbone_num_frames"] = network["necks"][1]["effective_time_dim"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    content = torch.load(folder / "model.ckpt", weights_only=True)
    torch.save(content["state_dict"], tmp_path / "weights.ckpt")
    for file, complaint in (
        (folder / "model.ckpt", "backbone_num_frames is 3, .* trained with 2"),
        (tmp_path / "weights.ckpt", "positions for 32 patches, .* the 3 dates"),
    ):
        with pytest.raises((RecipeError, WeightsError), match=complaint) as caught:
            import_terratorch(
                file,
                tmp_path / "config.yaml",
                tmp_path / "run",
                options=ImportOptions(scenes=(scene,)),
            )
        assert "\n" not in str(caught.value)


def test_a_band_that_the_images_do_not_have_is_named(tmp_path: Path) -> None:
    folder = CHECKPOINTS / "lora"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = config["data"]["init_args"]
    data |= {"dataset_bands": [*data["output_bands"][:-1], "SWIR2"]}
    data |= {"val_data_root": ".", "img_grep": "*"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        RecipeError, match=f"output_bands has {data['output_bands'][-1]}, which is none"
    ):
        import_terratorch(folder / "model.ckpt", tmp_path / "config.yaml", tmp_path / "run")


@pytest.mark.parametrize(
    ("ending", "change", "told"),
    [
        ("k_linear.weight", None, "a part of it is missing"),
        (
            "norm.weight",
            lambda value: value * np.nan,
            "numbers that are not finite, the first in model",
        ),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_or_holds_no_numbers_is_refused(
    ending: str, change: Callable[[Any], Any] | None, told: str, scene: Path, tmp_path: Path
) -> None:
    folder = CHECKPOINTS / "lora-qkv"
    content = torch.load(folder / "model.ckpt", weights_only=False)
    tensors = content["state_dict"]
    name = next(name for name in tensors if name.endswith(ending))
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value)
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(WeightsError, match=told):
        import_terratorch(
            tmp_path / "model.ckpt",
            folder / "config.yaml",
            tmp_path / "run",
            options=ImportOptions(scenes=(scene,)),
        )


def test_what_the_yaml_leaves_out_can_be_told(scene: Path, tmp_path: Path) -> None:
    folder = CHECKPOINTS / "lora"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"class_path": "Sen1Floods11NonGeoDataModule", "init_args": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    given = {"bands": BANDS, "mean": (0.2,) * 6, "std": (0.1,) * 6, "scenes": (scene,)}
    with pytest.raises(RecipeError, match=r"multiplied with .* --scale"):
        import_terratorch(
            folder / "model.ckpt",
            tmp_path / "config.yaml",
            tmp_path / "run",
            options=ImportOptions(**given),
        )
    report = import_terratorch(
        folder / "model.ckpt",
        tmp_path / "config.yaml",
        tmp_path / "run",
        options=ImportOptions(**given, scale=0.0001, classes=("a", "b", "c")),
    )
    assert [item.name for item in report.spec.classes] == ["a", "b", "c"]
    assert report.spec.bands[3].mean == 0.2


def test_a_tile_that_terratorch_would_pad_is_refused(scene: Path, tmp_path: Path) -> None:
    folder = CHECKPOINTS / "lora"
    options = ImportOptions(scenes=(scene,), tile=40)
    with pytest.raises(RecipeError, match=r"pad tiles of 40, .* multiple of 16\. Take --tile 32"):
        import_terratorch(
            folder / "model.ckpt", folder / "config.yaml", tmp_path / "run", options=options
        )


def test_the_images_of_the_configuration_are_read_by_position(
    make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(CHECKPOINTS / "lora", folder)
    (folder / "chips").mkdir()
    # swir22, swir16, nir08, red, green, blue and one more, as dataset_bands says.
    pixels = np.stack([np.full((40, 40), 1000 * place, np.uint16) for place in (6, 5, 4, 3, 2, 1, 9)])
    make_raster(folder / "chips" / "a_image.tif", pixels, names=(None,) * 7)
    with pytest.raises(RecipeError, match="Name one with --scene"):
        import_terratorch(folder / "model.ckpt", CHECKPOINTS / "lora" / "config.yaml", tmp_path / "no")
    import_terratorch(folder / "model.ckpt", folder / "config.yaml", tmp_path / "run")
    tiles = load_run(tmp_path / "run").tiles.pixels
    np.testing.assert_allclose(tiles[0, :, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], rtol=1e-3)


def test_the_command_makes_a_run_and_replaces_none(scene: Path, tmp_path: Path) -> None:
    folder = CHECKPOINTS / "dates"
    command = ["import", "terratorch", str(folder / "model.ckpt"), str(folder / "config.yaml")]
    command += ["-o", str(tmp_path / "run"), "--scene", str(scene)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "takes 2 dates of blue, green" in done.stdout
    assert "--scale 0.0001" in done.stdout
    with pytest.raises(OutputError, match="run"):
        CliRunner().invoke(app, command, catch_exceptions=False)
