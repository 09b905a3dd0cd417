"""The exported model against PyTorch, and faults planted on the way that must not get through."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from peft import PeftModel

from geodeploy.errors import OutputError, ParityError
from geodeploy.export import export, verify
from geodeploy.export.drift import Drift, Reference, bisect, reference_of
from geodeploy.export.merge import merge
from geodeploy.export.options import ExportOptions
from geodeploy.export.worst import draw_worst
from geodeploy.runtime import open_session
from geodeploy.runtime.graph import OnnxFile, read_onnx
from geodeploy.spec import METADATA_KEY, ModelSpec, Precision
from geodeploy.train.model import TunedModel
from geodeploy.train.run import load_run

Tune = Callable[..., Path]
METHODS = ("lora", "linear", "full")


@pytest.fixture(scope="module")
def exported(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A RUN tuned with LoRA and its ONNX."""
    run = tune()
    model = tmp_path_factory.mktemp("export") / "model.onnx"
    export(run, model)
    return run, model


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [
        ("nowhere/worst.png", "does not exist. Make it first"),
        ("model.onnx", "is the input itself.*--picture"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_told_before_any_work(
    exported: tuple[Path, Path], picture: str, complaint: str
) -> None:
    run, model = exported
    with pytest.raises(OutputError, match=complaint):
        verify(run.with_name("absent"), model, picture=model.parent / picture)
    assert read_onnx(model)


@pytest.mark.parametrize("method", METHODS)
def test_merging_changes_nothing_but_the_form(tune: Tune, method: str) -> None:
    run = load_run(tune(f"method.name={method}"))
    merged = merge(run.model)
    pixels = torch.from_numpy(run.tiles.pixels)
    with torch.inference_mode():
        torch.testing.assert_close(merged(pixels), run.model(pixels), rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in merged.state_dict())
    # On a copy: the tuned model still has its adapter.
    assert isinstance(run.model.backbone, PeftModel) == (method == "lora")


def test_the_adapter_matters_so_that_merging_can_fail(tune: Tune) -> None:
    run = load_run(tune())
    merged = merge(run.model)
    with run.model.backbone.disable_adapter(), torch.inference_mode():
        without = run.model(torch.from_numpy(run.tiles.pixels))
    with torch.inference_mode():
        within = merged(torch.from_numpy(run.tiles.pixels))
    assert (without - within).abs().max() > 1e-4


@pytest.mark.parametrize("overrides", [(), ("model.decoder=linear",), ("model.scaling=zscore",)])
def test_onnx_runtime_gives_the_logits_of_pytorch_for_any_batch(
    tune: Tune, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    path = tune(*overrides)
    export(path, tmp_path / "model.onnx")
    run = load_run(path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        pixels = np.resize(run.tiles.pixels, (batch, *run.tiles.pixels.shape[1:]))
        with torch.inference_mode():
            judge = run.model(torch.from_numpy(pixels)).numpy()
        (logits,) = session.run(["logits"], {"pixels": pixels})
        np.testing.assert_allclose(logits, judge, rtol=1e-4, atol=1e-5)


def test_the_file_says_what_it_is_and_nothing_of_where_it_was_made(
    exported: tuple[Path, Path],
) -> None:
    run, model = exported
    graph = onnx.load(model)
    onnx.checker.check_model(graph, full_check=True)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [20]
    spec = ModelSpec.from_json(
        {entry.key: entry.value for entry in graph.metadata_props}[METADATA_KEY], source="test"
    )
    tuned = ModelSpec.read(run / "spec.json")
    assert spec.model_copy(update={"parity": None}) == tuned
    assert spec.parity is not None
    report = model.with_suffix(".parity.json").read_bytes()
    assert spec.parity.argmax_agreement == json.loads(report)["exported"]["argmax_agreement"]
    import hashlib

    assert spec.parity.report_sha256 == hashlib.sha256(report).hexdigest()
    assert str(Path.cwd()).encode() not in model.read_bytes()
    assert b"site-packages" not in model.read_bytes()


def test_the_same_run_exports_to_the_same_bytes(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, model = exported
    export(run, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == model.read_bytes()
    item, again = model.with_suffix(".stac.json"), tmp_path / "again.stac.json"
    assert again.read_text().replace("again", "model") == item.read_text()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_on_one_core_it_exports_to_the_same_bytes_as_on_two(
    tune: Tune, tmp_path: Path, precision: Precision
) -> None:
    if not hasattr(os, "sched_setaffinity") or len(cores := os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores, and a system that takes one away")
    run, threads, made = tune(), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            os.sched_setaffinity(0, set(sorted(cores)[:number]))
            torch.set_num_threads(number)
            model = tmp_path / f"{number}.onnx"
            export(run, model, options=ExportOptions(precision=precision))
            made.append((model.read_bytes(), model.with_suffix(".parity.json").read_text()))
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    assert made[0] == made[1]


def test_an_existing_model_is_kept_unless_told_otherwise(exported: tuple[Path, Path]) -> None:
    run, model = exported
    before = model.read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        export(run, model)
    assert model.read_bytes() == before
    export(run, model, overwrite=True)
    assert sorted(item.name for item in model.parent.iterdir()) == [
        "model.onnx",
        "model.parity.json",
        "model.stac.json",
    ]


def test_what_was_exported_verifies(exported: tuple[Path, Path]) -> None:
    assert verify(*exported).released


def test_openvino_is_proved_too_and_the_model_says_so(exported: tuple[Path, Path]) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'geodeploy-eo[cpu]'")
    run, model = exported
    tuned = load_run(run)
    found = open_session(model, runtime="openvino").run(tuned.tiles.pixels)
    with torch.inference_mode():
        judge = tuned.model(torch.from_numpy(tuned.tiles.pixels)).numpy()
    np.testing.assert_allclose(found, judge, rtol=1e-4, atol=1e-5)
    report = json.loads(model.with_suffix(".parity.json").read_bytes())
    (other,) = report["other_runtimes"]
    assert other["runtime"].startswith("openvino ")
    assert other["problem"] is None
    assert other["exported"]["max_abs_diff"] == pytest.approx(np.abs(found - judge).max(), abs=1e-6)


def test_where_openvino_alone_fails_the_picture_is_of_its_worst_tile(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'geodeploy-eo[cpu]'")
    run, model = exported
    tuned, report = load_run(run), verify(run, model)
    (other,) = report.other_runtimes
    assert other.exported
    worst = (report.exported.worst_tile + 1) % report.exported.tiles
    far = other.exported.model_copy(update={"worst_tile": worst})
    failed = other.model_copy(update={"problem": "too far off", "exported": far})
    told = report.model_copy(update={"other_runtimes": (failed,)})
    draw_worst(tmp_path / "sound.png", tuned, model, report)
    draw_worst(tmp_path / "failed.png", tuned, model, told)
    # Two pictures in one: true colour is of another tile, and so are the classes beside it.
    sound, other_tile = (imread(tmp_path / name) for name in ("sound.png", "failed.png"))
    assert np.abs(sound - other_tile)[20:, : sound.shape[1] // 4].mean() > 0.01


def test_the_printed_report_has_all_that_parity_is_judged_by(exported: tuple[Path, Path]) -> None:
    report = verify(*exported)
    text = str(report)
    assert f"cosine {report.exported.cosine:.6f}" in text
    assert report.exported.iou_change
    points = [f"{name} {100 * by:+.2f}" for name, by in report.exported.iou_change.items()]
    assert f"(points of IoU: {', '.join(points)})" in text


def test_a_model_that_openvino_cannot_run_is_released_without_it(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install 'geodeploy-eo[cpu]'")
    from geodeploy.export import onnx as export_module

    write = export_module.write_onnx

    def with_a_node_of_onnx_runtime_alone(model: TunedModel, spec: ModelSpec, path: Path) -> None:
        """Multiplies the logits with the inverse of the matrix [[1]]."""
        write(model, spec, path)
        loaded = onnx.load(path)
        graph = loaded.graph
        graph.initializer.append(numpy_helper.from_array(np.ones((1, 1), np.float32), "one"))
        graph.node[-1].output[0] = "raw"
        graph.node.append(helper.make_node("Inverse", ["one"], ["same"], domain="com.microsoft"))
        graph.node.append(helper.make_node("Mul", ["raw", "same"], ["logits"]))
        loaded.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(loaded, path)

    monkeypatch.setattr(export_module, "write_onnx", with_a_node_of_onnx_runtime_alone)
    model = tmp_path / "model.onnx"
    report = export(tune(), model)
    assert report.released
    (other,) = report.other_runtimes
    assert "Inverse" in str(other)
    assert str(tmp_path) not in report.to_json()
    assert open_session(model).name.startswith("onnxruntime ")
    with pytest.raises(ParityError, match="parity report covers onnxruntime"):
        open_session(model, runtime="openvino")


# Faults planted in the exported graph ------------------------------------------------------------


def _initialisers(graph: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    return {entry.name: numpy_helper.to_array(entry) for entry in graph.graph.initializer}


def _replace(graph: onnx.ModelProto, name: str, value: NDArray[np.float32]) -> None:
    (entry,) = (entry for entry in graph.graph.initializer if entry.name == name)
    entry.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def swapped_bands(graph: onnx.ModelProto) -> None:
    """Red and near infrared change places before the first convolution of the patches."""
    for name, value in _initialisers(graph).items():
        if value.ndim == 4 and value.shape[1] == 6:
            _replace(graph, name, value[:, [0, 1, 3, 2, 4, 5]])
            return
    raise AssertionError("no convolution over the bands")


def wrong_scale(graph: onnx.ModelProto) -> None:
    """The normalisation divides by means ten per cent too large."""
    for name, value in _initialisers(graph).items():
        if value.size == 6:
            _replace(graph, name, value * np.float32(1.1))
            return
    raise AssertionError("no normalisation")


def transposed_weight(graph: onnx.ModelProto) -> None:
    """One square weight of the attention lies on its side."""
    for name, value in _initialisers(graph).items():
        if value.ndim == 2 and value.shape[0] == value.shape[1] > 1:
            _replace(graph, name, value.T)
            return
    raise AssertionError("no square weight")


def not_a_number(graph: onnx.ModelProto) -> None:
    """One bias is NaN."""
    for name, value in _initialisers(graph).items():
        if value.ndim == 1 and value.size > 6:
            _replace(graph, name, np.where(np.arange(value.size) == 3, np.float32(np.nan), value))
            return
    raise AssertionError("no bias")


@pytest.mark.parametrize("plant", [swapped_bands, wrong_scale, transposed_weight, not_a_number])
def test_a_planted_fault_is_refused(
    exported: tuple[Path, Path], tmp_path: Path, plant: Callable[[onnx.ModelProto], None]
) -> None:
    run, model = exported
    graph = onnx.load(model)
    plant(graph)
    onnx.save(graph, tmp_path / "faulty.onnx")
    with pytest.raises(ParityError, match=r"faulty\.onnx is not the model of"):
        verify(run, tmp_path / "faulty.onnx")


@pytest.fixture(scope="module")
def judge(exported: tuple[Path, Path]) -> tuple[Reference, NDArray[np.float32]]:
    """What PyTorch computes of two real tiles, layer by layer, and the tiles."""
    tuned = load_run(exported[0])
    tiles = tuned.tiles.pixels[:2]
    return reference_of(merge(tuned.model), tuned.spec)(tiles), tiles


def lying(place: int) -> Callable[[onnx.ModelProto], None]:
    """The square weight of the attention at ``place`` lies on its side."""

    def plant(graph: onnx.ModelProto) -> None:
        square = [
            (name, value)
            for name, value in _initialisers(graph).items()
            if value.ndim == 2 and value.shape[0] == value.shape[1] > 1
        ]
        _replace(graph, square[place][0], square[place][1].T)

    return plant


def a_little_more(graph: onnx.ModelProto) -> None:
    """The last convolution's weights are a thousandth too large: no class moves."""
    node = graph.graph.node[-1]
    _replace(graph, node.input[1], _initialisers(graph)[node.input[1]] * np.float32(1.001))


def first_drift(
    judge: tuple[Reference, NDArray[np.float32]], file: OnnxFile, runtime: str = "onnxruntime"
) -> Drift | None:
    return bisect(judge[0], file, judge[1], runtime=runtime, tolerance=1e-4).first_drift


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("plant", "value", "module"),
    [
        (wrong_scale, None, "TunedModel"),
        (swapped_bands, "conv2d", "backbone.patch_embed.proj"),
        (lying(0), "linear_1", "backbone.blocks.0.attn.proj"),
        (lying(1), "linear_5", "backbone.blocks.1.attn.proj"),
        (a_little_more, "logits", "decoder"),
    ],
)
def test_the_first_layer_that_drifts_is_named(
    exported: tuple[Path, Path],
    judge: tuple[Reference, NDArray[np.float32]],
    plant: Callable[[onnx.ModelProto], None],
    value: str | None,
    module: str,
    runtime: str,
) -> None:
    pytest.importorskip(runtime, reason=f"needs {runtime}: pip install 'geodeploy-eo[cpu]'")
    sound = read_onnx(exported[1])
    assert first_drift(judge, sound, runtime) is None
    graph = onnx.load(exported[1])
    plant(graph)
    faulty = replace(sound, content=graph.SerializeToString())
    found = first_drift(judge, faulty, runtime)
    assert found is not None
    assert found.module.startswith(module), found
    assert value in (None, found.value)
    assert found.relative_rms is not None
    assert found.relative_rms > 1e-4


def test_a_number_that_is_none_is_named_too(
    exported: tuple[Path, Path], judge: tuple[Reference, NDArray[np.float32]]
) -> None:
    graph = onnx.load(exported[1])
    not_a_number(graph)
    faulty = replace(read_onnx(exported[1]), content=graph.SerializeToString())
    found = first_drift(judge, faulty)
    assert found is not None
    assert found.relative_rms is None
    assert "NaN" in str(found)


def test_a_fault_in_the_export_itself_releases_nothing(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geodeploy.export import onnx as export_module

    write = export_module.write_onnx

    def faulty(model: object, spec: ModelSpec, path: Path) -> None:
        write(model, spec, path)
        graph = onnx.load(path)
        swapped_bands(graph)
        onnx.save(graph, path)

    monkeypatch.setattr(export_module, "write_onnx", faulty)
    with pytest.raises(ParityError, match=r"made of backbone\.patch_embed\.proj.* It was not written"):
        export(tune(), tmp_path / "model.onnx")
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"model.refused.json", "model.refused.png"}
    refused = json.loads((tmp_path / "model.refused.json").read_text())
    assert refused["released"] is False
    assert refused["first_drift"]["module"] == "backbone.patch_embed.proj"
    # A refusal that outlived its cure would be taken to be of the model beside it.
    monkeypatch.setattr(export_module, "write_onnx", write)
    export(tune(), tmp_path / "model.onnx")
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"model.onnx", "model.parity.json", "model.stac.json"}


def test_a_merge_gone_wrong_is_refused(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geodeploy.export import merge as merge_module

    honest = merge_module.merge

    def forgetful(model: object) -> object:
        merged = honest(model)
        merged.backbone.blocks[0].attn.qkv.weight.mul_(2)
        return merged

    monkeypatch.setattr(merge_module, "merge", forgetful)
    with pytest.raises(ParityError, match="merged model differs"):
        export(tune(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
