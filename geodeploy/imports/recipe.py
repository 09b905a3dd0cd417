"""The recipe of a model that was trained elsewhere, as far as its configuration tells one."""

import math
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from geodeploy.bands import common_names
from geodeploy.errors import RecipeError, WeightsError
from geodeploy.imports.config import Config, listed
from geodeploy.imports.network import Network
from geodeploy.imports.options import ImportOptions
from geodeploy.imports.weights import TrainedWeights
from geodeploy.spec import SegmentationClass, Target, default_color
from geodeploy.train.method_options import Full, Lora, RsLora
from geodeploy.train.qkv import PARTS
from geodeploy.train.recipe import (
    IMPORTED,
    Data,
    Model,
    Recipe,
    Scene,
    Statistics,
    Training,
    complaint,
)

_REACH = 20
"""Standard deviations from the mean within which a band's values are believed: it keeps whole numbers
apart from the reflectance that they stand for."""
_OVERLAP = 32


def build_recipe(
    config: Config, network: Network, weights: TrainedWeights, name: str, options: ImportOptions
) -> Recipe:
    """The recipe that builds the network, for a RUN.

    Raises:
        RecipeError: the configuration leaves out what is needed.
    """
    tile = options.tile or network.tile
    if tile % network.multiple:
        nearest = max(round(tile / network.multiple), 1) * network.multiple
        raise RecipeError(
            f"TerraTorch would pad tiles of {tile}, which is no multiple of {network.multiple}. "
            f"Take --tile {nearest}."
        )
    overlap = network.overlap
    if overlap is None or tile != network.tile:
        overlap = min(_OVERLAP, tile // 4)
    bands = _bands(config, network, options)
    try:
        return Recipe(
            name=re.sub(r"[^A-Za-z0-9._-]", "-", name),
            data=_data(config, bands, network, options),
            **_outputs(config, network, options),
            model=Model(
                backbone=network.backbone,
                options=network.options,
                weights=IMPORTED,
                tile=tile,
                overlap=overlap,
                timesteps=network.timesteps,
                decoder="terratorch",
                terratorch=network.decoder,
            ),
            method=_method(network, weights),
            training=Training(epochs=1),
        )
    except ValidationError as error:
        raise RecipeError(f"{config.path}: {complaint(error)}.") from error


def stored_scale(config: Config, options: ImportOptions) -> float:
    """What values stored in images are multiplied with.

    Raises:
        RecipeError: the configuration does not say.
    """
    told = options.scale if options.scale is not None else config.told("constant_scale")
    if told is None and not config.is_generic:
        raise RecipeError(
            f"{config.path} does not say what stored values are multiplied with "
            "(data.init_args.constant_scale): give the number with --scale, 1 for none."
        )
    try:
        scale = 1.0 if told is None else float(told)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{config.path}: data.init_args.constant_scale must be a number, found {told!r}."
        ) from error
    if not 0 < scale < math.inf:
        raise RecipeError(
            f"{config.path}: data.init_args.constant_scale must be greater than 0, found {told!r}. "
            "Give the number that stored values were multiplied with by --scale, 1 for none."
        )
    return scale


def _data(config: Config, bands: Sequence[str], network: Network, options: ImportOptions) -> Data:
    mean = _statistics(config, "mean", options.mean, bands)
    std = _statistics(config, "std", options.std, bands)
    scale = stored_scale(config, options)
    return Data(
        root=config.path.resolve().parent,
        bands=tuple(bands),
        units="stored values" + (f" x {scale:g}" if scale != 1 else ""),
        valid_range=tuple(
            (middle - _REACH * spread, middle + _REACH * spread)
            for middle, spread in zip(mean, std, strict=True)
        ),
        gsd_m=network.foundation.gsd_m if network.foundation else None,
        statistics=Statistics(mean=mean, std=std),
        scene=(Scene(image=config.path.resolve(), split="train", scale=scale),),
    )


def _bands(config: Config, network: Network, options: ImportOptions) -> tuple[str, ...]:
    if options.bands:
        return options.bands
    told = config.told("output_bands", "dataset_bands", "bands") or network.bands
    if not told or not all(isinstance(band, str) for band in listed(told)):
        raise RecipeError(
            f"{config.path} does not name the bands (data.init_args.output_bands has "
            f"{told or 'nothing'}): name them in the model's order with --bands blue,green,red,..."
        )
    told = listed(told)
    names = zip(told, common_names(told), strict=True)
    return tuple(common or name.lower() for name, common in names)


def _statistics(
    config: Config, what: str, given: tuple[float, ...] | None, bands: Sequence[str]
) -> tuple[float, ...]:
    found: Any = given or config.told(f"{what}s")
    words = [item for item in listed(found) if isinstance(item, str)]
    if words:  # PyYAML takes 1e-1 for a word; YAML 1.1 wants 1.0e-1
        raise RecipeError(
            f"{config.path}: data.init_args.{what}s holds the text {words[0]!r} where a number is "
            f"needed. Write it as YAML does (1.0e-1, not 1e-1), or give the numbers with --{what}."
        )
    if not isinstance(found, list | tuple) or not all(isinstance(item, int | float) for item in found):
        raise RecipeError(
            f"{config.path} does not say the {what} of each band (data.init_args.{what}s): give the "
            f"numbers for {', '.join(bands)} with --{what}."
        )
    if len(found) != len(bands):
        raise RecipeError(
            f"{config.path} has {len(found)} numbers for the {what} of {len(bands)} bands, "
            f"{', '.join(bands)}. Give as many with --{what}, or name the bands with --bands."
        )
    if odd := [item for item in found if not math.isfinite(item) or (what == "std" and item <= 0)]:
        raise RecipeError(
            f"{config.path}: data.init_args.{what}s must be finite numbers"
            f"{', greater than 0' if what == 'std' else ''}; found {odd[0]!r}. Give those that it was "
            f"trained with by --{what}."
        )
    return tuple(float(item) for item in found)


def _outputs(config: Config, network: Network, options: ImportOptions) -> dict[str, Any]:
    """The task of the recipe, and what the model gives."""
    if config.kind == "segmentation":
        if options.target is not None:
            raise RecipeError(f"--target is for a regression, and {config.path} is of a segmentation.")
        return {"classes": _classes(config, network, options)}
    if options.classes:
        raise RecipeError(f"--classes are for a segmentation, and {config.path} is of a regression.")
    told = listed(config.task.get("var_names") or ["value"])
    name, _, unit = (options.target or str(told[0])).partition(":")
    return {"task": "regression", "targets": (Target(name=name, unit=unit),)}


def _classes(config: Config, network: Network, options: ImportOptions) -> tuple[SegmentationClass, ...]:
    told = config.task.get("class_names") or [f"class {value}" for value in range(network.outputs)]
    names = options.classes or tuple(map(str, listed(told)))
    if len(names) != network.outputs:
        raise RecipeError(
            f"{len(names)} names are given for {network.outputs} classes. Give as many with --classes."
        )
    return tuple(
        SegmentationClass(value=value, name=name, color=default_color(value))
        for value, name in enumerate(names)
    )


def _method(network: Network, weights: TrainedWeights) -> Full | Lora | RsLora:
    """How it was tuned; where the adapters sit, the weights say."""
    if network.lora is None:
        return Full()
    split = {layer: part for part, layer in PARTS.items()}
    layers = {re.sub(r"^blocks\.\d+\.", "", name) for name in weights.adapters}
    targets = sorted({split.get(layer, layer) for layer in layers})
    if not targets:
        raise WeightsError("The YAML has a peft_config, the checkpoint has no adapters.")
    return network.lora.kind(r=network.lora.r, alpha=network.lora.alpha, targets=tuple(targets))
