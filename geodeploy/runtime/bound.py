"""Tiles and outputs in the memory where ONNX Runtime computes: one copy there, and one back.

Tested in the processor's memory, where the calls are the same; it has not run on a GPU.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.runtime.graph import Signature, input_shape, output_shape
from geodeploy.spec import ModelSpec


class Bound:
    """What a session takes and gives, for batches of one size, in ``memory``: ``cpu`` or ``cuda``.

    Of one caller at a time.
    """

    def __init__(
        self, session: Any, signature: Signature, spec: ModelSpec, batch: int, *, memory: str
    ) -> None:
        import onnxruntime as ort

        make = ort.OrtValue.ortvalue_from_shape_and_type
        self._taken = make([batch, *input_shape(spec)], np.float32, memory, 0)
        self._given = make([batch, *output_shape(spec)], np.float32, memory, 0)
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(signature.input, self._taken)
        self._binding.bind_ortvalue_output(signature.output, self._given)

    def run(self, pixels: NDArray[np.float32], options: Any) -> NDArray[np.float32]:
        """Outputs of ``pixels``, both as the graph has them, in memory of their own."""
        self._taken.update_inplace(pixels)
        self._session.run_with_iobinding(self._binding, options)
        # On the processor what NumPy is given is that memory itself.
        outputs: NDArray[np.float32] = self._given.numpy().copy()
        return outputs


def even_batch(tiles: int) -> int:
    """The batch that ``tiles`` are filled up to on a GPU, a power of 2.

    For each size that they have not seen, CUDA's libraries try again which kernel is the fastest, and
    buffers are made: of all the sizes that the ends of scenes come in, few are left.
    """
    return 1 << (tiles - 1).bit_length()
