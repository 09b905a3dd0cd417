"""STAC items: which asset holds which band, and what its values mean (STAC 1.0 and 1.1)."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from geodeploy.asset import Asset, Source
from geodeploy.dataset import as_url, gdal_name
from geodeploy.errors import SourceError, first_line

_ITEM_BYTES = 16 * 2**20
_TIMEOUT_S = 30
_PICTURES = {"thumbnail", "overview", "visual", "metadata"}
_RASTERS = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "application/x-geotiff")


def is_item(path: Path) -> bool:
    """Whether ``path`` is called as STAC items are: ``*.json``, or ``.../items/ID`` on the web."""
    url = as_url(path)
    if path.suffix.lower() in (".json", ".geojson"):
        return True
    parts = PurePosixPath(urlsplit(url).path).parts if url else ()
    return len(parts) > 1 and parts[-2] == "items"


def stac_source(path: Path) -> Source:
    """The bands of the item at ``path``, a file or a URL, by their common names.

    Raises:
        SourceError: it cannot be read, is no item, or names no raster.
    """
    item = _read(path)
    if item.get("type") != "Feature" or not isinstance(item.get("assets"), dict):
        kind = item.get("type", "document without a type")
        raise SourceError(f"{path} is a {kind}; a STAC item is needed, which has assets.")
    base = as_url(path) or path.absolute().as_uri()
    assets: dict[tuple[str | None, str | None], Asset] = {}
    try:
        # GeoTIFFs first: where the same band is there as JP2 too, they are faster to read in part.
        for key, asset in sorted(item["assets"].items(), key=lambda pair: not _is_tiff(pair[1])):
            if _is_data(asset):
                for band in _bands(key, asset, _located(asset["href"], base), item):
                    assets.setdefault((band.common_name or f"{key} {band.index}", band.name), band)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{path} is not a valid STAC item ({first_line(error)}).") from error
    if not assets:
        raise SourceError(f"{path} names no raster among its assets.")
    hints = (str(item.get("properties", {}).get("platform", "")), str(item.get("id", "")))
    return Source(str(item.get("id") or path.name), list(assets.values()), hints)


def item_time(path: Path) -> datetime | date | None:
    """When the scene of the item at ``path`` was taken; the day, of a span within one; None for others.

    Raises:
        SourceError: it cannot be read.
    """
    found = _read(path).get("properties")
    told = found if isinstance(found, dict) else {}
    when, start, end = (_time(told.get(key)) for key in ("datetime", "start_datetime", "end_datetime"))
    if when is None and start is not None and end is not None and start.date() == end.date():
        return start.date()
    return when


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def _read(path: Path) -> dict[str, Any]:
    url = as_url(path)
    try:
        if url is None:
            content = path.read_bytes()
        elif url.startswith(("http://", "https://")):
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
                content = response.read(_ITEM_BYTES + 1)
        else:
            raise SourceError(f"{url}: items are read from https:// or from a file. Fetch it first.")
    except urllib.error.HTTPError as error:
        error.close()
        raise SourceError(f"{url} answers {error.code} {error.reason}. Check the address.") from error
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist. Check the path; a scene is needed.") from error
    except OSError as error:  # URLError is one
        raise SourceError(f"{url or path} cannot be read ({first_line(error)}).") from error
    if len(content) > _ITEM_BYTES:
        raise SourceError(f"{path} is too large for a STAC item.")
    try:
        item = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({first_line(error)}).") from error
    return item if isinstance(item, dict) else {}


def _is_tiff(asset: Mapping[str, Any]) -> bool:
    return "tiff" in str(asset.get("type", ""))


def _is_data(asset: Mapping[str, Any]) -> bool:
    """Whether the asset is a raster, and not a picture of it."""
    kind = str(asset.get("type", "")).partition(";")[0].strip()
    if _PICTURES & set(asset.get("roles") or ()):
        return False
    return kind in _RASTERS or (not kind and asset["href"].lower().endswith((".tif", ".tiff", ".jp2")))


def _located(href: str, base: str) -> str:
    """GDAL's name of what ``href`` of an item at ``base`` points to."""
    if href.startswith("/vsi"):
        return href
    full = urljoin(base, href) if "://" not in href else href
    return unquote(urlsplit(full).path) if full.startswith("file://") else gdal_name(full)


def _bands(key: str, asset: Mapping[str, Any], path: str, item: Mapping[str, Any]) -> Iterator[Asset]:
    """The asset's bands. STAC 1.0 lists ``eo:bands`` and ``raster:bands``, 1.1 ``bands`` for both."""
    new = asset.get("bands") or []
    optical = asset.get("eo:bands") or new or [{}]
    stored = asset.get("raster:bands") or new or [{}]
    # Items of Earth Search name the offset of Sentinel-2 also where their files have it applied.
    applied = item.get("properties", {}).get("earthsearch:boa_offset_applied") is True
    for place, band in enumerate(optical):
        values = {**asset, **(stored[place] if place < len(stored) else {})}
        scale = values.get("raster:scale", values.get("scale"))
        offset = values.get("raster:offset", values.get("offset"))
        nodata = values.get("nodata")
        common_name = band.get("eo:common_name", band.get("common_name"))
        yield Asset(
            path,
            str(band.get("name") or key),
            place + 1,
            # Three bands of Sentinel-2 may all be called rededge: their own names tell more.
            common_name=None if common_name == "rededge" else common_name,
            scale=None if scale is None else float(scale),
            offset=0.0 if applied else None if offset is None else float(offset),
            nodata=None if nodata is None else float(nodata),
        )
