"""Say what a model, a RUN or a map is."""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from geodeploy.dataset import open_dataset
from geodeploy.errors import ModelError
from geodeploy.seams import Seams, measure_seams
from geodeploy.spec import BaseSpec, ModelSpec

_PREFIX = "GEODEPLOY_"


class ModelInspection(BaseModel):
    """A model or a RUN."""

    model_config = ConfigDict(frozen=True)

    kind: str
    path: Path
    bytes: int
    sha256: str | None
    """Of an ONNX file; a RUN is a folder."""
    spec: ModelSpec

    def __str__(self) -> str:
        spec = self.spec
        lines = [
            f"{self.path}: {self.kind} {spec.name!r}, {self.bytes / 1e6:.1f} MB, {spec.precision}",
            f"  takes    {spec.tile} x {spec.tile} pixels, overlap {spec.overlap}, {spec.units}"
            + (", bands last" if spec.layout == "NHWC" else "")
            + (f", {spec.timesteps} dates" if spec.timesteps > 1 else "")
            + (f", {spec.gsd_m:g} m" if spec.gsd_m else ""),
        ]
        lines += [
            f"    {band.name:<10} mean {band.mean:<8.4g} std {band.std:<8.4g} "
            f"valid {band.valid_range[0]:g} to {band.valid_range[1]:g}"
            + (f", seen {band.seen[0]:.4g} to {band.seen[1]:.4g}" if band.seen else "")
            for band in spec.bands
        ]
        if spec.normalise:
            lines.append("  fed with (pixels - mean) / std")
        if spec.input_range:
            low, high = spec.input_range
            lines.append(f"  fed with 0 to 1 for {low:g} to {high:g}")
        lines.append(f"  gives    {spec.output}" + (" of tiles as a whole" if spec.whole_tiles else ""))
        lines += [f"    {item.value:>3} {item.name:<20} {item.color}" for item in spec.classes]
        lines += [
            f"    {item!s:<20}"
            + ("" if item.mean is None else f" mean {item.mean:<8.4g}")
            + ("" if item.std is None else f" std {item.std:<8.4g}")
            for item in spec.targets
        ]
        if spec.backbone:
            lines.append(f"  backbone {spec.backbone.name}, weights {spec.backbone.weights}")
        if spec.method:
            rank = f", r={spec.method.r} alpha={spec.method.alpha:g}" if spec.method.alpha else ""
            lines.append(f"  method   {spec.method.name}{rank}")
        if spec.trained_on:
            lines.append(f"  trained  {spec.trained_on}")
        if spec.licence:
            lines.append(f"  licence  {spec.licence}")
        if spec.parity:
            runtimes = ", ".join(spec.parity.runtimes) or "no runtime on a CPU"
            lines.append(f"  parity   {spec.parity}; proved in {runtimes}")
        if spec.base_sha256:
            lines.append(f"  base     {spec.base_sha256}")
        if self.sha256:
            lines.append(f"  sha256   {self.sha256}")
        return "\n".join(lines)


class BaseInspection(BaseModel):
    """A base of several models, which is one only with an adapter."""

    model_config = ConfigDict(frozen=True)

    kind: str = "base"
    path: Path
    bytes: int
    sha256: str
    spec: BaseSpec

    def __str__(self) -> str:
        spec = self.spec
        return (
            f"{self.path}: base of adapters, {self.bytes / 1e6:.1f} MB\n"
            f"  takes    {spec.tile} x {spec.tile} pixels, and an adapter\n"
            f"  backbone {spec.backbone.name}, weights {spec.backbone.weights}\n"
            f"  sha256   {self.sha256}"
        )


class MapInspection(BaseModel):
    """A map that geodeploy made."""

    model_config = ConfigDict(frozen=True)

    kind: str = "map"
    path: Path
    height: int
    width: int
    crs: str | None
    tags: dict[str, str]
    """What made it: model, hashes, options."""
    seams: Seams | None
    """Whether the borders between its tiles show; None where it holds something else than classes."""

    def __str__(self) -> str:
        lines = [f"{self.path}: map, {self.height} x {self.width} pixels, {self.crs or 'no CRS'}"]
        lines += [f"  {name.lower():<14} {value}" for name, value in sorted(self.tags.items())]
        if self.seams:
            lines.append(f"  {'tile borders':<14} {self.seams}")
        return "\n".join(lines)


def inspect(path: Path | str) -> ModelInspection | BaseInspection | MapInspection:
    """What ``path`` is: an ONNX model, a base or adapter, a RUN folder or a map.

    Raises:
        ModelError: it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "spec.json").exists():
            raise ModelError(
                f"{path} is a folder without spec.json, so no RUN. Give a RUN, model or map."
            )
        return ModelInspection(
            kind="RUN",
            path=path,
            bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            sha256=None,
            spec=ModelSpec.read(path / "spec.json"),
        )
    if path.suffix.lower() == ".onnx_adapter":
        from geodeploy.runtime.adapter import read_adapter

        spec = read_adapter(path).spec
        return ModelInspection(
            kind="adapter",
            path=path,
            bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            spec=spec,
        )
    if path.suffix.lower() == ".onnx":
        from geodeploy.runtime import open_session
        from geodeploy.runtime.graph import is_base, read_base, read_onnx

        if path.is_file() and is_base(path):
            base = read_base(path)
            return BaseInspection(
                path=path, bytes=len(base.content), sha256=base.sha256, spec=base.spec
            )

        files = [path, *read_onnx(path).weights]
        with closing(open_session(path, device="cpu")) as session:
            return ModelInspection(
                kind="model",
                path=path,
                bytes=sum(file.stat().st_size for file in files),
                sha256=session.sha256,
                spec=session.spec,
            )
    with open_dataset(path) as dataset:
        tags = {
            name.removeprefix(_PREFIX): value
            for name, value in dataset.tags().items()
            if name.startswith(_PREFIX)
        }
        if not tags:
            raise ModelError(f"{path} is a raster, but no map that geodeploy made.")
        return MapInspection(
            path=path,
            height=dataset.height,
            width=dataset.width,
            crs=dataset.crs.to_string() if dataset.crs else None,
            tags=tags,
            seams=measure_seams(path) if _holds_classes(dataset) else None,
        )


def _holds_classes(dataset: Any) -> bool:
    labels = f"{_PREFIX}LABELS" in dataset.tags()
    return (dataset.descriptions, dataset.dtypes) == (("class",), ("uint8",)) and not labels
