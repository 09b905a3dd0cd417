"""Ways to tune a backbone. What is trainable is what the method says, and is counted."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import peft
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geodeploy.errors import RecipeError
from geodeploy.train.backbone import Backbone
from geodeploy.train.recipe import Method

PATCHES = "patch_embed"


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


def apply_method(backbone: Backbone, method: Method) -> nn.Module:
    """The backbone with just those parameters trainable that ``method`` trains.

    For LoRA that is a `peft.PeftModel` around the timm model; otherwise the timm model itself.
    """
    return METHODS[method.name](backbone, method)


def count_parameters(backbone: nn.Module, decoder: nn.Module) -> ParameterCounts:
    """What is trained, and what there is."""
    everything = [*backbone.parameters(), *decoder.parameters()]
    return ParameterCounts(
        backbone=sum(item.numel() for item in backbone.parameters() if item.requires_grad),
        head=sum(item.numel() for item in decoder.parameters() if item.requires_grad),
        total=sum(item.numel() for item in everything),
    )


def adapter_targets(vit: nn.Module, targets: tuple[str, ...]) -> str:
    """The pattern, for peft, of the layers ``targets`` inside the blocks.

    It is anchored there: a bare ``proj`` would also find the projection of the patch embedding.
    """
    layers = {
        re.sub(r"^blocks\.\d+\.", "", name)
        for name, module in vit.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    unknown = [target for target in targets if target not in layers]
    if unknown:
        raise RecipeError(
            f"method.targets: the blocks have no linear layer {', '.join(unknown)}; "
            f"they have {', '.join(sorted(layers))}."
        )
    return rf"blocks\.\d+\.({'|'.join(re.escape(target) for target in targets)})"


def _lora(backbone: Backbone, method: Method) -> nn.Module:
    if not isinstance(backbone.encoder, VisionTransformer):
        raise RecipeError(
            "method.name: lora needs a vision transformer; take full or linear for a convolutional one."
        )
    config = peft.LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=adapter_targets(backbone.encoder, method.targets),
        modules_to_save=[PATCHES] if backbone.new_patches else None,
        revision=backbone.sha256,
    )
    wrapped: nn.Module = peft.get_peft_model(backbone.encoder, config)
    return wrapped


def _linear(backbone: Backbone, method: Method) -> nn.Module:
    encoder = backbone.encoder.requires_grad_(False)
    encoder.get_submodule(backbone.first).requires_grad_(backbone.new_patches)
    return encoder


def _full(backbone: Backbone, method: Method) -> nn.Module:
    return backbone.encoder.requires_grad_(True)


METHODS: dict[str, Callable[[Backbone, Method], nn.Module]] = {
    "lora": _lora,
    "linear": _linear,
    "full": _full,
}
