"""An ONNX file before a runtime takes it, and what is done with its pixels whatever runs it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import ModelError, SpecError
from geodeploy.spec import (
    BASE_KEY,
    METADATA_KEY,
    REFERENCE_KEY,
    BaseSpec,
    Layout,
    ModelSpec,
)

# Numbers of the fields in https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_GRAPH, _METADATA_PROPS = 7, 14
_NODE, _INITIALIZER, _INPUT = 1, 5, 11
_INPUT_NAME, _TENSOR_NAME = 1, 8
_ATTRIBUTE, _TENSOR, _SUBGRAPH = 5, 5, 6
_EXTERNAL_DATA = 13
_KEY, _VALUE = 1, 2


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What is in an ONNX file, and what it says of itself or a file beside it says of it."""

    path: Path
    content: bytes
    spec: ModelSpec
    weights: tuple[Path, ...] = ()
    """Files beside it that hold weights, as those of models above 2 GB do."""
    reference: str | None = None
    """Tiles and what the tuned model gives for them, as `geodeploy.runtime.reference` reads them."""

    @property
    def sha256(self) -> str:
        """Of the content, and of what the files of weights hold."""
        whole = hashlib.sha256(self.content)
        for path in self.weights:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class OnnxBase:
    """What is in an ONNX file that is a model only with an adapter."""

    path: Path
    content: bytes
    spec: BaseSpec

    @property
    def sha256(self) -> str:
        """Of the content."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a graph, as a runtime reports it."""

    name: str
    shape: Sequence[int | str | None]
    """A name or None stands for any size."""
    dtype: str


@dataclass(frozen=True, slots=True)
class Signature:
    """How a graph is called."""

    input: str
    output: str
    batch: int | None
    """Tiles that the graph takes at once; None for any number."""


def read_onnx(path: Path) -> OnnxFile:
    """The file at ``path`` with its description.

    Raises:
        ModelError: it cannot be read, is no ONNX file, or is a base that needs an adapter.
        SpecError: its description is absent, broken or newer than this program.
    """
    content, weights, metadata = _read(path)
    if BASE_KEY in metadata:
        raise ModelError(
            f"{path} is the base of several models and none by itself. Name one of them with "
            "--adapter FILE.onnx_adapter."
        )
    text, reference = metadata.get(METADATA_KEY), metadata.get(REFERENCE_KEY)
    if text is not None:
        spec = ModelSpec.from_json(text, source=str(path))
        return OnnxFile(path, content, spec, weights, reference)
    beside = path.with_suffix(".spec.json")
    if not beside.exists():
        raise SpecError(
            f"{path} does not say which bands and classes it has. Export it with `geodeploy export`, "
            f"or describe it in {beside.name} beside it: JSON with name, tile, overlap, bands (name, "
            "mean, std, valid_range), classes (value, name, color) or, with task regression, targets "
            "(name, unit), and where needed task, normalise, layout, output."
        )
    return OnnxFile(path, content, ModelSpec.read(beside), weights)


def is_base(path: Path) -> bool:
    """Whether the file at ``path`` is a model only with an adapter.

    Raises:
        ModelError: it cannot be read, or is no ONNX file.
    """
    return BASE_KEY in _read(path)[2]


def read_base(path: Path) -> OnnxBase:
    """The base at ``path``.

    Raises:
        ModelError: it cannot be read, or is no base.
        SpecError: its description is broken or newer than this program.
    """
    content, _, metadata = _read(path)
    if BASE_KEY not in metadata:
        raise ModelError(f"{path} is no base that takes adapters: leave --adapter out.")
    return OnnxBase(path, content, BaseSpec.from_json(metadata[BASE_KEY], source=str(path)))


def _read(path: Path) -> tuple[bytes, tuple[Path, ...], dict[str, str]]:
    """What is in an ONNX file, the files of its weights, and its metadata."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"The model {path} cannot be read ({error.strerror}).") from error
    try:
        metadata = metadata_of(content)
        weights = tuple(path.parent / name for name in _external_files(content))
    except ValueError as error:
        raise ModelError(
            f"{path} is not an ONNX model that can be read ({error}). Export it again, or check that "
            "the file is whole."
        ) from error
    for file in weights:
        if not file.is_file():
            raise ModelError(
                f"{path} keeps its weights in {file.name}, which is not beside it. Keep them together."
            )
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise ModelError(
                f"{path} keeps its weights in {file.name}, a link to another folder, which runtimes do "
                "not follow. Copy both into one folder: cp -L."
            )
    return content, weights, metadata


def check_signature(
    file: OnnxFile, inputs: Sequence[Value], outputs: Sequence[Value], *, float32: str
) -> Signature:
    """The one input and output of the graph, whose shapes must be what the description says.

    ``float32`` is what the runtime calls that type.
    """
    spec = file.spec
    for what, values, shape in (("input", inputs, input_shape), ("output", outputs, output_shape)):
        if len(values) != 1:
            raise ModelError(f"{file.path} has {len(values)} {what}s, exactly one is needed.")
        (value,) = values
        needed = shape(spec)
        if not _fits(value.shape, needed):
            others = [
                layout
                for layout in get_args(Layout)
                if _fits(value.shape, shape(spec.model_copy(update={"layout": layout})))
            ]
            advice = "Mend the description"
            if others:
                advice = f'Write "layout": "{others[0]}" in the description'
            raise ModelError(
                f"{file.path}: the {what} {value.name} has shape {list(value.shape)}, its description "
                f"says (batch, {', '.join(map(str, needed))}). {advice}, or export the model again."
            )
        if value.dtype != float32:
            raise ModelError(
                f"{file.path}: the {what} {value.name} is {value.dtype}, float32 is needed."
            )
    batch = inputs[0].shape[0]
    return Signature(inputs[0].name, outputs[0].name, batch if isinstance(batch, int) else None)


def input_shape(spec: ModelSpec) -> list[int]:
    """Of one tile as the graph takes it."""
    side = [spec.tile, spec.tile]
    if spec.layout == "NCTHW":
        return [len(spec.bands), spec.timesteps, *side]
    return [*side, len(spec.planes)] if spec.layout == "NHWC" else [len(spec.planes), *side]


def output_shape(spec: ModelSpec) -> list[int]:
    """Of one tile as the graph returns it."""
    side, outputs = [spec.tile, spec.tile], len(spec.outputs)
    if spec.whole_tiles:
        return [outputs]
    return [*side, outputs] if spec.layout == "NHWC" else [outputs, *side]


def to_graph(
    pixels: NDArray[np.float32], spec: ModelSpec, batch: int | None
) -> list[NDArray[np.float32]]:
    """``pixels`` (B, planes, tile, tile) as the graph takes them, in arrays of ``batch`` tiles each.

    The last is filled up with its last tile. None for ``batch`` makes one array.
    """
    if spec.normalise:
        pixels = (pixels - _per_band([band.mean for band in spec.planes])) / _per_band(
            [band.std for band in spec.planes]
        )
    if spec.input_range:
        low, high = spec.input_range
        pixels = (pixels - np.float32(low)) / np.float32(high - low)
    if spec.layout == "NHWC":
        pixels = np.moveaxis(pixels, 1, 3)
    elif spec.layout == "NCTHW":
        dates = pixels.reshape(len(pixels), spec.timesteps, len(spec.bands), *pixels.shape[2:])
        pixels = dates.swapaxes(1, 2)
    if surplus := -len(pixels) % (batch or 1):
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], surplus, axis=0)])
    pixels = np.ascontiguousarray(pixels)
    return [pixels] if batch is None else list(pixels.reshape(-1, batch, *pixels.shape[1:]))


def from_graph(
    outputs: Sequence[NDArray[np.float32]], spec: ModelSpec, tiles: int
) -> NDArray[np.float32]:
    """The outputs (B, K, tile, tile) or (B, K) of as many ``tiles``, of what the graph returned."""
    whole = (outputs[0] if len(outputs) == 1 else np.concatenate(outputs))[:tiles]
    last = spec.layout == "NHWC" and not spec.whole_tiles
    return np.ascontiguousarray(np.moveaxis(whole, 3, 1)) if last else whole


def check_outputs(
    model: Path, spec: ModelSpec, pixels: NDArray[np.float32], outputs: NDArray[np.float32]
) -> None:
    """Refuse what is not a value for each output, and each pixel but of whole tiles.

    Raises:
        ModelError: ``outputs`` has another shape.
    """
    expected = [len(pixels), *output_shape(spec)]
    if list(outputs.shape) != expected:
        raise ModelError(
            f"{model} returned {list(outputs.shape)} for {list(pixels.shape)}, {expected} is needed: a "
            f"value for each class or target{'' if spec.whole_tiles else ', and pixel'}."
        )


def metadata_of(content: bytes) -> dict[str, str]:
    """The pairs of key and value in an ONNX file, read without a runtime.

    Raises:
        ValueError: it is no ONNX file.
    """
    found, has_graph = {}, False
    for number, value in _fields(memoryview(content)):
        has_graph |= number == _GRAPH
        if number == _METADATA_PROPS:
            pair = dict(_fields(value))
            found[_text(pair.get(_KEY))] = _text(pair.get(_VALUE))
    if not has_graph:
        raise ValueError("it holds no graph")
    return found


def input_names(content: bytes) -> list[str]:
    """The inputs of the graph in an ONNX file that have no value of their own."""
    (graph,) = _values(memoryview(content), _GRAPH)
    given = {_text(dict(_fields(tensor)).get(_TENSOR_NAME)) for tensor in _values(graph, _INITIALIZER)}
    names = [_text(dict(_fields(value)).get(_INPUT_NAME)) for value in _values(graph, _INPUT)]
    return [name for name in names if name not in given]


def _external_files(content: bytes) -> list[str]:
    """The names of the files that hold weights of the graph.

    Raises:
        ValueError: it is no ONNX file, or names a file that is not beside it.
    """
    names: dict[str, None] = {}
    for tensor in _tensors(memoryview(content)):
        for pair in map(dict, map(_fields, _values(tensor, _EXTERNAL_DATA))):
            if _text(pair.get(_KEY)) == "location":
                names[_text(pair.get(_VALUE))] = None
    for name in names:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"its weights are said to lie in {name!r}, which is no file beside it")
    return list(names)


def _tensors(model: memoryview) -> Iterator[memoryview]:
    """The initializers and constants of a model, those of branches and loops too."""
    graphs = list(_values(model, _GRAPH))
    while graphs:
        graph = graphs.pop()
        yield from _values(graph, _INITIALIZER)
        for node in _values(graph, _NODE):
            for attribute in _values(node, _ATTRIBUTE):
                yield from _values(attribute, _TENSOR)
                graphs += _values(attribute, _SUBGRAPH)


def _values(message: memoryview, number: int) -> Iterator[memoryview]:
    return (value for found, value in _fields(message) if found == number)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field of a protobuf message.

    The format is in https://protobuf.dev/programming-guides/encoding. A number's content is empty.

    Raises:
        ValueError: the message is broken or cut.
    """
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if not number or kind not in (0, 1, 2, 5):
            raise ValueError("it is no protobuf")
        begin = place
        if kind == 0:
            begin = place = _varint(message, place)[1]
        elif kind == 2:
            length, begin = _varint(message, place)
            place = begin + length
        else:
            place += {1: 8, 5: 4}[kind]
        if place > len(message):
            raise ValueError("it is cut short")
        yield number, message[begin:place]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number at ``place``, and where it ends."""
    number = 0
    for position, byte in enumerate(message[place : place + 10]):
        number |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return number, place + position + 1
    raise ValueError("it is cut short")


def _text(value: memoryview | None) -> str:
    return bytes(value or b"").decode()


def _fits(shape: Sequence[int | str | None], needed: list[int]) -> bool:
    """Whether ``shape`` is a batch of ``needed``."""
    return len(shape) == len(needed) + 1 and all(
        not isinstance(size, int) or size == need for size, need in zip(shape[1:], needed, strict=True)
    )


def _per_band(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, 1, 1)
