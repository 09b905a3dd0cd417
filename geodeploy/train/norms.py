"""Batch normalisation over the windows of several processes, as if one had them all."""

# B batch, C channel, H row, W column

import logging
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger(__name__)


def share_norms(model: nn.Module) -> None:
    """Let the batch normalisations of ``model`` take their statistics over all processes.

    Those of a kind of their own keep to the windows of each process, which the log says.
    """
    own = set()
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            module.__class__ = SharedBatchNorm  # its weights, statistics and place stay what they are
        elif isinstance(module, _BatchNorm):
            own.add(type(module).__name__)
    if own:
        log.warning("%s normalises over the windows of each process apart.", ", ".join(sorted(own)))


class SharedBatchNorm(nn.BatchNorm2d):
    """Normalises over the maps of all processes, of which each holds as many.

    Unlike `torch.nn.SyncBatchNorm` it runs on CPUs too, where it can be tested.
    """

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Of the same shape. In training every process must come here together."""
        if not self.training:
            return super().forward(features_BCHW)
        features = features_BCHW.float()
        mean_C = mean_of_all(features.mean(dim=(0, 2, 3)))
        centred = features - mean_C[:, None, None]
        variance_C = mean_of_all(centred.square().mean(dim=(0, 2, 3)))
        self._note(mean_C.detach(), variance_C.detach(), centred[:, 0].numel())
        scale_C = torch.rsqrt(variance_C + self.eps) * self.weight
        normalised = centred * scale_C[:, None, None] + self.bias[:, None, None]
        return normalised.to(features_BCHW.dtype)

    def _note(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        """Move the statistics that predictions are normalised by, as `torch.nn.BatchNorm2d` does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        whole = count * distributed.get_world_size()
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * (whole / max(whole - 1, 1)), self.momentum)
        self.num_batches_tracked.add_(1)


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of each process's ``values``; its gradient is the sum of what all ask for."""
    summed: Tensor = _Sum.apply(values)
    return summed / distributed.get_world_size()


class _Sum(torch.autograd.Function):
    """The sum over processes, forwards and backwards."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed
