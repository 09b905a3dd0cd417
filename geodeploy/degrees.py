"""Rings in degrees that are whole: they go on beyond 180 degrees, and run along a pole that they touch.

PROJ gives longitudes from -180 to 180, and any one at a pole: a ring that is taken to degrees point by
point is torn at the one and pinched at the other.
"""

import math

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.warp import transform as warp

Corners = NDArray[np.float64]
"""(N, 2): x and y, or longitude and latitude."""

WGS84 = CRS.from_epsg(4326)
STEP = 5.0
"""Degrees of longitude that a straight piece may span: near a pole it is not straight in degrees."""
AT_POLE = 90 - 1e-7
"""What is a centimetre from a pole is at it."""
_HALVINGS = 64


def moved(corners: Corners, source: CRS, target: CRS) -> Corners:
    """``corners`` in ``target``; NaN where it has no such point."""
    try:
        found = np.stack(warp(source, target, *corners.T), axis=1)
    except CPLE_BaseError:  # GDAL says so of all points, whichever it is
        if len(corners) == 1:
            return np.full((1, 2), np.nan)
        half = len(corners) // 2
        return np.concatenate(
            [moved(part, source, target) for part in (corners[:half], corners[half:])]
        )
    found[~np.isfinite(found).all(axis=1)] = np.nan
    return found


def densified(ring: Corners, step: float) -> Corners:
    """``ring`` with more corners along its sides, none longer than ``step``."""
    sides = np.diff(ring, axis=0)
    pieces = np.maximum(np.ceil(np.hypot(*sides.T) / step), 1).astype(int) if step else [1] * len(sides)
    side = np.repeat(np.arange(len(sides)), pieces)
    piece = np.arange(len(side)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    share = piece / np.asarray(pieces)[side]
    return np.concatenate([ring[side] + sides[side] * share[:, np.newaxis], ring[-1:]])


def extent(ring: Corners) -> float:
    """The longer side of the box around ``ring``."""
    return float(np.ptp(ring, axis=0).max())


def unrolled(ring: Corners, crs: CRS, degrees: CRS = WGS84) -> Corners:
    """A ring around what the closed ``ring`` in ``crs`` lies around, in longitude and latitude.

    Its longitudes go on beyond 180 degrees. Around a pole it goes from 180 degrees west to 180 degrees
    east, or back, and then along the pole. NaN marks corners that do not exist.
    """
    if crs.is_geographic:
        return near(moved(ring, crs, degrees), ring[:, 0], 360)
    if _area(ring) < 0:
        ring = ring[::-1]
    # A side as long as the earth would end where it begins.
    ring = densified(ring, extent(ring) / 8)
    placed = moved(ring, crs, degrees)
    for _ in range(_HALVINGS):
        polar = np.abs(placed[:, 1]) > AT_POLE
        wide = (np.abs(_turns(placed[:, 0])) > STEP) & ~polar[:-1] & ~polar[1:]
        if not wide.any():
            break
        middles, places = (ring[:-1][wide] + ring[1:][wide]) / 2, np.flatnonzero(wide) + 1
        ring = np.insert(ring, places, middles, axis=0)
        placed = np.insert(placed, places, moved(middles, crs, degrees), axis=0)
    if not np.isfinite(placed).all():
        return placed
    return _continued(placed[:-1])


def near(corners: Corners, xs: NDArray[np.float64], period: float) -> Corners:
    """``corners`` turned by whole ``period``s to lie as near to ``xs`` as they can."""
    return corners + np.stack(
        [period * np.round((xs - corners[:, 0]) / period), np.zeros(len(xs))], axis=1
    )


def turns(west: float, east: float, left: float, right: float) -> range:
    """The whole turns that bring what lies from ``west`` to ``east`` between ``left`` and ``right``."""
    first, last = math.floor((left - east) / 360) + 1, math.ceil((right - west) / 360) - 1
    return range(first, last + 1)


def _continued(ring: Corners) -> Corners:
    """The open ``ring``, against the clock on the ground, with longitudes that do not jump; closed."""
    longitudes, latitudes = ring.T
    polar = np.abs(latitudes) > AT_POLE
    if polar.all():
        return np.concatenate([ring, ring[:1]])
    # Begin away from the poles; several corners at a pole are one.
    order = np.roll(np.arange(len(ring)), -int(np.argmin(polar)))
    polar = polar[order]
    order = order[~(polar & np.roll(polar, 1))]
    longitudes, latitudes = ring[order].T
    polar = np.abs(latitudes) > AT_POLE
    # The ring comes to a pole along one meridian and leaves along another: two corners in degrees.
    before, after = np.roll(longitudes, 1), np.roll(longitudes, -1)
    twice = np.where(polar, 2, 1)
    comes = (np.cumsum(twice) - twice)[polar]
    xs, ys = np.repeat(longitudes, twice), np.repeat(latitudes, twice)
    xs[comes], xs[comes + 1] = before[polar], after[polar]
    ys[comes] = ys[comes + 1] = np.copysign(90, ys[comes])
    steps = _turns(np.append(xs, xs[0]))
    # With the inside to the left it runs to the west along the north pole, to the east along the other.
    sides = np.copysign(1, ys[comes])
    along = (sides * (xs[comes] - xs[comes + 1])) % 360
    along[along < 1e-9] = 360
    steps[comes] = -sides * along
    xs = xs[0] + np.concatenate([[0], np.cumsum(steps)])
    around = 360 * round(float(xs[-1] - xs[0]) / 360)
    xs[-1] = xs[0] + around
    ys = np.append(ys, ys[0])
    if around:
        xs, ys = _from_180(xs, ys, around)
        pole = math.copysign(90, around)
        xs, ys = np.append(xs, [xs[-1], xs[0], xs[0]]), np.append(ys, [pole, pole, ys[0]])
    return np.stack([xs, ys], axis=1)


def _from_180(
    xs: NDArray[np.float64], ys: NDArray[np.float64], around: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A line around a pole, cut where it crosses 180 degrees instead of where it was closed.

    Of several crossings at the one nearest to the pole, from where no other lies on the way there.
    """
    seam = 360 * np.floor((xs + 180) / 360) - 180
    (before,) = np.nonzero(np.diff(seam))
    crossed = np.maximum(seam[before], seam[before + 1])
    share = (crossed - xs[before]) / (xs[before + 1] - xs[before])
    latitudes = ys[before] + share * (ys[before + 1] - ys[before])
    nearest = np.argmax(latitudes * around)
    after, at, y = before[nearest] + 1, crossed[nearest], latitudes[nearest]
    start = -math.copysign(180, around)
    rest, begun = xs[after:] - at, xs[1:after] + around - at
    return (
        start + np.concatenate([[0], rest, begun, [around]]),
        np.concatenate([[y], ys[after:], ys[1:after], [y]]),
    )


def _turns(longitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The way from each to the next, the shorter way around."""
    return (np.diff(longitudes) + 180) % 360 - 180


def _area(ring: Corners) -> float:
    """Greater than 0 against the clock."""
    x, y = (ring - ring[0]).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
