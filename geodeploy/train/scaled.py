"""Linear layers whose rows and columns are scaled, shifted and joined by a low-rank product.

SSL scales the space of a weight's left singular vectors, its rows; SSB both, rows and columns ("See
Further for Parameter Efficient Fine-tuning by Standing on the Shoulders of Decomposition", arXiv
2407.05417).
"""

# B batch, N token

import re

import torch
from torch import Tensor, nn
from torch.nn import functional


class ScaledLinear(nn.Module):
    """``linear`` with the weight rows * W * columns + alpha / r * B A and the bias rows * b + shift."""

    def __init__(self, linear: nn.Linear, *, columns: bool, r: int, alpha: int) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.linear = linear
        self.rows = nn.Parameter(torch.ones(outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))
        self.columns = nn.Parameter(torch.ones(inputs)) if columns else None
        # As in LoRA: the product is zero at first, and its gradient is not.
        self.inner = nn.Parameter(torch.empty(r, inputs).uniform_(-1, 1) / inputs**0.5) if r else None
        self.outer = nn.Parameter(torch.zeros(outputs, r)) if r else None
        self.scale = alpha / r if r else 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, outputs) of (B, N, inputs)."""
        scaled = tokens if self.columns is None else tokens * self.columns
        out = functional.linear(scaled, self.linear.weight, self.linear.bias) * self.rows + self.shift
        if self.inner is None or self.outer is None:
            return out
        return out + self.scale * functional.linear(functional.linear(tokens, self.inner), self.outer)

    def merged(self) -> nn.Linear:
        """The one layer that does the same."""
        weight = self.rows[:, None] * self.linear.weight
        if self.columns is not None:
            weight = weight * self.columns
        if self.inner is not None and self.outer is not None:
            weight = weight + self.scale * self.outer @ self.inner
        bias = self.shift if self.linear.bias is None else self.rows * self.linear.bias + self.shift
        merged = nn.Linear(*weight.T.shape)
        merged.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        return merged


def scale_layers(module: nn.Module, pattern: str, *, columns: bool, r: int, alpha: int) -> None:
    """Put a `ScaledLinear` in place of each linear layer whose whole name ``pattern`` matches."""
    for name, layer in list(module.named_modules()):
        if re.fullmatch(pattern, name):
            module.set_submodule(name, ScaledLinear(layer, columns=columns, r=r, alpha=alpha))


def merge_scales(module: nn.Module) -> None:
    """Put a plain linear layer in place of each `ScaledLinear`."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, ScaledLinear):
            module.set_submodule(name, layer.merged())
