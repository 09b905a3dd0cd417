"""A model as a program of `torch.export`, which PyTorch runs without our code, or ONNX is made of."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from geodeploy.errors import ModelError, first_line
from geodeploy.spec import METADATA_KEY, ModelSpec

SPEC_FILE = f"{METADATA_KEY}.json"
"""The name of the spec among the file's extra files."""

OPSET = 20
"""Attention stays in plain parts, which every runtime has; LayerNormalization and Gelu are whole."""
_OPSET_OF_BF16 = 22
"""From it on a convolution may be one of bfloat16; attention is whole only from 23 on."""

_DYNAMIC = ({0: torch.export.Dim("batch")},)


def trace(model: nn.Module, spec: ModelSpec) -> ExportedProgram:
    """``model`` from pixels to logits, any batch, fixed tile."""
    program = torch.export.export(model, (_example(spec),), dynamic_shapes=_DYNAMIC, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of our source code
    program.example_inputs = None  # it would be the one pickle in the file
    return program


def write_program(program: ExportedProgram, spec: ModelSpec, path: Path) -> None:
    """Write ``program`` to ``path`` (.pt2), with ``spec`` inside."""
    archive = io.BytesIO()  # in a file the archive's own name would be part of every entry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code, nothing that we could change
        torch.export.save(program, archive, extra_files={SPEC_FILE: spec.to_json()})
    path.write_bytes(archive.getvalue())


def onnx_program(model: nn.Module, spec: ModelSpec) -> torch.onnx.ONNXProgram:
    """``model`` in ONNX, from ``pixels`` to outputs, any batch, fixed tile, and what it was made of."""
    return to_onnx(
        model,
        (_example(spec),),
        _DYNAMIC,
        inputs=["pixels"],
        outputs=[spec.output],
        opset=_OPSET_OF_BF16 if spec.precision == "bf16" else OPSET,
    )


def to_onnx(
    model: nn.Module,
    example: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int = OPSET,
) -> torch.onnx.ONNXProgram:
    """``model`` in ONNX, its sizes those of the ``example`` but for the ``dynamic`` ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own code, nothing that we could change
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    return program


def read_program(path: Path) -> tuple[nn.Module, ModelSpec]:
    """The module in ``path``, which takes and gives what the tuned model does, and its spec.

    Raises:
        ModelError: it is no program of `torch.export`.
        SpecError: it holds no spec.
    """
    files = {SPEC_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = torch.export.load(path, extra_files=files).module()
        except Exception as error:  # of zipfile, json and torch, as it breaks
            raise ModelError(
                f"{path} is no program that torch.export {torch.__version__} can load "
                f"({first_line(error)}). Export it again."
            ) from error
    return module, ModelSpec.from_json(files[SPEC_FILE], source=str(path))


def _example(spec: ModelSpec) -> torch.Tensor:
    # A batch of two: the exporter takes a size of one for a constant.
    return torch.zeros(2, len(spec.planes), spec.tile, spec.tile)
