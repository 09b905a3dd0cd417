"""Find the bands of a scene, whatever it comes as: one file, or several that belong together."""

import re
from collections.abc import Sequence
from pathlib import Path

from rasterio.enums import ColorInterp

from geodeploy import arrays, landsat, sentinel2, stac
from geodeploy.archive import is_archive, open_archive
from geodeploy.asset import Asset, Source
from geodeploy.bands import common_names, is_band_name
from geodeploy.dataset import gdal_name, open_dataset
from geodeploy.errors import SourceError

RASTERS = (".tif", ".tiff", ".jp2", ".img", ".vrt", ".dat", ".bsq", ".bil")
"""What is taken for a raster in a folder, by the end of its name."""
_SIDECARS = (".aux.xml", ".msk", ".ovr", ".hdr", ".prj", ".tfw", ".xml", ".json", ".txt")


def find_sources(
    path: Path, *, dates: Sequence[str] = (), most: int = 1, with_alpha: bool = False
) -> list[Source]:
    """The bands of the scene at ``path`` at each of its dates, the oldest first.

    Args:
        path: A NetCDF file, a Zarr store, or what `find_source` takes.
        dates: Those of a NetCDF file, a Zarr store or an array that are meant; none means all.
        most: How many dates a model takes.
        with_alpha: As for `find_source`.

    Raises:
        SourceError: as of `find_source`; or a date is not there, or there are more than are taken.
    """
    if arrays.is_store(path):
        return arrays.store_sources(path, dates, most)
    if arrays.is_held(path):
        return [_file_source(name, with_alpha) for name in arrays.held_names(path, dates, most)]
    if dates:
        raise SourceError(
            f"{path} has no dates to choose from: --date is for NetCDF files, Zarr stores and arrays."
        )
    return [find_source(path, with_alpha=with_alpha)]


def find_source(path: Path, *, with_alpha: bool = False) -> Source:
    """The bands of the scene at ``path``.

    Args:
        path: A raster file or a URL of one, a Sentinel-2 product or Landsat scene as it is delivered,
            a STAC item, a folder of rasters, or a pattern such as ``scene/*_B?.tif``.
        with_alpha: Whether a band that GDAL takes for alpha counts as a band.

    Raises:
        SourceError: nothing is there, or nothing that holds bands.
    """
    if path == Path():  # what becomes of an empty name, as an unset variable in a shell makes one
        raise SourceError("The name is empty, or . is a folder. Name the scene by its own name.")
    if is_pattern(path):
        return _files_source(str(path), _matching(path), with_alpha)
    if product := _product(path):
        return product
    if stac.is_item(path):
        return stac.stac_source(path)
    if path.is_dir():
        return _folder_source(path, with_alpha)
    return _file_source(path, with_alpha)


def _product(path: Path) -> Source | None:
    """The scene that a space agency packs into a folder, zip or tar; None if it is no such thing."""
    if path.is_file() and (landsat.is_metadata(path.name) or sentinel2.is_metadata(path.name)):
        path = path.parent  # the metadata file stands for the folder it lies in
    if not is_archive(path):
        return None
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    if path.is_dir() and not any(landsat.is_metadata(n) or sentinel2.is_metadata(n) for n in names):
        return None
    archive = open_archive(path)
    for file in archive.files:
        if sentinel2.is_metadata(file):
            return sentinel2.safe_source(archive, file)
        if landsat.is_metadata(file):
            return landsat.landsat_source(archive, file)
    raise SourceError(
        f"{path} holds neither a Sentinel-2 product nor a Landsat scene. Unpack it and name the "
        "folder, or name a file in it as GDAL does (/vsizip/..., /vsitar/...)."
    )


def stem(path: Path) -> str:
    """What the scene at ``path`` is called, for the names of its outputs."""
    if is_pattern(path):
        return path.parent.resolve().name
    name = Path(path.name.partition("?")[0])
    return name.stem if not path.is_dir() else path.resolve().name.removesuffix(".SAFE")


def is_pattern(path: Path) -> bool:
    """Whether ``path`` stands for several files, by ``*``, ``?`` or ``[``."""
    local = gdal_name(path) == str(path) and not str(path).startswith("/vsi")
    return local and re.search(r"[*?\[]", str(path)) is not None and not path.exists()


def _file_source(path: Path, with_alpha: bool) -> Source:
    with open_dataset(path) as dataset:
        alpha = [] if with_alpha else alpha_bands(dataset)
        tags = dataset.tags()
        return Source(
            name=path.name,
            left_out=f" without its alpha band {', '.join(map(str, alpha))}" if alpha else "",
            assets=[
                Asset(gdal_name(path), dataset.descriptions[index - 1] or None, index)
                for index in dataset.indexes
                if index not in alpha
            ],
            hints=(path.name, tags.get("SPACECRAFT_ID", ""), tags.get("PLATFORM", "")),
        )


def alpha_bands(dataset: object) -> list[int]:
    """The 1-based numbers of the bands that say how opaque the others are.

    GDAL marks the fourth band of any four 8-bit bands as alpha: near infrared, more often than not.
    A band with a name of its own is data.
    """
    return [
        index
        for index, meaning in enumerate(dataset.colorinterp, 1)  # type: ignore[attr-defined]
        if meaning == ColorInterp.alpha and not common_names([dataset.descriptions[index - 1]])[0]  # type: ignore[attr-defined]
    ]


def _folder_source(folder: Path, with_alpha: bool) -> Source:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in RASTERS and not path.name.startswith(".")
    )
    if not files:
        raise SourceError(
            f"{folder} is a folder without a raster in it ({', '.join(RASTERS[:4])}, ...). Name a "
            "raster file, or a folder with one file for each band."
        )
    return _files_source(folder.name or str(folder.resolve()), files, with_alpha)


def _matching(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor)
    files = sorted(
        path
        for path in anchor.glob(str(pattern.relative_to(anchor)))
        if path.is_file() and not path.name.lower().endswith(_SIDECARS)
    )
    if not files:
        raise SourceError(f"No file matches {pattern}. Check the pattern; it is for one scene's bands.")
    return files


def _files_source(name: str, files: Sequence[Path], with_alpha: bool) -> Source:
    """Bands of several files: by their descriptions, or by the file's name where it has but one."""
    assets = []
    hints: list[str] = []
    for path in files:
        source = _file_source(path, with_alpha)
        hints += source.hints
        if len(source.assets) == 1 and source.assets[0].name is None:
            assets.append(Asset(str(path), band_in_name(path.stem), 1))
        else:
            assets += source.assets
    return Source(name, assets, tuple(hints))


def band_in_name(file_stem: str) -> str:
    """The band that a file's name speaks of: ``SR_B4`` in ``LC08_x_SR_B4``, else the whole name."""
    words = re.split(r"[_.\s-]+", file_stem)
    for end in range(len(words), 0, -1):
        for begin in range(max(end - 3, 0), end):
            name = "_".join(words[begin:end])
            if is_band_name(name):
                return name
    return file_stem
