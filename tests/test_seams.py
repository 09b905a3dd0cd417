"""Borders between tiles: seen where they are, and not where the landscape changes by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from geodeploy import PredictOptions, predict
from geodeploy.classmap import open_class_map
from geodeploy.errors import ModelError
from geodeploy.inspect import MapInspection, inspect
from geodeploy.seams import THRESHOLD, count_changes, measure_seams

Make = Callable[..., Any]
HEIGHT, WIDTH = 900, 1100


@pytest.fixture
def make_map(tmp_path: Path, make_raster: Make) -> Callable[..., Path]:
    """A map as if made on tiles of 224 with an overlap of 32: borders of ``crop`` at 208, 400 ..."""

    def made(classes: NDArray[np.uint8], blend: str = "crop", corner: str = "0, 0") -> Path:
        path: Path = make_raster(tmp_path / "map.tif", classes[np.newaxis], names=["class"], nodata=255)
        with rasterio.open(path, "r+") as dataset:
            dataset.update_tags(
                GEODEPLOY_TILE="224",
                GEODEPLOY_OVERLAP="32",
                GEODEPLOY_BLEND=blend,
                GEODEPLOY_SCENE_SIZE="5000 x 4000",
                GEODEPLOY_CORNER=corner,
            )
        return path

    return made


@pytest.fixture(scope="module")
def patches() -> NDArray[np.uint8]:
    """A landscape of three classes with edges of all directions, and no data in a corner."""
    random = np.random.default_rng(2)
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    waves = sum(
        np.sin(rows * row + cols * col + phase)
        for row, col, phase in random.normal(0, (0.1, 0.1, 3), (6, 3))
    )
    classes = np.digitize(waves, [-1, 1]).astype(np.uint8)
    classes[:90, :70] = 255
    return classes


@given(seed=st.integers(0, 99), height=st.integers(1, 1100), width=st.integers(1, 40))
def test_changes_are_counted_as_in_the_whole_array(
    tmp_path_factory: pytest.TempPathFactory, make_raster: Make, seed: int, height: int, width: int
) -> None:
    values = np.random.default_rng(seed).choice(np.array([0, 3, 255], np.uint8), (height, width))
    path = make_raster(tmp_path_factory.mktemp("map") / "map.tif", values[np.newaxis], nodata=255)
    with open_class_map(path) as source:
        across, down = count_changes(source)
    for found, array in ((across, values.T), (down, values)):
        upper, lower = array[:-1].astype(int), array[1:].astype(int)
        pairs = (upper < 255) & (lower < 255)
        assert (found.pairs == [0, *pairs.sum(axis=1)]).all()
        assert (found.changed == [0, *(pairs & (upper != lower)).sum(axis=1)]).all()


def test_a_landscape_alone_has_no_seams(make_map: Make, patches: NDArray[np.uint8]) -> None:
    for blend in ("crop", "flat", "cosine"):
        found = measure_seams(make_map(patches, blend))
        assert found.visible is False, blend


@pytest.mark.parametrize(
    ("blend", "first", "shown"),
    [("crop", 208, True), ("flat", 192, True), ("flat", 224, True), ("cosine", 208, True),
     ("crop", 192, False), ("flat", 208, False), ("crop", 215, False)],
)  # fmt: skip
def test_what_is_shifted_from_tile_to_tile_shows_on_the_lines_of_its_blend(
    make_map: Make, patches: NDArray[np.uint8], blend: str, first: int, shown: bool
) -> None:
    shifted = patches.copy()
    for start in range(first, WIDTH, 384):
        shifted[:, start : start + 192] = np.roll(patches, 5, axis=0)[:, start : start + 192]
    found = measure_seams(make_map(shifted, blend))
    assert found.visible is shown
    if shown:
        assert found.at_borders > 1.5 * found.elsewhere


def test_edges_of_a_sources_blocks_are_no_seams(make_map: Make, patches: NDArray[np.uint8]) -> None:
    for side in (256, 512):
        shifted = patches.copy()
        for start in range(side, WIDTH, 2 * side):
            shifted[:, start : start + side] = 2 - np.minimum(patches[:, start : start + side], 2)
        for blend in ("crop", "flat", "cosine"):
            assert measure_seams(make_map(shifted, blend)).visible is False, (side, blend)


def test_the_tiles_of_an_area_lie_where_the_scene_has_them(
    make_map: Make, patches: NDArray[np.uint8]
) -> None:
    shifted = patches.copy()
    for start in range(208 - 150, WIDTH, 384):
        shifted[:, start : start + 192] = np.roll(patches, 5, axis=0)[:, start : start + 192]
    assert measure_seams(make_map(shifted, corner="70, 150")).visible
    assert not measure_seams(make_map(shifted, corner="70, 0")).visible


def test_one_class_all_over_has_no_seams_and_small_maps_have_too_few_lines(make_map: Make) -> None:
    found = measure_seams(make_map(np.ones((HEIGHT, WIDTH), np.uint8)))
    assert (found.at_borders, found.elsewhere, found.visible) == (0, 0, False)
    nothing = measure_seams(make_map(np.full((HEIGHT, WIDTH), 255, np.uint8)))
    small = measure_seams(make_map(np.ones((200, 210), np.uint8)))
    for found in (small, nothing):
        assert (found.lines, found.z, found.visible) == (0, None, None)
        assert str(found) == "too few to say (0 lines)"


def test_a_map_that_does_not_name_its_tiles_is_an_error(tmp_path: Path, make_raster: Make) -> None:
    path = make_raster(tmp_path / "map.tif", np.ones((1, 9, 9), np.uint8))
    with pytest.raises(ModelError, match="does not say on which tiles"):
        measure_seams(path)


@pytest.fixture(scope="module")
def with_edges(tmp_path_factory: pytest.TempPathFactory, make_model: Make, make_spec: Make) -> Any:
    """A model that sees zeros beyond a tile's edge, seven pixels deep."""
    spec = make_spec(values=(0, 1, 3), tile=64, overlap=16)
    return make_model(tmp_path_factory.mktemp("edges") / "model.onnx", spec, kernels=(15,), seed=4)


def test_a_model_with_edge_effects_shows_its_tiles_without_blending_alone(
    with_edges: Any, pointwise: Any, real_scene: Path, tmp_path: Path
) -> None:
    def seams(model: Any, **options: Any) -> Any:
        options = PredictOptions(device="cpu", overwrite=True, **options)
        predict(real_scene, model.path, tmp_path / "map.tif", options=options)
        found = inspect(tmp_path / "map.tif")
        assert isinstance(found, MapInspection)
        assert f"tile borders   {found.seams}" in str(found)
        return found.seams

    hard = seams(with_edges, blend="crop", overlap=0)
    assert hard.visible
    assert "they show" in str(hard)
    assert hard.at_borders > 2 * hard.elsewhere
    with rasterio.open(real_scene) as scene:
        west, north, east, south = (*(scene.transform @ (47, 33)), *(scene.transform @ (431, 470)))
        box = f"{west},{south},{east},{north}@{scene.crs}"
    assert seams(with_edges, blend="crop", overlap=0, aoi=box).visible
    soft = seams(with_edges, blend="cosine")
    assert not soft.visible
    assert soft.z < THRESHOLD - 1
    assert not seams(pointwise, blend="crop", overlap=0).visible


def on_real_scenes() -> list[Any]:
    """Scenes, options that bring them to reflectance, and what of them is mapped."""
    data = Path(__file__).parents[2] / "shared" / "data"  # where the recipes look for theirs
    coast = {"scale": 1e-4, "aoi": "440000,4165000,448000,4173000@EPSG:32618"}
    gulf = {"scale": 2e-5, "offset": -0.1, "bands": ("2", "3", "4", "5", "6", "7")}
    return [
        pytest.param(data / "s2-virginia-coast" / "s2_l1c_6band_10m.tif", coast, id="sentinel2"),
        pytest.param(data / "l8-cloudy-bqa" / "l8_l1_10band_30m.tif", gulf, id="landsat8"),
        pytest.param(None, {}, id="the sample"),
    ]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(("scene", "options"), on_real_scenes())
def test_the_models_map_of_a_real_scene_has_no_seams(
    scene: Path | None, options: dict[str, Any], real_scene: Path, tmp_path: Path
) -> None:
    scene = scene or real_scene
    if not scene.exists():
        pytest.skip(f"{scene} is not there")
    predict(scene, output=tmp_path / "map.tif", options=PredictOptions(device="cpu", **options))
    found = measure_seams(tmp_path / "map.tif")
    assert found.visible is False, found
