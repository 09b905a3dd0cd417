import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.crs import CRS
from rio_cogeo.cogeo import cog_validate

from geodeploy.errors import OutputError
from geodeploy.spec import ModelSpec
from geodeploy.writer import MapWriter, aux_path, check_output

MakeSpec = Callable[..., ModelSpec]
VALUES = (0, 3, 7)


@pytest.fixture
def spec(make_spec: MakeSpec) -> ModelSpec:
    return make_spec(values=VALUES)


def write(
    path: Path,
    classes: NDArray[np.uint8],
    spec: ModelSpec,
    *,
    strips: list[int] | None = None,
    **more: Any,
) -> MapWriter:
    options: dict[str, Any] = {
        "crs": CRS.from_epsg(32616),
        "transform": Affine(30, 0, 4e5, 0, -30, 3e6),
        "tags": {"GEODEPLOY_MODEL": "tiny"},
    }
    height, width = classes.shape
    with MapWriter(
        path,
        height=height,
        width=width,
        classes=spec.classes,
        nodata=spec.nodata,
        **(options | more),
    ) as writer:
        row = 0
        for rows in strips or [height]:
            writer.write(row, classes[row : row + rows])
            row += rows
        writer.finish()
    return writer


def some(height: int, width: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(height)
    return random.choice(np.array([*VALUES, 255], np.uint8), (height, width))


@given(data=st.data(), height=st.integers(1, 1100), width=st.integers(1, 40))
def test_what_is_written_in_strips_of_any_height_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    make_spec: MakeSpec,
    data: st.DataObject,
    height: int,
    width: int,
) -> None:
    path = tmp_path_factory.mktemp("map") / "map.tif"
    classes, strips, left = some(height, width), [], height
    while left:
        strips.append(data.draw(st.integers(min(left, 100), left)))
        left -= strips[-1]
    writer = write(path, classes, make_spec(values=VALUES), strips=strips)
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(1), classes)
    for value in range(256):
        assert writer.counts[value] == (classes == value).sum()


def test_the_map_is_a_valid_cog_on_the_grid_it_was_given(tmp_path: Path, spec: ModelSpec) -> None:
    path, crs, transform = tmp_path / "map.tif", CRS.from_epsg(32616), Affine(30, 1, 4e5, 2, 30, 3e6)
    write(path, some(1300, 700), spec, crs=crs, transform=transform)
    assert cog_validate(path) == (True, [], [])
    with rasterio.open(path) as dataset:
        assert (dataset.crs, dataset.transform) == (crs, transform)
        assert dataset.profile["dtype"] == "uint8"
        assert dataset.nodata == 255
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.overviews(1) == [2, 4]
        assert dataset.tags()["GEODEPLOY_MODEL"] == "tiny"
        assert dataset.descriptions == ("class",)


def test_overviews_show_the_class_most_pixels_have_and_never_a_value_in_between(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path = tmp_path / "map.tif"
    most = np.random.default_rng(0).choice(np.array(VALUES, np.uint8), (400, 400))
    classes = np.kron(most, np.ones((2, 2), np.uint8))
    # One of each four pixels, where nearest neighbour would look, is of another class.
    classes[::2, ::2] = np.random.default_rng(1).permuted(most, axis=0)
    write(path, classes, spec)
    with rasterio.open(path, overview_level=0) as dataset:
        np.testing.assert_array_equal(dataset.read(1), most)


def test_colours_are_in_the_file_and_names_beside_it(tmp_path: Path, spec: ModelSpec) -> None:
    path = tmp_path / "map.tif"
    write(path, some(50, 50), spec)
    with rasterio.open(path) as dataset:
        colors = dataset.colormap(1)
        assert [colors[item.value][:3] for item in spec.classes] == [item.rgb for item in spec.classes]
        assert colors[255] == (0, 0, 0, 0)
    band = ElementTree.parse(aux_path(path)).getroot().find("PAMRasterBand")
    assert band is not None
    names = [category.text or "" for category in band.iterfind("CategoryNames/Category")]
    assert [names[item.value] for item in spec.classes] == [item.name for item in spec.classes]
    assert len(names) == max(VALUES) + 1
    table = band.find("GDALRasterAttributeTable")
    assert table is not None
    assert [column.findtext("Name") for column in table.iterfind("FieldDefn")] == [
        *("Value", "Class", "Red", "Green", "Blue")
    ]
    rows = [[cell.text for cell in row.iterfind("F")] for row in table.iterfind("Row")]
    assert rows == [[str(item.value), item.name, *map(str, item.rgb)] for item in spec.classes]


def test_gdal_reads_the_statistics_without_nodata(tmp_path: Path, spec: ModelSpec) -> None:
    classes = some(60, 60)
    write(tmp_path / "map.tif", classes, spec)
    data = classes[classes != 255]
    with rasterio.open(tmp_path / "map.tif") as dataset:
        tags = dataset.tags(1)
        assert float(tags["STATISTICS_MEAN"]) == pytest.approx(data.mean())
        assert float(tags["STATISTICS_MAXIMUM"]) == 7


@pytest.mark.parametrize("name", ["<b>&\"'", "Waldfläche", "水"])
def test_names_in_any_script_survive(tmp_path: Path, make_spec: MakeSpec, name: str) -> None:
    spec = make_spec(values=(0, 1))
    classes = (spec.classes[0].model_copy(update={"name": name}), spec.classes[1])
    write(
        tmp_path / "map.tif", np.zeros((9, 9), np.uint8), spec.model_copy(update={"classes": classes})
    )
    found = ElementTree.parse(tmp_path / "map.tif.aux.xml").findtext(".//Category")
    assert found == name


def test_a_map_without_georeference_is_written_without_a_warning(
    tmp_path: Path, spec: ModelSpec
) -> None:
    write(tmp_path / "map.tif", some(9, 9), spec, crs=None, transform=Affine.identity())
    assert (tmp_path / "map.tif").exists()


def test_nothing_but_the_map_and_its_names_is_left_in_the_folder(
    tmp_path: Path, spec: ModelSpec
) -> None:
    write(tmp_path / "map.tif", some(600, 30), spec)
    assert {path.name for path in tmp_path.iterdir()} == {"map.tif", "map.tif.aux.xml"}


def test_a_map_has_the_permissions_of_any_new_file(tmp_path: Path, spec: ModelSpec) -> None:
    write(tmp_path / "map.tif", some(9, 9), spec)
    (tmp_path / "plain").touch()
    for path in (tmp_path / "map.tif", tmp_path / "map.tif.aux.xml"):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("rows", [0, 100, 600])
def test_a_run_that_ends_early_leaves_nothing_and_spares_the_map_that_was_there(
    tmp_path: Path, spec: ModelSpec, stop: type[BaseException], rows: int
) -> None:
    path = tmp_path / "map.tif"
    path.write_text("the map of yesterday")

    def run() -> None:
        with MapWriter(
            path,
            height=700,
            width=30,
            crs=None,
            transform=Affine.identity(),
            classes=spec.classes,
            nodata=255,
            tags={},
        ) as writer:
            writer.write(0, some(rows, 30))
            assert len(list(tmp_path.iterdir())) == 2
            raise stop

    with pytest.raises(stop):
        run()
    assert [place.name for place in tmp_path.iterdir()] == ["map.tif"]
    assert path.read_text() == "the map of yesterday"


def test_rows_that_do_not_follow_or_are_missing_are_a_bug_that_shows(
    tmp_path: Path, spec: ModelSpec
) -> None:
    with pytest.raises(AssertionError, match="10 of 20 rows"):
        write(tmp_path / "map.tif", some(20, 30), spec, strips=[10])
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_refused_with_the_way_out(tmp_path: Path) -> None:
    there = tmp_path / "there.tif"
    there.touch()
    for output, overwrite, complaint in (
        (tmp_path / "no" / "map.tif", True, r"folder .*no does not exist.* mkdir -p"),
        (there, False, r"there\.tif exists.* --overwrite"),
        (tmp_path, True, r"is a folder; a file name is needed"),
        (there / "map.tif", True, r"folder .*there\.tif does not exist|not a folder"),
    ):
        with pytest.raises(OutputError, match=complaint):
            check_output(output, [], overwrite=overwrite)
    check_output(there, [], overwrite=True)
    check_output(tmp_path / "new.tif", [tmp_path / "gone.tif"], overwrite=False)


def test_an_output_that_is_an_input_under_another_name_is_refused(tmp_path: Path) -> None:
    scene = tmp_path / "scene.tif"
    scene.touch()
    (tmp_path / "symbolic.tif").symlink_to(scene)
    os.link(scene, tmp_path / "hard.tif")
    for name in ("scene.tif", "symbolic.tif", "hard.tif", "../" + tmp_path.name + "/scene.tif"):
        with pytest.raises(OutputError, match="is the input itself"):
            check_output(tmp_path / name, [scene], overwrite=True)


def test_a_folder_that_cannot_be_written_is_told(spec: ModelSpec) -> None:
    # Nobody may make a folder under /proc, root neither.
    folder = Path("/proc/self")
    if not folder.is_dir():
        pytest.skip("this system has no /proc")
    with pytest.raises(OutputError, match="The folder /proc/self cannot be written"):
        write(folder / "map.tif", some(9, 9), spec)
