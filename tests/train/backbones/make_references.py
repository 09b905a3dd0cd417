"""Ask every reference once, and keep a part of what it gives, for machines that have none of them.

python tests/train/backbones/make_references.py [NAME ...]
"""

import json
import sys

import torch
from comparing import KEPT
from references import REFERENCES, ask_for_float32, filled, pixels_of

VALUES = 48
"""Kept of each map, spread evenly."""


def sample(values: torch.Tensor) -> torch.Tensor:
    """Some of the values of a map, from its beginning to its end."""
    flat = values.flatten()
    return flat[:: max(len(flat) // VALUES, 1)][:VALUES]


def values_of(tensor: torch.Tensor) -> list[float]:
    """One where all are the same."""
    values = [round(float(item), 7) for item in tensor.flatten()]
    return values[:1] if len(set(values)) == 1 else values


def main(names: list[str]) -> None:
    """Write a file a reference."""
    torch.set_num_threads(1)
    ask_for_float32()
    KEPT.mkdir(exist_ok=True)
    for name in names or REFERENCES:
        reference = REFERENCES[name]
        network = reference.build(reference.sides[0])
        tensors = filled(network)
        parameters = dict(network.named_parameters())
        kept = {
            "shapes": {key: list(value.shape) for key, value in tensors.items() if key in parameters},
            "constants": {
                key: [list(value.shape), values_of(value)]
                for key, value in tensors.items()
                if key not in parameters and key not in reference.computed
            },
            "maps": {
                side: [
                    [round(float(item), 6) for item in sample(values)]
                    for values in reference.answer(tensors, pixels_of(reference.planes, side))
                ]
                for side in reference.sides
            },
        }
        (KEPT / f"{name}.json").write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
