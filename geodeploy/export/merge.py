"""Fold adapters and scales into the weights they adapt, on a copy and in fp32 or better."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from geodeploy.errors import ParityError
from geodeploy.export.parity import compare, logits_of, tolerance
from geodeploy.spec import ModelSpec
from geodeploy.train.adapters import merge_lora
from geodeploy.train.model import TunedModel
from geodeploy.train.qkv import fuse_qkv
from geodeploy.train.scaled import merge_scales


def merge(model: TunedModel, *, dtype: torch.dtype = torch.float32) -> TunedModel:
    """A copy of ``model`` without adapters or scales, its weights changed by what those did.

    Prompts stay: they are constants of the network. So does what stands beside it, as in ViT-Adapter.

    ``model`` itself stays as it is: merging in place would lose the adapter if anything failed after.
    """
    merged = deepcopy(model).to(dtype).eval()
    try:
        if isinstance(merged.backbone, PeftModel):
            merged.backbone = merged.backbone.merge_and_unload(safe_merge=True)
        merge_lora(merged.backbone)
    except ValueError as error:  # NaN in the product of the adapter's matrices
        raise ParityError(
            f"The adapter cannot be merged ({error}). Was the training stable? Look at curves.png."
        ) from error
    merge_scales(merged.backbone)
    fuse_qkv(merged.backbone)
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged


def merge_checked(
    model: TunedModel, spec: ModelSpec, pixels: NDArray[np.float32], labels: NDArray[Any]
) -> tuple[TunedModel, float]:
    """`merge`, and the largest difference of its outputs from those of ``model`` on real ``pixels``.

    Raises:
        ParityError: the two do not do the same.
    """
    merged = merge(model)
    found = compare(logits_of(model, pixels), logits_of(merged, pixels), labels, spec)
    if problem := tolerance(spec).problem(found):
        raise ParityError(f"The merged model differs from the unmerged one: {problem}.")
    return merged, found.max_abs_diff
