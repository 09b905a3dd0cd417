"""The tensors of a TerraTorch checkpoint under the names that they have here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geodeploy.errors import WeightsError
from geodeploy.imports.network import Network
from geodeploy.train.backbones.prithvi import flat_filters

_LORA = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_WRAPPED = re.compile(
    r"^(base_model\.model\.)?(model\.)?|_timm_module\.|base_layer\.|modules_to_save\.default\."
)
"""What peft, timm and TerraTorch put into the names of a network that they wrap."""
_UNUSED = re.compile(r"original_module\.|(temporal|location)_embed_enc\.")
"""What was replaced in training, and what looks at times and places, of which nothing was told."""
_PARTS = {"q_linear": "q", "k_linear": "k", "v_linear": "v"}
"""Of a layer that TerraTorch's ``replace_qkv`` took apart."""
_DECODER = (
    (r"neck\.NECK\.fpn1", "neck.finest"),
    (r"neck\.NECK\.fpn2\.0", "neck.finer"),
    (r"decoder\.fpn1", "neck.finest"),
    (r"decoder\.fpn2\.0", "neck.finer"),
    (r"decoder\.convs\.(\d+)\.2\.ln", r"decoder.levels.\1.2"),
    (r"decoder\.convs\.", "decoder.levels."),
    (r"decoder\.decoder\.blocks\.(\d+)\.conv1", r"decoder.levels.\1.0"),
    (r"decoder\.decoder\.blocks\.(\d+)\.conv2", r"decoder.levels.\1.1"),
    (r"decoder\.psp_modules\.(\d+)\.1", r"decoder.branches.\1"),
    (r"decoder\.bottleneck", "decoder.join"),
    (r"decoder\.lateral_convs", "decoder.laterals"),
    (r"decoder\.fpn_convs", "decoder.smooth"),
    (r"decoder\.fpn_bottleneck", "decoder.fuse"),
    (r"decoder\.conv\.", "decoder.spread."),
)
"""The beginning of a name there, and here."""
_LAYERS = ((".conv.", ".0."), (".norm.", ".1."))
"""A convolution and its normalisation, in UPerNet."""


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """The tensors of a network."""

    encoder: Mapping[str, Tensor]
    """Without adapters, query, key and value in one layer."""
    adapters: Mapping[str, Mapping[str, Tensor]]
    """The matrices A and B of each layer that has them."""
    decoder: Mapping[str, Tensor]
    """Of a `TerraTorchDecoder`."""


def sort_weights(tensors: Mapping[str, Tensor], network: Network, source: str) -> TrainedWeights:
    """The tensors of a checkpoint by what they belong to; losses and auxiliary heads are left aside.

    Raises:
        WeightsError: there is no model in it, or a broken one.
    """
    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        if not value.isfinite().all():
            raise WeightsError(
                f"{source} holds numbers that are not finite, the first in {full}: its training broke. "
                "Take the checkpoint of an earlier step."
            )
        name = full.removeprefix("model.")
        part, _, rest = name.partition(".")
        if part == "encoder" and not _UNUSED.search(rest):
            rest = _WRAPPED.sub("", rest)
            if found := _LORA.fullmatch(rest):
                adapters.setdefault(_split_name(found[1]), {})[found[2]] = flat_filters(value)
            else:
                encoder[rest] = flat_filters(value)
        elif part in ("neck", "decoder", "head"):
            decoder[_decoder_name(name, network)] = value
    if not encoder or not decoder:
        raise WeightsError(
            f"{source} has no encoder and decoder of TerraTorch; its first tensors are "
            f"{', '.join(list(tensors)[:3])}."
        )
    if not any(name.startswith("head.") for name in decoder):
        # A decoder that gives logits by itself: the head here leaves them as they are.
        decoder |= {"head.1.weight": torch.eye(network.outputs)[..., None, None]}
        decoder |= {"head.1.bias": torch.zeros(network.outputs)}
    return TrainedWeights(_fuse(encoder, source), adapters, decoder)


def _split_name(layer: str) -> str:
    before, _, last = layer.rpartition(".")
    return f"{before}.{_PARTS.get(last, last)}"


def _fuse(encoder: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """``encoder`` with one layer for query, key and value."""
    fused = {}
    for name, value in encoder.items():
        if ".k_linear." in name or ".v_linear." in name:
            continue
        if ".q_linear." in name:
            names = [name.replace("q_linear", part) for part in _PARTS]
            if absent := [part for part in names if part not in encoder]:
                raise WeightsError(
                    f"{source} has {name} and not {absent[0]}: a part of it is missing. Copy the "
                    "checkpoint again, or save it whole."
                )
            parts = [encoder[part] for part in names]
            fused[name.replace("q_linear.", "")] = torch.cat(parts)
        else:
            fused[name] = value
    return fused


def _decoder_name(name: str, network: Network) -> str:
    if name.startswith("head.head."):
        return _head_name(name, network)
    for theirs, ours in _DECODER:
        renamed, found = re.subn("^" + theirs.replace("NECK", str(network.neck)), ours, name)
        if found:
            for there, here in _LAYERS:
                renamed = renamed.replace(there, here)
            return renamed
    return name


def _head_name(name: str, network: Network) -> str:
    before = len(network.decoder.head)
    if network.decoder.head_norm:
        if before and name.startswith("head.head.0."):
            return name.replace("head.head.0.", "head.")
        return re.sub(r"head\.head\.\d+", f"head.{before + 1}", name)
    place = re.sub(r"head\.head\.0\.(\d+)\.0", lambda found: f"head.{2 * int(found[1])}", name)
    return place.replace("head.head.2", f"head.{2 * before + 1}")
