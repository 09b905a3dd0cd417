"""A model as Triton Inference Server serves it: one folder of a model repository.

    NAME/config.pbtxt
    NAME/labels.txt
    NAME/warmup/tile
    NAME/1/model.onnx

The config is a `ModelConfig` of https://github.com/triton-inference-server/common (model_config.proto).
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geodeploy.runtime.graph import output_shape
from geodeploy.spec import ModelSpec

MODEL = Path("1") / "model.onnx"
"""Where Triton looks for the first version."""
CONFIG = "config.pbtxt"

_MAX_BATCH = 8
"""What `predict` takes at once by itself."""
_WAIT_MICROSECONDS = 1000
"""How long a tile waits for others to fill its batch: little beside a forward pass."""

_CONFIG = """\
name: {name}
backend: "onnxruntime"
max_batch_size: {batch}
input {{ name: "pixels" data_type: TYPE_FP32 dims: {taken} }}
output {{ name: "{output}" data_type: TYPE_FP32 dims: {given} label_filename: "labels.txt" }}
dynamic_batching {{ max_queue_delay_microseconds: {wait} }}
{warmup}"""
_WARMUP = """\
model_warmup {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{
    key: "pixels"
    value {{ data_type: TYPE_FP32 dims: {taken} input_data_file: "tile" }}
  }}
}}
"""


def write_beside(folder: Path, name: str, spec: ModelSpec, tile: NDArray[np.float32]) -> None:
    """Write into ``folder`` what Triton needs beside the ONNX file of the model ``name``.

    ``tile`` (C, tile, tile), in the spec's units, is what the server warms up with.
    """
    side = [spec.tile, spec.tile]
    taken = [len(spec.planes), *side]
    warmup = "".join(_WARMUP.format(batch=batch, taken=taken) for batch in (1, _MAX_BATCH))
    config = _CONFIG.format(
        name=json.dumps(name, ensure_ascii=False),
        batch=_MAX_BATCH,
        taken=taken,
        given=output_shape(spec),
        output=spec.output,
        wait=_WAIT_MICROSECONDS,
        warmup=warmup,
    )
    (folder / CONFIG).write_text(config, encoding="utf-8")
    labels = "".join(f"{name}\n" for name in spec.outputs)
    (folder / "labels.txt").write_text(labels, encoding="utf-8")
    (folder / "warmup").mkdir()
    (folder / "warmup" / "tile").write_bytes(tile.astype("<f4").tobytes())
