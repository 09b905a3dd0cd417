"""What can be asked of an export."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from geodeploy.spec import Range


class ExportOptions(BaseModel):
    """How to write a model."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    to: Literal["onnx", "triton", "torch-export"] = "onnx"
    """One ONNX file; a folder for the model repository of Triton with it inside; a ``.pt2`` of
    `torch.export`."""
    profile: Literal["deepness"] | None = None
    """For another program: ``deepness`` for the QGIS plugin Deepness and the command line GeoDeep."""
    range: Range | None = None
    """With ``deepness``, what 0 and 255 of 8-bit bands stand for, in the spec's units; None for what
    the training pixels lay in, or the valid ranges of the bands where that is not known."""
