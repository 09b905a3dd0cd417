from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from matplotlib.image import imread
from rasterio.crs import CRS

from geodeploy.classmap import open_class_map
from geodeploy.errors import OutputError
from geodeploy.predict import predict
from geodeploy.preview import write_preview

MakeRaster = Callable[..., Path]


def pixels(path: Path) -> np.ndarray:
    return (imread(path)[:, :, :3] * 255).round().astype(int)


@pytest.fixture(scope="module")
def real_map(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Path:
    path = tmp_path_factory.mktemp("real") / "map.tif"
    predict(real_scene, output=path)
    return path


def test_a_real_map_is_drawn_in_its_colours_and_shares(real_map: Path, tmp_path: Path) -> None:
    picture = pixels(write_preview(real_map, tmp_path / "preview.png")).reshape(-1, 3)
    with open_class_map(real_map) as opened:
        values = opened.dataset.read(1)
        drawn = {item.value: (picture == item.rgb).all(axis=1).sum() for item in opened.named}
        white = next(item.value for item in opened.named if item.rgb == (255, 255, 255))
    for value in set(drawn) - {white}:  # which is the page's colour too
        share = (values == value).sum() / (np.isin(values, list(set(drawn) - {white}))).sum()
        total = sum(count for other, count in drawn.items() if other != white)
        assert drawn[value] / total == pytest.approx(share, abs=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


def test_the_overviews_are_read_and_not_the_map(tmp_path: Path, make_raster: MakeRaster) -> None:
    path = make_raster(
        tmp_path / "map.tif",
        np.full((1, 2048, 1024), 1, np.uint8),
        nodata=255,
        tiled=True,
        blockxsize=256,
        blockysize=256,
    )
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    # What the map holds that its overviews do not is not in the picture.
    with rasterio.open(path, "r+") as dataset:
        dataset.write(np.full((2048, 1024), 2, np.uint8), 1)
    write_preview(path, tmp_path / "preview.png", side=500)
    with open_class_map(path) as opened:
        one, two = opened.item(1), opened.item(2)
    picture = pixels(tmp_path / "preview.png").reshape(-1, 3)
    assert (picture == one.rgb).all(axis=1).sum() > 1000
    assert not (picture == two.rgb).all(axis=1).any()


def test_degrees_are_drawn_as_wide_as_they_are(tmp_path: Path, make_raster: MakeRaster) -> None:
    path = make_raster(
        tmp_path / "map.tif",
        np.full((1, 50, 50), 1, np.uint8),
        crs=CRS.from_epsg(4326),
        transform=Affine(0.01, 0, 10, 0, -0.01, 60.25),
    )
    picture = pixels(write_preview(path, tmp_path / "preview.png"))
    with open_class_map(path) as opened:
        here = (picture == opened.item(1).rgb).all(axis=2)
    # The legend's own patch lies below the map.
    rows = np.flatnonzero(here.sum(axis=1) > here.sum(axis=1).max() / 2)
    cols = np.flatnonzero(here.sum(axis=0) > here.sum(axis=0).max() / 2)
    assert len(rows) / len(cols) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("side", [60, 300, 1000, 2500])
def test_the_map_is_as_many_pixels_long_as_asked_for(real_map: Path, tmp_path: Path, side: int) -> None:
    picture = pixels(write_preview(real_map, tmp_path / "preview.png", side=side))
    with open_class_map(real_map) as opened:
        colours = [item.rgb for item in opened.named if item.rgb != (255, 255, 255)]
        height, width = opened.height, opened.width
        values = opened.dataset.read(1)
        assert opened.item(int(values[0, 0])).rgb in colours
    # The map's own rows and columns, without the legend's patches and letters below.
    drawn = picture[: round(side * height / max(height, width))]
    coloured = np.any([(drawn == colour).all(axis=2) for colour in colours], axis=0)
    rows, cols = coloured.any(axis=1).nonzero()[0], coloured.any(axis=0).nonzero()[0]
    assert max(np.ptp(rows), np.ptp(cols)) + 1 == pytest.approx(side, abs=side / 50 + 1)
    assert len(picture) < side + 200


def test_a_picture_of_no_pixels_is_refused(real_map: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="side=0 pixels is none"):
        write_preview(real_map, tmp_path / "preview.png", side=0)
    assert not list(tmp_path.iterdir())


def test_the_same_map_gives_the_same_bytes(real_map: Path, tmp_path: Path) -> None:
    one, two = (write_preview(real_map, tmp_path / name) for name in ("one.png", "two.png"))
    assert one.read_bytes() == two.read_bytes()


def test_a_picture_that_exists_is_kept(real_map: Path, tmp_path: Path) -> None:
    (tmp_path / "preview.png").write_text("mine")
    with pytest.raises(OutputError, match=r"exists\. Choose another place with --preview"):
        write_preview(real_map, tmp_path / "preview.png")
    write_preview(real_map, tmp_path / "preview.png", overwrite=True)
