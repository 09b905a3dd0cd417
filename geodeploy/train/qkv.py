"""Query, key and value apart, where timm has them in one layer: to tune some of the three."""

# B batch, N token, D width

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from geodeploy.errors import RecipeError

FUSED = "attn.qkv"
"""The layer of a block that holds all three."""
PARTS = {"attn.q": "attn.qkv.q", "attn.k": "attn.qkv.k", "attn.v": "attn.qkv.v"}
"""A third of its rows each, by the name in a recipe, with the name of the layer once it is split."""


class SplitQkv(nn.Module):
    """Three layers that do what ``fused`` does."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        width = fused.out_features // 3
        self.q, self.k, self.v = (
            _linear({name: rows[place * width :][:width] for name, rows in fused.state_dict().items()})
            for place in range(3)
        )

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """(B, N, 3 D)."""
        return torch.cat([self.q(tokens_BND), self.k(tokens_BND), self.v(tokens_BND)], dim=-1)

    def fused(self) -> nn.Linear:
        """The one layer again."""
        parts = [part.state_dict() for part in (self.q, self.k, self.v)]
        return _linear({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def split_qkv(vit: nn.Module, targets: Collection[str]) -> None:
    """Split the fused layer of each block of ``vit`` if ``targets`` name one of `PARTS`.

    Raises:
        RecipeError: they name the whole too.
    """
    if PARTS.keys().isdisjoint(targets):
        return
    if FUSED in targets:
        raise RecipeError(
            f"method.targets: {FUSED} is {', '.join(PARTS)} together; name it, or some of the three."
        )
    for name, layer in list(vit.named_modules()):
        if re.fullmatch(rf"blocks\.\d+\.{re.escape(FUSED)}", name) and isinstance(layer, nn.Linear):
            vit.set_submodule(name, SplitQkv(layer))


def fuse_qkv(module: nn.Module) -> None:
    """Put a plain linear layer in place of each `SplitQkv`, its parts merged before."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, SplitQkv):
            module.set_submodule(name, layer.fused())


def _linear(state: Mapping[str, Tensor]) -> nn.Linear:
    outputs, inputs = state["weight"].shape
    layer = nn.Linear(inputs, outputs, bias="bias" in state)
    layer.load_state_dict(state)
    return layer
