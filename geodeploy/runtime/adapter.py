"""The base of several models, and the adapters that make a model of it: in ONNX Runtime.

A base ends in the maps that decoders take. Beside the pixels it takes the low-rank products and other
tensors of a task. An adapter holds those tensors, and the task's decoder as a graph of its own: weights
of convolutions that may change from run to run cost ONNX Runtime a fifth of its speed. It is a file in
ONNX Runtime's own format, which has room for tensors alone; description and decoder are two of bytes.
The decoder's metadata keeps the tiles that the whole is held against on a GPU: a third tensor of bytes
would have to be an input of the base, and so make another base.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import ModelError
from geodeploy.machine import usable_cores
from geodeploy.runtime import Device, Session, hold
from geodeploy.runtime.bound import even_batch
from geodeploy.runtime.graph import (
    OnnxFile,
    check_outputs,
    check_signature,
    from_graph,
    metadata_of,
    read_base,
    to_graph,
)
from geodeploy.runtime.onnx import Graph, import_onnxruntime
from geodeploy.runtime.streams import TILES, Streams
from geodeploy.spec import METADATA_KEY, REFERENCE_KEY, ModelSpec

SUFFIX = ".onnx_adapter"
DESCRIPTION, DECODER = METADATA_KEY, "decoder"
"""Names of the tensors of bytes. A base takes them too, as ONNX Runtime asks, and ignores them."""

_SETTINGS = {"session.force_spinning_stop": "1"}
"""The threads of base and decoder take turns, and are not to wait for work in each other's way."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What makes a base one of its models."""

    spec: ModelSpec
    tensors: Mapping[str, NDArray[np.float32]]
    """What the base takes beside the pixels, by the names of its inputs."""
    decoder: bytes
    """The graph from the base's outputs to logits."""

    @property
    def reference(self) -> str | None:
        """As `OnnxFile.reference`: of the base with this adapter."""
        return metadata_of(self.decoder).get(REFERENCE_KEY)


def read_adapter(path: Path) -> Adapter:
    """The adapter in ``path``, whole in memory.

    Raises:
        ModelError: it cannot be read, is no adapter, or does not say what it is.
        SpecError: its description is broken or newer than this program.
    """
    ort = import_onnxruntime()
    if not path.is_file():
        raise ModelError(
            f"The adapter {path} does not exist. `geodeploy export --adapters` makes them."
        )
    try:
        values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        # Copies: the values lie in memory that goes with the adapter.
        tensors = {name: np.array(value.numpy()) for name, value in values.items()}
    except (RuntimeError, ValueError) as error:  # ONNX Runtime checks sizes and offsets, Python names
        raise ModelError(
            f"{path} is no adapter of ONNX Runtime, or not whole. Make it again with "
            "`geodeploy export --adapters`."
        ) from error
    missing = [name for name in (DESCRIPTION, DECODER) if name not in tensors]
    if missing:
        raise ModelError(
            f"{path} has no {' and no '.join(missing)}, so it is no adapter of geodeploy. Make it with "
            "`geodeploy export --adapters`."
        )
    text, decoder = (tensors.pop(name).tobytes() for name in (DESCRIPTION, DECODER))
    return Adapter(ModelSpec.from_json(text, source=str(path)), tensors, decoder)


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write ``adapter`` to ``path``; the same one gives the same bytes."""
    ort = import_onnxruntime()
    texts = {DESCRIPTION: adapter.spec.to_json().encode(), DECODER: adapter.decoder}
    arrays = {
        **adapter.tensors,
        **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()},
    }
    values = {
        # Their order is that of the file.
        name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(arrays[name]))
        for name in sorted(arrays)
    }
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters(values)
    form.export_adapter(str(path))


class Base:
    """The base of several models, loaded once. They share it, and any of them may run at any time.

    Raises:
        ModelError: the file is no base, or cannot be loaded.
        DeviceError: the device asked for is not there.
    """

    def __init__(
        self, path: Path, *, device: Device, threads: int | None, batch: int | None = None
    ) -> None:
        file = read_base(path)
        self.sha256 = file.sha256
        tiles = 1 if device == "cuda" else batch or TILES  # a GPU takes all tiles at once
        self._streams = Streams(threads or usable_cores(), tiles)
        self._device, self._threads = device, self._streams.threads
        self.graph = Graph(path, file.content, device=device, threads=self._threads, settings=_SETTINGS)

    def session(self, path: Path) -> Session:
        """The model that the adapter at ``path`` makes of the base.

        Raises:
            ModelError: it is no adapter, or was made for another base.
            ParityError: on this GPU the two do not do what the tuned model does.
            SpecError: its description is broken or newer than this program.
        """
        adapter = read_adapter(path)
        wanted = adapter.spec.base_sha256 or "none"
        if wanted != self.sha256:
            raise ModelError(
                f"{path} was made for another base (sha256 {wanted[:12]}) than {self.graph.path} "
                f"({self.sha256[:12]}). Name the base that it was exported with."
            )
        if unknown := sorted(adapter.tensors.keys() - self.graph.optional):
            raise ModelError(
                f"{path} holds {unknown[0]}, which {self.graph.path} does not take. Export both again."
            )
        decoder = Graph(
            path, adapter.decoder, device=self._device, threads=self._threads, settings=_SETTINGS
        )
        file = OnnxFile(path, adapter.decoder, adapter.spec, reference=adapter.reference)
        return hold(file, lambda _: AdaptedSession(path, adapter, self.graph, decoder, self._streams))


class AdaptedSession:
    """A base with one adapter. See `geodeploy.runtime.Session`."""

    def __init__(
        self, path: Path, adapter: Adapter, base: Graph, decoder: Graph, shared: Streams
    ) -> None:
        self.spec = adapter.spec
        self.name = base.name
        self.device = base.device
        self.precision = adapter.spec.precision
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.streams = shared.number if self.device == "cpu" else 1
        self._streams = shared
        self._path = path
        self._tensors = {name: base.value(value) for name, value in adapter.tensors.items()}
        self._base, self._decoder = base, decoder
        self._maps = [value.name for value in decoder.inputs]
        told = OnnxFile(path, adapter.decoder, adapter.spec)
        self._signature = check_signature(told, base.inputs, decoder.outputs, float32="float")

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs (B, K, tile, tile) of pixels (B, C, tile, tile)."""
        batch = even_batch(len(pixels)) if self.device == "cuda" else None
        (tiles,) = to_graph(pixels, self.spec, batch)
        shares = [tiles] if self.device == "cuda" else self._streams.shares(tiles)
        return from_graph(self._streams.each(self._call, shares), self.spec, len(pixels))

    def _call(self, tiles: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outputs of ``tiles``, both as the graphs have them; checked."""
        feed = {self._signature.input: self._base.value(tiles), **self._tensors}
        maps = self._base.run(self._maps, feed)
        (outputs,) = self._decoder.run(
            [self._signature.output], dict(zip(self._maps, maps, strict=True))
        )
        logits: NDArray[np.float32] = outputs.numpy().copy()  # else it may lie in what goes with them
        check_outputs(self._path, self.spec, tiles, logits)
        return logits

    def close(self) -> None:
        """Give back what is not the base's."""
        del self._decoder, self._tensors
