"""Coarse maps of what whole tiles show. The judge runs the ONNX file on each tile, cut by hand."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

import geodeploy.engine
from geodeploy import PredictOptions, predict
from geodeploy.cells import CellGrid, coarse
from geodeploy.derived import DerivedOptions
from geodeploy.errors import ModelError, RecipeError
from geodeploy.inspect import inspect
from geodeploy.spec import METADATA_KEY, ModelSpec

Make = Callable[..., Any]
TILE, CLASSES = 16, 3


def build(path: Path, spec: ModelSpec, *, sigmoid: bool = False) -> Path:
    """An ONNX file whose logits are sums of products of the bands' means over corners of the tile."""
    random = np.random.default_rng(4)
    weights = random.normal(0, 3, (len(spec.outputs), len(spec.bands), spec.tile, spec.tile))
    weights = (weights / spec.tile).astype(np.float32)
    last = ["Conv", "Flatten"] + ["Sigmoid"] * sigmoid
    names = ["pixels", *(f"value{place}" for place in range(len(last) - 1)), spec.output]
    nodes = [
        helper.make_node(kind, [names[place], "weights"] if kind == "Conv" else [names[place]],
                         [names[place + 1]])
        for place, kind in enumerate(last)
    ]  # fmt: skip
    size = ["batch", len(spec.bands), spec.tile, spec.tile]
    graph = helper.make_graph(
        nodes,
        "tiles",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info(spec.output, TensorProto.FLOAT, ["batch", len(spec.outputs)])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def spec(make_spec: Make) -> ModelSpec:
    values = range(CLASSES)
    made: ModelSpec = make_spec(("red", "nir"), values, tile=TILE, overlap=0, task="multilabel")
    return made


@pytest.fixture(scope="module")
def model(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model") / "m.onnx", spec)


def read(path: Path) -> NDArray[np.uint8]:
    with rasterio.open(path) as dataset:
        return dataset.read()


@cache
def session_of(model: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def stored(model: Path, tile: NDArray[np.float32], name: str = "logits") -> NDArray[np.uint8]:
    """Bytes of the probabilities (K,) of a tile (C, h, w), NaN without data, mirrored if too small."""
    filled = np.where(np.isnan(tile).any(axis=0), np.float32(0.2), tile)
    below, right = TILE - tile.shape[1], TILE - tile.shape[2]
    filled = np.pad(filled, ((0, 0), (0, below), (0, right)), mode="reflect")
    (found,) = session_of(model).run([name], {"pixels": filled[np.newaxis]})
    values = found[0].astype(np.float64)
    shares = 1 / (1 + np.exp(-values)) if name == "logits" else values
    steps = shares * 250
    assert np.abs(steps % 1 - 0.5).min() > 1e-4  # no tie hangs on the last bits
    return np.rint(steps).astype(np.uint8)


def judge(model: Path, pixels: NDArray[np.float32], overlap: int = 0) -> NDArray[np.uint8]:
    """The map (K, rows, cols): each cell from the tile around it, cut by hand."""
    height, width = pixels.shape[1:]
    side = TILE - overlap
    rows, cols = -(-height // side), -(-width // side)
    found = np.full((CLASSES, rows, cols), 255, np.uint8)
    for row in range(rows):
        for col in range(cols):
            cell = pixels[:, row * side : row * side + side, col * side : col * side + side]
            if np.isnan(cell).any(axis=0).all():
                continue
            top, left = row * side - overlap // 2, col * side - overlap // 2
            top, left = min(max(top, 0), max(height - TILE, 0)), min(max(left, 0), max(width - TILE, 0))
            found[:, row, col] = stored(model, pixels[:, top : top + TILE, left : left + TILE])
    return found


def scene_of(height: int, width: int, holes: Sequence[tuple[slice, slice]] = ()) -> NDArray[np.float32]:
    pixels = np.random.default_rng(height * width).uniform(0, 0.6, (2, height, width))
    for hole in holes:
        pixels[:, *hole] = np.nan
    return pixels.astype(np.float32)


@pytest.mark.parametrize(
    ("height", "width", "overlap"),
    [
        (9, 11, 0),
        (16, 16, 0),
        (15, 33, 5),
        (17, 32, 0),
        (47, 49, 0),
        (47, 49, 5),
        (64, 20, 8),
        (17, 9, 15),
    ],
)
def test_each_cell_has_the_answer_for_the_tile_around_it(
    model: Path, make_raster: Make, tmp_path: Path, height: int, width: int, overlap: int
) -> None:
    holes = [np.s_[0:14, 0:20], np.s_[30:48, 16:40]] if width > 40 else []
    pixels = scene_of(height, width, holes)
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red", "nir"))
    report = predict(
        made, model, tmp_path / "map.tif", options=PredictOptions(overlap=overlap, batch=3)
    )
    found, expected = read(report.map), judge(model, pixels, overlap)
    np.testing.assert_array_equal(found, expected)
    side = TILE - overlap
    assert (report.height, report.width) == (-(-height // side), -(-width // side))
    assert report.valid_pixels == (expected[0] != 255).sum()
    assert (expected == 255).any() == bool(holes)
    for label, band in zip(report.labels, expected, strict=True):
        known = band[band != 255] / 250
        assert label.cells == (known >= 0.5).sum()
        assert label.mean == pytest.approx(known.mean())


def test_the_file_says_where_its_cells_lie_and_what_they_hold(
    model: Path, make_raster: Make, tmp_path: Path
) -> None:
    turned = Affine(30, 5, 2e5, -6, -28, 4.3e6)
    for name, grid in (("up", Affine(30, 0, 2e5, 0, 30, 4e6)), ("turned", turned)):
        made = make_raster(
            tmp_path / f"{name}.tif", scene_of(50, 40), names=("red", "nir"), transform=grid
        )
        predict(made, model, tmp_path / "map.tif", options=PredictOptions(overwrite=True))
        with rasterio.open(tmp_path / "map.tif") as dataset:
            assert dataset.crs.to_epsg() == 32616
            assert dataset.shape == (4, 3)
            for row, col in ((0, 0), (3, 2), (4, 3)):
                expected = grid @ (col * TILE, row * TILE)
                assert dataset.transform @ (col, row) == pytest.approx(expected)
            assert dataset.dtypes == ("uint8",) * CLASSES
            assert dataset.nodata == 255
            assert dataset.scales == (0.004,) * CLASSES
            assert dataset.descriptions == ("class 0", "class 1", "class 2")
            assert dataset.tags()["GEODEPLOY_LABELS"] == "class 0; class 1; class 2"
            assert dataset.tags()["GEODEPLOY_BLEND"] == "none"
    assert cog_validate(tmp_path / "map.tif") == (True, [], [])
    assert "Category" not in (tmp_path / "map.tif.aux.xml").read_text()
    assert "16" in str(inspect(tmp_path / "map.tif"))
    assert "of tiles as a whole" in str(inspect(model))


def test_in_parts_in_panels_and_after_a_stop_the_bytes_are_the_same(
    model: Path, make_raster: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = scene_of(1100, 150, [np.s_[500:700, 20:90]])
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red", "nir"))
    whole = predict(made, model, tmp_path / "whole.tif", options=PredictOptions(batch=5))
    assert whole.height == 69

    def stop(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(made, model, tmp_path / "again.tif", progress=stop)
    assert predict(made, model, tmp_path / "again.tif").pixels_kept == 32 * 10
    monkeypatch.setattr(geodeploy.engine, "PANEL_BYTES", 2**18)
    predict(made, model, tmp_path / "panels.tif")
    for name in ("again.tif", "panels.tif"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_an_area_is_a_cut_of_the_whole_map_wherever_it_begins(
    model: Path, make_raster: Make, tmp_path: Path
) -> None:
    made = make_raster(tmp_path / "scene.tif", scene_of(100, 90), names=("red", "nir"))
    predict(made, model, tmp_path / "whole.tif")
    grid = rasterio.open(made).transform
    (left, top), (right, bottom) = grid @ (20, 13), grid @ (61, 63)
    box = f"{left},{bottom},{right},{top}@EPSG:32616"
    cut = predict(made, model, tmp_path / "cut.tif", options=PredictOptions(aoi=box))
    np.testing.assert_array_equal(read(tmp_path / "cut.tif"), read(tmp_path / "whole.tif")[:, 0:4, 1:4])
    with rasterio.open(tmp_path / "cut.tif") as dataset:
        assert dataset.transform @ (0, 0) == pytest.approx(grid @ (TILE, 0))
    assert cut.tiles_run == 12


def test_a_graph_that_ends_in_a_sigmoid_is_taken_as_it_is(
    spec: ModelSpec, make_raster: Make, tmp_path: Path
) -> None:
    described = ModelSpec.model_validate(spec.model_dump() | {"output": "probabilities"})
    model = build(tmp_path / "m.onnx", described, sigmoid=True)
    pixels = scene_of(40, 33)
    made = make_raster(tmp_path / "scene.tif", pixels, names=("red", "nir"))
    report = predict(made, model, tmp_path / "map.tif")
    top = stored(model, pixels[:, :TILE, :TILE], "probabilities")
    np.testing.assert_array_equal(read(report.map)[:, 0, 0], top)
    wrong = build(tmp_path / "w.onnx", described)
    with pytest.raises(
        ModelError, match=r'values from .* If it has no sigmoid, write "output": "logits"'
    ):
        predict(made, wrong, tmp_path / "wrong.tif")


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--blend", {"blend": "flat"}),
        ("--confidence", {"confidence": True}),
        ("--probabilities", {"probabilities": True}),
        ("--disagreement", {"disagreement": True}),
        ("--smooth", {"smooth": 3}),
        ("--sieve", {"sieve": 9}),
        ("--polygons", {"derived": DerivedOptions(polygons=Path(".geojson"))}),
        ("--area", {"derived": DerivedOptions(area=Path(".csv"))}),
        ("--preview", {"derived": DerivedOptions(preview=Path(".png"))}),
        ("--on-error skip", {"on_error": "skip"}),
    ],
)
def test_what_is_for_maps_of_pixels_is_refused_before_any_work(
    model: Path, make_raster: Make, tmp_path: Path, flag: str, options: dict[str, Any]
) -> None:
    made = make_raster(tmp_path / "scene.tif", scene_of(20, 20), names=("red", "nir"))
    with pytest.raises(
        RecipeError, match=rf"^{flag} is for maps pixel by pixel; the model tiny"
    ) as caught:
        predict(made, model, tmp_path / "map.tif", options=PredictOptions(**options))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.data())
def test_every_cell_lies_in_its_tile_and_all_cells_cover_the_raster_once(
    height: int, width: int, tile: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    grid = CellGrid(height, width, tile, overlap)
    assert grid.cell == tile - overlap
    covered = np.zeros((height, width), int)
    for item in grid:
        for span, length in ((item.rows, height), (item.cols, width)):
            assert span.start <= span.begin < span.settled <= span.stop <= length
            assert span.stop - span.start == min(tile, length)
        covered[item.rows.begin : item.rows.settled, item.cols.begin : item.cols.settled] += 1
    assert (covered == 1).all()


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 20))
def test_a_window_in_cells_holds_the_window_and_no_cell_more(start: int, size: int, cell: int) -> None:
    found = coarse(Window(start, start, size, size), cell)
    first, count = int(found.col_off), int(found.width)
    assert first * cell <= start < (first + 1) * cell
    assert (first + count - 1) * cell < start + size <= (first + count) * cell
    assert (found.row_off, found.height) == (found.col_off, found.width)
