"""Regions for the test: scored apart, and without a trace in the weights."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine
from matplotlib.image import imread
from rasterio.windows import Window
from safetensors.torch import load_file

from geodeploy.train.run import load_run

Tune = Callable[..., Path]


def cut(source: Path, target: Path, window: Window) -> Path:
    with rasterio.open(source) as whole:
        profile = whole.profile | {
            "height": window.height,
            "width": window.width,
            "transform": whole.transform @ Affine.translation(window.col_off, window.row_off),
        }
        with rasterio.open(target, "w", **profile) as part:
            part.write(whole.read(window=window)[:, ::-1])  # on its head, it is ground of its own
            part.descriptions, part.scales, part.offsets = (
                whole.descriptions,
                whole.scales,
                whole.offsets,
            )
    return target


def test_a_region_for_the_test_is_scored_apart_and_changes_no_weight(
    recipe_file: Path, tune: Tune, tmp_path: Path
) -> None:
    window = Window(60, 70, 32, 32)  # one tile: the whole array is what the network saw
    image = cut(recipe_file.parent / "image.tif", tmp_path / "region.tif", window)
    labels = cut(recipe_file.parent / "labels.tif", tmp_path / "region_labels.tif", window)
    plain = "{image='image.tif', labels='labels.tif'}"
    test = f"{{image='{image}', labels='{labels}', split='test'}}"
    run = tune(f"data.scene=[{plain}, {test}]")

    metrics = json.loads((run / "metrics.json").read_text())
    ((region, scores),) = metrics["held_out"].items()
    assert region == str(image)
    with rasterio.open(image) as file:
        pixels = (file.read() * np.float32(2e-5) - np.float32(0.1)).astype(np.float32)
    with rasterio.open(labels) as file:
        truth = file.read(1)
    with torch.inference_mode():
        found = load_run(run).model(torch.from_numpy(pixels)[None])[0].argmax(0).numpy()
    counts = [[int(((truth == a) & (found == b)).sum()) for b in range(3)] for a in range(3)]
    assert np.abs(np.array(scores["confusion"]) - counts).sum() <= 4  # a tie or two, by rounding
    assert np.sum(scores["confusion"]) == 32 * 32
    assert "### Held out" in (run / "README.md").read_text()

    without = tune(f"data.scene=[{plain}]")
    assert json.loads((without / "metrics.json").read_text())["held_out"] == {}
    for name in ("adapter_model.safetensors", "head.safetensors"):
        one, other = load_file(run / name), load_file(without / name)
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_picture_of_the_split_shows_each_purpose_in_its_colour(
    tune: Tune, recipe_file: Path
) -> None:
    picture = imread(tune("data.scene=[{image='image.tif', labels='labels.tif'}]") / "split.png")
    colours = {tuple(value) for value in (picture[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {(0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77), (0xEB, 0xEB, 0xEB)} <= colours
