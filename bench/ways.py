"""Ways to map a scene with one small network; `peers.py` runs each in a process of its own.

    python bench/ways.py WAY SCENE MODEL.onnx OUTPUT

Every way cuts tiles of 224 pixels every 192, and runs the same weights: ONNX Runtime those of the ONNX
file, PyTorch those of the ``.npz`` beside it. A JSON file beside OUTPUT tells of the wall and CPU
seconds after the imports, loading the model included, and of the peak of the resident memory.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TILE, STRIDE, BATCH = 224, 192, 16
CLASSES, NODATA = 4, 255
MEANS = (0.09, 0.08, 0.07, 0.21, 0.14, 0.08)
STDS = (0.03, 0.03, 0.03, 0.04, 0.05, 0.04)
"""Of the sample scene's bands, in reflectance."""
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Stages = dict[str, float]
"""Seconds of what is worth telling apart."""


def main() -> None:
    """Import, map, report."""
    name, scene, model, output = sys.argv[1:]
    way = WAYS[name]
    for module in way.modules:
        importlib.import_module(module)
    imported_kib, begun, begun_cpu = resident_kib("VmRSS"), time.perf_counter(), cpu_seconds()
    stages = way.run(Path(scene), Path(model), Path(output))
    report = {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": cpu_seconds() - begun_cpu,
        "peak_mib": resident_kib("VmHWM") / 1024,
        "imported_mib": imported_kib / 1024,
        "stages": stages,
    }
    Path(output).with_suffix(".json").write_text(json.dumps(report), encoding="utf-8")


def run_geodeploy(scene: Path, model: Path, output: Path) -> Stages:
    """`geodeploy.predict` as it is, blending with cosine weights; a COG with overviews."""
    from geodeploy import PredictOptions, predict

    options = PredictOptions(overwrite=True, overlap=TILE - STRIDE)
    report = predict(scene, model, output, options=options)
    return {f"busy {stage}": share for stage, share in report.busy.model_dump().items()}


def run_terratorch_predict(scene: Path, model: Path, output: Path) -> Stages:
    """TerraTorch's trainer, data module and writer, as its command line puts them together."""
    import torch
    from terratorch.cli_tools import CustomWriter, MyTrainer
    from terratorch.datamodules import GenericNonGeoSegmentationDataModule
    from terratorch.tasks import SemanticSegmentationTask

    torch.set_num_threads(THREADS)
    means, stds = stored_statistics(scene)
    task = SemanticSegmentationTask(
        model=terratorch_model(model),
        model_args={"num_classes": CLASSES},
        tiled_inference_parameters={"crop": TILE, "stride": STRIDE, "delta": 8, "batch_size": BATCH},
    )
    data = GenericNonGeoSegmentationDataModule(
        batch_size=1,
        num_workers=0,
        num_classes=CLASSES,
        predict_data_root=scene.parent,
        img_grep=scene.name,
        label_grep=scene.name,
        means=means,
        stds=stds,
    )
    trainer = MyTrainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[CustomWriter(write_interval="batch")],
    )
    trainer.predict_output_dir, trainer.out_dtype = str(output.parent), "int16"
    trainer.output_file_prefix = output.stem
    trainer.predict(model=task, datamodule=data)
    (written,) = output.parent.glob(f"{output.stem}_*.tif")
    written.replace(output)
    return {}


def run_terratorch_pieces(scene: Path, model: Path, output: Path) -> Stages:
    """TerraTorch's own reading, tiled inference and saving, called one after the other."""
    import torch
    from terratorch.cli_tools import save_prediction
    from terratorch.datasets import GenericNonGeoSegmentationDataset
    from terratorch.tasks.tiled_inference import tiled_inference

    torch.set_num_threads(THREADS)
    network, stages = torch_network(model), {}
    means, stds = (torch.tensor(values).reshape(-1, 1, 1) for values in stored_statistics(scene))
    with timed(stages, "read"):
        dataset = GenericNonGeoSegmentationDataset(scene.parent, CLASSES, image_grep=scene.name)
        pixels, _ = dataset._load_file(scene)
        pixels = torch.from_numpy(pixels.to_numpy()).sub_(means).div_(stds)
    with timed(stages, "tiled inference"):
        logits = tiled_inference(
            network, pixels[None], crop=TILE, stride=STRIDE, delta=8, batch_size=BATCH
        )
    with timed(stages, "argmax"):
        classes = logits.argmax(dim=1)[0]
    with timed(stages, "save"):
        save_prediction(
            classes, str(scene), str(output.parent), suffix="x", output_file_name=output.stem
        )
    output.with_name(f"{output.stem}_x.tif").replace(output)
    return stages


def run_torchgeo(scene: Path, model: Path, output: Path) -> Stages:
    """TorchGeo's data set and grid sampler, PyTorch's loader; the map in memory, the last tile wins."""
    import numpy as np
    import rasterio
    import torch
    from torch.utils.data import DataLoader
    from torchgeo.datasets import RasterDataset, stack_samples
    from torchgeo.samplers import GridGeoSampler

    torch.set_num_threads(THREADS)
    network = torch_network(model)
    means, stds = (torch.tensor(values).reshape(-1, 1, 1) for values in stored_statistics(scene))
    with rasterio.open(scene) as source:
        profile, transform = source.profile, source.transform
    dataset = RasterDataset(str(scene))
    sampler = GridGeoSampler(dataset, size=TILE, stride=STRIDE)
    loader = DataLoader(dataset, BATCH, sampler=sampler, collate_fn=stack_samples)
    classes = np.full((profile["height"], profile["width"]), NODATA, np.uint8)
    for batch in loader:
        with torch.inference_mode():
            found = network((batch["image"] - means) / stds).argmax(dim=1).to(torch.uint8).numpy()
        for tile, (x, y, _) in zip(found, batch["bounds"], strict=True):
            # The grid hangs on the lower left corner, and its last tiles reach beyond the raster.
            col, row = (round(place) for place in ~transform @ (x.start, y.stop))
            above = max(-row, 0)
            place = classes[row + above : row + TILE, col : col + TILE]
            place[:] = tile[above : above + place.shape[0], : place.shape[1]]
    with rasterio.open(output, "w", **map_profile(profile)) as target:
        target.write(classes, 1)
    return {}


def run_loop(scene: Path, model: Path, output: Path) -> Stages:
    """What a user writes first: a window, the model, the window's classes into the file."""
    import numpy as np
    import rasterio
    from rasterio.windows import Window

    session = onnx_session(model)
    with (
        rasterio.open(scene) as source,
        rasterio.open(output, "w", **map_profile(source.profile)) as target,
    ):
        scale, offset = (np.float32(values[0]) for values in (source.scales, source.offsets))
        for row in starts(source.height):
            for col in starts(source.width):
                window = Window(col, row, TILE, TILE)
                pixels = source.read(window=window).astype(np.float32) * scale + offset
                (logits,) = session.run(None, {"pixels": pixels[None]})
                target.write(logits[0].argmax(axis=0).astype(np.uint8), 1, window=window)
    return {}


def run_prototype(scene: Path, model: Path, output: Path) -> Stages:
    """The least a streaming engine does: rows of tiles read ahead, overlaps cut, no checks."""
    import numpy as np
    import rasterio
    from rasterio.windows import Window

    session, edge = onnx_session(model), (TILE - STRIDE) // 2
    with (
        rasterio.Env(GDAL_CACHEMAX=160 * 2**20),
        rasterio.open(scene) as source,
        rasterio.open(output, "w", **map_profile(source.profile)) as target,
        ThreadPoolExecutor(1) as reader,
    ):
        height, width = source.shape
        scale, offset = (np.float32(values[0]) for values in (source.scales, source.offsets))
        rows, cols = starts(height), starts(width)

        def read(row: int) -> Any:
            return source.read(window=Window(0, row, width, TILE))

        ahead = reader.submit(read, rows[0])
        for row, following in zip(rows, [*rows[1:], height], strict=True):
            stored = ahead.result()
            if following < height:
                ahead = reader.submit(read, following)
            strip = np.empty((TILE, width), np.uint8)
            for first in range(0, len(cols), BATCH):
                places = cols[first : first + BATCH]
                pixels = np.empty((len(places), len(stored), TILE, TILE), np.float32)
                for tile, col in zip(pixels, places, strict=True):
                    np.multiply(stored[:, :, col : col + TILE], scale, out=tile)
                pixels += offset
                (logits,) = session.run(None, {"pixels": pixels})
                for classes, col in zip(best(logits), places, strict=True):
                    left = edge if col else 0
                    strip[:, col + left : col + TILE] = classes[:, left:]
            top, bottom = (edge if row else 0), min(following + edge, height) - row
            target.write(strip[top:bottom], 1, window=Window(0, row + top, width, bottom - top))
    return {}


def best(logits: Any) -> Any:
    """Classes (B, H, W) of logits (B, K, H, W): several times faster than argmax along that axis."""
    import numpy as np

    highest, classes = logits[:, 0].copy(), np.zeros((len(logits), TILE, TILE), np.uint8)
    for value in range(1, logits.shape[1]):
        better = logits[:, value] > highest
        np.copyto(highest, logits[:, value], where=better)
        classes[better] = value
    return classes


def starts(length: int) -> list[int]:
    """Where tiles begin; the last one slides back inside."""
    return [*range(0, length - TILE, STRIDE), length - TILE]


def map_profile(scene: dict[str, Any]) -> dict[str, Any]:
    """Of a tiled, deflated GeoTIFF of classes."""
    return {
        "driver": "GTiff", "dtype": "uint8", "count": 1, "nodata": NODATA, "tiled": True,
        "height": scene["height"], "width": scene["width"], "crs": scene["crs"],
        "transform": scene["transform"], "blockxsize": 512, "blockysize": 512, "compress": "deflate",
    }  # fmt: skip


def stored_statistics(scene: Path) -> tuple[list[float], list[float]]:
    """Means and standard deviations in the scene's stored numbers: no peer applies scale and offset."""
    import rasterio

    with rasterio.open(scene) as source:
        scale, offset = source.scales[0], source.offsets[0]
    return [(mean - offset) / scale for mean in MEANS], [std / scale for std in STDS]


def onnx_session(model: Path) -> Any:
    """ONNX Runtime on the usable cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def torch_network(model: Path) -> Any:
    """The weights beside ``model`` in PyTorch, taking normalised pixels."""
    import numpy as np
    import torch
    from torch import nn

    weights = {
        name: torch.from_numpy(value) for name, value in np.load(model.with_suffix(".npz")).items()
    }
    shapes = [value.shape for name, value in weights.items() if name.endswith("weight")]
    layers: list[nn.Module] = []
    for made, taken, *_ in shapes:
        layers += [nn.Conv2d(taken, made, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers[:-1]).eval()
    network.load_state_dict(weights)
    return network


def terratorch_model(model: Path) -> Any:
    """`torch_network` with the kind of output that TerraTorch's tasks take."""
    from terratorch.models.model import ModelOutput
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch_network(model)

        def forward(self, pixels: Any) -> Any:
            return ModelOutput(self.network(pixels))

    return Model()


class timed:  # noqa: N801
    """Note the seconds of a stage."""

    def __init__(self, stages: Stages, name: str) -> None:
        self._stages, self._name = stages, name

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stages[self._name] = time.perf_counter() - self._begun


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def resident_kib(key: str) -> int:
    """Resident memory of this process: VmRSS now, VmHWM at most.

    Not ru_maxrss, which counts what the parent process held when this one began.
    """
    lines: Iterator[str] = iter(Path("/proc/self/status").read_text().splitlines())
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    title: str
    run: Callable[[Path, Path, Path], Stages]
    modules: tuple[str, ...]
    """What is imported before the clock starts."""
    peer: bool = False
    """Whether it needs the peers' environment."""


_OURS = ("numpy", "rasterio", "onnxruntime")
_TERRATORCH = ("terratorch.cli_tools", "terratorch.tasks", "terratorch.datamodules")
WAYS = {
    "geodeploy": Way(
        "geodeploy `predict`, blending, COG with overviews",
        run_geodeploy,
        ("geodeploy.predict", "geodeploy.runtime.onnx", "onnxruntime"),
    ),
    "terratorch-predict": Way("TerraTorch `predict`", run_terratorch_predict, _TERRATORCH, peer=True),
    "terratorch-pieces": Way(
        "TerraTorch's pieces by hand: read, `tiled_inference`, argmax, save",
        run_terratorch_pieces,
        _TERRATORCH,
        peer=True,
    ),
    "torchgeo": Way(
        "TorchGeo `GridGeoSampler` with a `DataLoader`, no blending",
        run_torchgeo,
        ("torchgeo.datasets", "torchgeo.samplers"),
        peer=True,
    ),
    "loop": Way(
        "a plain loop, rasterio and onnxruntime, no blending", run_loop, ("rasterio", "onnxruntime")
    ),
    "prototype": Way(
        "the least streaming engine, rasterio and onnxruntime, no blending",
        run_prototype,
        ("rasterio", "onnxruntime"),
    ),
}


if __name__ == "__main__":
    main()
