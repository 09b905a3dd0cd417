"""What can be told of a checkpoint in place of what its configuration says, or leaves out."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt


class ImportOptions(BaseModel):
    """What to take in place of the configuration's word; None takes that."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    bands: tuple[str, ...] | None = None
    """Names in the order the model takes them, by STAC common name where one exists."""
    mean: tuple[float, ...] | None = None
    """Of each band, after the scale."""
    std: tuple[PositiveFloat, ...] | None = None
    """Of each band, after the scale."""
    scale: PositiveFloat | None = None
    """What the values stored in the images are multiplied with."""
    classes: tuple[str, ...] | None = None
    """Names of the classes from 0 on."""
    target: str | None = None
    """Name of the quantity of a regression, with its unit after a colon: ``canopy_height:m``."""
    tile: PositiveInt | None = None
    """Side in pixels of the square the model takes."""
    scenes: tuple[Path, ...] = ()
    """Images for the tiles on which an export is proved; none takes those for validation, test or
    training that the configuration names."""
