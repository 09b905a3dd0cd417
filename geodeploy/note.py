"""What a finished map remembers of the job that made it: the lines of its journal, in its ``.aux.xml``.

Not in the map's own tags: they hold no time and no path, so that the same pixels give the same bytes.
"""

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from geodeploy.cog import aux_path

_DOMAIN = "GEODEPLOY_JOURNAL"
"""Of metadata: GDAL shows those of other names only when asked, and keeps them."""


def read_note(raster: Path) -> list[dict[str, Any]]:
    """The lines that `write_note` wrote beside ``raster``; none where it did not."""
    try:
        found = ElementTree.parse(aux_path(raster)).find(f"Metadata[@domain='{_DOMAIN}']")
    except (OSError, ElementTree.ParseError):
        return []
    if found is None:
        return []
    told = {item.get("key"): item.text or "" for item in found.iterfind("MDI")}
    text = told.get("LINES", "")
    # Who mends what is beside a map by hand may break it.
    if told.get("SHA256") != sha256(text.encode()).hexdigest():
        return []
    lines: list[dict[str, Any]] = json.loads(text)
    return lines


def write_note(raster: Path, lines: Sequence[dict[str, Any]], *, draft: Path) -> None:
    """Put ``lines`` into the ``.aux.xml`` of ``raster``, which keeps all else, by way of ``draft``.

    Raises:
        OSError: it cannot be written.
        ParseError: what is there is no XML.
    """
    place = aux_path(raster)
    root = ElementTree.parse(place).getroot() if place.exists() else ElementTree.Element("PAMDataset")
    for old in root.findall(f"Metadata[@domain='{_DOMAIN}']"):
        root.remove(old)
    metadata = ElementTree.SubElement(root, "Metadata", domain=_DOMAIN)
    text = json.dumps(list(lines))
    ElementTree.SubElement(metadata, "MDI", key="LINES").text = text
    ElementTree.SubElement(metadata, "MDI", key="SHA256").text = sha256(text.encode()).hexdigest()
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(draft, encoding="utf-8")
    sync(draft)
    draft.replace(place)


def sync(path: Path) -> None:
    """Wait until ``path`` is on the disk, so that what is noted of it holds after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
