"""SmoothQuant (arXiv 2211.10438): what is wide in a few channels goes over into the next weights.

A transformer's layer norms give a few channels numbers far larger than all others, and one scale for
all has few steps left for those. Where the norm divides each channel by a number, and the weights that
take it are multiplied by that, the product is the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from geodeploy.export.steps import range_of, rounded, weights_in_int8

_SHARES = (0.25, 0.5, 0.75)
"""Of a channel's width, in its power, what is moved: the best for each norm is taken, or nothing."""
_TOKENS = 4
"""One of so many tokens decides that."""


def norms_of(
    graph: onnx.GraphProto, products: Sequence[NodeProto], users: Mapping[str, Sequence[NodeProto]]
) -> dict[str, Sequence[NodeProto]]:
    """Names of what layer norms give, each with the ``products`` that alone take it."""
    ours = {node.output[0] for node in products if node.op_type == "MatMul"}
    weights = {tensor.name for tensor in graph.initializer}
    return {
        node.output[0]: users[node.output[0]]
        for node in graph.node
        if node.op_type == "LayerNormalization"
        and weights.issuperset(node.input[1:])
        and users[node.output[0]]
        and all(user.output[0] in ours for user in users[node.output[0]])
    }


def smooth(
    graph: onnx.GraphProto,
    norm: NodeProto,
    products: Sequence[NodeProto],
    tokens: NDArray[np.float32],
    *,
    signed: bool,
) -> NDArray[np.float32]:
    """Make ``norm`` give, and ``products`` take, what int8 loses least of; ``tokens`` (N, D) as that.

    What it gives has another name then: it is no longer what PyTorch computes there.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in products]
    factors = _best(tokens, np.concatenate(matrices, axis=1), signed=signed)
    given = f"{norm.output[0]}.smooth"
    for place, name in enumerate(norm.input[1:], 1):
        norm.input[place] = f"{given}.{place}"
        values = numpy_helper.to_array(weights[name]) / factors
        graph.initializer.append(numpy_helper.from_array(values, norm.input[place]))
    for node, matrix in zip(products, matrices, strict=True):
        node.input[0], node.input[1] = given, f"{node.output[0]}.smooth"
        graph.initializer.append(numpy_helper.from_array(matrix * factors[:, None], node.input[1]))
    norm.output[0] = given
    smoothed: NDArray[np.float32] = tokens / factors
    return smoothed


def _best(
    tokens: NDArray[np.float32], weights: NDArray[np.float32], *, signed: bool
) -> NDArray[np.float32]:
    """What int8 loses least with: a number for each channel of ``tokens`` (N, D)."""
    widest = np.maximum(np.abs(tokens).max(axis=0), 1e-5)
    heaviest = np.maximum(np.abs(weights).max(axis=1), 1e-5)
    choices: list[NDArray[np.float32]] = [np.ones_like(widest)]
    choices += [(widest**share / heaviest ** (1 - share)).astype(np.float32) for share in _SHARES]
    some = tokens[::_TOKENS]
    exact = _product(some, weights)
    losses = []
    for factors in choices:
        whole, steps = weights_in_int8(weights * factors[:, None], 1)
        limits = range_of(tokens / factors)
        found = _product(rounded(some / factors, limits, signed=signed), whole * steps)
        losses.append(float(np.square(found - exact).sum()))
    return choices[int(np.argmin(losses))]


def _product(tokens: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """By torch: numpy's BLAS takes as many threads as there are cores, and its last bits with them."""
    product: NDArray[np.float32] = (torch.from_numpy(tokens) @ torch.from_numpy(weights)).numpy()
    return product
