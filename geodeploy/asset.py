"""What a scene is made of, before its pixels are looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from geodeploy.errors import SourceError


@dataclass(frozen=True, slots=True)
class Asset:
    """One band of a scene: where it lies, and what is known of its values."""

    path: str
    """What GDAL opens."""
    name: str | None
    """As the producer calls it (``B04``), for the user to ask for; None where it has none."""
    index: int = 1
    """1-based number of the band in its file."""
    common_name: str | None = None
    """Where the metadata says it beyond doubt; else it is worked out from the names."""
    scale: float | None = None
    """Stored values times this; None for what the file's own tags say."""
    offset: float | None = None
    """Added then."""
    nodata: float | None = None
    """The value that is no data; None for what the file says."""


@dataclass(frozen=True, slots=True)
class Source:
    """A scene before its pixels are looked at."""

    name: str
    """For messages."""
    assets: list[Asset]
    hints: tuple[str, ...] = ()
    """File names and tags in which a satellite may be named."""
    left_out: str = ""
    """What is no band, in words that follow the name."""
    lost: Mapping[str, SourceError] = field(default_factory=dict)
    """What could have been a band, by its name, and why it is none."""
