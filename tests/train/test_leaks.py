"""Pixels that train in one scene and are scored in another, however they were cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from geodeploy.errors import LabelError
from geodeploy.train import train
from geodeploy.train.data import open_scenes
from geodeploy.train.leaks import check_leaks
from geodeploy.train.recipe import load_recipe


@pytest.fixture
def cut(recipe_file: Path, tmp_path: Path) -> Callable[..., str]:
    """A piece of the recipe's image with its labels, as a scene of a recipe."""

    def make(
        name: str, window: Window, split: str, *, add: int = 0, moved: float = 0, **profile: object
    ) -> str:
        for kind in ("image", "labels"):
            with rasterio.open(recipe_file.parent / f"{kind}.tif") as whole:
                grid = whole.transform @ Affine.translation(window.col_off + moved, window.row_off)
                size = {"height": window.height, "width": window.width, "transform": grid}
                with rasterio.open(
                    tmp_path / f"{name}_{kind}.tif", "w", **whole.profile | size | profile
                ) as part:
                    part.write(
                        whole.read(window=window) + np.array(add * (kind == "image"), whole.dtypes[0])
                    )
                    part.descriptions = whole.descriptions
                    part.scales, part.offsets = whole.scales, whole.offsets
        image, labels = (tmp_path / f"{name}_{kind}.tif" for kind in ("image", "labels"))
        return f"{{image='{image}', labels='{labels}', split='{split}'}}"

    return make


LEFT, RIGHT = Window(0, 0, 70, 100), Window(60, 10, 60, 100)
"""They share 10 columns and 90 rows."""


def check(recipe_file: Path, *scenes: str) -> None:
    with open_scenes(load_recipe(recipe_file, [f"data.scene=[{', '.join(scenes)}]"])) as opened:
        check_leaks(opened)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("order", [1, -1])
def test_pieces_that_overlap_are_refused_with_the_number_of_pixels(
    recipe_file: Path, cut: Callable[..., str], split: str, order: int
) -> None:
    pieces = [cut("a", LEFT, "train"), cut("b", RIGHT, split)]
    with pytest.raises(LabelError, match=r"a_image\.tif and b_image\.tif share 900 labelled pixels"):
        check(recipe_file, *pieces[::order])


def test_one_crs_written_in_two_ways_hides_no_leak(recipe_file: Path, cut: Callable[..., str]) -> None:
    with rasterio.open(recipe_file.with_name("image.tif")) as image:
        renamed = CRS.from_wkt(image.crs.to_wkt().replace("UTM zone", "zone"))
        assert renamed == image.crs
        assert renamed.to_wkt() != image.crs.to_wkt()
    with pytest.raises(LabelError, match="share 900 labelled pixels"):
        check(recipe_file, cut("a", LEFT, "train"), cut("b", RIGHT, "test", crs=renamed))


def test_blocks_leak_only_what_trains_in_one_and_validates_in_the_other(
    recipe_file: Path, cut: Callable[..., str]
) -> None:
    whole = Window(0, 0, 131, 117)
    again = [cut("a", whole, "blocks"), cut("b", whole, "blocks")]
    check(recipe_file, *again)  # the same labels are cut into the same blocks
    with pytest.raises(LabelError, match="would be trained on"):
        check(recipe_file, again[0], cut("c", whole, "validation"))


def test_what_shares_no_pixel_is_not_refused(recipe_file: Path, cut: Callable[..., str]) -> None:
    left = cut("a", LEFT, "train")
    check(recipe_file, left, cut("b", Window(70, 0, 61, 117), "validation"))
    check(recipe_file, left, cut("c", RIGHT, "train"), cut("e", Window(120, 0, 11, 117), "validation"))
    check(recipe_file, left, cut("d", RIGHT, "validation", add=9))  # another day
    check(recipe_file, left, cut("f", RIGHT, "validation", moved=0.5))  # other pixels
    plain = {"crs": None}
    check(recipe_file, cut("g", LEFT, "train", **plain), cut("h", RIGHT, "validation", **plain))


def test_a_leak_behind_pixels_without_data_is_found(
    recipe_file: Path, cut: Callable[..., str], tmp_path: Path
) -> None:
    pieces = [cut("a", Window(0, 0, 70, 100), "train"), cut("b", Window(0, 0, 70, 90), "validation")]
    for name in "ab":
        with rasterio.open(tmp_path / f"{name}_image.tif", "r+") as image:
            image.nodata = 0
            pixels = image.read()
            pixels[:, :80] = 0
            image.write(pixels)
    with pytest.raises(LabelError, match="share 700 labelled pixels"):
        check(recipe_file, *pieces)


def test_a_copy_of_a_file_without_a_crs_is_the_same_ground(
    recipe_file: Path, cut: Callable[..., str], tmp_path: Path
) -> None:
    pieces = [cut("a", LEFT, "train", crs=None), cut("b", LEFT, "test", crs=None)]
    with pytest.raises(LabelError, match=r"a_image\.tif and b_image\.tif share 7000 labelled pixels"):
        check(recipe_file, *pieces)
    pieces[1] = cut("b", LEFT, "test", crs=None, add=1)
    check(recipe_file, *pieces)


def test_a_file_without_a_crs_leaks_into_itself_and_nothing_is_trained(
    recipe_file: Path, cut: Callable[..., str], tmp_path: Path
) -> None:
    scene = cut("a", LEFT, "train", crs=None)
    both = f"data.scene=[{scene}, {scene.replace('train', 'validation')}]"
    with pytest.raises(LabelError, match="share 7000 labelled pixels"):
        train(recipe_file, tmp_path / "run", overrides=[both])
    assert not (tmp_path / "run").exists()
