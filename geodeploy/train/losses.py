"""What training makes small, over the labelled pixels.

Of classes cross-entropy, Dice, focal and Lovasz loss; of quantities squared, absolute and Huber loss.
Of what whole tiles show binary cross-entropy.
"""

# B batch, K class, T target, H row, W column

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss
from torch import Tensor
from torch.nn import functional

from geodeploy.labels import IGNORED
from geodeploy.train.recipe import Training

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_FOCAL_GAMMA = 2.0
"""The paper's own (arXiv 1708.02002)."""
_RAREST = 10.0
"""Largest ratio of a balanced weight to the mean: a class of ten pixels must not rule the rest."""


def build_loss(training: Training, shares: NDArray[np.float64], *, distillation: float = 0.0) -> Loss:
    """The recipe's weighted sum of losses, of logits (B, K, H, W) and codes (B, H, W).

    With teachers there is a third argument, their probabilities (B, K, H, W), and ``distillation`` is
    the weight of what they say.

    ``shares`` are the classes' among the training pixels, for balanced weights.
    """
    dice = DiceLoss("multiclass", ignore_index=IGNORED)
    lovasz = LovaszLoss("multiclass", ignore_index=IGNORED)
    weights = class_weights(training.class_weights, shares)

    def loss(logits_BKHW: Tensor, codes_BHW: Tensor, taught_BKHW: Tensor | None = None) -> Tensor:
        total = logits_BKHW.new_zeros(())
        if training.cross_entropy:
            total = total + training.cross_entropy * cross_entropy(logits_BKHW, codes_BHW, weights)
        if training.dice:
            total = total + training.dice * dice(logits_BKHW, codes_BHW)
        if training.focal:
            focal = cross_entropy(logits_BKHW, codes_BHW, weights, gamma=_FOCAL_GAMMA)
            total = total + training.focal * focal
        if training.lovasz:
            # Without a label it is empty, and its sum 0.
            total = total + training.lovasz * lovasz(logits_BKHW, codes_BHW).sum()
        if taught_BKHW is not None:
            total = total + distillation * taught_entropy(logits_BKHW, taught_BKHW)
        return total

    return loss


def build_value_loss(training: Training, std: Tensor) -> Loss:
    """The recipe's weighted sum of losses, of quantities and labels (B, T, H, W), NaN where none is.

    Errors are divided by ``std`` (T, 1, 1), so that targets of all units weigh alike. Each target's is
    the mean over its labels, 0, not NaN, where there are none; the loss is the mean over the targets.
    """

    def loss(found_BTHW: Tensor, labels_BTHW: Tensor, taught: Tensor | None = None) -> Tensor:
        known_BTHW = torch.isfinite(labels_BTHW)
        # Not a product with 0: the gradient of NaN is NaN all the same.
        errors_BTHW = (found_BTHW - torch.where(known_BTHW, labels_BTHW, 0.0)) / std.to(
            labels_BTHW.device
        )
        errors_BTHW = torch.where(known_BTHW, errors_BTHW, 0.0)
        each_BTHW = training.mse * errors_BTHW**2 + training.mae * errors_BTHW.abs()
        if training.huber:
            zero = torch.zeros_like(errors_BTHW)
            each_BTHW = each_BTHW + training.huber * functional.huber_loss(
                errors_BTHW, zero, reduction="none"
            )
        labels_T = known_BTHW.sum(dim=(0, 2, 3)).clamp(min=1)
        return (each_BTHW.sum(dim=(0, 2, 3)) / labels_T).mean()

    return loss


def build_label_loss(weights: Sequence[float]) -> Loss:
    """The binary cross-entropy of logits (B, K) and labels (B, K), `IGNORED` where nobody knows.

    It is the mean over the labels that are known, 0, not NaN, where there are none; those that are 1
    count by the ``weights`` of their class.
    """

    def loss(logits_BK: Tensor, labels_BK: Tensor, taught: Tensor | None = None) -> Tensor:
        known_BK = labels_BK != IGNORED
        each_BK = functional.binary_cross_entropy_with_logits(
            logits_BK,
            (labels_BK == 1).to(logits_BK.dtype),
            pos_weight=torch.tensor(weights, dtype=logits_BK.dtype, device=logits_BK.device),
            reduction="none",
        )
        return (each_BK * known_BK).sum() / known_BK.sum().clamp(min=1)

    return loss


def positive_weights(
    wanted: str | tuple[float, ...], shown: NDArray[np.int64], absent: NDArray[np.int64]
) -> tuple[float, ...]:
    """What labels of 1 weigh, one number a class: as given, all 1, or the ratio of 0 to 1.

    ``shown`` and ``absent`` are how many tiles have the one and the other. The ratio is 10 at most, and
    1 for a class that no tile shows.
    """
    if isinstance(wanted, tuple):
        return wanted
    if wanted == "none":
        return (1.0,) * len(shown)
    ratios = np.where(shown > 0, absent / np.maximum(shown, 1), 1.0)
    return tuple(float(ratio) for ratio in np.clip(ratios, 1 / _RAREST, _RAREST))


def cross_entropy(
    logits_BKHW: Tensor, codes_BHW: Tensor, weights: Sequence[float], *, gamma: float = 0.0
) -> Tensor:
    """The weighted mean over labelled pixels; 0, not NaN, where there are none.

    With ``gamma`` it is the focal loss (arXiv 1708.02002): each pixel counts by (1 - p)^gamma, where p
    is the probability of its class.
    """
    weight_K = torch.tensor(weights, dtype=logits_BKHW.dtype, device=logits_BKHW.device)
    entropy_BHW = functional.cross_entropy(
        logits_BKHW, codes_BHW, weight=weight_K, ignore_index=IGNORED, reduction="none"
    )
    labelled_BHW = codes_BHW != IGNORED
    if gamma:
        position_BHW = torch.where(labelled_BHW, codes_BHW, 0)
        probs_BHW = logits_BKHW.softmax(dim=1).gather(1, position_BHW[:, None])[:, 0]
        entropy_BHW = entropy_BHW * (1 - probs_BHW) ** gamma
    return entropy_BHW.sum() / weight_K[codes_BHW[labelled_BHW]].sum().clamp(min=1e-6)


def taught_entropy(logits_BKHW: Tensor, taught_BKHW: Tensor) -> Tensor:
    """The mean cross-entropy against the teachers' probabilities, over the pixels they speak of.

    0, not NaN, where there are none.
    """
    summed = -(taught_BKHW * functional.log_softmax(logits_BKHW, dim=1)).sum()
    return summed / taught_BKHW.sum().clamp(min=1e-6)


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
