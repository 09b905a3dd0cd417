"""What training makes small: cross-entropy and Dice over the labelled pixels."""

# B batch, K class, H row, W column

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor
from torch.nn import functional

from geodeploy.labels import IGNORED
from geodeploy.train.recipe import Training

Loss = Callable[[Tensor, Tensor], Tensor]
_RAREST = 10.0
"""Largest ratio of a balanced weight to the mean: a class of ten pixels must not rule the rest."""


def build_loss(training: Training, shares: NDArray[np.float64]) -> Loss:
    """The recipe's weighted sum of losses, of logits (B, K, H, W) and codes (B, H, W).

    ``shares`` are the classes' among the training pixels, for balanced weights.
    """
    dice = DiceLoss("multiclass", ignore_index=IGNORED)
    weights = class_weights(training.class_weights, shares)

    def loss(logits_BKHW: Tensor, codes_BHW: Tensor) -> Tensor:
        total = logits_BKHW.new_zeros(())
        if training.cross_entropy:
            total = total + training.cross_entropy * cross_entropy(logits_BKHW, codes_BHW, weights)
        if training.dice:
            total = total + training.dice * dice(logits_BKHW, codes_BHW)
        return total

    return loss


def cross_entropy(logits_BKHW: Tensor, codes_BHW: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean over labelled pixels; 0, not NaN, where there are none."""
    weight_K = torch.tensor(weights, dtype=logits_BKHW.dtype, device=logits_BKHW.device)
    summed = functional.cross_entropy(
        logits_BKHW, codes_BHW, weight=weight_K, ignore_index=IGNORED, reduction="sum"
    )
    labelled = codes_BHW[codes_BHW != IGNORED]
    return summed / weight_K[labelled].sum().clamp(min=1e-6)


def class_weights(wanted: str | tuple[float, ...], shares: NDArray[np.float64]) -> tuple[float, ...]:
    """One weight a class: as given, all 1, or by the inverse of its share with a mean of 1.

    A class without a label weighs 1 too: made-up clouds may still bring it up.
    """
    if isinstance(wanted, tuple):
        return wanted
    if wanted == "none":
        return (1.0,) * len(shares)
    weights = np.ones(len(shares))
    present = shares > 0
    if present.any():
        inverse = 1 / shares[present]
        for _ in range(2):  # the cap moves the mean, once
            inverse = np.minimum(inverse / inverse.mean(), _RAREST)
        weights[present] = inverse
    return tuple(float(weight) for weight in weights)
