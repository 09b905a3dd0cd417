"""Positions of patches: sines and cosines of where they are, and grids of them for another tile."""

# N patch, D width

import torch
from torch import Tensor
from torch.nn import functional


def rates(count: int) -> Tensor:
    """How fast each of ``count`` waves turns, from 1 to nearly 1/10000 (arXiv 1706.03762)."""
    return 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / count)


def waves(places_N: Tensor, rates_R: Tensor) -> Tensor:
    """(N, 2 R): sines, then cosines, of each place at each rate, in the precision of the rates."""
    angles = places_N.to(rates_R.dtype)[:, None] * rates_R
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def cells(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of ``side`` by ``side`` patches, row after row."""
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return row.flatten(), col.flatten()


def plane(side: int, rates_R: Tensor, *, step: float = 1.0) -> Tensor:
    """(side * side, 4 R): waves of the column, then of the row; ``step`` from one patch to the next."""
    row, col = cells(side)
    return torch.cat([waves(col * step, rates_R), waves(row * step, rates_R)], dim=1)


def with_class_token(positions_ND: Tensor) -> Tensor:
    """(1, 1 + N, D): a class token before the patches, whose position is zeros."""
    return torch.cat([torch.zeros_like(positions_ND[:1]), positions_ND])[None]


def resize_positions(
    positions_1ND: Tensor,
    side: int,
    *,
    prefix: int = 1,
    stacks: int = 1,
    mode: str = "bicubic",
    align_corners: bool = False,
) -> Tensor:
    """Positions for ``side`` by ``side`` patches from those of another square, or ``stacks`` of them.

    ``prefix`` tokens before them stay as they are.
    """
    count, width = positions_1ND.shape[1:]
    old = round(((count - prefix) / stacks) ** 0.5)
    if old == side:
        return positions_1ND
    first, patches = positions_1ND[:, :prefix], positions_1ND[:, prefix:]
    grid = patches.reshape(stacks, old, old, width).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode=mode, align_corners=align_corners)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)
