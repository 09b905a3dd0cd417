"""Models whose answer is known, and rasters: functions that build values, handed out as fixtures."""

import json
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from geodeploy.spec import METADATA_KEY, Band, ModelSpec, SegmentationClass, Target, default_color

# A shell that runs the suite in the background has it ignored, and what the tests start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where it is set, pytest compares files' bytes one by one to print how they differ, which takes hours.
ON_CI = bool(os.environ.pop("CI", ""))

settings.register_profile(
    "geodeploy",
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=ON_CI,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("geodeploy")

SIX_BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")
UTM = CRS.from_epsg(32616)
GRID = Affine(30.0, 0.0, 200_000.0, 0.0, -30.0, 4_300_000.0)


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
"""Learns from a corner of the real scene in a second."""


@dataclass(frozen=True)
class TinyModel:
    """An ONNX file of a few convolutions, with the weights for a judge to work with."""

    path: Path
    weights: tuple[NDArray[np.float32], ...]
    """One array (out, in, side, side) a layer; each layer pads with zeros, ReLU between layers."""
    spec: ModelSpec | None

    @property
    def radius(self) -> int:
        """How far a pixel looks."""
        return sum(layer.shape[-1] // 2 for layer in self.weights)

    def on_the_whole(self, pixels: NDArray[Any]) -> NDArray[np.float64]:
        """Logits (K, H, W) of pixels (C, H, W) of any size: direct convolution in float64."""
        values = pixels.astype(np.float64)
        for place, layer in enumerate(self.weights):
            if place:
                values = np.maximum(values, 0)
            side, (height, width) = layer.shape[-1], values.shape[1:]
            padded = np.pad(values, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
            values = sum(
                np.tensordot(
                    layer[:, :, row, col].astype(np.float64),
                    padded[:, row : row + height, col : col + width],
                    axes=1,
                )
                for row in range(side)
                for col in range(side)
            )
        return values


def build_spec(
    bands: Sequence[str] = SIX_BANDS,
    values: Sequence[int] = (0, 1, 3, 4),
    *,
    tile: int = 64,
    overlap: int = 16,
    mean: float = 0.2,
    valid_range: tuple[float, float] = (-0.2, 1.6),
    seen: tuple[float, float] | None = None,
    targets: Sequence[Target] = (),
    **more: Any,
) -> ModelSpec:
    if targets:
        more |= {"task": "regression", "targets": targets}
        values = ()
    classes = tuple(
        SegmentationClass(value=value, name=f"class {value}", color=default_color(place))
        for place, value in enumerate(values)
    )
    return ModelSpec(
        name="tiny",
        bands=tuple(
            Band(name=name, mean=mean, std=0.1, valid_range=valid_range, seen=seen) for name in bands
        ),
        tile=tile,
        overlap=overlap,
        **({"classes": classes} if classes else {}),
        **more,
    )


def build_model(
    path: Path,
    spec: ModelSpec | None = None,
    *,
    kernels: Sequence[int] = (1,),
    whole_numbers: bool = False,
    seed: int = 0,
    metadata: str | None = "the spec",
    shape: tuple[int, int, int] | None = None,
    weights: Sequence[NDArray[np.float32]] | None = None,
) -> TinyModel:
    """A chain of convolutions of ``kernels``' sides, written to ``path``.

    Args:
        path: The ONNX file.
        spec: What the model says of itself; six bands and four classes without it.
        kernels: Sides of the layers; (1,) looks at each pixel alone.
        whole_numbers: Weights from -3 to 3 without fractions, so that float32 makes no error.
        seed: Of the weights.
        metadata: Written where the spec belongs; None for none.
        shape: Bands, classes and tile of the graph where they are to differ from the spec.
        weights: Instead of random ones.
    """
    spec = spec or build_spec()
    bands, classes, tile = shape or (len(spec.bands), len(spec.outputs), spec.tile)
    random = np.random.default_rng(seed)
    sizes = [bands, *[2] * (len(kernels) - 1), classes]
    layers = weights or [
        random.integers(-3, 4, (after, before, side, side)).astype(np.float32)
        if whole_numbers
        else random.normal(scale=3 / side**2, size=(after, before, side, side)).astype(np.float32)
        for before, after, side in zip(sizes, sizes[1:], kernels, strict=False)
    ]
    nodes, value = [], "pixels"
    for place, layer in enumerate(layers):
        if place:
            nodes.append(helper.make_node("Relu", [value], [f"relu{place}"]))
            value = f"relu{place}"
        last = place == len(layers) - 1 and not spec.whole_tiles
        out = "logits" if last else f"conv{place}"
        nodes.append(
            helper.make_node("Conv", [value, f"w{place}"], [out], pads=[layer.shape[-1] // 2] * 4)
        )
        value = out
    given = ["batch", classes, tile, tile]
    if spec.whole_tiles:  # the mean of what each pixel gives
        nodes.append(helper.make_node("GlobalAveragePool", [value], ["means"]))
        nodes.append(helper.make_node("Flatten", ["means"], ["logits"]))
        given = ["batch", classes]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", bands, tile, tile])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, given)],
        [numpy_helper.from_array(layer, f"w{place}") for place, layer in enumerate(layers)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if metadata is not None:
        text = spec.to_json() if metadata == "the spec" else metadata
        helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, path)
    return TinyModel(path, tuple(layers), spec if metadata == "the spec" else None)


def build_raster(
    path: Path,
    pixels: NDArray[Any],
    *,
    names: Sequence[str | None] = SIX_BANDS,
    crs: CRS | None = UTM,
    transform: Affine = GRID,
    nodata: float | None = None,
    scales: Sequence[float] | None = None,
    offsets: Sequence[float] | None = None,
    mask: NDArray[np.bool_] | None = None,
    driver: str = "GTiff",
    **profile: Any,
) -> Path:
    """A raster of ``pixels`` (C, H, W); ``profile`` goes to GDAL's driver."""
    if driver == "GTiff":
        # Or GDAL would take four bands of bytes for colours with alpha.
        profile = {"photometric": "minisblack", "alpha": "unspecified"} | profile
    count, height, width = pixels.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver=driver,
            count=count,
            height=height,
            width=width,
            dtype=pixels.dtype,
            crs=crs,
            transform=transform,
            nodata=nodata,
            **profile,
        ) as dataset:
            dataset.write(pixels)
            for index, name in enumerate(names[:count], 1):
                if name:
                    dataset.set_band_description(index, name)
            if scales is not None:
                dataset.scales = scales
            if offsets is not None:
                dataset.offsets = offsets
            if mask is not None:
                dataset.write_mask(mask)
    return path


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpec]:
    return build_spec


@pytest.fixture(scope="session")
def make_model() -> Callable[..., TinyModel]:
    return build_model


@pytest.fixture(scope="session")
def make_raster() -> Callable[..., Path]:
    return build_raster


@pytest.fixture(scope="session")
def real_scene() -> Path:
    """Landsat 8 over clouds: six bands, uint16 with scale and offset tags, an odd size, a CRS."""
    return Path(str(files("geodeploy"))) / "assets" / "landsat8_cloudy.tif"


@pytest.fixture(scope="session")
def pointwise(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Six bands, four classes, tile 64, overlap 16; each pixel for itself."""
    return build_model(tmp_path_factory.mktemp("model") / "pointwise.onnx")


@pytest.fixture
def small_scene(tmp_path: Path) -> Path:
    """100 x 130 pixels of reflectance in six named bands, whose answer nobody needs to know."""
    pixels = np.random.default_rng(5).uniform(0.0, 0.6, (6, 100, 130)).astype(np.float32)
    return build_raster(tmp_path / "small.tif", pixels)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a test of the chain that is skipped has failed: nobody would notice otherwise."""
    report = yield
    if report.skipped and ON_CI and item.get_closest_marker("chain"):
        report.outcome = "failed"
        report.longrepr = f"a test of the chain was skipped under CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Iterator[Path]:
    """Beside 131 x 117 pixels of the scene that ships, all three classes among them; read only."""
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
    before = _contents(folder)
    yield path
    assert _contents(folder) == before, "a test has changed what all others read"


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def tune(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A RUN of the tiny recipe with overrides; the same overrides give the same RUN, trained once."""
    made: dict[str, Path] = {}

    def tuned(*overrides: str) -> Path:
        key = json.dumps(overrides)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "run"
            import torch

            from geodeploy.train import train

            torch.set_num_threads(1)  # sums of several threads differ in their last bits
            train(recipe_file, made[key], overrides=overrides)
        return made[key]

    return tuned
