from collections.abc import Callable, Set
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from geodeploy.blend import (
    Blend,
    Block,
    Mosaic,
    best_class,
    check_finite,
    cosine_weights,
    softmax,
)
from geodeploy.errors import ModelError
from geodeploy.products import ClassMap
from geodeploy.tiles import Region, TileGrid

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


def weighted_mean(
    grid: TileGrid, blend: Blend, values: TileValues, *, without: Set[tuple[int, int]] = frozenset()
) -> NDArray[np.float64]:
    """Sum of w p over sum of w on the whole array in float64. Pixels that nothing weighs are NaN.

    Tiles that stand at a place ``without`` take no part.
    """
    line = profile(grid.tile, grid.overlap, blend)
    total = np.zeros((grid.height, grid.width))
    weights = np.zeros((grid.height, grid.width))
    for top, left in product(
        places(grid.height, grid.tile, grid.overlap), places(grid.width, grid.tile, grid.overlap)
    ):
        if (top, left) in without:
            continue
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
    """The Mosaic's classes, block by block; ``tiles`` gives each class's (tile, tile) at a place."""
    if valid is None:
        valid = np.ones((grid.height, grid.width), bool)
    count = len(tiles(0, 0))
    mosaic = Mosaic(grid, grid.whole, count, blend=blend)
    classes = ClassMap(range(count))
    result = np.full((grid.height, grid.width), 99, np.uint8)
    for tile in grid:
        probs = np.stack(tiles(tile.rows.begin, tile.cols.begin)).astype(np.float32)
        block = mosaic.add(tile, probs, valid[tile.window.toslices()])
        assert block is not None
        (result[place_of(block)],) = classes.of(block)
    assert (result != 99).all()
    return result


def place_of(block: Block) -> tuple[slice, slice]:
    height, width = block.valid.shape
    assert block.mean.shape[1:] == (height, width)
    return np.s_[block.row : block.row + height, block.col : block.col + width]


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
    mosaic = Mosaic(grid, grid.whole, 2, blend=blend)
    classes = ClassMap([7, 9])
    found = np.zeros((70, 90), np.uint8)
    for tile in grid:
        inside = valid[tile.window.toslices()]
        stand = tile.rows.begin, tile.cols.begin
        probs = np.stack([tile_of(part, grid, *stand) for part in whole]) if inside.any() else None
        block = mosaic.add(tile, probs, inside)
        assert block is not None
        (found[place_of(block)],) = classes.of(block)
    expected = np.where(valid, np.where(whole[1] > whole[0], 9, 7), 255)
    np.testing.assert_array_equal(found, expected)


def settled(
    grid: TileGrid, region: Region, blend: Blend, tiles: dict[tuple[int, int], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The means of a region and the disagreement, -1 where one tile is alone: (K + 1, h, w).

    NaN where no block has settled them or two blocks have.
    """
    window, (classes, *_) = region.window, next(iter(tiles.values())).shape
    mosaic = Mosaic(grid, region, classes, blend=blend, disagreement=1)
    means = np.full((classes + 1, grid.height, grid.width), np.nan, np.float32)
    for tile in region:
        probs = tiles[tile.rows.begin, tile.cols.begin].copy()
        valid = np.ones((tile.window.height, tile.window.width), bool)
        block = mosaic.add(tile, probs, valid)
        if block is not None:
            area = (slice(None), *place_of(block))
            apart = np.nan_to_num(block.disagreement, nan=-1)
            found = np.concatenate([block.mean, apart])
            means[area] = np.where(np.isnan(means[area]), found, np.nan)
    rows, cols = window.toslices()
    assert np.isnan(np.delete(np.delete(means, rows, 1), cols, 2)).all()
    return means[:, rows, cols]


@pytest.mark.parametrize("blend", BLENDS)
@given(data=st.data(), grid=grids(), seed=st.integers(0, 2**16))
def test_any_region_is_bit_for_bit_a_cut_of_the_whole(
    blend: Blend, data: st.DataObject, grid: TileGrid, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tiles = {
        (tile.rows.begin, tile.cols.begin): random.random((2, grid.tile, grid.tile), np.float32)
        for tile in grid
    }
    whole = settled(grid, grid.whole, blend, tiles)
    assert np.isfinite(whole).all()
    rows, cols = (
        data.draw(st.lists(st.integers(0, len(spans)), min_size=2, max_size=2, unique=True))
        for spans in (grid.rows, grid.cols)
    )
    region = grid.part(range(min(rows), max(rows)), range(min(cols), max(cols)))
    part = settled(grid, region, blend, tiles)
    np.testing.assert_array_equal(part, whole[:, *region.window.toslices()])


@pytest.mark.parametrize("blend", ["cosine", "flat"])
@given(grid=grids(), seed=st.integers(0, 2**16))
@example(grid=TileGrid(25, 22, 16, 15), seed=0)
def test_disagreement_is_the_weighted_distance_of_all_pairs_of_tiles(
    blend: Blend, grid: TileGrid, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tiles = {
        (tile.rows.begin, tile.cols.begin): softmax(
            random.normal(scale=3, size=(1, 3, grid.tile, grid.tile)).astype(np.float32)
        )[0]
        for tile in grid
    }
    # |p - q|² = |p|² - 2 p q + |q|²: sums over tiles stand for those over pairs.
    line = profile(grid.tile, grid.overlap, blend)
    size = grid.height, grid.width
    total, weights, squares, lengths = np.zeros((3, *size)), *np.zeros((3, *size))
    for tile in grid:
        stand = top, left = tile.rows.begin, tile.cols.begin
        down, across = min(grid.tile, grid.height - top), min(grid.tile, grid.width - left)
        up, back = top - tile.rows.start, left - tile.cols.start
        part = np.s_[top : tile.rows.stop, left : tile.cols.stop]
        here = np.s_[:, up : tile.rows.stop - tile.rows.start, back : tile.cols.stop - tile.cols.start]
        weight, probs = np.outer(line[:down], line[:across]), tiles[stand][here].astype(np.float64)
        weight = weight[: probs.shape[1], : probs.shape[2]]
        total[:, *part] += weight * probs
        weights[part] += weight
        squares[part] += weight**2
        lengths[part] += weight * (probs**2).sum(axis=0)
    apart = weights * lengths - (total**2).sum(axis=0)
    pairs = weights**2 - squares
    compared = pairs > 1e-9 * weights**2
    judge = np.sqrt(np.divide(apart, pairs, out=np.ones(size), where=compared).clip(0))
    found = settled(grid, grid.whole, blend, tiles)[-1]
    np.testing.assert_allclose(found, np.where(compared, judge, -1), atol=1e-4)


@pytest.mark.parametrize("blend", ["cosine", "flat"])
@given(grid=grids(), seed=st.integers(0, 2**16), share=st.sampled_from([0.05, 0.3, 0.8]))
def test_without_the_tiles_that_failed_the_blend_is_the_weighted_mean_of_the_others(
    blend: Blend, grid: TileGrid, seed: int, share: float
) -> None:
    random = np.random.default_rng(seed)
    tiles = {
        (tile.rows.begin, tile.cols.begin): random.random((grid.tile, grid.tile), np.float32)
        for tile in grid
    }
    failed = {place for place in tiles if random.random() < share}
    judge = weighted_mean(
        grid, blend, lambda top, left: tiles[top, left].astype(np.float64), without=failed
    )
    mosaic = Mosaic(grid, grid.whole, 1, blend=blend)
    valid = np.ones((grid.tile, grid.tile), bool)
    mean = np.full(judge.shape, np.nan)
    for tile in grid:
        place = tile.rows.begin, tile.cols.begin
        probs = None if place in failed else tiles[place][np.newaxis].copy()
        here = valid[: tile.rows.stop - tile.rows.start, : tile.cols.stop - tile.cols.start]
        block = mosaic.add(tile, probs, here, failed=place in failed)
        assert block is not None
        answered = True if block.answered is None else block.answered
        mean[place_of(block)] = np.where(answered, block.mean[0], np.nan)
    np.testing.assert_allclose(mean, judge, rtol=0, atol=WITHIN)


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
