"""Patch filters that a small transformer makes of the bands' wavelengths (DOFA, arXiv 2403.15356).

With the bands of a recipe they are constants: a plain convolution.
"""

# C band, D width of the network, E width of the small transformer, P pixel of a patch

import torch
from torch import Tensor, nn

from geodeploy.errors import WeightsError
from geodeploy.train.backbones.family import Tensors, Wanted

_HEADS = 4


def wavelengths_of(wanted: Wanted, table_um: dict[str, float]) -> Tensor:
    """The wavelength of each band of the recipe in micrometres.

    Raises:
        WeightsError: there is none for a band.
    """
    if wanted.micrometres is not None:
        return torch.tensor(wanted.micrometres)
    if unknown := [band for band in wanted.bands if band not in table_um]:
        raise WeightsError(
            f"{wanted.model.backbone} makes its filters of wavelengths, and knows none of "
            f"{', '.join(unknown)}. It knows those of {', '.join(table_um)}."
        )
    return torch.tensor([table_um[band] for band in wanted.bands])


def generate_filters(generator: Tensors, waves_CE: Tensor, *, encoder: str) -> tuple[Tensor, Tensor]:
    """Filters (C, P D), in the order that the network has in them, and biases (D,).

    ``generator`` has the small transformer's tensors, those of its one layer after ``encoder``.
    """
    prefix = f"{encoder}.layers.0."
    state = {
        name.removeprefix(prefix): value for name, value in generator.items() if name.startswith(prefix)
    }
    hidden, width = state["linear1.weight"].shape
    layer = nn.TransformerEncoderLayer(width, _HEADS, hidden, dropout=0.0, activation="gelu").eval()
    layer.load_state_dict(state)
    tokens = [generator["weight_tokens"], waves_CE, generator["bias_token"]]
    with torch.no_grad():
        told: Tensor = layer(torch.cat(tokens))
        of_bands = told[len(tokens[0]) : -1] + waves_CE
        filters = of_bands @ generator["fc_weight.weight"].T + generator["fc_weight.bias"]
        bias = told[-1] @ generator["fc_bias.weight"].T + generator["fc_bias.bias"]
    return filters, bias


def linear(waves_CE: Tensor, tensors: Tensors, name: str) -> Tensor:
    """What the layer ``name`` of ``tensors`` makes of them."""
    return waves_CE @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def below(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
    }
