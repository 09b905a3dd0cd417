"""A few real tiles and what the tuned model gives for them, kept inside an exported model.

On a GPU nobody could try at the export, a session is held against them before it makes a map.
"""

import base64
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from geodeploy.blend import sigmoid
from geodeploy.runtime import Session
from geodeploy.runtime.graph import OnnxFile
from geodeploy.spec import ModelSpec

TILES = 2
_STEP = 4
"""Of so many rows and columns one is compared."""

# The report's own tolerances were held at the export. What this is to find is a runtime gone wrong, as
# vision transformers have come out of TensorRT with a cosine of 0.018, or as NaN.
_AGREEMENT = 0.99
_RELATIVE_DIFF = 0.1


@dataclass(frozen=True, slots=True)
class Reference:
    """Tiles, and what the tuned model gives for them in float32."""

    pixels: NDArray[np.float32]
    """(N, planes, tile, tile) in the spec's units."""
    outputs: NDArray[np.float32]
    """(N, K, h, w): of every fourth row and column; or (N, K) of whole tiles."""

    def to_text(self) -> str:
        """What `from_text` reads: pixels in 256 steps, outputs as shares of the largest, in halves."""
        low, step, levels = _levels(self.pixels)
        largest = _largest(self.outputs).astype("<f4")
        parts = (low, step, levels, largest, (self.outputs / largest).astype("<f2"))
        content = b"".join(part.tobytes() for part in parts)
        return base64.b64encode(zlib.compress(content, 9)).decode()

    @classmethod
    def from_text(cls, text: str, spec: ModelSpec) -> Self:
        """Raises ValueError where ``text`` is not of ``TILES`` tiles as ``spec`` describes them."""
        planes, side = len(spec.planes), len(range(0, spec.tile, _STEP))
        shape = (TILES, planes, spec.tile, spec.tile)
        wanted = (TILES, len(spec.outputs), *(() if spec.whole_tiles else (side, side)))
        number = len(spec.outputs)
        sizes = [4 * planes, 4 * planes, int(np.prod(shape)), 4 * number, 2 * int(np.prod(wanted))]
        # Never more than that is unpacked: the file may come from anybody.
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), sum(sizes) + 1)
        if len(content) != sum(sizes):
            raise ValueError(f"{len(content)} bytes, {sum(sizes)} are needed")
        cuts = np.cumsum([0, *sizes])
        low, step, levels, largest, shares = (content[a:b] for a, b in pairwise(cuts))
        pixels = _unpacked(
            np.frombuffer(low, "<f4"),
            np.frombuffer(step, "<f4"),
            np.frombuffer(levels, np.uint8).reshape(shape),
        )
        outputs = np.frombuffer(shares, "<f2").reshape(wanted).astype(np.float32)
        ones = (1,) * (outputs.ndim - 2)
        return cls(pixels, outputs * np.frombuffer(largest, "<f4").reshape(number, *ones))


def pixels_to_keep(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first tiles of ``pixels`` (N, planes, tile, tile) as a `Reference` keeps them, in 8 bits."""
    return _unpacked(*_levels(np.resize(pixels, (TILES, *pixels.shape[1:]))))


def thinned(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of ``outputs`` (N, K, H, W) or (N, K) what a `Reference` compares."""
    return outputs[..., ::_STEP, ::_STEP] if outputs.ndim == 4 else outputs


def reference_of(file: OnnxFile) -> Reference | None:
    """What ``file`` keeps; None where it keeps nothing that can be read."""
    if file.reference is None:
        return None
    try:
        return Reference.from_text(file.reference, file.spec)
    except (ValueError, zlib.error):
        return None


def difference(session: Session, reference: Reference) -> str | None:
    """How ``session`` differs from ``reference`` on its tiles, in words; None if it does not."""
    found, expected = thinned(session.run(reference.pixels)), reference.outputs
    if not np.isfinite(found).all():
        return "it gives NaN or infinity"
    apart = np.abs(found - expected)
    if session.spec.task == "regression":  # each quantity has a size of its own, and none is a class
        far = float((apart / _largest(expected)).max())
        return f"quantities differ by {far:.2g} of the largest" if far > _RELATIVE_DIFF else None
    if session.spec.whole_tiles:
        far = float(np.abs(sigmoid(found) - sigmoid(expected)).max())
        return f"probabilities differ by {far:.2g}" if far > _RELATIVE_DIFF else None
    agreement = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    far = float(apart.max() / _largest(expected).max())
    if agreement >= _AGREEMENT and far <= _RELATIVE_DIFF:
        return None
    return f"{agreement:.2%} of pixels have the same class, outputs differ by {far:.2g} of the largest"


def _largest(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """The greatest distance from 0 of each output, (K, 1, 1), or (K,) of whole tiles."""
    tiles, *pixels = (axis for axis in range(outputs.ndim) if axis != 1)
    largest: NDArray[np.float32] = np.abs(outputs).max(axis=tiles)
    largest = largest.max(axis=tuple(axis - 1 for axis in pixels), keepdims=True)
    return np.maximum(largest, np.float32(1e-12))


def _levels(
    pixels: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Least value and step of each band, and ``pixels`` in steps from it."""
    low, high = pixels.min(axis=(0, 2, 3)), pixels.max(axis=(0, 2, 3))
    step = np.maximum((high - low) / 255, np.float32(1e-12)).astype("<f4")
    levels = np.rint((pixels - low[:, None, None]) / step[:, None, None])
    return low.astype("<f4"), step, np.clip(levels, 0, 255).astype(np.uint8)


def _unpacked(
    low: NDArray[np.float32], step: NDArray[np.float32], levels: NDArray[np.uint8]
) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = low[:, None, None] + step[:, None, None] * levels.astype(np.float32)
    return pixels
