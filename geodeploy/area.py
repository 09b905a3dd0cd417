"""Square metres: of pixels by their row, of classes by the whole map.

On a projected CRS a pixel has the area that the projection gives it. On a geographic one it is a piece
of the ellipsoid between two parallels and two meridians, whose area is known exactly.
"""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rasterio.crs import CRS

from geodeploy.classmap import open_class_map
from geodeploy.errors import OutputError
from geodeploy.spec import NODATA
from geodeploy.writer import Told, check_output, followed, replacing

_SPHEROID = re.compile(r'SPHEROID\["[^"]*",([0-9.eE+]+),([0-9.eE+]+)')


class ClassExtent(BaseModel):
    """How much of a map one class covers."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    value: int
    name: str
    pixels: int
    share: float
    """Of the pixels that hold data, 0 to 1."""
    area_m2: float | None
    """None where the map has no CRS, or a geographic one that is turned against the meridians."""

    @property
    def area_ha(self) -> float | None:
        """In hectares."""
        return None if self.area_m2 is None else self.area_m2 / 10_000


def class_extents(source: Path | str) -> tuple[ClassExtent, ...]:
    """Pixels and area of each class of the map at ``source``, read in bands of rows.

    Classes that the map names are listed even where they cover nothing, others where they occur.

    Raises:
        SourceError: the map is missing, or no class map.
    """
    with open_class_map(source) as opened:
        counts = np.zeros(256, np.int64)
        areas = np.zeros(256)
        edges = column_areas(opened.crs, opened.transform, opened.height)
        for row, values in opened.bands():
            by_row = _count_rows(values)
            counts += by_row.sum(axis=0)
            if edges is not None:
                pixel_areas = np.diff(edges[row : row + len(values) + 1])
                areas += pixel_areas @ by_row
        if opened.nodata is not None:
            counts[opened.nodata] = 0
        listed = sorted({item.value for item in opened.named} | set(np.flatnonzero(counts).tolist()))
        data = max(int(counts.sum()), 1)
        return tuple(
            ClassExtent(
                value=value,
                name=opened.item(value).name,
                pixels=int(counts[value]),
                share=int(counts[value]) / data,
                area_m2=None if edges is None else float(areas[value]),
            )
            for value in listed
        )


def write_area_table(
    source: Path | str, output: Path | str, *, overwrite: bool = False, told: Told | None = None
) -> tuple[ClassExtent, ...]:
    """Write the area of each class of the map at ``source`` to ``output``, a CSV file.

    ``told`` hears of it before it is moved there.

    Raises:
        OutputError: ``output`` cannot or must not be written.
        SourceError: the map is missing, or no class map.
    """
    output = followed(Path(output))
    check_output(output, [Path(source)], overwrite=overwrite, flag="--area")
    extents = class_extents(source)
    try:
        with replacing(output, told) as draft:
            draft.write_text(_table(extents), encoding="utf-8", newline="")
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror}).") from error
    return extents


def column_areas(crs: CRS | None, transform: Affine, height: int) -> NDArray[np.float64] | None:
    """Square metres from the top of the raster down to each edge of its rows, one pixel wide.

    (height + 1,), float64; the differences are the areas of pixels. None where a pixel's area is not
    known, or not the same along a row.
    """
    if crs is None:
        return None
    rows = np.arange(height + 1, dtype=np.float64)
    if crs.is_projected:
        _, metres = crs.linear_units_factor
        return rows * (abs(transform.determinant) * float(metres) ** 2)
    found = _SPHEROID.search(crs.to_wkt())
    if not crs.is_geographic or found is None or transform.b or transform.d:
        return None
    radians = float(crs.units_factor[1])
    width = abs(transform.a) * radians
    latitudes = (transform.f + transform.e * rows) * radians
    areas = _area_to_equator(latitudes, axis=float(found[1]), inverse_flattening=float(found[2]))
    return np.asarray(np.abs(areas - areas[0]) * width)


def _area_to_equator(
    latitudes: NDArray[np.float64], *, axis: float, inverse_flattening: float
) -> NDArray[np.float64]:
    """Square metres between the equator and ``latitudes``, for one radian of longitude.

    Half of q a², with q from Snyder, Map Projections: A Working Manual (USGS PP 1395), 3-12.
    """
    sine = np.sin(np.clip(latitudes, -math.pi / 2, math.pi / 2))
    if not inverse_flattening:  # WKT's way to write a sphere
        return np.asarray(axis**2 * sine)
    flattening = 1 / inverse_flattening
    e = math.sqrt(flattening * (2 - flattening))
    q = (1 - e**2) * (sine / (1 - (e * sine) ** 2) + np.arctanh(e * sine) / e)
    return np.asarray(axis**2 / 2 * q)


def _count_rows(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each value occurs in each row, (rows, 256)."""
    counts = np.empty((len(values), NODATA + 1), np.int64)
    for place, row in enumerate(values):
        counts[place] = np.bincount(row, minlength=NODATA + 1)
    return counts


def _table(extents: Sequence[ClassExtent]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["value", "name", "pixels", "share", "area_m2", "area_ha"])
    for item in extents:
        square_metres = "" if item.area_m2 is None else f"{item.area_m2:.2f}"
        hectares = "" if item.area_ha is None else f"{item.area_ha:.6f}"
        writer.writerow(
            [item.value, item.name, item.pixels, f"{item.share:.8f}", square_metres, hectares]
        )
    return text.getvalue()
