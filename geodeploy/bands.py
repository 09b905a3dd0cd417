"""Which of a file's bands are the ones a model needs. Names only, no I/O.

Names are STAC common names. Aliases count only where they can mean one thing: `B5` is NIR on
Landsat 8 and SWIR on Landsat 5, so it is taken only when the file says which Landsat it is.
"""

import re
from collections.abc import Sequence

from geodeploy.errors import BandError

WAVELENGTH_UM = {
    "coastal": 0.443, "blue": 0.49, "green": 0.56, "yellow": 0.6, "red": 0.66, "pan": 0.6,
    "rededge": 0.72, "rededge071": 0.705, "rededge075": 0.74, "rededge078": 0.783, "nir": 0.83,
    "nir08": 0.865, "nir09": 0.945, "cirrus": 1.375, "swir16": 1.61, "swir22": 2.2,
}  # fmt: skip
"""Centre of each band in micrometres, by common name."""

_WORDS = {
    "coastal": "coastal", "coastalaerosol": "coastal", "blue": "blue", "green": "green",
    "yellow": "yellow", "red": "red", "rededge": "rededge", "rededge1": "rededge071",
    "rededge2": "rededge075", "rededge3": "rededge078", "rededge071": "rededge071",
    "rededge075": "rededge075", "rededge078": "rededge078", "nir": "nir", "nir08": "nir08",
    "nirnarrow": "nir08", "nirbroad": "nir", "nir09": "nir09", "watervapour": "nir09",
    "watervapor": "nir09", "cirrus": "cirrus", "swir1": "swir16", "swir16": "swir16", "swir2": "swir22",
    "swir22": "swir22", "pan": "pan", "panchromatic": "pan", "lwir": "lwir", "lwir11": "lwir11",
    "lwir12": "lwir12",
}  # fmt: skip

SENTINEL2 = {
    "1": "coastal", "2": "blue", "3": "green", "4": "red", "5": "rededge071", "6": "rededge075",
    "7": "rededge078", "8": "nir", "8A": "nir08", "9": "nir09", "10": "cirrus", "11": "swir16",
    "12": "swir22",
}  # fmt: skip
_TM = {
    "1": "blue",
    "2": "green",
    "3": "red",
    "4": "nir08",
    "5": "swir16",
    "6": "lwir",
    "7": "swir22",
}
_OLI = {
    "1": "coastal", "2": "blue", "3": "green", "4": "red", "5": "nir08", "6": "swir16",
    "7": "swir22", "8": "pan", "9": "cirrus", "10": "lwir11", "11": "lwir12",
}  # fmt: skip
_LANDSAT = {4: _TM, 5: _TM, 7: _TM | {"8": "pan"}, 8: _OLI, 9: _OLI}

STAND_INS = {"nir": "nir08", "nir08": "nir"}
"""The broad and the narrow near infrared serve the same models; either stands in for the other."""

# GDAL's driver for Sentinel-2 describes a band as "B4, central wavelength 665 nm".
_WAVELENGTH = re.compile(r",\s*central wavelength.*", re.IGNORECASE)
_NUMBERED = re.compile(r"^(?:(?:SR|ST|TOA|RT)_)?B0?(\d{1,2}A?)$", re.IGNORECASE)
_LANDSAT_FILE = re.compile(r"^L[COTEM]0?([45789])(?!\d)", re.IGNORECASE)
_LANDSAT_WORD = re.compile(r"LANDSAT[ _-]?([45789])(?!\d)", re.IGNORECASE)


def landsat_number(*hints: str) -> int | None:
    """The Landsat that file names (`LC08_...`) or tags (`LANDSAT_8`) speak of, if they agree."""
    found = {
        int(match[1])
        for hint in hints
        for match in (_LANDSAT_FILE.match(hint), _LANDSAT_WORD.search(hint))
        if match
    }
    # The Landsat half of HLS joins 8 and 9, whose bands are the same.
    found |= {8 for hint in hints if re.match(r"HLS\.L30\.", hint, re.IGNORECASE)}
    return found.pop() if len(found) == 1 else None


def common_names(names: Sequence[str | None], *, landsat: int | None = None) -> list[str | None]:
    """The STAC common name of each band, None where the name is missing or could mean two things."""
    by_gdal = any(_WAVELENGTH.search(name or "") for name in names)
    names = [_WAVELENGTH.sub("", name or "") for name in names]
    numbers = [match[1].upper() if (match := _NUMBERED.match(name or "")) else None for name in names]
    if landsat is not None:
        table = _LANDSAT[landsat]
    elif by_gdal or {"8A", "12"} & set(numbers) or "B08" in {(name or "").upper() for name in names}:
        table = SENTINEL2  # no Landsat has an 8A or a 12, and HLS writes no Landsat band as B08
    else:
        # Two digits are the writing of Sentinel-2 and of HLS, which agree on these three alone.
        two_digits = any(re.search(r"B0\d$", name or "", re.IGNORECASE) for name in names)
        table = {key: SENTINEL2[key] for key in ("2", "3", "4")} if two_digits else {}
    return [
        table.get(number) if number else _WORDS.get(_word(name))
        for name, number in zip(names, numbers, strict=True)
    ]


def is_band_name(text: str) -> bool:
    """Whether ``text`` names a band, be it ambiguous."""
    return bool(_NUMBERED.match(text)) or _word(text) in _WORDS


def _word(name: str | None) -> str:
    return re.sub(r"[\s_-]", "", name or "").lower()


def match_bands(
    names: Sequence[str | None],
    needed: Sequence[str],
    *,
    source: str,
    landsat: int | None = None,
    known: Sequence[str | None] | None = None,
    select: Sequence[str] | None = None,
) -> tuple[list[int], list[str]]:
    """The 1-based numbers of the ``needed`` bands among ``names``, and warnings about the choice.

    Args:
        names: Of the file's bands, None where one has none.
        needed: Common names in the model's order.
        source: The file's name, for errors.
        landsat: The Landsat's number where the file says it.
        known: Common names that metadata give beyond doubt, None for bands of which they do not.
        select: What the user gave with ``--bands``: names or 1-based numbers in the model's order.

    Raises:
        BandError: a band is missing, named twice, or its name could mean two things.
    """
    if select is not None:
        return _selected(names, needed, select, source=source), []
    listed = _listed(names)
    if not any(names):
        if len(names) == len(needed):
            return list(range(1, len(names) + 1)), [
                f"{source}: its bands have no names; taken in order as {', '.join(needed)}."
            ]
        raise BandError(
            f"{source} has {count_bands(len(names))} without names, the model needs {len(needed)}: "
            f"{', '.join(needed)}. {_advice(names, needed)}"
        )
    guessed = common_names(names, landsat=landsat)
    known = [told or guess for told, guess in zip(known or guessed, guessed, strict=True)]
    indexes, warnings = [], []
    for want in needed:
        found = [index for index, name in enumerate(names, 1) if name == want] or [
            index for index, name in enumerate(known, 1) if name == want
        ]
        if not found and want in STAND_INS:
            found = [index for index, name in enumerate(known, 1) if name == STAND_INS[want]]
            if len(found) == 1:
                warnings.append(
                    f"{source}: {names[found[0] - 1]} ({STAND_INS[want]}) stands in for {want}."
                )
        if not found:
            numbered = [
                name
                for name, common in zip(names, known, strict=True)
                if name and common is None and _NUMBERED.match(name)
            ]
            unclear = (
                f" ({numbered[0]} means different bands on different satellites)" if numbered else ""
            )
            raise BandError(
                f"{source} has {count_bands(len(names))} ({listed}), among which {want} is not "
                f"found{unclear}; the model needs {', '.join(needed)}. {_advice(names, needed)}"
            )
        if len(found) > 1:
            raise BandError(
                f"{source} has {want} more than once (bands {', '.join(map(str, found))} of "
                f"{listed}). Name the model's bands in order with --bands: {', '.join(needed)}."
            )
        indexes += found
    return indexes, warnings


def _selected(
    names: Sequence[str | None], needed: Sequence[str], select: Sequence[str], *, source: str
) -> list[int]:
    if len(select) != len(needed):
        raise BandError(
            f"--bands names {len(select)} ({', '.join(select) or 'none'}), the model needs "
            f"{len(needed)}: {', '.join(needed)}."
        )
    indexes = []
    for item in select:
        found = [index for index, name in enumerate(names, 1) if name == item]
        if not found and item.isdecimal() and 1 <= int(item) <= len(names):
            found = [int(item)]
        if len(found) != 1:
            raise BandError(
                f"--bands {item or repr(item)}: {source} has "
                f"{'no' if not found else 'more than one'} such band; "
                f"it has {_listed(names)}. Use those names or the numbers 1 to {len(names)}."
            )
        indexes += found
    _check_twice(indexes, len(names), needed, select, source=source)
    return indexes


def _check_twice(
    indexes: Sequence[int], count: int, needed: Sequence[str], select: Sequence[str], *, source: str
) -> None:
    """Refuse a band that is named twice where there are enough for each to be named once.

    A file of fewer bands can only repeat some, and the near infrared may stand in for its twin.
    """
    for place, index in enumerate(indexes):
        first = indexes.index(index)
        if first == place or count < len(needed) or STAND_INS.get(needed[place]) == needed[first]:
            continue
        raise BandError(
            f"--bands names {select[place]} twice, for {needed[first]} and for {needed[place]}; "
            f"{source} has {count} bands. Name another for each of {', '.join(needed)}."
        )


def _advice(names: Sequence[str | None], needed: Sequence[str]) -> str:
    if len(names) < len(needed):
        return "Add the missing ones (gdalbuildvrt -separate), or take a model for these bands."
    return f"Say with --bands which they are, by name or number, that of {needed[0]} first."


def _listed(names: Sequence[str | None]) -> str:
    return ", ".join(name or f"band {index}" for index, name in enumerate(names, 1))


def count_bands(bands: int) -> str:
    """In words."""
    return "1 band" if bands == 1 else f"{bands} bands"
