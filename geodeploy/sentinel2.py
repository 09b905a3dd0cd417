"""Sentinel-2 products (SAFE, L1C and L2A): which file holds which band, and its values in reflectance.

Names and metadata as in the Sentinel-2 Products Specification Document, S2-PDGS-TAS-DI-PSD.
"""

import re
from xml.etree import ElementTree

from geodeploy.archive import Archive
from geodeploy.asset import Asset, Source
from geodeploy.bands import SENTINEL2
from geodeploy.errors import SourceError, first_line

_METADATA = re.compile(r"(^|/)(MTD_MSIL(1C|2A)|S2\w_\w+_MTD_(SAFL1C|SAFL2A|DMPL1C)_\w+)\.xml$")
_IMAGE = re.compile(r"(?:^|/)IMG_DATA/(?:R\d\dm/)?\w+_(B(?:\d\d|8A))(?:_(10|20|60)m)?\.jp2$")
_GRANULE = re.compile(r"(?:^|/)GRANULE/([^/]+)/")


def is_metadata(file: str) -> bool:
    """Whether ``file`` is called as the metadata of a product is."""
    return _METADATA.search(file) is not None


def safe_source(archive: Archive, metadata: str) -> Source:
    """The product's bands, each from the file in which it has the smallest pixels.

    Raises:
        SourceError: the metadata cannot be read, or the product has no images or several tiles.
    """
    folder = metadata.rpartition("/")[0]
    files = [file for file in archive.files if file.startswith(folder)]
    granules = sorted({match[1] for file in files if (match := _GRANULE.search(file))})
    if len(granules) > 1:
        raise SourceError(
            f"{archive.name} holds {len(granules)} tiles ({', '.join(granules[:3])}, ...). Map them "
            "one by one: each is a folder of JP2 files, GRANULE/*/IMG_DATA."
        )
    images: dict[str, tuple[int, str]] = {}
    for file in files:
        if match := _IMAGE.search(file):
            found = int(match[2] or 0), file
            images[match[1]] = min(images.get(match[1], found), found)
    if not images:
        raise SourceError(f"{archive.name} holds no image of a band (IMG_DATA/*.jp2). Fetch it again.")
    scale, offsets = _to_reflectance(archive, metadata)
    assets = []
    for band, (_, file) in sorted(images.items()):
        number = band[1:].lstrip("0")
        assets.append(
            Asset(
                archive.gdal_name(file),
                band,
                common_name=SENTINEL2[number],
                scale=scale,
                offset=offsets.get(number, 0.0) * scale,
                nodata=0,  # the product's special value NODATA; JP2 has no tag for it
            )
        )
    return Source(archive.name, assets)


def _to_reflectance(archive: Archive, metadata: str) -> tuple[float, dict[str, float]]:
    """The factor of all bands, and what is added to the stored values of each, by its number."""
    try:
        root = ElementTree.fromstring(archive.read(metadata))
        level = "BOA" if root.tag.endswith("Level-2A_User_Product") else "RADIO"
        quantification = root.find(
            ".//BOA_QUANTIFICATION_VALUE" if level == "BOA" else ".//QUANTIFICATION_VALUE"
        )
        if quantification is None:  # L2A before 2017 wrote it with the level in its name
            quantification = root.find(".//L2A_BOA_QUANTIFICATION_VALUE")
        if quantification is None:
            raise SourceError(f"{archive.name}: {metadata} names no quantification value.")
        # Products before processing baseline 04.00, of January 2022, have no offset.
        numbers = {
            int(item.attrib["bandId"]): item.attrib["physicalBand"][1:].upper()
            for item in root.iter("Spectral_Information")
        } or dict(enumerate(SENTINEL2))
        offsets = {
            numbers[int(item.attrib["band_id"])]: float(item.text or "")
            for item in root.iter(f"{level}_ADD_OFFSET")
        }
        return 1 / float(quantification.text or ""), offsets
    except (ElementTree.ParseError, KeyError, ValueError, ZeroDivisionError) as error:
        raise SourceError(
            f"{archive.name}: {metadata} is not the metadata of a Sentinel-2 product "
            f"({first_line(error)}). Fetch it again."
        ) from error
