"""How a scene is mapped: what the user may choose."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
)

from geodeploy.blend import Blend
from geodeploy.derived import DerivedOptions
from geodeploy.filters import Side, Size
from geodeploy.runtime import Device, Runtime

Progress = Callable[[int, int], None]
"""Called with the rows written so far and all rows."""


def _gsd(value: Any) -> Any:
    if value in ("native", "model"):
        return value
    try:
        metres = float(value)
    except (TypeError, ValueError):
        metres = 0.0
    if not 0 < metres < math.inf:
        raise ValueError("native, model or a number of metres above 0 is needed")
    return metres


class PredictOptions(BaseModel):
    """How to run a model over a scene."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    overlap: NonNegativeInt | None = None
    """Pixels shared by neighbouring tiles: context at the edge, paid for in more tiles. None takes the
    model's own."""
    blend: Blend = "cosine"
    """How overlapping tiles are weighed; ``crop`` cuts the overlap in the middle."""
    batch: PositiveInt = 8
    """Tiles in work at once, at most, shared out among threads. Memory grows in proportion."""
    adapter: Path | None = None
    """What makes a model of a base: a file that `geodeploy export --adapters` made with it."""
    runtime: Runtime = "auto"
    """What runs an ONNX file; ``auto`` takes the fastest that its parity report covers."""
    device: Device = "auto"
    """Asking for ``cuda`` and getting the CPU is an error."""
    earlier: tuple[Path, ...] = ()
    """The place of the scene at earlier dates, oldest first, for a model that takes several. All are
    read on the scene's grid; a pixel without data at one date has no class."""
    date: tuple[str, ...] = ()
    """Which dates of a NetCDF file, a Zarr store or an array, as ``2024-05-31`` or as much of its
    beginning as tells it from the others; as many as the model takes. None takes all, if they are so
    many."""
    bands: tuple[str, ...] | None = None
    """Names or 1-based numbers of the scene's bands in the model's order."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What values are multiplied with after the file's own scale and offset."""
    offset: FiniteFloat = 0.0
    """What is added then."""
    gsd: Annotated[Literal["native", "model"] | float, PlainValidator(_gsd)] = "native"
    """Metres a pixel to resample the scene to as it is read; ``model`` takes those of the training."""
    aoi: str | None = None
    """The area to map: ``xmin,ymin,xmax,ymax`` in degrees or, after an ``@``, in another CRS; or a file
    of polygons. Its pixels are those of the whole map, but near its edge where ``smooth`` or ``sieve``
    see no further, of which the report warns. None maps the whole scene."""
    smooth: Side | None = None
    """Each pixel takes the majority of a square of so many pixels, an odd number up to 255."""
    sieve: Size | None = None
    """Regions of fewer pixels than this, up to 1000, take the class with the longest common border."""
    confidence: bool = False
    """Write the probability of the chosen class beside the map, ``<map>_confidence.tif``."""
    probabilities: bool = False
    """Write the probability of every class, a band each, ``<map>_probabilities.tif``."""
    disagreement: bool = False
    """Write how far overlapping tiles are apart, ``<map>_disagreement.tif``."""
    derived: DerivedOptions = DerivedOptions()
    """What to make of the map beside it."""
    on_error: Literal["stop", "skip"] = "stop"
    """``skip`` leaves out what cannot be read, and what the model answers with NaN or infinity: such
    holes are nodata, and the report lists them. Of several scenes it leaves out those that cannot be
    mapped at all."""
    overwrite: bool = False
    """Replace a map that exists, what lies beside it and what is made of it."""
    readers: PositiveInt = 2
    """Threads that decode ahead of the model; two keep up with any model worth running."""
    threads: PositiveInt | None = None
    """For the model's arithmetic. None takes every core this process may use."""

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of the rasters that are to lie beside the map."""
        asked = {
            "confidence": self.confidence,
            "probabilities": self.probabilities,
            "disagreement": self.disagreement,
        }
        return tuple(name for name, wanted in asked.items() if wanted)
