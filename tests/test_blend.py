from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from geodeploy.blend import Blend, Mosaic, best_class, check_finite, cosine_weights, softmax
from geodeploy.errors import ModelError
from geodeploy.tiles import TileGrid

BLENDS: tuple[Blend, ...] = ("cosine", "flat", "crop")
WITHIN = 1e-5
"""What the design promises: float32 means of numbers up to one, a few additions each."""

TileValues = Callable[[int, int], NDArray[np.float64]]


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    tile = draw(st.integers(2, 24))
    overlap = draw(st.one_of(st.integers(0, tile - 1), st.sampled_from([0, tile // 2, tile - 1])))
    # At most six tiles across, for the time it takes.
    most = tile + 5 * (tile - overlap)
    sizes = st.one_of(st.integers(1, most), st.sampled_from([1, tile - 1, tile, tile + 1]))
    return TileGrid(height=draw(sizes), width=draw(sizes), tile=tile, overlap=overlap)


def places(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles stand in the regular grid: as many as it takes to cover ``length``."""
    stands = [0]
    while stands[-1] + tile < length:
        stands.append(stands[-1] + tile - overlap)
    return stands


def profile(tile: int, overlap: int, blend: Blend) -> NDArray[np.float64]:
    """The weight of each pixel along one side of a tile, written out pixel by pixel."""
    weights = np.zeros(tile)
    for pixel in range(tile):
        from_edge = min(pixel, tile - 1 - pixel)
        if blend == "flat" or (blend == "cosine" and from_edge + 0.5 >= overlap):
            weights[pixel] = 1
        elif blend == "cosine":
            weights[pixel] = np.sin(np.pi / 2 * (from_edge + 0.5) / overlap) ** 2
        elif overlap // 2 <= pixel < tile - overlap + overlap // 2:
            weights[pixel] = 1
    return weights


def weighted_mean(grid: TileGrid, blend: Blend, values: TileValues) -> NDArray[np.float64]:
    """Sum of w p over sum of w on the whole array in float64. Pixels that nothing weighs are NaN."""
    line = profile(grid.tile, grid.overlap, blend)
    total = np.zeros((grid.height, grid.width))
    weights = np.zeros((grid.height, grid.width))
    for top, left in product(
        places(grid.height, grid.tile, grid.overlap), places(grid.width, grid.tile, grid.overlap)
    ):
        down, across = min(grid.tile, grid.height - top), min(grid.tile, grid.width - left)
        weight = np.outer(line[:down], line[:across])
        part = np.s_[top : top + down, left : left + across]
        # The tile was read further up and left where it would have left the raster.
        up, back = (
            top - max(min(top, grid.height - grid.tile), 0),
            left - max(min(left, grid.width - grid.tile), 0),
        )
        total[part] += weight * values(top, left)[up : up + down, back : back + across]
        weights[part] += weight
    return np.divide(total, weights, out=np.full(total.shape, np.nan), where=weights > 0)


def mapped(
    grid: TileGrid,
    blend: Blend,
    tiles: Callable[[int, int], list[NDArray[np.float32]]],
    *,
    valid: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The Mosaic's classes, strip by strip; ``tiles`` gives each class's (tile, tile) at a place."""
    if valid is None:
        valid = np.ones((grid.height, grid.width), bool)
    first = tiles(0, 0)
    mosaic = Mosaic(grid, list(range(len(first))), blend=blend, nodata=255)
    strips = []
    for tile in grid:
        probs = np.stack(tiles(tile.rows.begin, tile.cols.begin)).astype(np.float32)
        strip = mosaic.add(tile, probs, valid[tile.window.toslices()])
        if strip is not None:
            assert strip.row == sum(len(part) for part in strips)
            strips.append(strip.classes.copy())
    return np.concatenate(strips)


def tile_of(whole: NDArray[np.float32], grid: TileGrid, top: int, left: int) -> NDArray[np.float32]:
    """What a tile that stands at ``top, left`` sees of ``whole``, padded by anything."""
    row, col = max(min(top, grid.height - grid.tile), 0), max(min(left, grid.width - grid.tile), 0)
    part = whole[row : row + grid.tile, col : col + grid.tile]
    padding = ((0, grid.tile - part.shape[0]), (0, grid.tile - part.shape[1]))
    return np.pad(part, padding, constant_values=0.5)


@pytest.mark.parametrize("blend", BLENDS)
@given(grid=grids(), seed=st.integers(0, 2**16))
@example(grid=TileGrid(1, 70, 16, 5), seed=0)
@example(grid=TileGrid(70, 1, 16, 5), seed=0)
@example(grid=TileGrid(50, 50, 16, 0), seed=0)
@example(grid=TileGrid(25, 22, 16, 15), seed=0)
def test_blending_is_the_weighted_mean_over_the_whole_array(
    blend: Blend, grid: TileGrid, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tiles = {
        (tile.rows.begin, tile.cols.begin): random.random((grid.tile, grid.tile), np.float32)
        for tile in grid
    }
    judge = weighted_mean(grid, blend, lambda top, left: tiles[top, left].astype(np.float64))
    weighed = np.isfinite(judge)
    # A second class that all tiles hold to be the judge's value, plus or minus the tolerance, shows
    # through the class map alone that the mean of the first is that close.
    for shift, winner in ((WITHIN, 1), (-WITHIN, 0)):
        other = (np.nan_to_num(judge) + shift).astype(np.float32)
        classes = mapped(
            grid, blend, lambda top, left, o=other: [tiles[top, left], tile_of(o, grid, top, left)]
        )
        assert classes.shape == (grid.height, grid.width)
        assert (classes[weighed] == winner).all()


@pytest.mark.parametrize("blend", BLENDS)
@given(grid=grids(), seed=st.integers(0, 2**16))
def test_tiles_that_agree_leave_every_bit_as_it_is(blend: Blend, grid: TileGrid, seed: int) -> None:
    value = np.random.default_rng(seed).random((grid.height, grid.width), np.float32)
    above, below = np.nextafter(value, np.float32(2)), np.nextafter(value, np.float32(-1))
    for other, winner in ((above, 1), (below, 0), (value, 0)):
        classes = mapped(
            grid,
            blend,
            lambda top, left, o=other: [tile_of(x, grid, top, left) for x in (value, o)],
        )
        assert (classes == winner).all()


@given(grid=grids())
@example(grid=TileGrid(80, 81, 32, 24))
@example(grid=TileGrid(41, 37, 9, 8))
def test_crop_takes_each_pixel_from_a_tile_that_sees_half_an_overlap_around_it(grid: TileGrid) -> None:
    # Two classes: whether the pixel is too near the tile's edge, and not. Raster edges do not count.
    reach = grid.overlap // 2

    def near_edge(top: int, left: int) -> list[NDArray[np.float32]]:
        near = np.zeros((grid.tile, grid.tile), np.float32)
        starts = [
            max(min(stand, length - grid.tile), 0)
            for stand, length in ((top, grid.height), (left, grid.width))
        ]
        for axis, (start, length) in enumerate(zip(starts, (grid.height, grid.width), strict=True)):
            lines = np.moveaxis(near, axis, 0)
            if start > 0:
                lines[:reach] = 1
            if start + grid.tile < length:
                lines[grid.tile - reach :] = 1
        return [1 - near, near]

    assert (mapped(grid, "crop", near_edge) == 0).all()


@pytest.mark.parametrize("blend", BLENDS)
def test_pixels_without_data_are_nodata_and_tiles_without_data_may_be_left_out(blend: Blend) -> None:
    grid = TileGrid(70, 90, 16, 6)
    random = np.random.default_rng(3)
    whole = random.random((2, 70, 90), np.float32)
    valid = np.zeros((70, 90), bool)
    valid[20:40, 50:] = random.random((20, 40)) > 0.3
    mosaic = Mosaic(grid, [7, 9], blend=blend, nodata=255)
    strips = []
    for tile in grid:
        inside = valid[tile.window.toslices()]
        stand = tile.rows.begin, tile.cols.begin
        probs = np.stack([tile_of(part, grid, *stand) for part in whole]) if inside.any() else None
        strip = mosaic.add(tile, probs, inside)
        strips += [] if strip is None else [strip.classes]
    expected = np.where(valid, np.where(whole[1] > whole[0], 9, 7), 255)
    np.testing.assert_array_equal(np.concatenate(strips), expected)


@given(tile=st.integers(1, 64), overlap=st.integers(0, 63))
def test_weights_of_the_cosine_are_nowhere_zero_and_mirror_themselves(tile: int, overlap: int) -> None:
    weights = cosine_weights(tile, min(overlap, tile - 1))
    assert weights.min() > 0
    assert weights.max() <= 1
    np.testing.assert_allclose(weights, weights[::-1])


def test_where_two_cosine_tiles_overlap_their_weights_sum_to_one() -> None:
    weights = cosine_weights(32, 10)
    np.testing.assert_allclose(weights[-10:] + weights[:10], 1.0)


@given(seed=st.integers(0, 2**16), classes=st.integers(1, 9))
def test_the_best_class_is_the_first_of_the_greatest_as_argmax_has_it(seed: int, classes: int) -> None:
    probs = np.random.default_rng(seed).integers(0, 4, (classes, 7, 5)).astype(np.float32)
    np.testing.assert_array_equal(best_class(probs), probs.argmax(axis=0))


def test_softmax_sums_to_one_and_stands_logits_beyond_what_exp_can_hold() -> None:
    logits = np.random.default_rng(0).normal(scale=300, size=(2, 5, 4, 4)).astype(np.float32)
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(softmax(logits), exact, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_that_returns_no_number_is_told_of_with_the_tile(bad: float) -> None:
    tiles = list(TileGrid(100, 100, 64, 16))
    outputs = np.zeros((len(tiles), 2, 64, 64), np.float32)
    check_finite(outputs, tiles)
    outputs[2, 1, 5, 5] = bad
    with pytest.raises(ModelError, match="NaN or infinity for the tile at row 36, column 0"):
        check_finite(outputs, tiles)


def test_large_but_finite_outputs_are_no_error() -> None:
    outputs = np.full((1, 2, 64, 64), 3e38, np.float32)
    with np.errstate(over="ignore"):
        check_finite(outputs, list(TileGrid(64, 64, 64, 0)))
