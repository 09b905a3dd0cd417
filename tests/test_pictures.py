"""Pictures are opened and looked at, pixel by pixel where that can be done."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from geodeploy.pictures import add_legend, coloured, draw_map, true_colour
from geodeploy.predict import predict
from geodeploy.spec import SegmentationClass

CLASSES = (
    SegmentationClass(value=1, name="water", color="#0000ff"),
    SegmentationClass(value=7, name="land", color="#00ff00"),
)


def test_classes_have_their_colours_and_what_is_none_is_grey() -> None:
    found = coloured(np.array([[1, 7, 255]], np.uint8), CLASSES)
    assert found.tolist() == [[[0, 0, 255], [0, 255, 0], [235, 235, 235]]]


def test_true_colour_takes_its_bands_by_name_and_one_stretch_for_all() -> None:
    pixels = np.zeros((4, 10, 10), np.float32)
    pixels[0], pixels[1], pixels[2] = 0.1, 0.2, 0.3
    pixels[:, 0, :5] = 0.0
    image = true_colour(pixels, ["blue", "green", "red", "nir"], np.ones((10, 10), bool))
    assert image[5, 5] == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-6)


def test_true_colour_of_an_image_without_a_valid_pixel_is_white() -> None:
    pixels = np.full((1, 4, 4), np.nan, np.float32)
    assert (true_colour(pixels, [None], np.zeros((4, 4), bool)) == 1).all()


def test_a_map_is_drawn_in_its_colours(tmp_path: Path, pointwise: object, real_scene: Path) -> None:
    report = predict(real_scene, pointwise.path, tmp_path / "map.tif")
    draw_map(real_scene, tmp_path / "map.tif", pointwise.spec.classes, tmp_path / "picture.png")
    picture = (imread(tmp_path / "picture.png")[:, :, :3] * 255).round().astype(int)
    right = picture[:, picture.shape[1] // 2 :].reshape(-1, 3)
    shares = {item.value: (right == item.rgb).all(axis=1).mean() for item in pointwise.spec.classes}
    common = max(report.classes, key=lambda item: item.pixels)
    assert max(shares, key=shares.__getitem__) == common.value


@pytest.mark.parametrize("width", [4, 9])
def test_a_legend_is_no_wider_than_its_picture(width: int) -> None:
    figure = Figure(figsize=(width, 4), layout="constrained")
    figure.subplots().imshow(np.zeros((4, 4)))
    names = ["cloud shadow  12%", "open water  46%", "evergreen forest  20%", "bare soil  4%"]
    classes = [CLASSES[place % 2] for place in range(len(names))]
    add_legend(figure, classes, names, other="no data")
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == [*names, "no data"]
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    rows = {round(text.get_window_extent().y0) for text in legend.get_texts()}
    assert len(rows) == 1 if width == 9 else 1 < len(rows) < 5  # as many side by side as fit
