import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
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
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from geodeploy.blend import Block
from geodeploy.cog import Frame, aux_path
from geodeploy.errors import OutputError
from geodeploy.parts import Journal, Part, forget
from geodeploy.spec import ModelSpec
from geodeploy.writer import TIFF, MapWriter, check_output, followed

MakeSpec = Callable[..., ModelSpec]
VALUES = (0, 3, 7)


@pytest.fixture
def spec(make_spec: MakeSpec) -> ModelSpec:
    return make_spec(values=VALUES)


class Told:
    """Writes what the blocks hold, as it is."""

    name, bands, nodata, scale, overviews = "told", ("class",), 255, 1.0, "mode"
    dtype, units = "uint8", ()

    def of(self, block: Block) -> NDArray[np.uint8]:
        return block.mean.astype(np.uint8)


def cut(length: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """From where to where the pieces go, those of ``cuts`` that lie inside being the borders."""
    inside = sorted({place for place in cuts if 0 < place < length})
    return list(pairwise([0, *inside, length]))


def parts_of(height: int, width: int, rows: Sequence[int] = (), cols: Sequence[int] = ()) -> list[Part]:
    places = product(cut(width, cols), cut(height, rows))
    return [
        Part(number, range(1), range(1), Window(left, top, right - left, bottom - top))
        for number, ((left, right), (top, bottom)) in enumerate(places)
    ]


def blocks_of(part: Part, classes: NDArray[np.uint8], side: int = 300) -> Iterator[Block]:
    rows, cols = part.window.toslices()
    for top, left in product(range(rows.start, rows.stop, side), range(cols.start, cols.stop, side)):
        values = classes[top : min(top + side, rows.stop), left : min(left + side, cols.stop)]
        yield Block(top, left, values[np.newaxis].astype(np.float32), values != 255)


def open_writer(
    path: Path, journal: Journal, parts: list[Part], spec: ModelSpec, **more: Any
) -> MapWriter:
    about: dict[str, Any] = {
        "height": max(part.window.row_off + part.window.height for part in parts),
        "width": max(part.window.col_off + part.window.width for part in parts),
        "crs": CRS.from_epsg(32616),
        "transform": Affine(30, 0, 4e5, 0, -30, 3e6),
    } | more
    frame = Frame(Window(0, 0, about["width"], about["height"]), about["crs"], about["transform"])
    classes = spec.classes
    return MapWriter(path, journal=journal, parts=parts, frame=frame, classes=classes, product=Told())


def write(
    path: Path,
    classes: NDArray[np.uint8],
    spec: ModelSpec,
    *,
    parts: list[Part] | None = None,
    stop: type[BaseException] | None = None,
    **more: Any,
) -> NDArray[np.int64]:
    """The pixels of each value, after all has been written; with ``stop`` all but the last part is."""
    parts = parts or parts_of(*classes.shape)
    tags = more.pop("tags", {"GEODEPLOY_MODEL": "tiny"})
    with Journal(path, {"model": "tiny"}, parts=len(parts)) as journal:
        writer = open_writer(path, journal, parts, spec, **more)
        for part in parts if stop is None else parts[:-1]:
            if part.number in journal.done:
                continue
            whole = [writer.add(part, block) for block in blocks_of(part, classes)]
            assert whole == [*[False] * (len(whole) - 1), True]
            writer.save(part, {})
        if stop is not None:
            raise stop
        (counts,) = writer.tallies()
        writer.finish(tags)
    forget(path)
    return counts.pixels


def some(height: int, width: int) -> NDArray[np.uint8]:
    random = np.random.default_rng(height)
    return random.choice(np.array([*VALUES, 255], np.uint8), (height, width))


@given(
    height=st.integers(1, 1100),
    width=st.integers(1, 700),
    rows=st.lists(st.integers(1, 1100), max_size=4),
    cols=st.lists(st.integers(1, 700), max_size=2),
)
def test_what_is_written_in_parts_of_any_size_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    make_spec: MakeSpec,
    height: int,
    width: int,
    rows: list[int],
    cols: list[int],
) -> None:
    path = tmp_path_factory.mktemp("map") / "map.tif"
    classes, spec = some(height, width), make_spec(values=VALUES)
    counts = write(path, classes, spec, parts=parts_of(height, width, rows, cols))
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(dataset.read(1), classes)
    for value in range(256):
        assert counts[value] == (classes == value).sum()
    whole = path.with_name("whole.tif")
    write(whole, classes, spec)
    assert path.read_bytes() == whole.read_bytes()


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


def test_the_statistics_are_those_that_gdal_finds_without_nodata(
    tmp_path: Path, spec: ModelSpec
) -> None:
    classes = some(60, 60)
    write(tmp_path / "map.tif", classes, spec)
    data = classes[classes != 255]
    with rasterio.open(tmp_path / "map.tif") as dataset:
        tags = dataset.tags(1)
        plain = {key: value for key, value in dataset.profile.items() if key != "driver"}
        with rasterio.open(tmp_path / "plain.tif", "w", driver="GTiff", **plain) as copied:
            copied.write(classes, 1)
    assert float(tags["STATISTICS_MEAN"]) == pytest.approx(data.mean(), rel=1e-12)
    assert float(tags["STATISTICS_MAXIMUM"]) == 7
    rasterio.shutil.copy(tmp_path / "plain.tif", tmp_path / "judge.tif", driver="COG", statistics="yes")
    with rasterio.open(tmp_path / "judge.tif") as judge:
        judged = judge.tags(1)
    # GDAL 3.10 counts one pixel too few where their number is odd.
    share = float(tags.pop("STATISTICS_VALID_PERCENT"))
    assert share == pytest.approx(float(judged.pop("STATISTICS_VALID_PERCENT")), abs=0.04)
    assert share == pytest.approx(100 * data.size / classes.size, abs=0.006)
    assert tags == judged


def test_a_map_without_a_valid_pixel_has_no_statistics(tmp_path: Path, spec: ModelSpec) -> None:
    write(tmp_path / "map.tif", np.full((30, 30), 255, np.uint8), spec)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags(1) == {}
        assert (dataset.read() == 255).all()


@pytest.mark.parametrize("epsg", [32616, 4326, 3035, 2193, 7415, 4979])
def test_a_crs_is_kept_whatever_the_order_of_its_axes(
    tmp_path: Path, spec: ModelSpec, epsg: int
) -> None:
    crs = CRS.from_epsg(epsg)
    transform = Affine(1 / 3, 0, 12.3, 0, -0.7 / 3, 45.6)
    write(tmp_path / "map.tif", some(9, 9), spec, crs=crs, transform=transform)
    make = {"driver": "GTiff", "height": 9, "width": 9, "count": 1, "dtype": "uint8"}
    with rasterio.open(tmp_path / "judge.tif", "w", crs=crs, transform=transform, **make) as judge:
        pass
    with rasterio.open(tmp_path / "map.tif") as made, rasterio.open(tmp_path / "judge.tif") as judge:
        assert (made.crs, made.transform) == (judge.crs, judge.transform)
        assert made.crs.to_wkt() == judge.crs.to_wkt()


@pytest.mark.parametrize("text", ["<b>&\"'", "Waldfläche 水", " two\nlines ", "x\ty"])
def test_tags_in_any_script_survive(tmp_path: Path, spec: ModelSpec, text: str) -> None:
    write(tmp_path / "map.tif", some(9, 9), spec, tags={"GEODEPLOY_MODEL": text})
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags()["GEODEPLOY_MODEL"].strip() == text.strip()


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
    write(tmp_path / "map.tif", some(600, 30), spec, parts=parts_of(600, 30, [500], [9]))
    assert {path.name for path in tmp_path.iterdir()} == {"map.tif", "map.tif.aux.xml"}


def test_a_map_has_the_permissions_of_any_new_file(tmp_path: Path, spec: ModelSpec) -> None:
    write(tmp_path / "map.tif", some(9, 9), spec)
    (tmp_path / "plain").touch()
    for path in (tmp_path / "map.tif", tmp_path / "map.tif.aux.xml"):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


STOPS = [RuntimeError, KeyboardInterrupt, SystemExit]


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_ends_before_its_first_part_leaves_nothing_and_spares_the_map_that_was_there(
    tmp_path: Path, spec: ModelSpec, stop: type[BaseException]
) -> None:
    path = tmp_path / "map.tif"
    path.write_text("the map of yesterday")
    with pytest.raises(stop):
        write(path, some(700, 30), spec, stop=stop)
    assert [place.name for place in tmp_path.iterdir()] == ["map.tif"]
    assert path.read_text() == "the map of yesterday"


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_ends_later_keeps_its_parts_hidden_and_spares_the_map_that_was_there(
    tmp_path: Path, spec: ModelSpec, stop: type[BaseException]
) -> None:
    path, classes = tmp_path / "map.tif", some(700, 30)
    path.write_text("the map of yesterday")
    parts = parts_of(700, 30, [100, 600])
    with pytest.raises(stop):
        write(path, classes, spec, parts=parts, stop=stop)
    assert {place.name for place in tmp_path.iterdir()} == {"map.tif", ".map.tif.parts"}
    assert path.read_text() == "the map of yesterday"
    write(path, classes, spec, parts=parts)
    assert {place.name for place in tmp_path.iterdir()} == {"map.tif", "map.tif.aux.xml"}
    write(tmp_path / "whole.tif", classes, spec)
    assert path.read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_what_a_killed_run_left_of_its_map_does_not_get_into_the_next(
    tmp_path: Path, spec: ModelSpec
) -> None:
    path, classes, parts = tmp_path / "map.tif", some(1200, 30), parts_of(1200, 30, [600])
    write(tmp_path / "whole.tif", classes, spec, parts=parts)
    with pytest.raises(RuntimeError):
        write(path, classes, spec, parts=parts, stop=RuntimeError)
    names = tmp_path / "whole.tif.aux.xml"
    for name in (
        "map.tif",
        "map.tif.ovr.tmp",
        "map.tif.msk.ovr.tmp",
        "map.vrt",
        "part-00001.tif.draft",
    ):
        (tmp_path / ".map.tif.parts" / name).write_bytes(b"II*\0 half of it")
    for name in ("map.tif.aux.xml", "map.vrt.aux.xml", "part-00000.tif.aux.xml"):
        (tmp_path / ".map.tif.parts" / name).write_bytes(names.read_bytes())
    write(path, classes, spec, parts=parts)
    assert path.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert aux_path(path).read_bytes() == names.read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_pixels_that_are_missing_or_belong_elsewhere_are_a_bug_that_shows(
    tmp_path: Path, spec: ModelSpec
) -> None:
    classes, parts = some(20, 30), parts_of(20, 30, [10])
    with Journal(tmp_path / "map.tif", {}, parts=2) as journal:
        writer = open_writer(tmp_path / "map.tif", journal, parts, spec)
        upper, lower = (next(blocks_of(part, classes)) for part in parts)
        with pytest.raises(AssertionError, match=r"10 x 30 pixels at 10, 0 are not of Part\(number=0"):
            writer.add(parts[0], lower)
        half = Block(0, 0, upper.mean[:, :5], upper.valid[:5])
        assert not writer.add(parts[0], half)
        with pytest.raises(AssertionError, match=r"150 of the 300 pixels of Part\(number=0"):
            writer.save(parts[0], {})
        assert writer.add(parts[0], Block(5, 0, upper.mean[:, 5:], upper.valid[5:]))
        writer.save(parts[0], {})
        with pytest.raises(AssertionError, match="1 of 2 parts"):
            writer.finish({})
        journal.remove()
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


@pytest.mark.parametrize("kind", ["device", "pipe", "link to a device"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "map.tif"
    if kind == "pipe":
        os.mkfifo(output)
    else:  # a link, so that nothing but it is lost where this fails
        output.symlink_to("/dev/null")
    asked = followed(output) if kind == "device" else output
    with pytest.raises(OutputError, match="is a device, pipe or socket"):
        check_output(asked, [], overwrite=True)
    assert not output.is_file()


def test_a_link_is_followed_to_what_may_not_be_there_yet(tmp_path: Path) -> None:
    link, circle = tmp_path / "link.tif", tmp_path / "circle.tif"
    link.symlink_to("elsewhere.tif")
    circle.symlink_to(circle)
    assert followed(link) == tmp_path / "elsewhere.tif"
    assert followed(tmp_path / "plain.tif") == tmp_path / "plain.tif"
    check_output(followed(link), [], overwrite=False)
    with pytest.raises(OutputError, match="is a link that leads nowhere"):
        check_output(followed(circle), [], overwrite=True)


def test_a_name_that_leaves_no_room_for_those_of_the_files_beside_it_is_refused(tmp_path: Path) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".aux.xml")
    check_output(tmp_path / ("é" * (most // 2)), [], overwrite=False)
    for length in (most + 1, 1000, 10_000):
        with pytest.raises(OutputError, match=rf"has {length} bytes; {most} are the most"):
            check_output(tmp_path / ("n" * (length - 4) + ".tif"), [], overwrite=False)


@pytest.mark.parametrize("name", ["map.jp2", "map.vrt", "map.png", "map", ".tif"])
def test_a_suffix_that_would_lie_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"it needs \.tif or \.tiff"):
        check_output(tmp_path / name, [], overwrite=False, suffixes=TIFF)
    check_output(tmp_path / "MAP.TIF", [], overwrite=False, suffixes=TIFF)
