"""Ways to tune a backbone. What is trainable is what the method says, and is counted."""

import logging
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geodeploy.errors import RecipeError
from geodeploy.train.adapters import check_rank, inject_lora, layer_pattern, wrap
from geodeploy.train.backbone import Backbone, Taps
from geodeploy.train.backbones.timm_models import TRANSFORMERS
from geodeploy.train.method_options import (
    Adapter,
    BitFit,
    LayerNorm,
    Lora,
    Method,
    Ssb,
    Ssl,
    VitAdapter,
    Vpt,
)
from geodeploy.train.prompts import add_prompts
from geodeploy.train.qkv import split_qkv
from geodeploy.train.scaled import scale_layers
from geodeploy.train.vit_adapter import AdaptedVit

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters."""

    backbone: int
    """Trained in the backbone: adapters, patch embedding, or all of it."""
    head: int
    """Trained in the decoder."""
    total: int
    """Of the whole network, trained or not."""

    @property
    def trainable(self) -> int:
        """All that are trained."""
        return self.backbone + self.head

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} of {self.total:,} parameters are trained "
            f"({self.backbone:,} in the backbone, {self.head:,} in the decoder)"
        )


def count_parameters(backbone: nn.Module, decoder: nn.Module) -> ParameterCounts:
    """What is trained, and what there is."""
    everything = [*backbone.parameters(), *decoder.parameters()]
    return ParameterCounts(
        backbone=sum(item.numel() for item in backbone.parameters() if item.requires_grad),
        head=sum(item.numel() for item in decoder.parameters() if item.requires_grad),
        total=sum(item.numel() for item in everything),
    )


def warn_of_size(counts: ParameterCounts, method: Method) -> None:
    """Say where ``method`` trains more beside a frozen backbone than the backbone has."""
    frozen = counts.total - counts.trainable
    if not method.tunes_all and counts.backbone > frozen:
        log.warning(
            "method: %s trains %s parameters beside the %s of the frozen backbone, more than "
            "method.name = full would. A lower rank, fewer tokens or fewer method.targets train less.",
            method,
            f"{counts.backbone:,}",
            f"{frozen:,}",
        )


def apply_method(backbone: Backbone, method: Method) -> nn.Module:
    """The backbone with just those parameters trainable that ``method`` trains.

    For an `Adapter` that is a `peft.PeftModel` around the timm model, for `VitAdapter` an `AdaptedVit`;
    otherwise the timm model itself, with prompts or scales put into it where the method has some.

    Raises:
        RecipeError: the method does not fit the network.
    """
    encoder: Any = backbone.encoder
    fits = VisionTransformer if isinstance(method, VitAdapter | Vpt) else TRANSFORMERS
    if isinstance(method, Adapter | Ssl | VitAdapter | Vpt) and not isinstance(encoder, fits):
        kind = type(encoder).__name__
        other = (
            "a vision transformer; take lora or full for one of rotary positions"
            if isinstance(encoder, TRANSFORMERS)
            else f"a plain vision transformer, and this network is a {kind}; take full or linear"
        )
        raise RecipeError(f"method.name: {method.name} needs {other}.")
    if isinstance(method, Adapter | Ssl):
        split_qkv(encoder, method.targets)
    if isinstance(method, Adapter):
        return wrap(backbone, method)
    encoder.requires_grad_(method.tunes_all)
    if isinstance(method, Vpt):
        add_prompts(encoder, method.tokens, deep=method.deep, dropout=method.dropout)
    elif isinstance(method, Ssl):
        columns, pattern = isinstance(method, Ssb), layer_pattern(encoder, method.targets)
        check_rank(encoder, pattern, method)
        scale_layers(encoder, pattern, columns=columns, r=method.r, alpha=method.alpha)
    elif isinstance(method, BitFit):
        _train_biases(encoder)
    elif isinstance(method, LayerNorm):
        _train_norms(encoder)
    elif isinstance(method, VitAdapter) and method.lora_r:
        check_rank(encoder, layer_pattern(encoder, Lora().targets), method)
        inject_lora(encoder, method.lora_r)
    if backbone.new_patches:
        encoder.get_submodule(backbone.first).requires_grad_(True)
    tuned: nn.Module = encoder
    if isinstance(method, VitAdapter):
        tuned = AdaptedVit(
            encoder,
            points=method.points,
            channels=method.channels,
            value_ratio=method.value_ratio,
        )
    return tuned


def taps_of(tuned: nn.Module, backbone: Backbone) -> Taps:
    """Where a decoder taps ``tuned``, which a method made of ``backbone``."""
    return tuned.taps() if isinstance(tuned, AdaptedVit) else backbone.taps


def _train_biases(encoder: nn.Module) -> None:
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def _train_norms(encoder: nn.Module) -> None:
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    if not norms:
        raise RecipeError(
            "method.name: layernorm needs a network with layer normalisation; take full or linear."
        )
    for norm in norms:
        norm.requires_grad_(True)


def layer_rates(encoder: nn.Module, decay: float) -> dict[str, float]:
    """A factor on the learning rate of each of the encoder's parameters, by name.

    1 for those of its last layer, times ``decay`` for each layer before it.

    Raises:
        RecipeError: the network does not say what its layers are.
    """
    if decay == 1:
        return {name: 1.0 for name, _ in encoder.named_parameters()}
    matcher: Any = getattr(encoder, "group_matcher", None)
    if matcher is None:
        raise RecipeError("method.layer_decay: needs a network of timm; take 1 for this one.")
    layers: dict[str, int] = group_parameters(encoder, matcher(), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}
