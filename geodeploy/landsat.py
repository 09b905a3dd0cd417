"""Landsat scenes, Collection 2 and before: which file holds which band, and its values in reflectance.

Names as in the Data Format Control Books of Landsat 4 to 9, LSDS-1822 and LSDS-1834 among others.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from geodeploy.archive import Archive
from geodeploy.asset import Asset, Source
from geodeploy.bands import common_names, landsat_number
from geodeploy.errors import SourceError

_METADATA = re.compile(r"(^|/)L[A-Z0-9_]+_MTL\.(json|txt)$", re.IGNORECASE)
_GROUPS = {
    # Surface reflectance and temperature; a Level 2 file holds the gains of Level 1 as well.
    2: ("LEVEL2_SURFACE_REFLECTANCE_PARAMETERS", "LEVEL2_SURFACE_TEMPERATURE_PARAMETERS"),
    1: ("LEVEL1_RADIOMETRIC_RESCALING", "RADIOMETRIC_RESCALING"),
}

Groups = dict[str, dict[str, str]]


def is_metadata(file: str) -> bool:
    """Whether ``file`` is called as the metadata of a scene is."""
    return _METADATA.search(file) is not None


def landsat_source(archive: Archive, metadata: str) -> Source:
    """The scene's bands in reflectance: at the surface (Level 2) or at the top of the atmosphere.

    Those of Level 1 are divided by the sine of the sun's elevation in the middle of the scene. Thermal
    bands are in kelvin in Level 2, and left out of Level 1, where that takes more than a factor.

    Raises:
        SourceError: the metadata lack what this takes, or no band's file is there.
    """
    groups = _groups(archive, metadata)
    everything = {key: value for group in groups.values() for key, value in group.items()}
    satellite = landsat_number(everything.get("SPACECRAFT_ID", ""), metadata.rpartition("/")[2])
    if satellite is None:
        raise SourceError(f"{archive.name}: {metadata} does not say which Landsat it is of.")
    level = 2 if any(group in groups for group in _GROUPS[2]) else 1
    gains = {key: value for name in _GROUPS[level] for key, value in groups.get(name, {}).items()}
    sun = 1.0 if level == 2 else _sun(archive, metadata, everything)
    here = {file.rpartition("/")[2].upper(): file for file in archive.files}
    names, assets = [], []
    # A Level 2 file names those of Level 1 too, in another group.
    for key, file_name in (
        groups.get("PRODUCT_CONTENTS", {}) | groups.get("PRODUCT_METADATA", {})
    ).items():
        band = key.removeprefix("FILE_NAME_BAND_")
        scale, offset = (_gain(gains, f"{what}_BAND_{band}") for what in ("MULT", "ADD"))
        if band == key or scale is None or offset is None or file_name.upper() not in here:
            continue
        names.append(f"B{band}" if band.isdecimal() else band)
        assets.append((archive.gdal_name(here[file_name.upper()]), scale / sun, offset / sun))
    if not assets:
        raise SourceError(
            f"{archive.name} holds none of the bands that {metadata} names in reflectance. Are the "
            "files beside it, with the names they came with?"
        )
    return Source(
        archive.name,
        [
            Asset(path, name, common_name=common, scale=scale, offset=offset, nodata=0)
            for (path, scale, offset), name, common in zip(
                assets, names, common_names(names, landsat=satellite), strict=True
            )
        ],
    )


def _gain(gains: Mapping[str, str], key: str) -> float | None:
    text = gains.get(f"REFLECTANCE_{key}") or gains.get(f"TEMPERATURE_{key}")
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _sun(archive: Archive, metadata: str, everything: Mapping[str, str]) -> float:
    try:
        sine = math.sin(math.radians(float(everything["SUN_ELEVATION"])))
    except (KeyError, ValueError):
        sine = 0
    if sine <= 0:
        raise SourceError(
            f"{archive.name}: {metadata} gives no elevation of the sun above the horizon, without "
            "which there is no reflectance. Was it taken at night?"
        )
    return sine


def _groups(archive: Archive, metadata: str) -> Groups:
    """The metadata's groups, by name, of keys and values without quotation marks."""
    text = archive.read(metadata).decode("utf-8", "replace")
    if not metadata.lower().endswith(".json"):
        return _parse_odl(text)
    try:
        (root,) = json.loads(text).values()
        return {
            str(name): {str(key): str(value) for key, value in group.items()}
            for name, group in root.items()
        }
    except (ValueError, AttributeError) as error:
        raise SourceError(
            f"{archive.name}: {metadata} is not the metadata of a Landsat scene."
        ) from error


def _parse_odl(text: str) -> Groups:
    groups: Groups = {}
    open_groups: list[dict[str, Any]] = []
    for line in text.splitlines():
        key, equals, value = (word.strip() for word in line.partition("="))
        if not equals:
            continue
        if key == "GROUP":
            open_groups.append(groups.setdefault(value, {}))
        elif key == "END_GROUP" and open_groups:
            open_groups.pop()
        elif open_groups:
            open_groups[-1][key] = value.strip('"')
    return groups
