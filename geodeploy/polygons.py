"""The polygons of a class map: made in bands of rows, joined across them, written as they are whole.

A band is 512 rows. What does not touch its edges is written at once; what does waits, by region, until
no row can add to it. Memory is that of one band and of the outlines that still wait.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rasterio.crs import CRS

from geodeploy.area import column_areas
from geodeploy.classmap import ROWS, ClassMap, open_class_map
from geodeploy.errors import OutputError, require
from geodeploy.writer import Told, check_output, followed

if TYPE_CHECKING:
    from geodeploy.outlines import Features

SUFFIXES = (".gpkg", ".geojson", ".json", ".parquet", ".geoparquet")
IN_DEGREES = (".geojson", ".json")
_EARTH_M = 6_371_000.0

Metres = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PolygonOptions(BaseModel):
    """How to draw the polygons of a class map."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    min_area_m2: Metres = 0.0
    """Smaller polygons are left out, which leaves holes; ``sieve`` gives them to their neighbours."""
    simplify_m: Metres = 0.0
    """Outlines lose corners that make triangles of less than this squared. Neighbours keep a common
    outline. On the edge between two bands of 512 rows every outline keeps its place."""
    overwrite: bool = False
    """Replace a file that exists."""


class PolygonReport(BaseModel):
    """What was written."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    map: Path
    output: Path
    polygons: int
    left_out: int
    """Smaller than ``min_area_m2``."""
    seconds: float

    def __str__(self) -> str:
        left_out = f", {self.left_out} smaller ones left out" if self.left_out else ""
        return f"{self.output}: {self.polygons} polygons in {self.seconds:.1f} s{left_out}"


def write_polygons(
    source: Path | str,
    output: Path | str,
    *,
    options: PolygonOptions | None = None,
    told: Told | None = None,
) -> PolygonReport:
    """Write the polygons of the class map at ``source`` to ``output``.

    One polygon a region of pixels of one class that share sides, with its ``value``, ``name`` and
    ``area_m2``: that of its pixels, on the ellipsoid where the CRS is geographic, before any
    simplification; null where the map has no CRS. Nodata has no polygons.

    Args:
        source: A class map, as `predict` writes it.
        output: ``.gpkg``, ``.geojson`` (in WGS 84, as RFC 7946 has it) or ``.parquet`` (GeoParquet).
        options: How to draw; None for the defaults.
        told: Hears of the file before it is moved there.

    Raises:
        OutputError: ``output`` cannot or must not be written, or the map lacks a CRS that it needs.
        SourceError: the map is missing, or no class map.
        MissingExtraError: the extra ``vector`` is not installed.
    """
    options = options or PolygonOptions()
    source, output = Path(source), followed(Path(output))
    check_vectors(output)
    check_output(output, [source], overwrite=options.overwrite, flag="--polygons")
    from geodeploy.vectors import open_vectors

    begun, written, left_out = time.perf_counter(), 0, 0
    with open_class_map(source) as opened:
        check_ground(str(source), opened.crs, opened.transform, output, options)
        with open_vectors(output, opened, told) as vectors:
            for features in _polygons(opened, options):
                kept = features[~(features.areas_m2 < options.min_area_m2)]
                vectors.add(kept)
                written += len(kept)
                left_out += len(features) - len(kept)
    return PolygonReport(
        map=source,
        output=output,
        polygons=written,
        left_out=left_out,
        seconds=time.perf_counter() - begun,
    )


def check_vectors(output: Path) -> None:
    """Refuse a format that is not written, or that cannot be here.

    Raises:
        OutputError: by its suffix it is none of ours.
        MissingExtraError: the extra ``vector`` is not installed.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{output}: polygons go to {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    require("vector", ("shapely", "pyogrio", "pyarrow"))


def check_ground(
    name: str, crs: CRS | None, transform: Affine, output: Path, options: PolygonOptions
) -> None:
    """Refuse what the grid of ``name`` is no ground for.

    Raises:
        OutputError: degrees without a CRS, or metres without one that tells them.
    """
    if crs is None and output.suffix.lower() in IN_DEGREES:
        raise OutputError(f"{name} has no CRS, and GeoJSON is in degrees: take .gpkg or .parquet.")
    if (options.min_area_m2 or options.simplify_m) and column_areas(crs, transform, 1) is None:
        raise OutputError(f"{name} has no CRS that tells metres: --min-area and --simplify need one.")


def _polygons(source: ClassMap, options: PolygonOptions) -> Iterator["Features"]:
    from geodeploy.outlines import simplified, trace

    areas = column_areas(source.crs, source.transform, source.height)

    def simplify(geometries: NDArray[np.object_], row: int) -> NDArray[np.object_]:
        rows = min(ROWS, source.height - row)
        assert areas is not None
        width_m = _width_m(source, row + rows / 2)
        height_m = float(areas[row + rows] - areas[row]) / rows / width_m
        return simplified(geometries, tolerance=options.simplify_m / width_m, ratio=height_m / width_m)

    return trace(
        source.bands(),
        height=source.height,
        nodata=source.nodata,
        areas=areas,
        simplify=simplify if options.simplify_m else None,
    )


def _width_m(source: ClassMap, row: float) -> float:
    """Metres that a pixel is wide, near enough to say which corners may go."""
    grid = source.transform
    assert source.crs is not None
    if source.crs.is_projected:
        return math.hypot(grid.a, grid.d) * float(source.crs.linear_units_factor[1])
    radians = float(source.crs.units_factor[1])
    narrowing = max(math.cos((grid.f + row * grid.e) * radians), 0.01)  # not nothing at the poles
    return abs(grid.a) * radians * _EARTH_M * narrowing
