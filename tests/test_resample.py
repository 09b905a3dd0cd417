from typing import Any

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.warp import reproject

from geodeploy.resample import Axis, resample


def onto(
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    rows: Axis,
    cols: Axis,
    down: tuple[int, int],
    across: tuple[int, int],
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A window of the grid, from the source pixels that it needs and no others."""
    above, below = rows.needed(*down)
    first, last = cols.needed(*across)
    part = np.s_[above:below, first:last]
    window = slice(*down), slice(*across)
    return resample(values[part], valid[part], rows, cols, corner=(above, first), window=window)


@given(
    step=st.sampled_from([0.5, 1 / 3, 1 / 6, 0.7, 1.0, 1.5, 2.0, 3.3]),
    shift=st.sampled_from([0.0, 0.5, 0.25, 3.0, -0.5]),
    cut=st.integers(1, 20),
)
def test_however_the_grid_is_cut_its_pixels_are_the_same(step: float, shift: float, cut: int) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 9000, (31, 29)).astype(np.uint16)
    valid = random.random(values.shape) > 0.2
    rows, cols = Axis(step, shift, 31), Axis(step, shift, 29)
    (top, bottom), (left, right) = rows.covered(-50, 500), cols.covered(-50, 500)
    whole = onto(values, valid, rows, cols, (top, bottom), (left, right))
    cut = min(cut, bottom - top - 1, right - left - 1)
    parts = [(top, top + cut), (top + cut, bottom)], [(left, left + cut), (left + cut, right)]
    for layer, name in enumerate(("values", "valid")):
        joined = np.block(
            [[onto(values, valid, rows, cols, down, across)[layer] for across in parts[1]]
             for down in parts[0]]
        )  # fmt: skip
        np.testing.assert_array_equal(joined, whole[layer], err_msg=name)


@pytest.mark.parametrize("size", [0.5, 1 / 3, 0.7, 1.6, 2.0, 5.0])
def test_the_middle_of_a_scene_is_what_gdal_warps_it_to(size: float) -> None:
    smooth = np.add.outer(np.sin(np.arange(60) / 3), np.cos(np.arange(70) / 4)).astype(np.float32)
    height, width = int(60 / size), int(70 / size)
    grid, crs = Affine(10, 0, 5000, 0, -10, 9000), "EPSG:32616"
    judge = np.zeros((height, width), np.float32)
    reproject(
        smooth,
        judge,
        src_crs=crs,
        dst_crs=crs,
        src_transform=grid,
        dst_transform=grid @ Affine.scale(size),
        resampling=Resampling.bilinear,
        tolerance=0,
    )
    rows, cols = Axis(size, 0, 60), Axis(size, 0, 70)
    ours, valid = onto(smooth, np.ones((60, 70), bool), rows, cols, (0, height), (0, width))
    assert valid.all()
    inside = np.s_[6:-6, 6:-6] if size < 1 else np.s_[1:-1, 1:-1]
    np.testing.assert_allclose(ours[inside], judge[inside], atol=2e-4)


def test_a_flat_field_stays_flat_and_what_is_not_valid_has_no_weight() -> None:
    values = np.full((9, 9), 700, np.int16)
    valid = np.ones((9, 9), bool)
    values[4, 4], valid[4, 4] = -9999, False
    axis = Axis(0.5, 0, 9)
    ours, kept = onto(values, valid, axis, axis, (0, 18), (0, 18))
    assert (ours[kept] == 700).all()
    np.testing.assert_array_equal(kept, np.kron(valid, np.ones((2, 2), bool)))


def test_nan_that_is_not_valid_reaches_no_other_pixel() -> None:
    values = np.ones((6, 6), np.float32)
    values[2, 3] = np.nan
    axis = Axis(0.5, 0, 6)
    ours, kept = onto(values, np.isfinite(values), axis, axis, (0, 12), (0, 12))
    assert (ours[kept] == 1).all()


def test_a_grid_is_covered_only_where_its_pixels_lie_wholly_on_the_source() -> None:
    assert Axis(0.5, 0, 10).covered(0, 30) == (0, 20)
    assert Axis(0.5, -0.5, 10).covered(0, 30) == (1, 21)
    assert Axis(0.7, 0, 7).covered(0, 30) == (0, 10)
    assert Axis(0.7, 0.1, 7).covered(0, 30) == (0, 9)
    assert Axis(2.0, 30, 10).covered(0, 30) == (0, 0)
    assert Axis(2.0, -90, 10).covered(0, 30) == (30, 30)
