"""The little that a runtime of our own needs of CUDA: a device, streams, memory. Through cuda-python.

Untested on a GPU.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import DeviceError, missing_extra

_ADVICE = "See `geodeploy doctor`, or leave TensorRT out, which needs a GPU."


class Cuda:
    """The CUDA runtime on the first GPU.

    Raises:
        MissingExtraError: cuda-python is not installed.
        DeviceError: there is no GPU that it can use, or a call fails.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise missing_extra("tensorrt", "cuda-bindings") from error
        self.api: Any = runtime
        if not self.call("cudaGetDeviceCount"):
            raise DeviceError(f"CUDA finds no GPU. {_ADVICE}")

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function ``name`` of the runtime gives."""
        error, *results = getattr(self.api, name)(*arguments)
        if error != self.api.cudaError_t.cudaSuccess:
            raise DeviceError(f"The GPU cannot be used: {name} says {error.name}. {_ADVICE}")
        return results[0] if results else None

    def describe(self) -> str:
        """The GPU, its compute capability and the driver: what an engine is bound to."""
        found = self.call("cudaGetDeviceProperties", 0)
        name = found.name.decode() if isinstance(found.name, bytes) else found.name
        driver = self.call("cudaDriverGetVersion")
        return f"{name.strip(chr(0))}, sm {found.major}{found.minor}, driver {driver}"

    def pinned(self, shape: tuple[int, ...]) -> tuple[int, NDArray[np.float32]]:
        """Memory that the GPU copies from and to by itself: its address, and an array over it."""
        size = 4 * int(np.prod(shape))
        address = int(self.call("cudaMallocHost", size))
        memory = (ctypes.c_byte * size).from_address(address)
        return address, np.frombuffer(memoryview(memory), np.float32).reshape(shape)
