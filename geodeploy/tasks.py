"""What a model's outputs mean: the rasters made of them, what a run tells of these, how they score.

Here alone the mapping knows one task from another.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geodeploy.aoi import Area
from geodeploy.area import class_extents, column_areas
from geodeploy.blend import Block, Mosaic
from geodeploy.cells import CellGrid, Cells
from geodeploy.cog import Frame
from geodeploy.errors import LabelError, RecipeError
from geodeploy.labels import (
    class_positions,
    stored_positions,
    target_bands,
    target_values,
)
from geodeploy.options import PredictOptions
from geodeploy.products import (
    SCALE,
    ClassMap,
    Confidence,
    Disagreement,
    Probabilities,
    Product,
    Quantities,
    Spread,
)
from geodeploy.report import ClassArea, LabelSummary, TargetSummary
from geodeploy.scores import ClassCount, ErrorCount, LabelCount, ScoreCount
from geodeploy.spec import NODATA, ModelSpec, SegmentationClass
from geodeploy.tally import Counts
from geodeploy.tiles import Region, Tile, TileGrid


class Canvas(Protocol):
    """A map as it grows: tiles go in by rows from the top left, final blocks come out."""

    def add(
        self,
        tile: Tile,
        answer: NDArray[np.float32] | None,
        valid: NDArray[np.bool_],
        *,
        failed: bool = False,
    ) -> Block | None:
        """Take the next tile; what it settles. See `geodeploy.blend.Mosaic`."""
        ...


class Task(Protocol):
    """What a run has to know of the model's outputs."""

    product: Product
    """The map."""
    classes: Sequence[SegmentationClass]
    """Whose names and colours the values of the map have."""
    apart: int
    """Planes that the disagreement of tiles has."""
    grid: type[TileGrid]
    """Where the tiles lie."""

    def canvas(
        self, grid: TileGrid, region: Region, area: Area | None, options: PredictOptions
    ) -> Canvas:
        """Takes the answers for the tiles of ``region``."""
        ...

    def others(self, options: PredictOptions) -> list[Product]:
        """What is to be written beside the map.

        Raises:
            RecipeError: an option asks for what cannot be made of these outputs.
        """
        ...

    def tags(self) -> dict[str, str]:
        """What the files say of the outputs."""
        ...

    def told(self, tallies: Sequence[Any], frame: Frame, output: Path) -> dict[str, Any]:
        """What the report tells of the map at ``output``, whose bands come to ``tallies``."""
        ...

    def label_bands(self, labels: Any) -> list[int]:
        """The numbers of the bands of the open raster ``labels`` that a map is scored against.

        Raises:
            LabelError: it does not hold what the model maps.
        """
        ...

    def truth(self, labels: Any, stored: Any) -> NDArray[Any]:
        """What is ``stored`` in those bands (P, h, w), masked without data, for the count of scores.

        Raises:
            LabelError: a value can be none.
        """
        ...

    def found(self, mapped: NDArray[Any]) -> NDArray[Any]:
        """What the ``mapped`` values (P, h, w) are for the count of scores."""
        ...

    def count(self) -> ScoreCount:
        """Takes in both, and scores the map."""
        ...


class Segmentation:
    """Classes, of which each pixel has one."""

    apart = 1
    grid: type[TileGrid] = TileGrid

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.product: Product = ClassMap(spec.class_values)
        self.classes: Sequence[SegmentationClass] = spec.classes

    def canvas(
        self, grid: TileGrid, region: Region, area: Area | None, options: PredictOptions
    ) -> Canvas:
        """Tiles are blended."""
        return _mosaic(grid, region, self._spec, options, self.apart)

    def others(self, options: PredictOptions) -> list[Product]:
        """Confidence, probabilities and disagreement, as they are asked for."""
        make: dict[str, Callable[[], Product]] = {
            "confidence": Confidence,
            "probabilities": lambda: Probabilities(self._spec.outputs),
            "disagreement": Disagreement,
        }
        return [make[name]() for name in options.beside]

    def tags(self) -> dict[str, str]:
        """The classes."""
        listed = (f"{item.value} {item.name}" for item in self._spec.classes)
        return {"GEODEPLOY_CLASSES": "; ".join(listed)}

    def told(self, tallies: Sequence[Any], frame: Frame, output: Path) -> dict[str, Any]:
        """The area of each class."""
        counts, valid = tallies[0].pixels, max(tallies[0].valid, 1)
        areas_m2 = _areas_m2(frame, counts, output)
        return {
            "classes": tuple(
                ClassArea(
                    value=item.value,
                    name=item.name,
                    pixels=int(counts[item.value]),
                    share=float(counts[item.value] / valid),
                    area_m2=areas_m2.get(item.value),
                )
                for item in self._spec.classes
            )
        }

    def label_bands(self, labels: Any) -> list[int]:
        """The only one."""
        if labels.count != 1 or np.dtype(labels.dtypes[0]).kind not in "iu":
            raise LabelError(
                f"{_name(labels)} has {labels.count} band(s) of {labels.dtypes[0]}; labels are "
                "one band of whole numbers."
            )
        return [1]

    def truth(self, labels: Any, stored: Any) -> NDArray[Any]:
        """Positions of classes; a nodata tag that is a listed class is no nodata."""
        spec = self._spec
        return stored_positions(labels, stored, spec.classes, spec.ignore, source=_name(labels))

    def found(self, mapped: NDArray[Any]) -> NDArray[Any]:
        """Positions of classes."""
        return class_positions(mapped, self._spec.classes, {NODATA}, source="the map")

    def count(self) -> ScoreCount:
        """A confusion matrix."""
        return ClassCount(self._spec.classes)


class Regression:
    """Quantities, each by itself at every pixel."""

    classes: Sequence[SegmentationClass] = ()
    grid: type[TileGrid] = TileGrid

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.product: Product = Quantities(spec.targets)
        self.apart = len(spec.targets)

    def canvas(
        self, grid: TileGrid, region: Region, area: Area | None, options: PredictOptions
    ) -> Canvas:
        """Tiles are blended."""
        return _mosaic(grid, region, self._spec, options, self.apart)

    def others(self, options: PredictOptions) -> list[Product]:
        """The disagreement, if it is asked for."""
        of_classes = {
            "--confidence": options.confidence,
            "--probabilities": options.probabilities,
            "--smooth": options.smooth,
            "--sieve": options.sieve,
            "--polygons": options.derived.polygons,
            "--area": options.derived.area,
            "--preview": options.derived.preview,
        }
        for flag, value in of_classes.items():
            if value:
                raise RecipeError(
                    f"{flag} is for maps of classes; the model {self._spec.name} gives quantities: "
                    f"{', '.join(map(str, self._spec.targets))}. Leave it out."
                )
        return [Spread(self._spec.targets)] if options.disagreement else []

    def tags(self) -> dict[str, str]:
        """The quantities."""
        return {"GEODEPLOY_TARGETS": "; ".join(map(str, self._spec.targets))}

    def told(self, tallies: Sequence[Any], frame: Frame, output: Path) -> dict[str, Any]:
        """What each quantity ranges over."""
        return {
            "targets": tuple(
                TargetSummary(
                    name=target.name,
                    unit=target.unit,
                    pixels=tally.valid,
                    minimum=tally.low if tally.valid else None,
                    maximum=tally.high if tally.valid else None,
                    mean=tally.mean if tally.valid else None,
                    std=tally.deviation if tally.valid else None,
                )
                for target, tally in zip(self._spec.targets, tallies, strict=True)
            )
        }

    def label_bands(self, labels: Any) -> list[int]:
        """By name, or in order."""
        return target_bands(labels, self._spec.targets, source=_name(labels))

    def truth(self, labels: Any, stored: Any) -> NDArray[Any]:
        """The quantities."""
        bands = self.label_bands(labels)
        return target_values(
            stored,
            self._spec.targets,
            self._spec.ignore,
            scales=[labels.scales[band - 1] for band in bands],
            offsets=[labels.offsets[band - 1] for band in bands],
            source=_name(labels),
        )

    def found(self, mapped: NDArray[Any]) -> NDArray[Any]:
        """The quantities."""
        return mapped

    def count(self) -> ScoreCount:
        """Sums of errors."""
        return ErrorCount(self._spec.targets)


class Multilabel:
    """Which classes each tile shows as a whole; the map has a cell a tile."""

    apart = 0
    classes: Sequence[SegmentationClass] = ()
    grid: type[TileGrid] = CellGrid

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.product: Product = Probabilities(spec.outputs)

    def canvas(
        self, grid: TileGrid, region: Region, area: Area | None, options: PredictOptions
    ) -> Canvas:
        """Each tile has a cell of its own."""
        return Cells(grid, len(self._spec.outputs), area)

    def others(self, options: PredictOptions) -> list[Product]:
        """None: the map has the probabilities."""
        of_pixels = {
            "--blend": "blend" in options.model_fields_set,
            "--confidence": options.confidence,
            "--probabilities": options.probabilities,
            "--disagreement": options.disagreement,
            "--smooth": options.smooth,
            "--sieve": options.sieve,
            "--polygons": options.derived.polygons,
            "--area": options.derived.area,
            "--preview": options.derived.preview,
            "--on-error skip": options.on_error == "skip",
        }
        for flag, value in of_pixels.items():
            if value:
                raise RecipeError(
                    f"{flag} is for maps pixel by pixel; the model {self._spec.name} gives the "
                    "probabilities of classes in whole tiles, which are the map. Leave it out."
                )
        return []

    def tags(self) -> dict[str, str]:
        """The classes."""
        return {"GEODEPLOY_LABELS": "; ".join(self._spec.outputs)}

    def told(self, tallies: Sequence[Counts], frame: Frame, output: Path) -> dict[str, Any]:
        """How many cells show each class."""
        half, levels = round(0.5 / SCALE), np.arange(NODATA) * SCALE
        return {
            "labels": tuple(
                LabelSummary(
                    name=name,
                    cells=int(tally.pixels[half:NODATA].sum()),
                    share=float(tally.pixels[half:NODATA].sum() / max(tally.valid, 1)),
                    mean=float(levels @ tally.pixels[:NODATA] / tally.valid) if tally.valid else None,
                )
                for name, tally in zip(self._spec.outputs, tallies, strict=True)
            )
        }

    def label_bands(self, labels: Any) -> list[int]:
        """The only one, of the class of each pixel."""
        return Segmentation(self._spec).label_bands(labels)

    def truth(self, labels: Any, stored: Any) -> NDArray[Any]:
        """Positions of classes; `geodeploy.labels.present_classes` says what a tile of them shows."""
        return Segmentation(self._spec).truth(labels, stored)

    def found(self, mapped: NDArray[Any]) -> NDArray[Any]:
        """The stored probabilities."""
        return mapped

    def count(self) -> ScoreCount:
        """Of each probability."""
        return LabelCount(self._spec.classes)


TASKS: dict[str, type[Segmentation] | type[Regression] | type[Multilabel]] = {
    "segmentation": Segmentation,
    "regression": Regression,
    "multilabel": Multilabel,
}
"""By the spec's word for them."""


def task_of(spec: ModelSpec) -> Task:
    """What the outputs of the model of ``spec`` mean."""
    return TASKS[spec.task](spec)


def _mosaic(
    grid: TileGrid, region: Region, spec: ModelSpec, options: PredictOptions, apart: int
) -> Mosaic:
    return Mosaic(
        grid,
        region,
        len(spec.outputs),
        blend=options.blend,
        disagreement=apart if options.disagreement else 0,
    )


def _name(labels: Any) -> str:
    return Path(labels.name).name


def _areas_m2(frame: Frame, counts: NDArray[np.int64], output: Path) -> dict[int, float | None]:
    """The area of each value, as `class_extents` has it; the map is read where pixels differ by row."""
    if frame.crs is not None and frame.crs.is_geographic:
        return {item.value: item.area_m2 for item in class_extents(output)}
    edges = column_areas(frame.crs, frame.transform, 1)
    return {} if edges is None else dict(enumerate((counts * edges[1]).tolist()))
