from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geodeploy.errors import GridError
from geodeploy.tiles import TileGrid


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    tile = draw(st.integers(1, 40))
    overlap = draw(st.integers(0, tile - 1))
    sizes = st.one_of(st.integers(1, 130), st.sampled_from([1, max(tile - 1, 1), tile, tile + 1]))
    return TileGrid(height=draw(sizes), width=draw(sizes), tile=tile, overlap=overlap)


@given(grids())
def test_every_pixel_is_covered_and_none_lies_outside(grid: TileGrid) -> None:
    visits = np.zeros((grid.height, grid.width), dtype=int)
    for tile in grid:
        rows, cols = tile.window.toslices()
        assert 0 <= rows.start < rows.stop <= grid.height
        assert 0 <= cols.start < cols.stop <= grid.width
        visits[rows, cols] += 1
    assert visits.min() >= 1


@given(grids())
def test_every_window_is_a_whole_tile_unless_the_raster_is_smaller(grid: TileGrid) -> None:
    for tile in grid:
        assert tile.window.height == min(grid.tile, grid.height)
        assert tile.window.width == min(grid.tile, grid.width)


@given(grids())
def test_every_seam_is_exactly_the_overlap_wide(grid: TileGrid) -> None:
    for spans, length in ((grid.rows, grid.height), (grid.cols, grid.width)):
        for span, after in pairwise(spans):
            assert after.begin == span.begin + grid.stride
            # A tile that is followed by another one stands at its place in the regular grid.
            assert span.start == span.begin
            assert span.stop - after.begin == grid.overlap
        assert spans[-1].start <= spans[-1].begin < spans[-1].stop == length


@given(grids())
def test_what_a_tile_settles_no_later_tile_adds_to_and_all_is_settled_once(grid: TileGrid) -> None:
    for spans, length in ((grid.rows, grid.height), (grid.cols, grid.width)):
        settled = [pixel for span in spans for pixel in range(span.begin, span.settled)]
        assert settled == list(range(length))
        for place, span in enumerate(spans):
            assert all(later.begin >= span.settled for later in spans[place + 1 :])


@given(grids())
def test_no_tile_is_there_for_nothing(grid: TileGrid) -> None:
    for spans in (grid.rows, grid.cols):
        for span, after in pairwise(spans):
            assert after.stop > span.stop


@given(grids(), st.integers(0, 60), st.integers(0, 60))
def test_a_larger_raster_has_the_same_tiles_up_to_where_the_smaller_one_ends(
    grid: TileGrid, down: int, right: int
) -> None:
    larger = TileGrid(grid.height + down, grid.width + right, grid.tile, grid.overlap)
    begins = [(tile.rows.begin, tile.cols.begin) for tile in larger]
    assert {(tile.rows.begin, tile.cols.begin) for tile in grid} <= set(begins)
    assert grid.rows[:-1] == larger.rows[: len(grid.rows) - 1]


@given(grids())
def test_tiles_come_row_by_row_and_are_as_many_as_the_grid_says(grid: TileGrid) -> None:
    corners = [(tile.window.row_off, tile.window.col_off) for tile in grid]
    assert corners == sorted(corners)
    assert len(set(corners)) == len(corners) == len(grid)


@st.composite
def regions(draw: st.DrawFn) -> tuple[TileGrid, range, range]:
    grid = draw(grids())
    rows, cols = (
        sorted(draw(st.lists(st.integers(0, len(spans)), min_size=2, max_size=2, unique=True)))
        for spans in (grid.rows, grid.cols)
    )
    return grid, range(*rows), range(*cols)


@given(regions())
def test_a_region_has_every_tile_that_adds_to_its_window_and_no_other(
    drawn: tuple[TileGrid, range, range],
) -> None:
    grid, rows, cols = drawn
    region = grid.part(rows, cols)
    top, left = region.window.row_off, region.window.col_off
    bottom, right = top + region.window.height, left + region.window.width
    needed = [
        tile
        for tile in grid
        if (tile.rows.begin < bottom and tile.rows.stop > top)
        and (tile.cols.begin < right and tile.cols.stop > left)
    ]
    assert list(region) == needed
    assert len(region) == len(needed)


@given(regions())
def test_the_window_of_a_region_is_what_the_tiles_at_its_places_settle(
    drawn: tuple[TileGrid, range, range],
) -> None:
    grid, rows, cols = drawn
    window = grid.part(rows, cols).window
    assert window.row_off == grid.rows[rows[0]].begin
    assert window.col_off == grid.cols[cols[0]].begin
    assert window.row_off + window.height == grid.rows[rows[-1]].settled
    assert window.col_off + window.width == grid.cols[cols[-1]].settled


@given(regions())
def test_the_source_of_a_region_is_the_smallest_window_with_all_that_its_tiles_read(
    drawn: tuple[TileGrid, range, range],
) -> None:
    grid, rows, cols = drawn
    region = grid.part(rows, cols)
    read = np.zeros((grid.height, grid.width), bool)
    for tile in region:
        read[tile.window.toslices()] = True
    source = region.source.toslices()
    assert read[source].all()
    assert read.sum() == read[source].size


@given(grids())
def test_the_whole_is_a_region_with_every_tile(grid: TileGrid) -> None:
    window = grid.whole.window
    assert list(grid.whole) == list(grid)
    assert (window.row_off, window.col_off) == (0, 0)
    assert (window.height, window.width) == (grid.height, grid.width)


def test_last_tile_slides_back_instead_of_leaving_the_raster() -> None:
    grid = TileGrid(height=256, width=600, tile=256, overlap=32)
    assert [tile.window.col_off for tile in grid] == [0, 224, 344]
    # It adds to the map from its regular place on: the seam is 32 wide, not 136.
    assert [span.begin for span in grid.cols] == [0, 224, 448]


def test_a_sentinel_2_scene_takes_3364_tiles_of_224_with_overlap_32() -> None:
    assert len(TileGrid(height=10980, width=10980, tile=224, overlap=32)) == 3364


@pytest.mark.parametrize("overlap", [-1, 64, 65])
def test_an_overlap_that_does_not_fit_says_which_ones_do(overlap: int) -> None:
    with pytest.raises(GridError, match=rf"overlap={overlap} px .* tile=64 px.* from 0 to 63"):
        TileGrid(height=100, width=100, tile=64, overlap=overlap)


def test_a_raster_without_pixels_has_no_grid() -> None:
    with pytest.raises(GridError, match="0 x 100 pixels"):
        TileGrid(height=0, width=100, tile=64, overlap=0)


def test_a_raster_of_a_size_that_no_place_on_earth_has_is_refused() -> None:
    with pytest.raises(GridError, match=r"A raster of 100 x 2000000000 pixels: .* Is its size"):
        TileGrid(height=100, width=2_000_000_000, tile=224, overlap=32)
