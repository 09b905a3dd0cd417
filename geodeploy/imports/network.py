"""A network in TerraTorch's words, in those of a recipe."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from geodeploy.errors import RecipeError
from geodeploy.imports.config import Arguments, Config, as_trained, listed, necks
from geodeploy.imports.foundations import NAMES as FOUNDATIONS
from geodeploy.imports.foundations import Foundation, read_foundation
from geodeploy.train.backbones.prithvi import VARIANTS
from geodeploy.train.method_options import Lora, RsLora
from geodeploy.train.recipe import BackboneOptions, TerraTorch, complaint
from geodeploy.train.terratorch import ACTIVATIONS

_NATIVE_TILE = 224
_TRAINING_ALONE = (
    "backbone_pretrained", "backbone_ckpt_path", "backbone_pretrained_bands", "backbone_drop_path",
    "backbone_drop_path_rate", "backbone_mask_ratio", "backbone_norm_pix_loss", "backbone_padding",
    "backbone_coords_scale_learn", "backbone_in_chans", "pretrained", "backbone_ckpt_data",
    "in_channels", "aux_decoders",
)  # fmt: skip
"""Arguments that change nothing in a trained model, or that its weights say themselves."""
_SAME_FUNCTION = (*_TRAINING_ALONE, "backbone_img_size", "backbone_bands", "head_dropout")
"""Arguments that do not change what it computes of a tile."""


@dataclass(frozen=True, slots=True)
class Network:
    """What a recipe needs to build the same."""

    backbone: str
    options: BackboneOptions
    decoder: TerraTorch
    timesteps: int
    tile: int
    """That positions were made for, or that the configuration cuts scenes into."""
    overlap: int | None
    """As the configuration cuts scenes; None where it does not say."""
    multiple: int
    """What the tile must be a multiple of, so that TerraTorch would not pad it."""
    resized: bool
    """Whether TerraTorch brings what the decoder gives to the tile's size."""
    outputs: int
    """Classes, or 1 quantity."""
    neck: int | None
    """Position among the necks of the one with weights."""
    lora: "LoraSettings | None"
    bands: tuple[Any, ...]
    """What the backbone is told of its bands."""
    foundation: Foundation | None = None
    """Where the backbone is one of these."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Of the adapters; where they sit, their weights say."""

    kind: type[Lora] | type[RsLora]
    r: int
    alpha: int


def read_network(config: Config) -> Network:
    """The network that ``config`` describes.

    Raises:
        RecipeError: it is one that cannot be built here just like it, or that nobody can build.
    """
    try:
        return _read_network(config)
    except ValidationError as error:
        raise RecipeError(f"{config.network.source}: {complaint(error)}.") from error


def check_as_trained(network: Network, config: Config, told: Mapping[str, Any], source: str) -> None:
    """Refuse a ``network`` of ``config`` that is not the one that the checkpoint was ``told`` to be.

    Heads, scales of adapters and the like leave no trace in the tensors: such a network would load, and
    compute something else.

    Raises:
        RecipeError: they contradict each other; it names both.
    """
    trained = as_trained(config, told, source)
    if trained is None or _function(read_network(trained)) == _function(network):
        return
    here, there = (dict(_leaves(one.network.given)) for one in (config, trained))
    key = next(
        key
        for key in sorted(here.keys() | there)
        if here.get(key) != there.get(key) and key.partition(".")[0] not in _SAME_FUNCTION
    )
    raise RecipeError(
        f"{config.network.source}.{key} is {here.get(key, 'absent')}, and {source} was trained with "
        f"{there.get(key, 'none')}. Give the YAML that it was trained by."
    )


def _function(network: Network) -> Network:
    """``network`` without what does not change what it computes of a tile."""
    decoder = network.decoder.model_copy(update={"dropout": 0.0})
    return replace(network, decoder=decoder, tile=0, overlap=None, bands=())


def _leaves(table: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What ``table`` holds, by dotted keys."""
    if isinstance(table, Mapping) and table:
        for key, value in table.items():
            yield from _leaves(value, (*place, str(key)))
    elif isinstance(table, list | tuple) and any(isinstance(item, Mapping) for item in table):
        for number, item in enumerate(table):
            yield from _leaves(item, (*place, str(number)))
    else:
        yield ".".join(place), list(table) if isinstance(table, tuple) else table


def _read_network(config: Config) -> Network:
    given = config.network
    given.drop(*_TRAINING_ALONE)
    given.only("backbone_vpt", False)
    given.only("backbone_vit_adapter", False)
    given.only("backbone_use_temporal", False)
    name = str(given.take("backbone", "")).removeprefix("terratorch_")
    found = _read_backbone(name, config)
    tile, overlap = _read_tiling(config, found.side)
    outputs = _read_outputs(config)
    decoder, neck = _read_decoder(config, found, outputs)
    resized = bool(given.take("rescale", True))
    given.only("image_size_out", tile, [tile, tile])
    lora = _read_lora(given)
    if lora and found.foundation:
        raise RecipeError(
            f"{given.source}.peft_config: adapters of {name} cannot be imported; those of Prithvi and "
            "of timm's networks can, and any that was tuned whole."
        )
    bands = tuple(listed(given.take("backbone_bands", [])))
    if found.foundation:
        bands = found.foundation.bands
    given.end()
    return Network(
        backbone=found.name,
        options=found.options,
        decoder=decoder,
        timesteps=found.timesteps,
        tile=tile,
        overlap=overlap,
        multiple=found.multiple,
        resized=resized,
        outputs=outputs,
        neck=neck,
        lora=lora,
        bands=bands,
        foundation=found.foundation,
    )


def _read_outputs(config: Config) -> int:
    given = config.network
    if config.kind == "regression":
        # TerraTorch squeezes its one quantity, and has no losses for more.
        given.only("num_outputs", 1)
        given.only("head_num_outputs", 1)
        given.drop("num_classes")
        return 1
    classes = given.number("num_classes", 0)
    if classes < 2:
        raise RecipeError(
            f"{given.source}.num_classes: {classes} found, a segmentation has 2 or more to be imported."
        )
    return classes


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    options: BackboneOptions
    maps: tuple[int, ...] | None
    """The blocks whose outputs the necks are given; None for all of a pyramid's levels."""
    timesteps: int
    side: int
    multiple: int
    foundation: Foundation | None = None


def _read_backbone(name: str, config: Config) -> _Found:
    if name.startswith("prithvi"):
        return _read_prithvi(name, config)
    if name.removeprefix("timm_") in FOUNDATIONS:
        return _read_foundation(name.removeprefix("timm_"), config)
    return _read_timm(name, config)


def _read_foundation(name: str, config: Config) -> _Found:
    given = config.network
    found = read_foundation(name, given)
    side = given.numbers("backbone_img_size", _NATIVE_TILE)[-1]
    told = [neck.get("name") for neck in listed(given.given.get("necks")) if isinstance(neck, Mapping)]
    if found.depth and "ReshapeTokensToImage" not in told:
        raise RecipeError(
            f"{given.source}.necks: {name} gives tokens, and without ReshapeTokensToImage nobody says "
            "which map they are. Add it as the model was trained."
        )
    maps = found.maps
    if maps is None and found.depth:
        maps = tuple(range(found.depth))
    options = BackboneOptions()
    return _Found(found.name, options, maps, 1, side, 2 * found.patch if found.depth else 1, found)


def _read_prithvi(name: str, config: Config) -> _Found:
    given = config.network
    given.drop("backbone_model_bands")
    plain = name.removesuffix("_tl")
    if plain not in VARIANTS:
        raise _unknown(name, given)
    encodings = given.take("backbone_coords_encoding", ["time"] if name != plain else [])
    if encodings and config.data.get("use_metadata"):
        raise RecipeError(
            f"{config.path}: data.use_metadata tells the model times and places, which scenes to be "
            "mapped do not come with; a model trained without them can be imported."
        )
    patch = given.numbers("backbone_patch_size", VARIANTS[plain].patch_size)
    if len(patch) == 3 and patch[0] != 1:
        raise RecipeError(f"{given.source}.backbone_patch_size: patches of one date are needed.")
    told: dict[str, Any] = {
        key: given.take(f"backbone_{key}", None)
        for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")
    }
    depth = told["depth"] or VARIANTS[plain].depth
    return _Found(
        name=plain,
        options=BackboneOptions(**told, patch_size=patch[-1]),
        maps=_blocks(given.numbers("backbone_out_indices", range(depth)), depth),
        timesteps=given.number("backbone_num_frames", 1),
        side=given.numbers("backbone_img_size", _NATIVE_TILE)[-1],
        multiple=2 * patch[-1],
    )


def _read_timm(name: str, config: Config) -> _Found:
    import timm
    from timm.models import is_model_in_modules

    given = config.network
    given.drop("backbone_model_bands")
    plain = name.removeprefix("timm_")
    if not timm.is_model(plain) or not is_model_in_modules(plain, {"resnet", "vision_transformer"}):
        raise _unknown(name, given)
    given.only("backbone_features_only", True)
    side = given.numbers("backbone_img_size", _NATIVE_TILE)[-1]
    if is_model_in_modules(plain, {"resnet"}):
        given.only("backbone_out_indices")
        return _Found(plain, BackboneOptions(), None, 1, side, 1)
    whole: Any = timm.create_model(plain, pretrained=False, img_size=side, num_classes=0)
    depth = len(whole.blocks)
    maps = _blocks(given.numbers("backbone_out_indices", range(depth - 4, depth)), depth)
    patch: int = whole.patch_embed.patch_size[0]
    # What comes after the last block whose output is taken is not in the checkpoint.
    return _Found(plain, BackboneOptions(depth=max(maps) + 1), maps, 1, side, 2 * patch)


def _unknown(name: str, given: Arguments) -> RecipeError:
    return RecipeError(
        f"{given.source}.backbone: {name or 'none'} cannot be imported; {', '.join(VARIANTS)}, also "
        f"with _tl, {', '.join(FOUNDATIONS)}, and timm's ResNets and plain vision transformers can."
    )


def _blocks(indices: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return tuple(index % depth for index in indices)


def _read_tiling(config: Config, side: int) -> tuple[int, int | None]:
    told = config.task.get("tiled_inference_parameters") or {}
    tiling = Arguments(f"{config.path}: tiled_inference_parameters", told)
    crop, stride = tiling.number("h_crop", 0), tiling.number("h_stride", 0)
    if not crop or tiling.number("w_crop", crop) != crop:
        return side, None
    return crop, crop - stride if stride else None


def _read_decoder(config: Config, found: _Found, outputs: int) -> tuple[TerraTorch, int | None]:
    given, maps = config.network, found.maps
    table: dict[str, Any] = {}
    place = None
    for number, (name, arguments) in enumerate(necks(config)):
        if name == "SelectIndices":
            chosen = arguments.numbers("indices", None)
            if min(chosen) < 0 or (maps and max(chosen) >= len(maps)):
                count = f"0 to {len(maps) - 1}" if maps else "0"
                raise RecipeError(
                    f"{arguments.source}.indices: count from {count} to import the model, found "
                    f"{list(chosen)}."
                )
            maps = tuple(maps[index] for index in chosen) if maps else chosen
        elif name == "ReshapeTokensToImage":
            _check_class_token(arguments, found)
            arguments.only("temporal_inputs", False)
            _check_dates(arguments, found)
        elif name == "LearnedInterpolateToPyramidal":
            table["neck"], place = "learned", number
        elif name == "InterpolateToPyramidal":
            arguments.only("mode", "nearest")
            table |= {"neck": "interpolated", "scale": arguments.number("scale_factor", 2)}
        elif name == "MaxpoolToPyramidal":
            table |= {"neck": "pooled", "scale": arguments.number("kernel_size", 2)}
        else:
            raise RecipeError(f"{arguments.source}: the neck {name} cannot be imported.")
        arguments.end()
    decoder = str(given.take("decoder", "")).removeprefix("terratorch_")
    if decoder not in _DECODERS:
        raise RecipeError(
            f"{given.source}.decoder: {decoder or 'none'} cannot be imported; "
            f"{', '.join(_DECODERS)} can."
        )
    told = _DECODERS[decoder](given)
    if decoder == "LinearDecoder":
        if table.get("neck") in ("interpolated", "pooled"):
            raise RecipeError(f"{given.source}.decoder: {decoder} on a pyramid cannot be imported.")
        # That of itself, before a head that older versions did not put after it.
        told["channels"] = given.numbers("decoder_num_classes", outputs)
    table |= told
    table["head"] = given.numbers("head_channel_list", [])
    table["dropout"] = given.take("head_dropout", 0.0)
    if config.kind == "regression":
        table |= {"head_norm": True, "activation": _read_activation(given)}
        given.only("head_learned_upscale_layers", 0)
        given.drop("head_batch_norm")  # which TerraTorch takes, and does not look at
    return TerraTorch(blocks=maps, **table), place


def _read_activation(given: Arguments) -> str:
    path = str(given.take("head_final_act", "torch.nn.Identity"))
    name = path.rpartition(".")[2].lower().replace("identity", "none")
    if name not in ACTIVATIONS:
        raise RecipeError(
            f"{given.source}.head_final_act: {path} cannot be imported; torch.nn.ReLU, "
            "torch.nn.Sigmoid and torch.nn.Softplus can."
        )
    return name


def _check_class_token(arguments: Arguments, found: _Found) -> None:
    there = found.foundation is None or found.foundation.class_token
    removed = arguments.take("remove_cls_token", True)
    if removed is not there:
        raise RecipeError(
            f"{arguments.source}.remove_cls_token is {removed}, and {found.name} has "
            f"{'a' if there else 'no'} class token: such a model cannot be imported."
        )


def _check_dates(arguments: Arguments, found: _Found) -> None:
    dates = arguments.number("effective_time_dim", 1)
    if dates != found.timesteps:
        raise RecipeError(
            f"{arguments.source}.effective_time_dim is {dates}, the backbone has {found.timesteps} "
            "dates; they must be as many."
        )
    arguments.drop("h")


def _read_fcn(given: Arguments) -> dict[str, Any]:
    return {
        "name": "fcn",
        "channels": given.numbers("decoder_channels", 256),
        "convolutions": given.number("decoder_num_convs", 4),
        "map": given.number("decoder_in_index", -1),
    }


def _read_unet(given: Arguments) -> dict[str, Any]:
    given.only("decoder_use_batchnorm", True, "batchnorm")
    given.only("decoder_attention_type")
    return {"name": "unet", "channels": given.numbers("decoder_channels", None)}


def _read_upernet(given: Arguments) -> dict[str, Any]:
    table = {
        "name": "upernet",
        "channels": given.numbers("decoder_channels", 256),
        "bins": given.numbers("decoder_pool_scales", (1, 2, 3, 6)),
        "align_corners": given.take("decoder_align_corners", True),
    }
    # The neck's work, before there were necks.
    return table | ({"neck": "learned"} if given.take("decoder_scale_modules", False) else {})


def _read_linear(given: Arguments) -> dict[str, Any]:
    return {
        "name": "linear",
        "scale": given.number("decoder_upsampling_size", 0),
        "map": given.number("decoder_in_index", -1),
    }


def _read_identity(given: Arguments) -> dict[str, Any]:
    return {"name": "identity", "map": given.number("decoder_out_index", -1)}


_DECODERS: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "FCNDecoder": _read_fcn, "UNetDecoder": _read_unet, "UperNetDecoder": _read_upernet,
    "LinearDecoder": _read_linear, "IdentityDecoder": _read_identity,
}  # fmt: skip


def _read_lora(given: Arguments) -> LoraSettings | None:
    table = given.take("peft_config", None)
    if table is None:
        return None
    outer = Arguments(f"{given.source}.peft_config", table)
    if (method := outer.take("method", "")) != "LORA":
        raise RecipeError(f"{outer.source}.method: {method} cannot be imported; LORA can.")
    outer.drop("replace_qkv")
    inner = Arguments(f"{outer.source}.peft_config_kwargs", outer.take("peft_config_kwargs", {}))
    outer.end()
    rank_stabilised = inner.take("use_rslora", False)
    inner.only("use_dora", False)
    inner.only("fan_in_fan_out", False)
    inner.drop(
        "target_modules", "modules_to_save", "lora_dropout", "bias", "init_lora_weights", "task_type",
        "inference_mode", "exclude_modules", "layers_to_transform", "layers_pattern",
    )  # fmt: skip
    found = LoraSettings(
        kind=RsLora if rank_stabilised else Lora,
        r=inner.number("r", 8),
        alpha=inner.number("lora_alpha", 8),
    )
    inner.end()
    return found
