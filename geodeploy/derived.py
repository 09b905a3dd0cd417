"""What is made of a map as soon as it is whole: polygons, area table, preview, STAC item."""

from collections.abc import Collection, Sequence
from datetime import date, datetime
from hashlib import sha256
from pathlib import Path

from affine import Affine
from pydantic import BaseModel, ConfigDict
from rasterio.crs import CRS

from geodeploy.area import write_area_table
from geodeploy.errors import GeodeployError, OutputError
from geodeploy.item import ItemOptions, acquisition, item_path, write_item
from geodeploy.parts import note_derived, noted_derived
from geodeploy.polygons import Metres, PolygonOptions, check_ground, check_vectors, write_polygons
from geodeploy.preview import write_preview
from geodeploy.stac import is_item, item_time
from geodeploy.writer import check_output


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
    overwrite: bool,
    made: Collection[Path] = (),
) -> None:
    """Refuse, before any work, what cannot be made of the maps or must not be written.

    The ``inputs`` must not be written over; what was ``made`` before need not be written.

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
            if place.absolute() == mapped.absolute():
                raise OutputError(f"{flag} {path} is the map itself. Choose another place.")
            check_output(place, inputs, overwrite=overwrite or place.absolute() in made, flag=flag)
    if options.stac:
        for mapped, scene in zip(maps, scenes, strict=True):
            place = item_path(mapped)
            there = overwrite or place.absolute() in made
            check_output(place, inputs, overwrite=there, flag="-o")
            if options.acquired is None and _taken(scene) is None:
                raise OutputError(
                    f"{scene.name} does not tell when it was taken, which a STAC item must: "
                    "say --acquired 2024-05-31 or 2024-05-31T10:20:30Z."
                )


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
            if place.absolute() in before:
                pass
            elif flag == "--polygons":
                drawing = PolygonOptions(
                    min_area_m2=options.min_area, simplify_m=options.simplify, overwrite=overwrite
                )
                write_polygons(mapped, place, options=drawing)
            elif flag == "--area":
                write_area_table(mapped, place, overwrite=overwrite)
            else:
                write_preview(mapped, place, overwrite=overwrite)
            made.append(place)
            note_derived(mapped, place, options.digest)
        if options.stac and item_path(mapped).absolute() in before:
            made.append(item_path(mapped))
        elif options.stac:
            telling = ItemOptions(
                acquired=options.acquired or _taken(scene),
                model=model,
                others=(*beside, *made),
                overwrite=overwrite,
            )
            made.append(write_item(mapped, options=telling))
            note_derived(mapped, made[-1], options.digest)
    except GeodeployError as error:
        raise type(error)(f"{error} The map {mapped} is whole.") from error
    return tuple(made)


def _taken(scene: Path) -> datetime | date | None:
    """When the scene was taken, if its STAC item or its name tells."""
    return (item_time(scene) if is_item(scene) else None) or acquisition(scene.name)


def _is_suffix(path: Path) -> bool:
    return path.name == str(path) and path.name.startswith(".") and not path.suffix


def _place(path: Path, mapped: Path) -> Path:
    return mapped.with_suffix(path.name) if _is_suffix(path) else path
