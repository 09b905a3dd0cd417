"""TerraTorch's geospatial backbones beside Prithvi: which of ours each is, where its tensors are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geodeploy.errors import RecipeError
from geodeploy.imports.config import Arguments, listed

_UM = {
    "COASTAL_AEROSOL": 0.44, "BLUE": 0.49, "GREEN": 0.56, "RED": 0.665, "RED_EDGE_1": 0.705,
    "RED_EDGE_2": 0.74, "RED_EDGE_3": 0.783, "NIR_BROAD": 0.832, "NIR_NARROW": 0.864,
    "WATER_VAPOR": 0.945, "CIRRUS": 1.373, "SWIR_1": 1.61, "SWIR_2": 2.2, "THERMAL_INFRARED_1": 10.9,
    "THERMAL_INFRARED_12": 12.0, "VV": 5.405, "VH": 5.405, "ASC_VV": 5.405, "ASC_VH": 5.405,
    "DSC_VV": 5.405, "DSC_VH": 5.405, "VV-VH": 5.405,
}  # fmt: skip
"""What TerraTorch 1.2.11 tells DOFA and Clay of bands by these names, in micrometres."""
_CLAY_UM = _UM | {
    "blue": 0.493, "green": 0.56, "red": 0.665, "rededge1": 0.704, "rededge2": 0.74, "rededge3": 0.783,
    "nir": 0.842, "nir08": 0.865, "swir16": 1.61, "swir22": 2.19, "vv": 3.5, "vh": 4.0,
}  # fmt: skip
_CLAY_BANDS = ["blue", "green", "red", "nir", "swir16", "swir22"]
"""Where nobody says."""
_CLAY_METRES = 1.0
"""The ground sample distance that TerraTorch tells Clay, whatever the images have."""
_MODALITIES = ("S2L2A", "S2L1C", "S1GRD", "S1RTC", "RGB")
_RESNETS = {
    f"ssl4eos12_{resnet}_{sensor}_all_{kind}": f"ssl4eo_{resnet}_{ours}"
    for resnet, sensor, ours, kinds in (
        ("resnet18", "sentinel2", "s2", ("moco",)),
        ("resnet50", "sentinel2", "s2", ("decur", "dino", "moco", "softcon")),
        ("resnet50", "sentinel1", "s1", ("decur", "moco")),
    )
    for kind in kinds
}
_TERRAMINDS = tuple(f"terramind_v1_{size}" for size in ("tiny", "small", "base", "large"))
_DOFAS = {f"dofa_{size}_patch16_224": f"dofa_{size}" for size in ("small", "base", "large")}

NAMES = ("clay_v1_base", *_TERRAMINDS, *_DOFAS, *_RESNETS)
"""TerraTorch's."""


@dataclass(frozen=True, slots=True)
class Foundation:
    """A backbone whose tensors become ours as those of its published file do."""

    name: str
    """Ours."""
    prefix: str = ""
    """Before the published names of its tensors."""
    depth: int | None = None
    """Blocks; None for the levels of a pyramid."""
    patch: int = 1
    class_token: bool = True
    maps: tuple[int, ...] | None = None
    """Blocks or levels whose outputs the necks are given; None for all."""
    bands: tuple[Any, ...] = ()
    """What it is told of its bands."""
    micrometres: tuple[float, ...] | None = None
    """What it is told of their wavelengths."""
    gsd_m: float | None = None


def read_foundation(name: str, given: Arguments) -> Foundation:
    """The backbone that TerraTorch calls ``name``, one of `NAMES`.

    Raises:
        RecipeError: it is told what cannot be done here.
    """
    if name == "clay_v1_base":
        return _read_clay(given)
    if name in _TERRAMINDS:
        return _read_terramind(name, given)
    if name in _DOFAS:
        return _read_dofa(name, given)
    indices = given.numbers("backbone_out_indices", -1)
    bands = tuple(listed(given.take("backbone_model_bands", [])))
    # It gives its maps in their order, whatever that of the indices.
    maps = tuple(sorted({index % 5 for index in indices}))
    return Foundation(_RESNETS[name], "resnet_model.", maps=maps, bands=bands)


def _read_clay(given: Arguments) -> Foundation:
    given.only("backbone_num_frames", 1)
    bands = listed(given.take("backbone_bands", _CLAY_BANDS))
    maps = given.numbers("backbone_out_indices", range(12))
    return Foundation(
        "clay_v1_base",
        "clay_encoder.",
        depth=12,
        patch=8,
        maps=maps,
        bands=tuple(bands),
        # Of a name that it does not know, it is told 0.
        micrometres=tuple(_CLAY_UM.get(_plain(band), 0.0) for band in bands),
        gsd_m=_CLAY_METRES,
    )


def _read_dofa(name: str, given: Arguments) -> Foundation:
    bands = listed(given.take("backbone_model_bands", []))
    given.only("backbone_pos_interpolation_mode", "bilinear")
    given.drop("backbone_input_size")
    if unknown := [str(band) for band in bands if _plain(band) not in _UM]:
        raise RecipeError(
            f"{given.source}.backbone_model_bands: {unknown[0]} has no wavelength; "
            f"{', '.join(_UM)} have."
        )
    depth = 24 if "large" in name else 12
    found = given.numbers("backbone_out_indices", -1)
    return Foundation(
        _DOFAS[name],
        "dofa_model.",
        depth=depth,
        patch=16,
        maps=tuple(sorted({index % depth for index in found})),
        bands=tuple(bands),
        micrometres=tuple(_UM[_plain(band)] for band in bands),
    )


def _read_terramind(name: str, given: Arguments) -> Foundation:
    told = listed(given.take("backbone_modalities", []))
    modality = str(told[0]).upper() if len(told) == 1 else None
    if modality not in _MODALITIES:
        raise RecipeError(
            f"{given.source}.backbone_modalities: {told} cannot be imported; one of "
            f"{', '.join(_MODALITIES)} can."
        )
    given.only("backbone_merge_method", "mean", "max", "concat")
    given.only("backbone_num_register_tokens", 0)
    given.drop("backbone_modality_drop_rate")
    bands: Any = given.take("backbone_bands", [])
    if isinstance(bands, Mapping):
        bands = next(iter(bands.values()), [])
    return Foundation(
        name if modality == "S2L2A" else f"{name}_{modality.lower()}",
        depth=24 if "large" in name else 12,
        patch=16,
        class_token=False,
        bands=tuple(listed(bands)),
    )


def _plain(band: Any) -> str:
    """``HLSBands.BLUE`` as ``BLUE``."""
    return str(band).rpartition(".")[2]
