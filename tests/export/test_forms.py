"""Other forms than one ONNX file: Triton's own schema reads its config, PyTorch runs its program."""

import json
import stat
import zipfile
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from geodeploy.errors import ModelError, OutputError, ParityError, RecipeError
from geodeploy.export import export, verify
from geodeploy.export.options import ExportOptions
from geodeploy.export.program import trace, write_program
from geodeploy.spec import ModelSpec
from geodeploy.train.run import load_run

Tune = Callable[..., Path]
TRITON, PROGRAM = ExportOptions(to="triton"), ExportOptions(to="torch-export")
FILES = [
    "1/model.onnx",
    "1/model.parity.json",
    "1/model.stac.json",
    "config.pbtxt",
    "labels.txt",
    "warmup/tile",
]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def repository(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A RUN, and a repository with its model `clouds`."""
    folder = tmp_path_factory.mktemp("triton") / "models"
    export(tune(), folder / "clouds", options=TRITON)
    return tune(), folder


@pytest.fixture
def config(repository: tuple[Path, Path]) -> Any:
    """What Triton's schema makes of the config."""
    package = find_spec("tritonclient")
    if package is None or package.origin is None:
        pytest.skip("needs tritonclient: pip install --no-deps tritonclient==2.73.0")
    from google.protobuf import text_format

    # By its path: the package around it wants gRPC.
    schema = spec_from_file_location("schema", Path(package.origin).parent / "grpc/model_config_pb2.py")
    assert schema is not None
    assert schema.loader is not None
    module = module_from_spec(schema)
    schema.loader.exec_module(module)
    text = (repository[1] / "clouds" / "config.pbtxt").read_text()
    return text_format.Parse(text, module.ModelConfig())


def test_triton_reads_from_the_config_what_the_graph_takes_and_gives(
    config: Any, repository: tuple[Path, Path]
) -> None:
    session = onnxruntime.InferenceSession(
        repository[1] / "clouds" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert (config.name, config.backend, config.max_batch_size) == ("clouds", "onnxruntime", 8)
    for told, values in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        (one,), (value,) = told, values
        assert (one.name, list(one.dims)) == (value.name, value.shape[1:])
        assert one.DESCRIPTOR.fields_by_name["data_type"].enum_type.values[one.data_type].name == (
            "TYPE_FP32"
        )
    assert config.HasField("dynamic_batching")
    assert config.output[0].label_filename == "labels.txt"


def test_the_warm_up_is_a_real_tile_alone_and_in_a_whole_batch(
    config: Any, repository: tuple[Path, Path]
) -> None:
    run, folder = repository
    assert [request.batch_size for request in config.model_warmup] == [1, config.max_batch_size]
    for request in config.model_warmup:
        told = request.inputs["pixels"]
        stored = np.fromfile(folder / "clouds" / "warmup" / told.input_data_file, "<f4")
        np.testing.assert_array_equal(stored.reshape(told.dims), load_run(run).tiles.pixels[0])


def test_the_folder_is_whole_and_others_may_read_it(repository: tuple[Path, Path]) -> None:
    run, folder = repository
    assert [item.name for item in folder.iterdir()] == ["clouds"]
    assert sorted(contents(folder / "clouds")) == FILES
    assert (folder / "clouds" / "labels.txt").read_text().split() == ["clear", "cloud", "cirrus"]
    modes = [path.stat().st_mode for path in [folder / "clouds", *(folder / "clouds").rglob("*")]]
    assert all(mode & stat.S_IROTH for mode in modes)
    assert verify(run, folder / "clouds" / "1" / "model.onnx").released


def test_a_model_in_the_repository_is_replaced_only_when_told_and_by_the_same_bytes(
    repository: tuple[Path, Path], tmp_path: Path
) -> None:
    run, folder = repository
    before = contents(folder / "clouds")
    with pytest.raises(OutputError, match="exists already"):
        export(run, folder / "clouds", options=TRITON)
    export(run, folder / "clouds", overwrite=True, options=TRITON)
    assert contents(folder / "clouds") == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="exists already"):  # no model of Triton's
        export(run, tmp_path / "mine", overwrite=True, options=TRITON)


def test_the_program_runs_in_pytorch_alone_and_gives_the_logits(tune: Tune, tmp_path: Path) -> None:
    run = tune()
    path = tmp_path / "model.pt2"
    assert export(run, path, options=PROGRAM).runtime.startswith("torch.export ")
    files = {"geodeploy.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    tuned = load_run(run)
    for batch in (1, 2, 5):
        pixels = torch.from_numpy(np.resize(tuned.tiles.pixels, (batch, *tuned.tiles.pixels.shape[1:])))
        with torch.inference_mode():
            torch.testing.assert_close(program(pixels), tuned.model(pixels), rtol=1e-4, atol=1e-5)
    spec = ModelSpec.from_json(files["geodeploy.json"], source="test")
    assert spec.model_copy(update={"parity": None}) == tuned.spec
    item = json.loads((tmp_path / "model.stac.json").read_text())
    assert item["assets"]["model"]["mlm:artifact_type"] == "torch.export.save"
    assert str(Path.cwd()).encode() not in path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data/sample_inputs/model.pt") == b""  # the one place for a pickle
    assert verify(run, path).released
    export(run, tmp_path / "again.pt2", options=PROGRAM)
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()
    with pytest.raises(ParityError, match="is not the model of"):
        verify(tune("method.name=linear"), path)


def test_a_program_that_cannot_be_compared_is_told_in_one_line(
    tune: Tune, make_spec: Callable[..., ModelSpec], tmp_path: Path
) -> None:
    spec, path = make_spec(("red", "nir"), (0, 1), tile=16, overlap=4), tmp_path / "other.pt2"
    write_program(trace(torch.nn.Conv2d(2, 2, 1), spec), spec, path)
    with pytest.raises(ParityError, match="has other bands, classes or tiles than the RUN"):
        verify(tune(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"other\.pt2 is no program that torch\.export") as caught:
        verify(tune(), path)
    assert "\n" not in str(caught.value)


def test_what_the_forms_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave --to triton out"):
        export("run", tmp_path / "a", options=ExportOptions(to="triton", profile="deepness"))
    with pytest.raises(OutputError, match=r"ends in \.pt2"):
        export("run", tmp_path / "a.onnx", options=PROGRAM)
    (tmp_path / "other.stac.json").touch()
    for name, form in (("other.onnx", ExportOptions()), ("other.pt2", PROGRAM)):
        with pytest.raises(OutputError, match=r"other\.stac\.json exists"):
            export("run", tmp_path / name, options=form)
    (tmp_path / "other.stac.json").unlink()
    for name in ("a", "a.pt2", "a.ONNX"):
        with pytest.raises(OutputError, match=r"the name of an ONNX file ends in \.onnx"):
            export("run", tmp_path / name)
    assert not list(tmp_path.iterdir())
