"""A base with its adapters against the merged models, and what must not be put together."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import timm
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import save_file

from geodeploy import Model
from geodeploy.errors import GeodeployError, ModelError, OutputError, ParityError, RecipeError
from geodeploy.evaluate import evaluate
from geodeploy.export import export, export_adapters, verify
from geodeploy.export.adapters import low_rank
from geodeploy.export.merge import merge
from geodeploy.inspect import inspect
from geodeploy.options import PredictOptions
from geodeploy.predict import predict
from geodeploy.runtime import open_session
from geodeploy.runtime.adapter import Adapter, Base, read_adapter, write_adapter
from geodeploy.runtime.reference import Reference
from geodeploy.spec import REFERENCE_KEY
from geodeploy.train.run import load_run

Tune = Callable[..., Path]

FEW = ("training.steps=2", "training.validate_every=1")
OTHER = (
    "method.r=2",
    "model.decoder=linear",
    'data.bands=["blue", "nir", "swir16"]',
    'classes=[{value=0, name="clear", color="#8fae6b"}, {value=1, name="cloud", color="#ffffff"}]',
    "data.ignore=[2]",
    *FEW,
)
"""Another rank, decoder, number of bands and number of classes than the tiny recipe has."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that gives all RUNs of the tiny recipe the same weights, for red, green and blue."""
    torch.manual_seed(5)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        num_classes=0,
        global_pool="",
        embed_dim=32,
        depth=2,
        num_heads=2,
        patch_size=8,
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(vit.state_dict(), path)
    return f'model.weights="{path}"'


@pytest.fixture(scope="module")
def runs(tune: Tune, pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A RUN under a name of its own."""
    folder = tmp_path_factory.mktemp("named")

    def named(name: str, *overrides: str) -> Path:
        if not (folder / name).exists():
            shutil.copytree(tune(pretrained, *overrides), folder / name)
        return folder / name

    return named


@pytest.fixture(scope="module")
def exported(
    runs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    """The folder of a base with two adapters, and their RUNs."""
    folder = tmp_path_factory.mktemp("export") / "adapters"
    made = [runs("flood"), runs("cloud", *OTHER)]
    export_adapters(made, folder)
    return folder, made


def logits_of_merged(run: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    tuned = load_run(run)
    with torch.inference_mode():
        return tuned.tiles.pixels, merge(tuned.model)(torch.from_numpy(tuned.tiles.pixels)).numpy()


def adapter_of(folder: Path, run: Path) -> Path:
    return folder / f"{run.name}.onnx_adapter"


def test_a_base_with_an_adapter_gives_what_the_merged_model_gives(
    exported: tuple[Path, list[Path]],
) -> None:
    folder, made = exported
    found = []
    for run in made:
        pixels, judge = logits_of_merged(run)
        session = open_session(folder / "base.onnx", adapter=adapter_of(folder, run), device="cpu")
        found.append(session.run(pixels))
        np.testing.assert_allclose(found[-1], judge, rtol=0, atol=1e-5 * np.abs(judge).max())
        report = json.loads((folder / f"{run.name}.parity.json").read_text())
        assert report["released"]
        assert session.spec.parity
        item = json.loads((folder / f"{run.name}.stac.json").read_text())
        assert item["assets"]["base"]["file:checksum"] == f"1220{session.spec.base_sha256}"
        assert verify(run, folder / "base.onnx", adapter=adapter_of(folder, run)).released
    assert [item.shape[1] for item in found] == [3, 2]


def test_the_products_matter_so_that_the_comparison_can_fail(
    exported: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    folder, (run, _) = exported
    adapter = read_adapter(adapter_of(folder, run))
    more = {
        name: value * 100 if name.endswith("lora_B") else value
        for name, value in adapter.tensors.items()
    }
    write_adapter(tmp_path / "more.onnx_adapter", Adapter(adapter.spec, more, adapter.decoder))
    with pytest.raises(ParityError, match="is not the model of"):
        verify(run, folder / "base.onnx", adapter=tmp_path / "more.onnx_adapter")


def test_an_adapter_is_held_to_a_tenth_of_what_other_exports_may_differ_by(
    exported: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    folder, (run, _) = exported
    adapter = read_adapter(adapter_of(folder, run))
    decoder = onnx.load_from_string(adapter.decoder)
    weights = {item.name: item for item in decoder.graph.initializer}
    (last,) = (node for node in decoder.graph.node if "logits" in node.output)
    for name in last.input[1:]:
        more = numpy_helper.to_array(weights[name]) * np.float32(1 + 3e-5)
        weights[name].CopyFrom(numpy_helper.from_array(more, name))
    faulty = Adapter(adapter.spec, adapter.tensors, decoder.SerializeToString())
    write_adapter(tmp_path / "more.onnx_adapter", faulty)
    with pytest.raises(ParityError, match="at most 1e-05 may be"):
        verify(run, folder / "base.onnx", adapter=tmp_path / "more.onnx_adapter")
    report = verify(run, folder / "base.onnx", adapter=adapter_of(folder, run))
    assert report.tolerances["relative_diff"] == 1e-5


def test_onnx_runtime_alone_puts_base_and_adapter_together(
    exported: tuple[Path, list[Path]],
) -> None:
    folder, made = exported
    base = onnxruntime.InferenceSession(folder / "base.onnx", providers=["CPUExecutionProvider"])
    for run in made:
        pixels, judge = logits_of_merged(run)
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(adapter_of(folder, run)))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        maps = base.run(None, {"pixels": pixels}, options)
        values = onnxruntime.AdapterFormat.read_adapter(str(adapter_of(folder, run))).get_parameters()
        decoder = onnxruntime.InferenceSession(values["decoder"].numpy().tobytes())
        names = [item.name for item in decoder.get_inputs()]
        feed = dict(zip([item.name for item in base.get_outputs()], maps, strict=True))
        (logits,) = decoder.run(None, {name: feed[name] for name in names})
        np.testing.assert_allclose(logits, judge, rtol=1e-4, atol=1e-5)


def test_the_base_is_of_no_task_so_that_later_runs_find_it(
    exported: tuple[Path, list[Path]], runs: Callable[..., Path], tmp_path: Path
) -> None:
    folder, (_, cloud) = exported
    onnx.checker.check_model(onnx.load(folder / "base.onnx"), full_check=True)
    export_adapters([cloud], tmp_path / "later")
    for name in ("base.onnx", "cloud.onnx_adapter", "cloud.parity.json"):
        assert (tmp_path / "later" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        export_adapters([cloud], tmp_path / "later")


def test_vectors_and_parts_of_the_attention_travel_in_an_adapter_too(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    parts = 'method.targets=["attn.q", "attn.v", "attn.proj"]'
    made = [
        runs("biases", "method.name=bitfit", *FEW),
        runs("parts", "method.name=rslora", "method.r=2", parts, *FEW),
    ]
    export_adapters(made, tmp_path / "adapters")
    for run in made:
        pixels, judge = logits_of_merged(run)
        adapter = adapter_of(tmp_path / "adapters", run)
        found = open_session(tmp_path / "adapters" / "base.onnx", adapter=adapter).run(pixels)
        np.testing.assert_allclose(found, judge, rtol=0, atol=1e-5 * np.abs(judge).max())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.name=full",), "no base to share"),
        (("method.name=ia3",), "matrix of rank .* Export it by itself"),
        (("method.name=vpt", "method.tokens=2"), "adds tokens or layers"),
        (("method.name=vit_adapter", "model.decoder_channels=[8, 8, 8]"), "adds tokens or layers"),
        (("model.tile=64",), "no common base: tile is (64 in one and 32|32 in one and 64)"),
    ],
)
def test_what_has_no_room_in_an_adapter_is_refused_before_anything_is_written(
    runs: Callable[..., Path], tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    odd = runs(overrides[0], *overrides, *FEW)
    for order in ([runs("flood"), odd], [odd, runs("flood")]):
        with pytest.raises(RecipeError, match=message):
            export_adapters(order, tmp_path / "adapters")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_change_becomes_a_product_of_its_own_rank(shape: tuple[int, int], rank: int) -> None:
    random = torch.Generator().manual_seed(1)
    tall = torch.randn(shape[0], rank, generator=random, dtype=torch.float64)
    wide = torch.randn(rank, shape[1], generator=random, dtype=torch.float64)
    a_IR, b_RO = low_rank(1e-3 * tall @ wide)
    assert a_IR.shape == (shape[1], rank)
    torch.testing.assert_close((a_IR @ b_RO).T, 1e-3 * tall @ wide, rtol=1e-9, atol=1e-12)


# Putting together --------------------------------------------------------------------------------


def test_an_adapter_for_another_base_is_refused_by_its_hash(
    exported: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    folder, (run, _) = exported
    other = onnx.load(folder / "base.onnx")
    other.doc_string = "the same to any runtime"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="was made for another base"):
        open_session(tmp_path / "other.onnx", adapter=adapter_of(folder, run))


def test_what_does_not_belong_together_is_said_in_one_line(
    exported: tuple[Path, list[Path]], pointwise: Any, tmp_path: Path
) -> None:
    folder, (run, _) = exported
    base, adapter = folder / "base.onnx", adapter_of(folder, run)
    (tmp_path / "junk.onnx_adapter").write_bytes(b"junk" * 100)
    whole = adapter.read_bytes()
    (tmp_path / "cut.onnx_adapter").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "altered.onnx_adapter").write_bytes(whole.replace(b"lora_A", b"lora\xff\xff"))
    options: list[tuple[str, dict[str, Any]]] = [
        ("none by itself.*--adapter", {"model": base}),
        ("no base that takes adapters", {"model": pointwise.path, "adapter": adapter}),
        ("is a RUN", {"model": run, "adapter": adapter}),
        ("leave --runtime openvino out", {"model": base, "adapter": adapter, "runtime": "openvino"}),
        ("does not exist", {"model": base, "adapter": tmp_path / "gone.onnx_adapter"}),
        ("no adapter of ONNX Runtime", {"model": base, "adapter": tmp_path / "junk.onnx_adapter"}),
        ("or not whole", {"model": base, "adapter": tmp_path / "cut.onnx_adapter"}),
        ("or not whole", {"model": base, "adapter": tmp_path / "altered.onnx_adapter"}),
    ]
    for message, given in options:
        with pytest.raises(ModelError, match=message) as error:
            open_session(**given)
        assert "\n" not in str(error.value)


def test_tensors_that_the_base_does_not_take_are_refused(
    exported: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    folder, (run, _) = exported
    adapter = read_adapter(adapter_of(folder, run))
    odd = {**adapter.tensors, "nothing.known": np.zeros(3, np.float32)}
    write_adapter(tmp_path / "odd.onnx_adapter", Adapter(adapter.spec, odd, adapter.decoder))
    with pytest.raises(ModelError, match=r"holds nothing\.known"):
        open_session(folder / "base.onnx", adapter=tmp_path / "odd.onnx_adapter")


def test_threads_and_callers_of_an_adapted_base_change_no_bit(
    exported: tuple[Path, list[Path]],
) -> None:
    folder, (run, _) = exported
    asked = {"adapter": adapter_of(folder, run), "device": "cpu"}
    alone, shared = (open_session(folder / "base.onnx", threads=n, **asked) for n in (1, 2))
    assert (alone.streams, shared.streams) == (1, 2)
    tiles = load_run(run).tiles.pixels
    pixels = np.resize(tiles, (9, *tiles.shape[1:]))
    judge = alone.run(pixels)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(shared.run, [pixels] * 6):
            np.testing.assert_array_equal(found, judge)


def on_gpu(base: Path) -> Base:
    """``base`` as on a GPU that computes what the processor does."""
    loaded = Base(base, device="cpu", threads=1)
    loaded.graph.device = "cuda"
    return loaded


def with_reference(path: Path, adapter: Adapter, text: str | None) -> Path:
    decoder = onnx.load_from_string(adapter.decoder)
    del decoder.metadata_props[:]
    if text:
        onnx.helper.set_model_props(decoder, {REFERENCE_KEY: text})
    write_adapter(path, Adapter(adapter.spec, adapter.tensors, decoder.SerializeToString()))
    return path


def test_an_adapter_keeps_real_tiles_and_what_its_run_gives_and_is_held_against_them_on_a_gpu(
    exported: tuple[Path, list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, made = exported
    base = on_gpu(folder / "base.onnx")
    for run in made:
        adapter = read_adapter(adapter_of(folder, run))
        assert adapter.reference is not None
        kept, tuned = Reference.from_text(adapter.reference, adapter.spec), load_run(run)
        with torch.inference_mode():
            judge = tuned.model(torch.from_numpy(kept.pixels)).numpy()[:, :, ::4, ::4]
        np.testing.assert_allclose(kept.outputs, judge, rtol=1e-3, atol=1e-4)
        assert base.session(adapter_of(folder, run)).device == "cuda"
        assert not caplog.records
        negative = Reference(kept.pixels, -kept.outputs).to_text()
        wrong = with_reference(tmp_path / "wrong.onnx_adapter", adapter, negative)
        with pytest.raises(ParityError, match=r"on this GPU: .* Take --device cpu\.$"):
            base.session(wrong)
        open_session(folder / "base.onnx", adapter=wrong, device="cpu").close()


def test_on_a_gpu_base_and_decoder_give_for_any_batch_what_they_give_on_the_processor(
    exported: tuple[Path, list[Path]],
) -> None:
    folder, made = exported
    base = on_gpu(folder / "base.onnx")
    for run in made:
        adapter = adapter_of(folder, run)
        there = base.session(adapter)
        here = open_session(folder / "base.onnx", adapter=adapter, device="cpu", threads=1)
        tiles = load_run(run).tiles.pixels
        for batch in (1, 3, 8):
            pixels = np.resize(tiles, (batch, *tiles.shape[1:]))
            np.testing.assert_allclose(there.run(pixels), here.run(pixels), rtol=1e-4, atol=1e-5)


def test_an_adapter_without_tiles_is_run_on_a_gpu_with_a_warning(
    exported: tuple[Path, list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, (run, _) = exported
    old = with_reference(tmp_path / "old.onnx_adapter", read_adapter(adapter_of(folder, run)), None)
    on_gpu(folder / "base.onnx").session(old)
    assert "old.onnx_adapter keeps no tiles to be tried on this GPU" in caplog.text


def test_inspect_tells_base_and_adapter(exported: tuple[Path, list[Path]]) -> None:
    folder, (run, _) = exported
    base, adapter = inspect(folder / "base.onnx"), inspect(adapter_of(folder, run))
    assert (base.kind, adapter.kind) == ("base", "adapter")
    assert base.sha256 in str(adapter)  # type: ignore[union-attr]


# Maps --------------------------------------------------------------------------------------------


def test_maps_name_their_adapter_and_another_one_starts_afresh(
    exported: tuple[Path, list[Path]], real_scene: Path, tmp_path: Path
) -> None:
    folder, made = exported
    base, (flood, cloud) = folder / "base.onnx", (adapter_of(folder, run) for run in made)
    place = tmp_path / "map.tif"
    report = predict(real_scene, base, place, options=PredictOptions(adapter=flood))
    with rasterio.open(place) as mapped:
        tags = mapped.tags()
        assert tags["GEODEPLOY_MODEL_SHA256"] == report.model_sha256
        assert tags["GEODEPLOY_BASE_SHA256"] == report.base_sha256 == inspect(base).sha256  # type: ignore[union-attr]
    assert f"adapter {report.model_sha256[:12]} on base" in str(report)
    export(made[0], tmp_path / "merged.onnx")
    options = PredictOptions(runtime="onnxruntime")
    predict(real_scene, tmp_path / "merged.onnx", tmp_path / "merged.tif", options=options)
    with rasterio.open(place) as one, rasterio.open(tmp_path / "merged.tif") as other:
        assert (one.read(1) == other.read(1)).mean() > 0.9999
    with pytest.raises(GeodeployError, match="exists"):
        predict(real_scene, base, place, options=PredictOptions(adapter=cloud))
    again = PredictOptions(adapter=cloud, overwrite=True)
    assert predict(real_scene, base, place, options=again).model_sha256 != report.model_sha256


def test_a_held_model_maps_with_many_adapters_at_once_and_keeps_few(
    exported: tuple[Path, list[Path]], small_scene: Path, tmp_path: Path
) -> None:
    folder, made = exported
    adapters = [adapter_of(folder, run) for run in made]
    judges = [
        predict(
            small_scene,
            folder / "base.onnx",
            tmp_path / f"judge{number}.tif",
            options=PredictOptions(adapter=adapter),
        )
        for number, adapter in enumerate(adapters)
    ]
    with Model(folder / "base.onnx", adapters=1, threads=1) as model:
        first = model.session(adapters[0])
        assert model.session(adapters[0]) is first
        with ThreadPoolExecutor(4) as pool:
            reports = list(
                pool.map(
                    lambda turn: model.predict(
                        small_scene, tmp_path / f"{turn}.tif", adapter=adapters[turn % 2]
                    ),
                    range(4),
                )
            )
        assert model.session(adapters[0]) is not first
        with pytest.raises(ModelError, match="name an adapter"):
            model.predict(small_scene, tmp_path / "none.tif")
    for turn, report in enumerate(reports):
        assert report.model_sha256 == judges[turn % 2].model_sha256
        assert (tmp_path / f"{turn}.tif").read_bytes() == judges[turn % 2].map.read_bytes()


def test_a_held_model_that_is_no_base_takes_no_adapter(
    exported: tuple[Path, list[Path]], pointwise: Any, small_scene: Path, tmp_path: Path
) -> None:
    with Model(pointwise.path) as model:
        report = model.predict(small_scene, tmp_path / "map.tif")
        assert report.base_sha256 is None
        with pytest.raises(ModelError, match="no base that takes adapters"):
            model.session(adapter_of(exported[0], exported[1][0]))


def test_an_adapter_is_scored_as_its_run_is(
    exported: tuple[Path, list[Path]], recipe_file: Path
) -> None:
    folder, (run, _) = exported
    image, labels = recipe_file.with_name("image.tif"), recipe_file.with_name("labels.tif")
    options = PredictOptions(adapter=adapter_of(folder, run))
    found = evaluate(folder / "base.onnx", image, labels, options=options)
    assert found.miou == pytest.approx(evaluate(run, image, labels).miou, abs=1e-3)
