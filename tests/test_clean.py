"""Maps cleaned in files: the filters' answer, with all that the map said of itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pydantic import ValidationError
from rio_cogeo.cogeo import cog_validate

from geodeploy.classmap import open_class_map
from geodeploy.clean import CleanOptions, clean_map
from geodeploy.errors import OutputError, SourceError
from geodeploy.filters import sieve_bands, smooth_bands
from geodeploy.predict import PredictOptions, predict


@pytest.fixture(scope="module")
def real_map(tmp_path_factory: pytest.TempPathFactory, real_scene: Path) -> Path:
    path = tmp_path_factory.mktemp("real") / "map.tif"
    predict(real_scene, output=path)
    return path


def test_a_real_map_is_smoothed_and_then_sieved(real_map: Path, tmp_path: Path) -> None:
    report = clean_map(real_map, tmp_path / "clean.tif", options=CleanOptions(smooth=5, sieve=12))
    with rasterio.open(real_map) as dataset:
        before, nodata = dataset.read(1), dataset.nodata
    smooth = np.concatenate(list(smooth_bands([before], 5, nodata=nodata)))
    expected = np.concatenate(list(sieve_bands([smooth], 12, nodata=nodata)))
    with rasterio.open(tmp_path / "clean.tif") as dataset:
        assert (dataset.read(1) == expected).all()
    assert report.pixels_changed == (before != expected).sum() > 0
    assert report.share_changed == pytest.approx(report.pixels_changed / (before != nodata).sum())
    assert {path.name for path in tmp_path.iterdir()} == {"clean.tif", "clean.tif.aux.xml"}


def test_the_clean_map_says_what_the_map_said(real_map: Path, tmp_path: Path) -> None:
    clean_map(real_map, tmp_path / "clean.tif", options=CleanOptions(sieve=3))
    valid, errors, warnings = cog_validate(tmp_path / "clean.tif")
    assert (valid, errors, warnings) == (True, [], [])
    with open_class_map(real_map) as before, open_class_map(tmp_path / "clean.tif") as after:
        assert (after.crs, after.transform, after.nodata) == (
            before.crs,
            before.transform,
            before.nodata,
        )
        assert after.named == before.named
        assert len(after.named) == 4
        assert after.dataset.colormap(1) == before.dataset.colormap(1)
        assert after.dataset.descriptions == before.dataset.descriptions
        ours = {name: value for name, value in before.dataset.tags().items() if "GEODEPLOY" in name}
        told = after.dataset.tags()
        assert ours.items() <= told.items()
        assert (told["GEODEPLOY_SMOOTH"], told["GEODEPLOY_SIEVE"]) == ("None", "3")


def test_the_same_job_gives_the_same_bytes(real_map: Path, tmp_path: Path) -> None:
    for name in ("one.tif", "two.tif"):
        clean_map(real_map, tmp_path / name, options=CleanOptions(smooth=3))
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()


def test_a_clean_map_can_be_cleaned_again(real_map: Path, tmp_path: Path) -> None:
    clean_map(real_map, tmp_path / "one.tif", options=CleanOptions(sieve=5))
    report = clean_map(tmp_path / "one.tif", tmp_path / "two.tif", options=CleanOptions(sieve=5))
    assert report.pixels_changed == 0


def test_a_map_that_breaks_off_leaves_nothing(real_map: Path, tmp_path: Path) -> None:
    whole = real_map.read_bytes()
    (tmp_path / "map.tif").write_bytes(whole[: len(whole) - len(whole) // 8])
    with pytest.raises(SourceError, match="damaged or truncated"):
        clean_map(tmp_path / "map.tif", tmp_path / "clean.tif", options=CleanOptions(sieve=3))
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif"]


def test_a_map_is_not_cleaned_in_place(real_map: Path) -> None:
    with pytest.raises(OutputError, match="is the input itself"):
        clean_map(real_map, real_map, options=CleanOptions(sieve=3, overwrite=True))


@pytest.mark.parametrize(
    "wrong", [{"smooth": 4}, {"smooth": 1}, {"smooth": 257}, {"sieve": 1}, {"sieve": 1001}]
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CleanOptions(**wrong)


@pytest.mark.parametrize("options", [{"smooth": 5}, {"sieve": 12}, {"smooth": 3, "sieve": 20}])
def test_predict_cleans_before_it_writes(
    real_map: Path, real_scene: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = predict(real_scene, output=tmp_path / "map.tif", options=PredictOptions(**options))
    clean_map(real_map, tmp_path / "later.tif", options=CleanOptions(**options))
    with rasterio.open(tmp_path / "map.tif") as one, rasterio.open(tmp_path / "later.tif") as other:
        values = one.read(1)
        assert (values == other.read(1)).all()
        assert one.overviews(1) == other.overviews(1)
        assert one.colormap(1) == other.colormap(1)
        ours = {name: value for name, value in other.tags().items() if "GEODEPLOY" in name}
        assert ours.items() <= one.tags().items()
        found, expected = one.tags(1), other.tags(1)
        for name in ("STATISTICS_MINIMUM", "STATISTICS_MAXIMUM", "STATISTICS_MEAN"):
            assert float(found[name]) == pytest.approx(float(expected[name]))
    assert cog_validate(tmp_path / "map.tif")[0]
    assert [item.pixels for item in report.classes] == [
        (values == item.value).sum() for item in report.classes
    ]
    assert not list(tmp_path.glob(".*"))
