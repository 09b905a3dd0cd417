"""Sieve and smooth by bands; the judges look at the whole array, pixel by pixel or by GDAL."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.features import rasterize, shapes, sieve

from geodeploy import filters as module
from geodeploy.filters import sieve_bands, smooth_bands


def cut(values: NDArray[np.uint8], rows: int) -> Iterator[NDArray[np.uint8]]:
    return (values[row : row + rows] for row in range(0, len(values), rows))


def joined(bands: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.concatenate(list(bands))


@st.composite
def class_maps(draw: st.DrawFn) -> NDArray[np.uint8]:
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    values = draw(st.lists(st.sampled_from([0, 1, 7, 255]), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = random.choice(np.array(values, np.uint8), (height, width))
    patches = np.kron(chosen, np.ones((draw(st.integers(1, 3)), draw(st.integers(1, 5))), np.uint8))
    noise = random.random(patches.shape) < draw(st.sampled_from([0, 0.1]))
    patches[noise] = random.choice(np.array(values, np.uint8), noise.sum())
    return patches


@pytest.fixture(autouse=True, scope="module")
def _low_bands() -> Iterator[None]:
    """Else all maps that are small enough for the judges would be one band."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", 4)
        yield


def majority(values: NDArray[np.uint8], side: int, nodata: int | None) -> NDArray[np.uint8]:
    reach, result = side // 2, values.copy()
    for row, col in np.ndindex(*values.shape):
        if values[row, col] == nodata:
            continue
        square = values[max(row - reach, 0) : row + reach + 1, max(col - reach, 0) : col + reach + 1]
        votes = np.bincount(square.ravel(), minlength=256)
        if nodata is not None:
            votes[nodata] = 0
        if votes[values[row, col]] < votes.max():
            result[row, col] = votes.argmax()
    return result


def sieved(values: NDArray[np.uint8], size: int, nodata: int | None) -> NDArray[np.uint8]:
    """One pass: regions by GDAL, borders by looking at each pixel's four neighbours."""
    outlines = [outline for outline, _ in shapes(values, connectivity=4)]
    regions = rasterize(
        ((outline, number) for number, outline in enumerate(outlines)), values.shape, dtype="int32"
    )
    pixels = np.bincount(regions.ravel())
    result = values.copy()
    for number in np.flatnonzero(pixels < size):
        inside = regions == number
        if values[inside][0] == nodata:
            continue
        borders = np.zeros(256, int)
        for row, col in np.argwhere(inside):
            for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                there = row + down, col + right
                if not (0 <= there[0] < len(values) and 0 <= there[1] < values.shape[1]):
                    continue
                if values[there] != nodata and pixels[regions[there]] >= size:
                    borders[values[there]] += 1
        if borders.any():
            result[inside] = borders.argmax()
    return result


@given(class_maps(), st.sampled_from([3, 5, 9]), st.integers(1, 30), st.sampled_from([255, None]))
def test_smooth_is_the_majority_of_the_whole(
    values: NDArray[np.uint8], side: int, rows: int, nodata: int | None
) -> None:
    found = joined(smooth_bands(cut(values, rows), side, nodata=nodata))
    assert (found == majority(values, side, nodata)).all()


@given(class_maps(), st.sampled_from([2, 3, 5, 11]), st.integers(1, 30), st.sampled_from([255, None]))
def test_sieve_is_that_of_the_whole(
    values: NDArray[np.uint8], size: int, rows: int, nodata: int | None
) -> None:
    expected = values
    for _ in range(3):
        expected = sieved(expected, size, nodata)
    before = values.copy()
    assert (joined(sieve_bands(cut(values, rows), size, nodata=nodata)) == expected).all()
    assert (values == before).all()


def test_lone_pixels_go_as_they_do_with_gdal() -> None:
    values = np.ones((50, 40), np.uint8)
    values[::7, ::5] = 2
    values[20:30, 10:20] = 3
    found = joined(sieve_bands(cut(values, 9), 4, nodata=None))
    assert (found == sieve(values, 4, connectivity=4)).all()
    assert set(np.unique(found)) == {1, 3}


def test_the_longest_border_wins_over_the_largest_neighbour() -> None:
    values = np.ones((30, 30), np.uint8)
    values[:4] = 2
    values[3, 10:13] = 7  # three pixels of 1 below, three of 2 above, one more on either side
    assert (joined(sieve_bands([values], 4, nodata=None))[3, 10:13] == 2).all()
    assert (sieve(values, 4, connectivity=4)[3, 10:13] == 1).all()


def test_a_region_within_a_small_one_follows_it() -> None:
    values = np.ones((20, 20), np.uint8)
    values[5:10, 5:10] = 2
    values[7, 7] = 3
    assert (joined(sieve_bands(cut(values, 3), 30, nodata=None)) == 1).all()


def test_nodata_is_left_alone_and_gains_nothing() -> None:
    values = np.full((20, 20), 255, np.uint8)
    values[4:6, 4:6] = 1
    values[10:, :] = 2
    values[15, 15] = 255
    for found in (
        joined(sieve_bands(cut(values, 6), 10, nodata=255)),
        joined(smooth_bands(cut(values, 6), 9, nodata=255)),
    ):
        assert (found == values).all()
