"""Areas of pixels and classes; the judge for the ellipsoid is pyproj's geodesic polygon."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Geod
from rasterio.crs import CRS

from geodeploy.area import class_extents, column_areas, write_area_table
from geodeploy.errors import OutputError, SourceError
from geodeploy.predict import PredictOptions, predict

MakeRaster = Callable[..., Path]


@given(st.floats(-89, 88), st.floats(0.001, 0.5), st.booleans())
def test_a_pixel_in_degrees_has_the_area_that_geodesy_gives_it(
    south: float, side: float, south_up: bool
) -> None:
    transform = (
        Affine(side, 0, 10, 0, side, south) if south_up else Affine(side, 0, 10, 0, -side, south + side)
    )
    edges = column_areas(CRS.from_epsg(4326), transform, 1)
    # Geodesics bow away from parallels: many short ones follow them.
    steps = np.linspace(0, side, 200)
    xs = np.concatenate([10 + steps, 10 + steps[::-1]])
    ys = np.concatenate([np.full(200, south), np.full(200, south + side)])
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(xs, ys)
    assert edges is not None
    assert edges[1] == pytest.approx(area, rel=1e-6)


def test_the_whole_ellipsoid_has_its_known_area() -> None:
    edges = column_areas(CRS.from_epsg(4326), Affine(0.5, 0, -180, 0, -0.5, 90), 360)
    assert edges is not None
    assert edges[-1] * 720 == pytest.approx(510_065_621_724_088.44, rel=1e-12)


def test_a_foot_of_a_projection_is_a_foot() -> None:
    edges = column_areas(CRS.from_epsg(2263), Affine(10, 0, 0, 0, -10, 0), 2)
    assert edges is not None
    assert edges.tolist() == pytest.approx([0, 100 * 0.3048006096**2, 200 * 0.3048006096**2])


@pytest.mark.parametrize(
    ("crs", "transform"),
    [(None, Affine.identity()), (CRS.from_epsg(4326), Affine.rotation(10) @ Affine.scale(0.1))],
)
def test_an_area_that_is_not_known_is_none(crs: CRS | None, transform: Affine) -> None:
    assert column_areas(crs, transform, 3) is None


@pytest.mark.parametrize("crs", [None, "EPSG:4326", "EPSG:2263"])
def test_the_table_of_a_real_map_is_that_of_the_report(
    tmp_path: Path, real_scene: Path, pointwise: Any, crs: str | None
) -> None:
    scene = tmp_path / "scene.tif"
    shutil.copy(real_scene, scene)
    if crs is not None:
        with rasterio.open(scene, "r+") as dataset:
            dataset.crs, dataset.transform = crs, Affine(3e-4, 0, 8, 0, -3e-4, 61)
    report = predict(scene, pointwise.path, tmp_path / "map.tif", options=PredictOptions(smooth=3))
    assert sum(item.area_m2 or 0 for item in report.classes) > 0
    write_area_table(tmp_path / "map.tif", tmp_path / "area.csv")
    with (tmp_path / "area.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [item.name for item in report.classes]
    for row, item in zip(rows, report.classes, strict=True):
        assert int(row["pixels"]) == item.pixels
        assert float(row["share"]) == pytest.approx(item.share, abs=1e-8)
        assert float(row["area_m2"]) == pytest.approx(item.area_m2, rel=1e-9, abs=0.01)
        assert float(row["area_ha"]) == pytest.approx(item.area_m2 / 1e4, abs=1e-6)


def test_rows_in_degrees_count_for_what_they_are(tmp_path: Path, make_raster: MakeRaster) -> None:
    values = np.full((1, 60, 4), 1, np.uint8)
    values[0, 30:] = 2
    values[0, 0, 0] = 255
    path = make_raster(
        tmp_path / "map.tif",
        values,
        crs=CRS.from_epsg(4326),
        transform=Affine(1, 0, 0, 0, -1, 60),
        nodata=255,
    )
    north, south = class_extents(path)
    edges = column_areas(CRS.from_epsg(4326), Affine(1, 0, 0, 0, -1, 60), 60)
    assert edges is not None
    assert (north.name, north.pixels, south.pixels) == ("class 1", 119, 120)
    assert north.area_m2 == pytest.approx(4 * edges[30] - edges[1])
    assert south.area_m2 == pytest.approx(4 * (edges[60] - edges[30]))


def test_what_is_no_class_map_is_said_to_be_none(tmp_path: Path, small_scene: Path) -> None:
    with pytest.raises(
        SourceError, match="has 6 bands, the first of float32; a class map has one of uint8"
    ):
        class_extents(small_scene)


def test_a_table_that_exists_is_kept(tmp_path: Path, small_scene: Path) -> None:
    (tmp_path / "area.csv").write_text("mine")
    with pytest.raises(OutputError, match=r"exists\. Choose another place with --area"):
        write_area_table(small_scene, tmp_path / "area.csv")
    assert (tmp_path / "area.csv").read_text() == "mine"
