import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.crs import CRS
from rasterio.windows import Window

from geodeploy.errors import BandError, LabelError, RangeError, RecipeError, SourceError
from geodeploy.labels import IGNORED
from geodeploy.train import check_data
from geodeploy.train.data import (
    NEITHER,
    TRAINING,
    VALIDATION,
    LabelledScene,
    compute_statistics,
    labelled_places,
    open_scenes,
    read_tile,
    sample_tiles,
    split,
)
from geodeploy.train.goals import goal_of
from geodeploy.train.recipe import Blocks, Scene, load_recipe
from geodeploy.train.validation import validate

MEAN = np.full(6, 0.2, np.float32)


def opened(path: Path, *overrides: str) -> AbstractContextManager[list[LabelledScene]]:
    return open_scenes(load_recipe(path, overrides))


def relabel(recipe_file: Path, folder: Path, change: Callable[..., None], **profile: object) -> str:
    """The labels changed in place by ``change``, as an override."""
    with rasterio.open(recipe_file.parent / "labels.tif") as source:
        labels = source.read(1)
        change(labels)
        with rasterio.open(folder / "labels.tif", "w", **source.profile | profile) as target:
            target.write(labels, 1)
    return f"data.scene.0.labels={folder / 'labels.tif'}"


def test_labels_are_positions_of_classes_and_nodata_is_ignored(
    recipe_file: Path, tmp_path: Path
) -> None:
    def change(labels: np.ndarray) -> None:
        labels[0, :5] = [0, 1, 2, 255, 7]

    override = relabel(recipe_file, tmp_path, change)
    order = ["classes.0.value=2", "classes.1.value=1", "classes.2.value=0", "data.ignore=[7]"]
    with opened(recipe_file, override, *order) as (scene,):
        assert scene.codes[0, :5].tolist() == [2, 1, 0, IGNORED, IGNORED]


def test_a_class_may_have_the_value_that_the_file_calls_nodata(
    recipe_file: Path, tmp_path: Path
) -> None:
    override = relabel(recipe_file, tmp_path, lambda labels: None, nodata=0)
    with opened(recipe_file, override) as (scene,):
        assert (scene.codes == 0).any()


def test_what_a_mask_hides_has_no_label(recipe_file: Path, tmp_path: Path) -> None:
    def change(labels: np.ndarray) -> None:
        labels[:40] = 77  # which is no class: nobody is to look under the mask

    override = relabel(recipe_file, tmp_path, change, nodata=0)
    with rasterio.open(tmp_path / "labels.tif", "r+") as labels:
        labels.write_mask(np.arange(labels.height)[:, None] >= np.full(labels.width, 40))
    with opened(recipe_file) as (whole,), opened(recipe_file, override) as (scene,):
        assert (scene.codes[:40] == IGNORED).all()
        np.testing.assert_array_equal(scene.codes[40:], whole.codes[40:])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_labels_without_a_crs_lie_where_they_say_and_pictures_on_the_image(
    recipe_file: Path, tmp_path: Path
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        grid = image.transform
    same = relabel(recipe_file, tmp_path, lambda labels: None, crs=None)
    with opened(recipe_file, same):
        pass
    moved = {"crs": None, "transform": grid @ Affine.translation(50, 0)}
    aside = relabel(recipe_file, tmp_path, lambda labels: None, **moved)
    with pytest.raises(LabelError, match=r"lies elsewhere than image\.tif"), opened(recipe_file, aside):
        pass
    picture = relabel(recipe_file, tmp_path, lambda labels: None, crs=None, transform=Affine.identity())
    with opened(recipe_file, picture) as (scene,), opened(recipe_file) as (plain,):
        np.testing.assert_array_equal(scene.codes, plain.codes)


def test_bands_without_names_are_told(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as source:
        pixels, profile = source.read(), source.profile
        scales, offsets = source.scales, source.offsets
    for name in ("a.tif", "b.tif"):
        with rasterio.open(tmp_path / name, "w", **profile) as target:
            target.write(pixels)
            target.scales, target.offsets = scales, offsets
    labels = recipe_file.parent / "labels.tif"
    images = [
        f"{{image='{tmp_path / name}', labels='{labels}', split='train'}}"
        for name in ("a.tif", "b.tif")
    ]
    override = f"data.scene=[{', '.join(images)}]"
    with opened(recipe_file, override):
        pass
    assert "a.tif: its bands have no names; taken in order as blue" in caplog.text
    assert "(and so of 1 more images)" in caplog.text
    told = [
        item for item in check_data(recipe_file, overrides=[override]).findings if item.kind == "bands"
    ]
    assert [item.severity for item in told] == ["warning", "warning"]
    assert "no names; taken in order" in told[0].message


def test_unknown_label_values_are_an_error_that_names_found_and_known(
    recipe_file: Path, tmp_path: Path
) -> None:
    def change(labels: np.ndarray) -> None:
        labels[3, 3:5] = [9, 11]

    override = relabel(recipe_file, tmp_path, change)
    with (
        pytest.raises(LabelError, match=r"values 9, 11, .*0 clear, 1 cloud, 2 cirrus.*`ignore`"),
        opened(recipe_file, override),
    ):
        pass


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"transform": Affine(30, 0, 0, 0, -30, 0)}, "lies elsewhere than image.tif"),
        ({"crs": CRS.from_epsg(32617)}, "is in EPSG:32617"),
        ({"dtype": "float32"}, "holds float32 numbers"),
    ],
)
def test_labels_that_do_not_lie_on_the_image_are_refused(
    recipe_file: Path, tmp_path: Path, profile: dict[str, object], words: str
) -> None:
    override = relabel(recipe_file, tmp_path, lambda labels: None, **profile)
    with pytest.raises(LabelError, match=words), opened(recipe_file, override):
        pass


@pytest.mark.parametrize(("stretch", "fits"), [(1.00005, True), (1.004, False)])
def test_labels_from_the_same_corner_lie_on_the_image_at_the_other_too(
    recipe_file: Path, tmp_path: Path, stretch: float, fits: bool
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        grid = image.transform @ Affine.scale(stretch)  # half a pixel in the end, or what is rounded
    override = relabel(recipe_file, tmp_path, lambda labels: None, transform=grid)
    refused = pytest.raises(LabelError, match=r"lies elsewhere than image\.tif: it reaches from")
    with nullcontext() if fits else refused, opened(recipe_file, override):
        pass


def test_labels_of_another_size_are_refused(recipe_file: Path, real_scene: Path) -> None:
    labels = real_scene.with_name("landsat8_cloudy_labels.tif")
    with (
        pytest.raises(LabelError, match=r"509 x 531 pixels, image\.tif has 117 x 131"),
        opened(recipe_file, f"data.scene.0.labels={labels}"),
    ):
        pass


def test_labels_where_the_image_has_no_data_are_none(recipe_file: Path, tmp_path: Path) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as source:
        pixels = source.read()
        pixels[:, :100] = 0
        with rasterio.open(tmp_path / "image.tif", "w", **source.profile | {"nodata": 0}) as target:
            target.write(pixels)
            target.descriptions = source.descriptions
            target.scales, target.offsets = source.scales, source.offsets
    override = f"data.scene.0.image={tmp_path / 'image.tif'}"
    with opened(recipe_file, override, "data.scene.0.split=train") as (scene,):
        assert scene.count(TRAINING) == (pixels > 0).all(axis=0).sum() == 17 * 131
        assert (scene.codes[:100] == IGNORED).all()
    labels = relabel(recipe_file, tmp_path, lambda labels: labels[100:].fill(255))
    with pytest.raises(LabelError, match="nodata"), opened(recipe_file, override, labels):
        pass


def test_a_missing_scene_is_named(recipe_file: Path) -> None:
    with (
        pytest.raises(SourceError, match=r"absent\.tif does not exist"),
        opened(recipe_file, "data.scene.0.image=absent.tif"),
    ):
        pass


def test_an_image_in_other_units_is_refused(recipe_file: Path) -> None:
    with (
        pytest.raises(RangeError, match=r"with data\.scene\.0\.scale and data\.scene\.0\.offset\.$"),
        opened(recipe_file, "data.scene.0.scale=10000"),
    ):
        pass


def test_advice_on_the_range_can_be_given_to_set(
    recipe_file: Path, tmp_path: Path, make_raster: Callable[..., Path]
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        path = make_raster(
            tmp_path / "untagged.tif", image.read(), transform=image.transform, crs=image.crs
        )
    overrides = [f"data.scene.0.image={path}", "data.valid_range=[-0.09, 1.2]"]
    with pytest.raises(RangeError) as caught, opened(recipe_file, *overrides):
        pass
    assert "--" not in str(caught.value)
    advice = re.search(r"Try (\S+ = \S+)(?: and (\S+ = \S+))? \(", str(caught.value))
    assert advice
    with opened(recipe_file, *overrides, *filter(None, advice.groups())) as (scene,):
        assert scene.raster.height == 117


@pytest.mark.parametrize(
    ("names", "override", "words"),
    [
        ((None,) * 7, "seed=0", r"Say with data\.scene\.0\.bands which they are"),
        ((None,) * 7, "data.scene.0.bands=['1', '2']", r"^data\.scene\.0\.bands names 2 \(1, 2\)"),
    ],
)
def test_advice_on_bands_names_the_key_of_the_scene(
    recipe_file: Path,
    tmp_path: Path,
    make_raster: Callable[..., Path],
    names: tuple[None, ...],
    override: str,
    words: str,
) -> None:
    path = make_raster(tmp_path / "seven.tif", np.zeros((7, 117, 131), np.uint8), names=names)
    with (
        pytest.raises(BandError, match=words) as caught,
        opened(recipe_file, f"data.scene.0.image={path}", override),
    ):
        pass
    assert "--" not in str(caught.value)


def test_labels_that_are_all_ignored_are_an_error(recipe_file: Path, tmp_path: Path) -> None:
    override = relabel(recipe_file, tmp_path, lambda labels: labels.fill(255))
    with (
        pytest.raises(LabelError, match="No training scene has a labelled pixel"),
        opened(recipe_file, override, "data.scene.0.split=train"),
    ):
        pass


def test_blocks_keep_a_gap_between_training_and_validation() -> None:
    codes = np.random.default_rng(0).integers(0, 3, (200, 170)).astype(np.uint8)
    scene = Scene(image=Path(), labels=Path())
    part = split(codes, scene, Blocks(size=32, gap=5, fraction=0.3), 3)
    rows, cols = np.nonzero(part == VALIDATION)
    for row, col in zip(rows, cols, strict=True):
        around = part[max(row - 5, 0) : row + 6, max(col - 5, 0) : col + 6]
        assert (around != TRAINING).all()
    shares = [(part == kind).mean() for kind in (NEITHER, TRAINING, VALIDATION)]
    assert 0.2 < shares[VALIDATION] < 0.4
    assert shares[TRAINING] > 0.3


def test_every_class_is_in_the_validation_blocks_if_some_draw_allows_it() -> None:
    codes = np.zeros((256, 256), np.uint8)
    codes[:32, :] = 1  # rare: in a quarter of the upper blocks
    part = split(codes, Scene(image=Path(), labels=Path()), Blocks(size=32, gap=0, fraction=0.1), 2)
    assert set(np.unique(codes[part == VALIDATION])) == {0, 1}
    assert set(np.unique(codes[part == TRAINING])) == {0, 1}


def test_a_class_that_the_scene_lacks_does_not_blur_the_draw_of_blocks() -> None:
    codes = np.zeros((40, 4), np.uint8)
    codes[0:8:2] = 1  # in two of ten blocks; no pixel is of the third class
    scene = Scene(image=Path("image.tif"), labels=Path("labels.tif"))
    part = split(codes, scene, Blocks(size=4, gap=0, fraction=0.5), 3)
    assert [((part == VALIDATION) & (codes == k)).sum() for k in (0, 1)] == [72, 8]


@pytest.mark.parametrize(("labelled", "validating"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_a_labelled_block_is_always_left_to_train_on(labelled: int, validating: int) -> None:
    codes = np.full((4, 40), IGNORED, np.uint8)
    codes[:, : 4 * labelled] = 1
    scene = Scene(image=Path("image.tif"), labels=Path("labels.tif"))
    part = split(codes, scene, Blocks(size=4, gap=0, fraction=0.9), 2)
    assert ((part == VALIDATION) & (codes == 1)).sum() == 16 * validating
    assert ((part == TRAINING) & (codes == 1)).sum() == 16 * (labelled - validating)


def test_a_scene_of_one_block_cannot_be_cut(recipe_file: Path) -> None:
    with (
        pytest.raises(RecipeError, match=r"data\.blocks\.size"),
        opened(recipe_file, "data.blocks.size=200"),
    ):
        pass


def test_no_training_window_shows_the_label_of_a_validation_or_gap_pixel(recipe_file: Path) -> None:
    with opened(recipe_file) as (scene,):
        whole = scene.codes_of(Window(0, 0, 131, 117), TRAINING)
        assert (whole[scene.part != TRAINING] == IGNORED).all()
        assert (whole[scene.part == TRAINING] == scene.codes[scene.part == TRAINING]).all()


def test_statistics_are_those_of_the_valid_training_pixels(recipe_file: Path) -> None:
    with opened(recipe_file) as (scene,):
        found = compute_statistics([scene], 6)
        with rasterio.open(recipe_file.parent / "image.tif") as image:
            pixels = image.read() * np.float64(2e-5) - 0.1
        chosen = pixels[:, scene.part == TRAINING]
    np.testing.assert_allclose(found.mean, chosen.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.std, chosen.std(axis=1), rtol=1e-4)


def test_a_band_of_one_value_is_refused_whatever_its_sums_round_to(
    recipe_file: Path, tmp_path: Path
) -> None:
    for number, value in enumerate(np.linspace(0.011, 0.99, 9)):
        with rasterio.open(recipe_file.parent / "image.tif") as source:
            image = tmp_path / f"{number}.tif"
            profile = source.profile | {"dtype": "float32"}
            with rasterio.open(image, "w", **profile) as target:
                target.write(source.read(out_dtype="float32") * 2e-5)
                target.write(np.full(source.shape, value, np.float32), 5)
                target.descriptions = source.descriptions
        with (
            opened(recipe_file, f"data.scene.0.image={image}") as scenes,
            pytest.raises(RecipeError, match=r"Band 5 of data\.bands has one value"),
        ):
            compute_statistics(scenes, 6)


def test_a_tile_over_the_edge_is_mirrored_and_its_outside_ignored(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.scene.0.split=train", "model.tile=160"])
    with open_scenes(recipe) as scenes:
        (tile,) = sample_tiles(scenes, recipe, MEAN, 16)
    assert tile.pixels.shape == (6, 160, 160)
    np.testing.assert_array_equal(tile.pixels[:, 117:, :], tile.pixels[:, 115:72:-1, :])
    assert (tile.codes[117:] == IGNORED).all()
    assert (tile.codes[:, 131:] == IGNORED).all()


def test_invalid_pixels_hold_the_mean_and_no_label(
    recipe_file: Path, tmp_path: Path, make_raster: Callable[..., Path]
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        pixels = (image.read() * 2e-5 - 0.1).astype(np.float32)
        pixels[3, 10:20, 10:20] = np.nan
        path = make_raster(tmp_path / "holes.tif", pixels, transform=image.transform, crs=image.crs)
    recipe = load_recipe(recipe_file, [f"data.scene.0.image={path}", "data.scene.0.split=train"])
    with open_scenes(recipe) as scenes:
        place = next(labelled_places(scenes[0], 32, 8, part=TRAINING))
        tile = read_tile(scenes[0], place, 32, MEAN, part=TRAINING)
    assert (tile.pixels[:, 10:20, 10:20] == MEAN[0]).all()
    assert (tile.codes[10:20, 10:20] == IGNORED).all()
    assert (tile.codes != IGNORED).any()


def always_the_second(pixels: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.0, 1.0, 0.0]).reshape(1, 3, 1, 1).expand(len(pixels), 3, 32, 32)


@pytest.mark.parametrize("overlap", [0, 7, 8])
def test_validation_counts_every_labelled_pixel_once(recipe_file: Path, overlap: int) -> None:
    recipe = load_recipe(recipe_file, ["data.scene.0.split=train"])
    with open_scenes(recipe) as (scene,):
        scene.part.fill(VALIDATION)
        scene.codes[5, 5] = IGNORED
        scores = validate(
            always_the_second,
            [scene],
            goal_of(recipe),
            tile=32,
            overlap=overlap,
            batch=3,
            mean=MEAN,
        )
    counts = np.array(scores.confusion)
    assert counts.sum() == 117 * 131 - 1
    assert scores.ignored == 1
    assert counts[:, 1].tolist() == [int((scene.codes == k).sum()) for k in range(3)]


def test_a_folder_of_scenes_that_is_missing_is_named_with_the_key(recipe_file: Path) -> None:
    with (
        pytest.raises(SourceError, match=r"folder of the scenes, .*nowhere, .*data\.root=FOLDER"),
        opened(recipe_file, "data.root=nowhere"),
    ):
        pass


def test_a_scene_may_have_a_scale_and_an_offset_a_band(
    recipe_file: Path, tmp_path: Path, make_raster: Callable[..., Path]
) -> None:
    with rasterio.open(recipe_file.parent / "image.tif") as image:
        stored, where = image.read(), {"transform": image.transform, "crs": image.crs}
    path = make_raster(tmp_path / "bare.tif", stored, **where)
    scales, offsets = [2e-5, 2e-5, 1e-5, 2e-5, 2e-5, 3e-5], [-0.1, 0, -0.1, -0.1, -0.05, -0.2]
    overrides = [
        f"data.scene.0.{key}={value}" for key, value in (("scale", scales), ("offset", offsets))
    ]
    with opened(recipe_file, f"data.scene.0.image={path}", *overrides) as (scene,):
        found, _ = scene.raster.read_pixels(Window(0, 0, 131, 117))
    needed = stored * np.reshape(scales, (6, 1, 1)) + np.reshape(offsets, (6, 1, 1))
    np.testing.assert_allclose(found, needed, atol=1e-6)


def test_labels_may_lie_in_a_folder_of_their_own(recipe_file: Path, tmp_path: Path) -> None:
    def change(labels: np.ndarray) -> None:
        labels.fill(2)

    relabel(recipe_file, tmp_path, change)
    with opened(recipe_file, f"data.label_root={tmp_path}") as (scene,):
        assert (scene.codes == 2).all()
    # Those that are not there are looked for beside the images.
    (tmp_path / "empty").mkdir()
    with opened(recipe_file, f"data.label_root={tmp_path / 'empty'}") as (scene,):
        assert not (scene.codes == 2).all()
