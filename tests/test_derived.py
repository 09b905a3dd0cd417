import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geodeploy.derived import DerivedOptions, check_derived, derive
from geodeploy.errors import OutputError
from geodeploy.options import PredictOptions
from geodeploy.predict import predict

ALL = DerivedOptions(
    polygons=".gpkg", area=".csv", preview=".png", stac=True, acquired=date(2020, 6, 1), min_area=1000
)


@pytest.fixture(scope="module")
def real_map(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Path:
    path = tmp_path_factory.mktemp("real") / "map.tif"
    predict(real_scene, output=path)
    return path


def test_all_that_is_asked_for_lies_beside_the_map(real_map: Path, real_scene: Path) -> None:
    check_derived([real_map], [real_scene], ALL, inputs=[real_scene], overwrite=False)
    made = derive(real_map, real_scene, Path("cloud.onnx"), ALL, overwrite=False)
    assert [path.name for path in made] == ["map.gpkg", "map.csv", "map.png", "map.stac.json"]
    assert all(path.parent == real_map.parent and path.exists() for path in made)
    assert '"./map.gpkg"' in made[-1].read_text()
    with pytest.raises(OutputError, match=r"map\.gpkg exists\. Choose another place with --polygons"):
        check_derived([real_map], [real_scene], ALL, inputs=[real_scene], overwrite=False)
    check_derived([real_map], [real_scene], ALL, inputs=[real_scene], overwrite=True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"polygons": "a.gpkg"}, r"--polygons a\.gpkg is one file for 2 maps\. Give a suffix alone"),
        ({"polygons": ".shp"}, "polygons go to"),
        ({"preview": "missing/a.png"}, "is one file for 2 maps"),
        ({"stac": True}, "does not tell when it was taken"),
        ({"area": ".tif"}, "is the map itself"),
        ({"min_area": 3}, r"--min-area 3\.0 does nothing without --polygons"),
        ({"acquired": date(2020, 6, 1)}, "does nothing without --stac"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, object], complaint: str
) -> None:
    maps, scenes = [tmp_path / "a_map.tif", tmp_path / "b_map.tif"], [Path("a.tif"), Path("b.tif")]
    with pytest.raises(OutputError, match=complaint):
        check_derived(maps, scenes, DerivedOptions(**options), inputs=scenes, overwrite=False)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"area": "map_confidence.tif"}, "map_confidence.tif is the raster of --confidence"),
        ({"area": "../X/map_confidence.tif"}, "map_confidence.tif is the raster of --confidence"),
        ({"area": "map.tif.aux.xml"}, "map.tif.aux.xml is where the map's names of classes go"),
        ({"polygons": ".json", "area": "map.json"}, "map.json is the file of --polygons .json"),
        ({"polygons": "map.stac.json", "stac": True}, "is the file of --polygons map.stac.json"),
        ({"area": "there.csv", "preview": "there.csv"}, "is the file of --area there.csv"),
        ({"preview": "y.jpg"}, "y.jpg would not be what its name says: it needs .png"),
        ({"area": "y.png"}, "y.png would not be what its name says: it needs .csv"),
    ],
)
def test_no_output_is_written_over_another_and_none_lies_by_its_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], complaint: str
) -> None:
    folder = tmp_path / "X"
    folder.mkdir()
    monkeypatch.chdir(folder)
    asked = DerivedOptions(acquired=date(2020, 6, 1) if "stac" in options else None, **options)
    with pytest.raises(OutputError, match=complaint):
        check_derived(
            [folder / "map.tif"],
            [Path("scene.tif")],
            asked,
            inputs=[],
            beside=("confidence",),
            overwrite=True,
        )


def test_links_are_followed_and_what_they_led_to_is_replaced(real_scene: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name in ("map.tif", "area.csv"):
        (tmp_path / name).symlink_to(Path("far") / name)
    asked = DerivedOptions(area=tmp_path / "area.csv")
    report = predict(real_scene, output=tmp_path / "map.tif", options=PredictOptions(derived=asked))
    assert report.map.samefile(tmp_path / "map.tif")
    assert all((tmp_path / name).is_symlink() for name in ("map.tif", "area.csv"))
    assert {path.name for path in (tmp_path / "far").iterdir()} == {
        "map.tif", "map.tif.aux.xml", "area.csv"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["map_confidence.tif", "map.tif.aux.xml"])
def test_a_link_that_would_be_replaced_is_refused(real_scene: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("dear.tif")
    options = PredictOptions(confidence=True, overwrite=True)
    with pytest.raises(OutputError, match=f"{name} is a link, in whose place a file would be put"):
        predict(real_scene, output=tmp_path / "map.tif", options=options)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"polygons": ".geojson"}, "no CRS, and GeoJSON is in degrees"),
        ({"polygons": ".gpkg", "min_area": 3}, "no CRS that tells metres"),
    ],
)
def test_polygons_that_need_a_crs_are_refused_before_a_scene_without_one_is_mapped(
    make_raster: Callable[..., Path],
    pointwise: Any,
    tmp_path: Path,
    options: dict[str, object],
    complaint: str,
) -> None:
    scene = make_raster(tmp_path / "scene.tif", np.full((6, 40, 40), 0.2, np.float32), crs=None)
    with pytest.raises(OutputError, match=complaint):
        predict(
            scene,
            pointwise.path,
            tmp_path / "map.tif",
            options=PredictOptions(derived=DerivedOptions(**options)),
        )
    assert not (tmp_path / "map.tif").exists()


def test_what_fails_afterwards_says_that_the_map_is_whole(
    real_map: Path, real_scene: Path, tmp_path: Path
) -> None:
    options = DerivedOptions(polygons=tmp_path / "missing" / "a.gpkg")
    with pytest.raises(OutputError, match=r"does not exist.*The map .*map\.tif is whole"):
        derive(real_map, real_scene, Path("cloud.onnx"), options, overwrite=False)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "geodeploy", "predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_makes_them_and_its_report_names_them(real_scene: Path, tmp_path: Path) -> None:
    asked = [
        "--polygons",
        ".parquet",
        "--min-area",
        5000,
        "--simplify",
        30,
        "--area",
        tmp_path / "a.csv",
    ]
    asked += ["--preview", ".png", "--stac", "--acquired", "2020-06-01T10:20:30Z", "--json"]
    done = run(real_scene, "-o", tmp_path / "map.tif", *asked)
    assert done.returncode == 0, done.stderr
    made = [Path(path) for path in json.loads(done.stdout)["derived"]]
    assert [path.name for path in made] == ["map.parquet", "a.csv", "map.png", "map.stac.json"]
    assert '"2020-06-01T10:20:30Z"' in made[-1].read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "map.tif", "map.tif.aux.xml", *(path.name for path in made)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (["--stac", "--acquired", "nonsense"], "error: --acquired nonsense: "),
        (["--polygons", ".gpkg", "--min-area", -3], "error: --min-area -3.0: "),
        (["--polygons", ".shp"], "polygons go to .gpkg"),
        (["--stac"], "say --acquired"),
    ],
)
def test_the_command_refuses_in_one_line(
    real_scene: Path, tmp_path: Path, asked: list[object], complaint: str
) -> None:
    done = run(real_scene, "-o", tmp_path / "map.tif", *asked)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
