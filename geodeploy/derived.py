"""What is made of a map as soon as it is whole: polygons, area table, preview, STAC item."""

import os
from collections.abc import Collection, Iterator, Sequence
from datetime import date, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path

from affine import Affine
from pydantic import BaseModel, ConfigDict
from rasterio.crs import CRS

from geodeploy.area import write_area_table
from geodeploy.cog import aux_path
from geodeploy.errors import GeodeployError, OutputError
from geodeploy.item import ItemOptions, acquisition, item_path, write_item
from geodeploy.parts import note_derived, noted_derived
from geodeploy.polygons import Metres, PolygonOptions, check_ground, check_vectors, write_polygons
from geodeploy.preview import PNG, write_preview
from geodeploy.stac import is_item, item_time
from geodeploy.writer import beside as raster_beside
from geodeploy.writer import check_output, clear_draft, followed

SUFFIXES: dict[str, Sequence[str]] = {"--polygons": (), "--area": (".csv",), "--preview": PNG}
"""What the names end in, by flag; `check_vectors` looks at those of polygons."""


class DerivedOptions(BaseModel):
    """What to make of a map beside it.

    A suffix alone, such as ``.gpkg``, stands for a file with the map's name beside the map; for several
    scenes it must be one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    polygons: Path | None = None
    """``.gpkg``, ``.geojson`` or ``.parquet``."""
    min_area: Metres = 0.0
    """Square metres; smaller polygons are left out."""
    simplify: Metres = 0.0
    """Metres; see `PolygonOptions`."""
    area: Path | None = None
    """A CSV table of the area of each class."""
    preview: Path | None = None
    """A PNG with a legend."""
    stac: bool = False
    """A STAC item beside the map, ``<stem>.stac.json``."""
    acquired: date | datetime | None = None
    """When the scene was taken, for the STAC item; None takes it from the scene's own item or name."""

    @property
    def files(self) -> dict[str, Path]:
        """What was asked for, by flag; not the STAC item, whose place is given."""
        found = {"--polygons": self.polygons, "--area": self.area, "--preview": self.preview}
        return {flag: path for flag, path in found.items() if path is not None}

    @property
    def digest(self) -> str:
        """A short text that other options would not have."""
        return sha256(self.model_dump_json().encode()).hexdigest()[:16]


def check_derived(
    maps: Sequence[Path],
    scenes: Sequence[Path],
    options: DerivedOptions,
    *,
    inputs: Sequence[Path],
    beside: Sequence[str] = (),
    overwrite: bool,
    made: Collection[Path] = (),
) -> None:
    """Refuse, before any work, what cannot be made of the maps or must not be written.

    The ``inputs`` must not be written over, nor the rasters with the names ``beside`` the maps; what
    was ``made`` before need not be written.

    Raises:
        OutputError: says which, and the flag.
        SourceError: a scene is a STAC item that cannot be read, and ``options`` do not say its time.
        MissingExtraError: polygons are asked for without the extra ``vector``.
    """
    for flag, given, needed, there in (
        ("--min-area", options.min_area, "--polygons", options.polygons is not None),
        ("--simplify", options.simplify, "--polygons", options.polygons is not None),
        ("--acquired", options.acquired, "--stac", options.stac),
    ):
        if given and not there:
            raise OutputError(f"{flag} {given} does nothing without {needed}.")
    taken = dict(_of_the_run(maps, beside))
    for flag, path in options.files.items():
        if len(maps) > 1 and not _is_suffix(path):
            raise OutputError(
                f"{flag} {path} is one file for {len(maps)} maps. Give a suffix alone, such as "
                f"{flag} {path.suffix or '.gpkg'}: each file then lies beside its map."
            )
        for mapped in maps:
            place = _place(path, mapped)
            if flag == "--polygons":
                check_vectors(place)
            _take(taken, place, f"{flag} {path}")
            there = overwrite or place.absolute() in made
            check_output(place, inputs, overwrite=there, flag=flag, suffixes=SUFFIXES[flag])
    if options.stac:
        for mapped, scene in zip(maps, scenes, strict=True):
            place = followed(item_path(mapped))
            _take(taken, place, "--stac")
            there = overwrite or place.absolute() in made
            check_output(place, inputs, overwrite=there, flag="-o")
            if options.acquired is None and _taken(scene) is None:
                raise OutputError(
                    f"{scene.name} does not tell when it was taken, which a STAC item must: "
                    "say --acquired 2024-05-31 or 2024-05-31T10:20:30Z."
                )


def _of_the_run(maps: Sequence[Path], beside: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """What the mapping itself writes, by its place."""
    for mapped in maps:
        yield _real(mapped), "the map itself"
        yield _real(aux_path(mapped)), "where the map's names of classes go"
        for name in beside:
            yield _real(raster_beside(mapped, name)), f"the raster of --{name}"


def _take(taken: dict[Path, str], place: Path, asked: str) -> None:
    """Note that ``place`` is where what was ``asked`` for goes, if nothing else goes there."""
    if other := taken.get(_real(place)):
        raise OutputError(f"{asked}: {place} is {other}. Choose another place.")
    taken[_real(place)] = f"the file of {asked}"


def _real(place: Path) -> Path:
    """``place`` by one name, however its folder is written."""
    return Path(os.path.realpath(place.parent)) / place.name


def check_grid(scene: str, crs: CRS | None, transform: Affine, options: DerivedOptions) -> None:
    """Refuse, before any work, polygons that need another CRS than that of the map of ``scene``.

    Raises:
        OutputError: says what needs it.
    """
    if options.polygons is not None:
        drawing = PolygonOptions(min_area_m2=options.min_area, simplify_m=options.simplify)
        check_ground(scene, crs, transform, _place(options.polygons, Path("map.tif")), drawing)


def derive(
    mapped: Path,
    scene: Path,
    model: Path,
    options: DerivedOptions,
    *,
    beside: Sequence[Path] = (),
    overwrite: bool,
) -> tuple[Path, ...]:
    """Make of the map at ``mapped`` what ``options`` ask for; the files that were written.

    The STAC item lists them, and the rasters ``beside`` the map. The map's journal, if it has one, is
    told of each, and what it tells of already is not made again unless ``overwrite`` is said.

    Raises:
        GeodeployError: one of its kinds; the map is whole all the same, and what was made before too.
    """
    made: list[Path] = []
    before = set() if overwrite else noted_derived(mapped, options.digest)
    try:
        for flag, path in options.files.items():
            place = _place(path, mapped)
            made.append(place)
            if place.absolute() in before:
                clear_draft(place)
                continue
            told = partial(_note, mapped, place, options)
            if flag == "--polygons":
                drawing = PolygonOptions(
                    min_area_m2=options.min_area, simplify_m=options.simplify, overwrite=overwrite
                )
                write_polygons(mapped, place, options=drawing, told=told)
            elif flag == "--area":
                write_area_table(mapped, place, overwrite=overwrite, told=told)
            else:
                write_preview(mapped, place, overwrite=overwrite, told=told)
        if options.stac:
            place = followed(item_path(mapped))
            telling = ItemOptions(
                acquired=options.acquired or _taken(scene),
                model=model,
                others=(*beside, *made),
                overwrite=overwrite,
            )
            if place.absolute() in before:
                clear_draft(place)
            else:
                told = partial(_note, mapped, place, options)
                write_item(mapped, place, options=telling, told=told)
            made.append(place)
    except GeodeployError as error:
        raise type(error)(f"{error} The map {mapped} is whole.") from error
    return tuple(made)


def _taken(scene: Path) -> datetime | date | None:
    """When the scene was taken, if its STAC item or its name tells."""
    return (item_time(scene) if is_item(scene) else None) or acquisition(scene.name)


def _note(mapped: Path, place: Path, options: DerivedOptions, draft: Path) -> None:
    note_derived(mapped, draft, place, options.digest)


def _is_suffix(path: Path) -> bool:
    return path.name == str(path) and path.name.startswith(".") and not path.suffix


def _place(path: Path, mapped: Path) -> Path:
    return followed(mapped.with_suffix(path.name) if _is_suffix(path) else path)
