"""What the pixels of a band come to: its statistics, and whether a file holds just those pixels.

Parts of a band are tallied one by one, noted as JSON, and added up.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from geodeploy.spec import NODATA

_FEW = 24
"""Values in a map of classes, at most; a raster of shares has more."""
_SAMPLED = 32
"""Every so many columns are looked at for values."""


class Tally(Protocol):
    """Of one band, or of a piece of it."""

    @classmethod
    def of(cls, values: NDArray[Any]) -> Self:
        """Of a band's ``values``."""
        ...

    @classmethod
    def read(cls, noted: Sequence[float]) -> Self:
        """What `noted` gave."""
        ...

    def __add__(self, other: Self) -> Self:
        """Of both pieces."""
        ...

    @property
    def noted(self) -> list[Any]:
        """Itself in numbers that JSON keeps as they are."""
        ...

    @property
    def valid(self) -> int:
        """Pixels with data."""
        ...

    def holds(self, other: Self) -> bool:
        """Whether the ``other`` pixels are these, as far as can be told."""
        ...

    def statistics(self) -> dict[str, str]:
        """What GDAL would find, by its tags; nothing without a valid pixel."""
        ...


@dataclass(frozen=True, slots=True)
class Counts:
    """Of bytes: the pixels of each value; 255 is no data."""

    pixels: NDArray[np.int64]
    """(256,)"""

    @classmethod
    def of(cls, values: NDArray[np.uint8]) -> Self:
        """Of a band's ``values``."""
        # A map has few values, and comparing is twenty times faster than bincount, which widens every
        # byte to eight.
        pixels = np.zeros(256, np.int64)
        present = np.flatnonzero(np.bincount(values[..., ::_SAMPLED].ravel(), minlength=256))
        if len(present) <= _FEW:
            for value in present.tolist():  # as a numpy int64 it would widen every byte too
                pixels[value] = np.count_nonzero(values == value)
        if pixels.sum() != values.size:
            pixels = np.bincount(values.ravel(), minlength=256)
        return cls(pixels)

    @classmethod
    def read(cls, noted: Sequence[float]) -> Self:
        """What `noted` gave."""
        return cls(np.array(noted, np.int64))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.pixels + other.pixels)

    @property
    def noted(self) -> list[Any]:
        """One number a value."""
        counts: list[Any] = self.pixels.tolist()
        return counts

    @property
    def valid(self) -> int:
        """Pixels with data."""
        return int(self.pixels[:NODATA].sum())

    def holds(self, other: Self) -> bool:
        """Whether the ``other`` pixels have as many of each value."""
        return bool((self.pixels == other.pixels).all())

    def statistics(self) -> dict[str, str]:
        """What GDAL would find, by its tags; nothing without a valid pixel."""
        found = {value: int(count) for value, count in enumerate(self.pixels[:NODATA]) if count}
        pixels = self.valid
        if not pixels:
            return {}
        # Whole numbers: the same sums however the map is cut.
        total = sum(value * count for value, count in found.items())
        squares = sum(value * value * count for value, count in found.items())
        return {
            "STATISTICS_MINIMUM": str(min(found)),
            "STATISTICS_MAXIMUM": str(max(found)),
            "STATISTICS_MEAN": f"{total / pixels:.14g}",
            "STATISTICS_STDDEV": f"{math.sqrt(squares * pixels - total * total) / pixels:.14g}",
            "STATISTICS_VALID_PERCENT": f"{100 * pixels / int(self.pixels.sum()):.4g}",
        }


@dataclass(frozen=True, slots=True)
class Moments:
    """Of float32 numbers, of which NaN is no data."""

    pixels: int = 0
    """With and without data."""
    valid: int = 0
    """Pixels with data."""
    bits: int = 0
    """The sum of the bits of each number, read as whole ones, modulo 2^64: the same in any order."""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of the squared distances from the mean."""

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Self:
        """Of a band's ``values``; the bits are those that they have in float32."""
        found = values[~np.isnan(values)]
        if not found.size:
            return cls(pixels=values.size)
        mean = float(found.mean(dtype=np.float64))
        return cls(
            pixels=values.size,
            valid=found.size,
            bits=int(found.astype(np.float32).view(np.uint32).sum(dtype=np.uint64)),
            low=float(found.min()),
            high=float(found.max()),
            mean=mean,
            squares=float(np.square(found.astype(np.float64) - mean).sum()),
        )

    @classmethod
    def read(cls, noted: Sequence[float]) -> Self:
        """What `noted` gave."""
        pixels, valid, bits, *more = noted
        return cls(int(pixels), int(valid), int(bits), *more)

    def __add__(self, other: Self) -> Self:
        """Of both pieces (Chan, Golub and LeVeque 1979)."""
        if not self.valid or not other.valid:
            more, less = (self, other) if self.valid else (other, self)
            return type(self).read([more.pixels + less.pixels, *more.noted[1:]])
        valid = self.valid + other.valid
        apart = other.mean - self.mean
        return type(self)(
            pixels=self.pixels + other.pixels,
            valid=valid,
            bits=(self.bits + other.bits) % 2**64,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            mean=self.mean + apart * other.valid / valid,
            squares=self.squares + other.squares + apart**2 * self.valid * other.valid / valid,
        )

    @property
    def noted(self) -> list[Any]:
        """The numbers in their order."""
        return [getattr(self, name) for name in self.__slots__]

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.squares / max(self.valid, 1))

    def holds(self, other: Self) -> bool:
        """Whether as many ``other`` pixels have data, and the same sum of bits."""
        return (self.pixels, self.valid, self.bits) == (other.pixels, other.valid, other.bits)

    def statistics(self) -> dict[str, str]:
        """What GDAL would find, by its tags; nothing without a valid pixel."""
        if not self.valid:
            return {}
        # Nine digits say a float32 exactly; sums of others would tell in which pieces they were made.
        return {
            "STATISTICS_MINIMUM": f"{self.low:.9g}",
            "STATISTICS_MAXIMUM": f"{self.high:.9g}",
            "STATISTICS_MEAN": f"{self.mean:.9g}",
            "STATISTICS_STDDEV": f"{self.deviation:.9g}",
            "STATISTICS_VALID_PERCENT": f"{100 * self.valid / self.pixels:.4g}",
        }


TALLIES: dict[str, type[Counts] | type[Moments]] = {"uint8": Counts, "float32": Moments}
"""By the type of the numbers."""


def add_up(tallies: Iterable[Any]) -> Any:
    """Of all the pieces, of which there is at least one, in their order."""
    first, *rest = tallies
    for tally in rest:
        first = first + tally
    return first
