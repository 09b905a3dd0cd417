"""Our network with the weights of a published file, beside the network that the file is of."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from references import GSD_M, TINY, Reference, fill
from torch import Tensor

from geodeploy.train.backbone import Backbone, build_backbone
from geodeploy.train.recipe import Model

LARGEST = 1e-4
"""What single precision may leave."""


KEPT = Path(__file__).parent / "references"
"""What `make_references` keeps of each."""


def kept_tensors(name: str) -> dict[str, Tensor]:
    """Those that the reference ``name`` had when it was asked."""
    kept = json.loads((KEPT / f"{name}.json").read_text())
    tensors = {key: fill(key, tuple(shape)) for key, shape in kept["shapes"].items()}
    for key, (shape, values) in kept["constants"].items():
        count = math.prod(shape)
        tensors[key] = torch.tensor(values * (count if len(values) == 1 else 1)).reshape(shape)
    return tensors


def ours(reference: Reference, tensors: dict[str, Tensor], side: int, folder: Path) -> Backbone:
    """The backbone that a recipe names, with the ``tensors`` as they are published."""
    torch.save(reference.packed(dict(tensors)), folder / "published.pth")
    options: dict[str, Any] = {}
    if "resnet" not in reference.backbone:
        options = TINY | reference.options
    model = Model(
        backbone=reference.backbone,
        options=options,
        weights=str(folder / "published.pth"),
        tile=side,
        overlap=8,
        timesteps=reference.dates,
        **reference.told,
    )
    return build_backbone(model, reference.bands, gsd_m=GSD_M)


def maps_of(backbone: Backbone, pixels: Tensor) -> list[Tensor]:
    """Its maps of every block or level, the last one normalised at the end, of others none."""
    encoder: Any = backbone.encoder.eval()
    every = list(range(len(encoder.feature_info)))
    with torch.inference_mode():
        maps = list(encoder.forward_intermediates(pixels, indices=every, intermediates_only=True))
        if not backbone.taps.pyramid:
            maps[-1:] = encoder.forward_intermediates(
                pixels, indices=every[-1:], norm=True, intermediates_only=True
            )
    return maps


def largest_difference(found: list[Tensor], needed: list[Tensor]) -> float:
    """Over all maps that the reference gives; they must be of one shape."""
    assert len(found) == len(needed)
    pairs = [(one, two) for one, two in zip(found, needed, strict=True) if two.numel()]
    assert all(one.shape == two.shape for one, two in pairs)
    assert min(float(two.std()) for _, two in pairs) > 0.05  # something to differ in
    return max(float((one - two).abs().max()) for one, two in pairs)
