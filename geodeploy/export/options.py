"""What can be asked of an export."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from geodeploy.spec import Precision, Range


class ExportOptions(BaseModel):
    """How to write a model."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    to: Literal["onnx", "tensorrt", "triton", "torch-export"] = "onnx"
    """One ONNX file; the same, and its TensorRT engine for this GPU in the cache; a folder for the
    model repository of Triton with it inside; a ``.pt2`` of `torch.export`."""
    precision: Precision = "fp32"
    """What an ONNX file computes in. ``fp16`` and ``bf16`` are half the size and for GPUs, ``bf16``
    also for CPUs that multiply in it; ``int8`` a quarter and for CPUs, ``int8-tensorrt`` the same for
    TensorRT. Input, output, and what needs digits or range stay float32."""
    profile: Literal["deepness"] | None = None
    """For another program: ``deepness`` for the QGIS plugin Deepness and the command line GeoDeep."""
    range: Range | None = None
    """With ``deepness``, what 0 and 255 of 8-bit bands stand for, in the spec's units; None for what
    the training pixels lay in, or the valid ranges of the bands where that is not known."""
