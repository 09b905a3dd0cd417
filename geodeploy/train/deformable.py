"""Deformable attention over maps of several resolutions, by bilinear sampling: it exports as it is.

"Deformable DETR", arXiv 2010.04159, whose own code is a CUDA kernel.
"""

# B batch, N query, S token of the maps, D width, M head, C channel of a head, L map, P point,
# H row, W column

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class DeformableAttention(nn.Module):
    """Each query looks at a few points of each map, near its own place, chosen by itself."""

    places: Tensor
    """(N, 1, 1, 2): where each query lies, x and y as shares of the maps' sides."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        points: int,
        value_ratio: float,
        of: Sequence[int],
        to: Sequence[int],
    ) -> None:
        """For queries on square grids of the sides ``of``, which look into maps of the sides ``to``."""
        super().__init__()
        self.heads, self.points, self.sides = heads, points, tuple(to)
        inner = max(round(width * value_ratio / heads), 1) * heads
        looks = heads * len(self.sides) * points
        self.offsets = nn.Linear(width, 2 * looks)
        self.weights = nn.Linear(width, looks)
        self.values = nn.Linear(width, inner)
        self.join = nn.Linear(inner, width)
        places_N2 = torch.cat([centres(side) for side in of])
        self.register_buffer("places", places_N2[:, None, None], persistent=False)
        # As the paper begins: each head looks in a direction of its own, a pixel further at each point.
        nn.init.zeros_(self.offsets.weight)
        angles_M = torch.arange(heads) * (2 * math.pi / heads)
        ways_M2 = torch.stack([angles_M.cos(), angles_M.sin()], dim=-1)
        ways_M2 = ways_M2 / ways_M2.abs().amax(dim=-1, keepdim=True)
        steps_P = torch.arange(1, points + 1)
        starts = ways_M2[:, None, None] * steps_P[:, None]
        self.offsets.bias.data = starts.expand(-1, len(self.sides), -1, -1).flatten().clone()
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.values, self.join):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries_BND: Tensor, tokens_BSD: Tensor) -> Tensor:
        """(B, N, D); the tokens are those of the maps, one after the other."""
        count, shape = queries_BND.shape[1], (self.heads, len(self.sides), self.points)
        offsets = self.offsets(queries_BND).reshape(-1, count, *shape, 2)
        weights = self.weights(queries_BND).reshape(-1, count, self.heads, shape[1] * shape[2])
        sides_L = torch.tensor(self.sides, dtype=offsets.dtype, device=offsets.device)
        places = self.places[:, None] + offsets / sides_L[:, None, None]
        values = self.values(tokens_BSD).unflatten(-1, (self.heads, -1))
        found = look_up(values, self.sides, places, weights.softmax(dim=-1).unflatten(-1, shape[1:]))
        joined: Tensor = self.join(found)
        return joined


def look_up(
    values_BSMC: Tensor, sides: Sequence[int], places_BNMLP2: Tensor, weights_BNMLP: Tensor
) -> Tensor:
    """(B, N, M C): the values at ``places`` of square maps of these ``sides``, weighted and summed.

    Places are x and y as shares of the side, pixels are squares with a value in their centre, between
    which it is bilinear; beyond the rim all is zero.
    """
    _, count, heads, _, points, _ = places_BNMLP2.shape
    channels = values_BSMC.shape[-1]
    found = []
    for level, values in enumerate(torch.split(values_BSMC, [side**2 for side in sides], dim=1)):
        # Each head of each tile is a map of its own.
        maps = values.permute(0, 2, 3, 1).reshape(-1, channels, sides[level], sides[level])
        grid = places_BNMLP2[:, :, :, level].transpose(1, 2).reshape(-1, count, points, 2)
        found.append(
            functional.grid_sample(
                maps, 2 * grid - 1, mode="bilinear", padding_mode="zeros", align_corners=False
            )
        )
    weights = weights_BNMLP.transpose(1, 2).reshape(-1, 1, count, len(sides) * points)
    summed = (torch.cat(found, dim=-1) * weights).sum(dim=-1)  # (B M, C, N)
    return summed.reshape(-1, heads * channels, count).transpose(1, 2)


def centres(side: int) -> Tensor:
    """(side * side, 2): x and y of the centres of a grid's squares, row by row, shares of its side."""
    along = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)
