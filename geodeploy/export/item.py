"""Describe a model as a STAC item with the extension for machine learning models (MLM 1.5)."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from geodeploy.item import class_objects, item_path
from geodeploy.spec import ModelSpec

_EXTENSIONS = (
    "https://stac-extensions.github.io/mlm/v1.5.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
)
_EARTH = [[[-180.0, -90.0], [180.0, -90.0], [180.0, 90.0], [-180.0, 90.0], [-180.0, -90.0]]]
_KINDS = {
    ".onnx": ("ONNX", "ONNX", "application/octet-stream; application=onnx"),
    ".onnx_adapter": ("ONNX adapter", "ONNX", "application/octet-stream"),
    ".pt2": ("torch.export.save", "PyTorch", "application/zip; application=pytorch"),
}
"""What MLM calls the file, what runs it, and its media type."""
_TASKS = {
    "segmentation": "semantic-segmentation",
    "regression": "regression",
    "multilabel": "scene-classification",
}
"""What MLM calls the spec's tasks."""
BASE = "base.onnx"
"""The name of a base among its adapters."""


def model_item(spec: ModelSpec, model: Path, *, parameters: int) -> dict[str, Any]:
    """The item of the ONNX file ``model``; the same file gives the same item.

    It holds for all places and times: what the model was trained on is told in words.

    Args:
        spec: What the file says of itself.
        model: Read for its size and hash; links are relative to its folder.
        parameters: The number of the model's weights.
    """
    content = model.read_bytes()
    kind, framework, media_type = _KINDS[model.suffix]
    assets: dict[str, Any] = {
        "model": {
            "href": f"./{model.name}",
            "type": media_type,
            "title": f"{spec.name} as {kind}, {spec.precision}",
            "roles": ["mlm:model", "mlm:weights", "data"],
            "mlm:artifact_type": kind,
            "file:size": len(content),
            # A multihash: sha2-256, 32 bytes.
            "file:checksum": f"1220{sha256(content).hexdigest()}",
            # The one place that all versions of MLM look for what `bands` of an input names.
            "raster:bands": [
                {
                    "name": band.name,
                    "data_type": "float32",
                    "statistics": {"mean": band.mean, "stddev": band.std},
                }
                for band in spec.bands
            ],
        }
    }
    if spec.base_sha256:
        assets["base"] = {
            "href": f"./{BASE}",
            "type": _KINDS[".onnx"][2],
            "title": "The base that the adapter makes a model of",
            "roles": ["mlm:weights"],
            "mlm:artifact_type": "ONNX",
            "file:checksum": f"1220{spec.base_sha256}",
        }
    if spec.parity:
        assets["parity"] = {
            "href": f"./{model.with_suffix('.parity.json').name}",
            "type": "application/json",
            "title": "How the exported model compares with the tuned one, on real tiles",
            "roles": ["metadata"],
        }
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(_EXTENSIONS),
        "id": model.stem,
        "geometry": {"type": "Polygon", "coordinates": _EARTH},
        "bbox": [-180.0, -90.0, 180.0, 90.0],
        "properties": _properties(spec, framework, parameters),
        "links": [],
        "assets": assets,
    }


def write_model_item(spec: ModelSpec, model: Path, *, parameters: int) -> Path:
    """Write the item beside ``model``, as ``<stem>.stac.json``."""
    output = item_path(model)
    item = model_item(spec, model, parameters=parameters)
    output.write_text(json.dumps(item, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return output


def _properties(spec: ModelSpec, framework: str, parameters: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "title": spec.name,
        # No day of the making is told: the same RUN is to give the same bytes.
        "datetime": None,
        "start_datetime": "1900-01-01T00:00:00Z",
        "end_datetime": "9999-12-31T23:59:59Z",
        "mlm:name": _name(spec.name),
        "mlm:architecture": spec.backbone.name if spec.backbone else "unknown",
        "mlm:tasks": [_TASKS[spec.task]],
        "mlm:framework": framework,
        "mlm:total_parameters": parameters,
        "mlm:input": [_input(spec)],
        "mlm:output": [_output(spec)],
        "mlm:hyperparameters": {"tile": spec.tile, "overlap": spec.overlap},
    }
    if spec.trained_on:
        described["description"] = spec.trained_on
    if spec.licence:
        # Else a text of its own, which the model carries inside.
        is_identifier = re.fullmatch(r"[\w.+-]+", spec.licence)
        described["license"] = spec.licence if is_identifier else "other"
    if spec.gsd_m:
        described["gsd"] = spec.gsd_m
    if spec.backbone:
        weights = spec.backbone.weights
        described["mlm:pretrained"] = weights != "random"
        described["mlm:pretrained_source"] = None if weights == "random" else weights
    if spec.method:
        method = spec.method.model_dump(include={"name", "r", "alpha"}, exclude_none=True)
        described["mlm:hyperparameters"]["method"] = method
    return described


def _input(spec: ModelSpec) -> dict[str, Any]:
    scaling = [
        {"type": "z-score", "mean": band.mean, "stddev": band.std}
        for band in (spec.bands if spec.normalise else ())
    ]
    if spec.input_range:
        low, high = spec.input_range
        scaling = [{"type": "min-max", "minimum": low, "maximum": high}] * len(spec.bands)
    units = spec.units[:1].upper() + spec.units[1:]
    told = "scaled as told" if scaling else "as it is: the graph normalises by itself"
    return {
        "name": "pixels",
        "description": f"{units}, {told}. Pixels without data hold the mean of their band.",
        "bands": [band.name for band in spec.planes],
        "input": _array(spec, len(spec.planes), "bands"),
        **({"value_scaling": scaling} if scaling else {}),
    }


def _output(spec: ModelSpec) -> dict[str, Any]:
    if spec.targets:
        return {
            "name": spec.output,
            "description": f"Quantities in this order: {', '.join(map(str, spec.targets))}.",
            "tasks": [_TASKS[spec.task]],
            "result": _array(spec, len(spec.outputs), "target"),
        }
    carried = "a map carries the value of the greatest"
    if spec.whole_tiles:
        carried = "each by itself, of the tile as a whole, which may show several"
    return {
        "name": spec.output,
        "description": f"{spec.output.capitalize()} of the classes in this order; {carried}.",
        "tasks": [_TASKS[spec.task]],
        "result": _array(spec, len(spec.outputs), "class"),
        "classification:classes": [
            # MLM has classes of classification 1.1, before titles; `stac_model` reads no others.
            {key: value for key, value in item.items() if key != "title"}
            for item in class_objects(spec.classes)
        ],
    }


def _array(spec: ModelSpec, channels: int, axis: str) -> dict[str, Any]:
    sizes = {"batch": -1, axis: channels, "height": spec.tile, "width": spec.tile}
    order = ["batch", axis, "height", "width"]
    if spec.layout == "NHWC":
        order = ["batch", "height", "width", axis]
    if axis == "class" and spec.whole_tiles:
        order = ["batch", axis]
    return {
        "shape": [sizes[name] for name in order],
        "dim_order": order,
        "data_type": "float32",
    }


def _name(name: str) -> str:
    """``name`` with no other signs than MLM allows, beginning with a letter."""
    kept = re.sub(r"[^0-9A-Za-z_.\- ]+", "-", name).strip("_.- ")
    return kept if re.fullmatch(r"[A-Za-z].+", kept) and len(kept) > 2 else f"model-{kept or 'unnamed'}"
