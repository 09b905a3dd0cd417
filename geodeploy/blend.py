"""Join overlapping tiles into one map, holding only what a later tile can still change. No I/O.

Where tiles overlap, what they say (probabilities of classes, or quantities) is averaged with weights
that fade towards a tile's edge. The weights are a product of one factor along the rows and one along
the columns, so the average is taken in two steps: along a row of tiles, then between rows. Each step is
a running mean,

    mean += share * (new - mean),      share = weight of the new tile / weight of all so far,

which equals the weighted sum divided by the sum of the weights, needs no array of weights, and
leaves tiles that agree exactly as they are.

How far the tiles disagree comes along as one more plane, or one for each quantity: their variance
about that mean. Each step mixes the variances of both sides and adds the one between them (Chan, Golub
and LeVeque 1979),

    variance = mix(variance, new variance) + share * (1 - share) * |new - mean|².

It is the weighted mean of |p - q|² / 2 over all pairs of tiles, each paired with itself too. Divided
by the weight of the pairs of two tiles, its root is the disagreement: 0 where all tiles say the same,
|p - q| / sqrt(2) between two tiles, whatever they weigh; of probabilities, 1 where each is sure of a
class of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from geodeploy.errors import ModelError
from geodeploy.tiles import Region, Span, Tile, TileGrid

Blend = Literal["cosine", "flat", "crop"]


def cosine_weights(tile: int, overlap: int) -> NDArray[np.float64]:
    """Weights (tile,) that rise as sin² over ``overlap`` pixels at either edge, nowhere zero."""
    edge = np.minimum(np.arange(tile), np.arange(tile)[::-1])
    inside = np.minimum((edge + 0.5) / max(overlap, 1), 1.0)
    weights: NDArray[np.float64] = np.sin(0.5 * np.pi * inside) ** 2
    return weights


def flat_weights(tile: int, overlap: int) -> NDArray[np.float64]:
    """Weights (tile,) of one: a plain mean where tiles overlap."""
    return np.ones(tile)


def crop_weights(tile: int, overlap: int) -> NDArray[np.float64]:
    """Weights (tile,) that cut each overlap in its middle: every pixel from one tile."""
    weights = np.zeros(tile)
    weights[overlap // 2 : tile - (overlap - overlap // 2)] = 1.0
    return weights


WEIGHTS: dict[Blend, Callable[[int, int], NDArray[np.float64]]] = {
    "cosine": cosine_weights,
    "flat": flat_weights,
    "crop": crop_weights,
}


def shares(weights: NDArray[np.float64], overlap: int, place: int) -> NDArray[np.float32]:
    """How much the tile at ``place`` in its row counts against the earlier ones: (overlap,), 0 to 1.

    ``weights`` (tile,) are those of every tile; over the first ``overlap`` pixels of this one lie as
    many earlier tiles as reach that far. A pixel that only this tile weighs gets 1. One that no tile so
    far weighs, as `crop` has them at the raster's edges, goes to the tile whose middle is nearest: the
    first tile keeps those at its beginning (0), the last one takes those at its end (1).
    """
    laid = _laid(weights, overlap, place)
    total = laid.sum(axis=0)
    found = (np.arange(overlap) >= len(weights) // 2).astype(np.float64)
    np.divide(laid[0], total, out=found, where=total > 0)
    return found.astype(np.float32)


def paired(weights: NDArray[np.float64], overlap: int, place: int) -> NDArray[np.float64]:
    """The weight of all pairs of two tiles among all pairs, (tile,), over the tile at ``place``.

    It is 0 where one tile alone covers a pixel, or weighs anything.
    """
    laid = _laid(weights, overlap, place)
    total, squares = laid.sum(axis=0), (laid**2).sum(axis=0)
    pairs = np.zeros(len(weights))
    pairs[:overlap] = 1 - np.divide(squares, total**2, out=np.ones(overlap), where=total > 0)
    return pairs


def _laid(weights: NDArray[np.float64], overlap: int, place: int) -> NDArray[np.float64]:
    """Weights (n, overlap) of the tile at ``place`` and of those before it, over its first pixels."""
    tile = len(weights)
    stride = tile - overlap
    laid = [weights[:overlap]]
    for back in range(1, place + 1):
        over = weights[back * stride :][:overlap]
        laid.append(np.pad(over, (0, overlap - len(over))))
    return np.array(laid)


def mix(
    mean: NDArray[np.float32], new: NDArray[np.float32], share: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The running mean after ``new``; exact where the share is 0 or 1 and where both agree."""
    mixed: NDArray[np.float32] = new - mean
    mixed *= share
    mixed += mean
    whole = share == 1.0
    if whole.any():
        np.copyto(mixed, new, where=whole)
    return mixed


def reweigh(
    before: NDArray[np.float64], new: NDArray[np.float64], share: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The ``share`` of a tile where not all tiles have an answer, and what is ``before`` for the next.

    ``before`` and ``new`` say, from 0 to 1, which part of the weights of the earlier tiles and of the
    new one belongs to tiles with an answer. Where that is all of both the share stays what it was.
    """
    if (before == 1).all() and (new == 1).all():
        return share, new
    counted = new * share.astype(np.float64)
    heard = before * (1 - share.astype(np.float64)) + counted
    part = np.divide(counted, heard, out=np.zeros_like(heard), where=heard > 0)
    return part.astype(np.float32), heard


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of logits (B, K, H, W), over K; in the same memory."""
    for values in logits:  # one tile at a time stays in the processor's cache
        np.subtract(values, values.max(axis=0), out=values)
        np.exp(values, out=values)
        np.divide(values, values.sum(axis=0), out=values)
    return logits


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of logits, each by itself."""
    shares: NDArray[np.float32] = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * logits))
    return shares


def best_class(probs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The position (H, W) of the greatest of (K, H, W); the first of equals, as argmax has it."""
    # Passes over contiguous memory without a branch: ten times faster than argmax along the first axis.
    best = probs[0].copy()
    positions = np.zeros(best.shape, np.uint8)
    for position in range(1, len(probs)):
        better = probs[position] > best
        np.maximum(best, probs[position], out=best)
        np.maximum(positions, better.view(np.uint8) * np.uint8(position), out=positions)
    return positions


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the map that no later tile can change."""

    row: int
    """Of the raster, its first."""
    col: int
    mean: NDArray[np.float32]
    """(K, h, w): of all tiles that cover it. Use it before the next tile goes in."""
    valid: NDArray[np.bool_]
    """(h, w): where the scene has data."""
    disagreement: NDArray[np.float32] | None = None
    """(1, h, w) of probabilities, (K, h, w) of quantities: how far the tiles that cover a pixel are
    apart; NaN where one alone does, or one of them has no answer. None unless it was asked for."""
    answered: NDArray[np.bool_] | None = None
    """(h, w): where a tile took part; None for everywhere."""


class Mosaic:
    """The map as it grows: tiles go in by rows from the top left, final blocks come out.

    Memory: P x overlap x width x 4 bytes of seam to the next row of tiles and P x tile² x 8 bytes
    of seam to the next tile, the width being that of the region; P is the number of outputs and two,
    and with the disagreement one more, or for quantities as many again. Nothing grows with the height.

    Args:
        grid: Where the tiles lie.
        region: The part of it that is mapped.
        outputs: The number K of the model's outputs.
        blend: How overlapping tiles are weighed.
        disagreement: In how many planes blocks tell how far the tiles are apart: 1 for the outputs
            together, K for each by itself.
    """

    def __init__(
        self,
        grid: TileGrid,
        region: Region,
        outputs: int,
        *,
        blend: Blend,
        disagreement: int = 0,
    ) -> None:
        self._grid = grid
        self._region = region
        self._outputs = outputs
        self._disagreement = disagreement
        planes = outputs + disagreement
        weights = WEIGHTS[blend](grid.tile, grid.overlap)
        # Past the first few, every tile has as many others before it: the shares repeat.
        places = min(max(len(grid.rows), len(grid.cols)), -(-grid.tile // grid.stride) + 1)
        self._shares = [shares(weights, grid.overlap, place) for place in range(places)]
        self._paired = [paired(weights, grid.overlap, place) for place in range(places) if disagreement]
        # The region's first tiles do not find their own neighbours here, but zeros or what other tiles
        # left: what comes of that lies outside the region.
        self._col = region.cols[0].begin
        width = region.cols[-1].stop - self._col
        # Mean of the row of tiles above, over the rows that the next row of tiles also covers.
        self._below = np.zeros((planes, grid.overlap, width), np.float32)
        # Mean of the tiles to the left, over the columns that the next tile also covers.
        self._right = np.zeros((planes, grid.tile, grid.overlap), np.float32)
        # Of the weights of all tiles so far, the part that those with an answer have.
        self._heard_below = np.ones((grid.overlap, width))
        self._heard_right = np.ones((grid.tile, grid.overlap))

    def add(
        self,
        tile: Tile,
        answer: NDArray[np.float32] | None,
        valid: NDArray[np.bool_],
        *,
        failed: bool = False,
    ) -> Block | None:
        """Take the next tile of the region; return what it settles, None outside the region.

        Args:
            tile: The next one in the region's order.
            answer: Probabilities or quantities (K, tile, tile), padding included; overwritten. None
                for a tile without data.
            valid: (height, width) of the tile's window, True where the scene has data.
            failed: Whether the tile takes no part, for want of an answer, which is None then.
        """
        rows, cols, seam = tile.rows, tile.cols, self._grid.overlap
        height, width = rows.stop - rows.begin, cols.stop - cols.begin
        if answer is None:
            mean = np.zeros((self._outputs, height, width), np.float32)
        else:
            top, left = rows.begin - rows.start, cols.begin - cols.start
            mean = answer[:, top : top + height, left : left + width]
        if self._disagreement:
            variance = np.zeros((self._disagreement, height, width), np.float32)
            mean = np.concatenate([mean, variance])
        heard = np.full((height, width), 0.0 if failed else 1.0)

        if cols.begin > 0 and seam:
            share = self._shares[self._place(cols)]
            share, heard[:, :seam] = reweigh(self._heard_right[:height], heard[:, :seam], share)
            mean[:, :, :seam] = self._mixed(self._right[:, :height], mean[:, :, :seam], share)
        final = cols.settled - cols.begin
        if final < width:
            self._right[:, :height] = mean[:, :, final:]
            self._heard_right[:height] = heard[:, final:]
        mean, heard = mean[:, :, :final], heard[:, :final]

        here = slice(cols.begin - self._col, cols.settled - self._col)
        if rows.begin > 0 and seam:
            share = self._shares[self._place(rows)][:, np.newaxis]
            share, heard[:seam] = reweigh(self._heard_below[:, here], heard[:seam], share)
            mean[:, :seam] = self._mixed(self._below[:, :, here], mean[:, :seam], share)
        final = rows.settled - rows.begin
        if final < height:
            self._below[:, :, here] = mean[:, final:]
            self._heard_below[:, here] = heard[final:]
        mean, heard = mean[:, :final], heard[:final]

        if rows.begin < self._region.first_row or cols.begin < self._region.first_col:
            return None
        inside = valid[-height:, -width:][:final, : mean.shape[2]]
        answered = None if heard.all() else heard > 0
        if not self._disagreement:
            return Block(rows.begin, cols.begin, mean, inside, answered=answered)
        apart = self._apart(tile, mean[self._outputs :])
        apart[:, heard < 1] = np.nan  # the pairs that there are have other weights
        return Block(rows.begin, cols.begin, mean[: self._outputs], inside, apart, answered)

    def _mixed(
        self, mean: NDArray[np.float32], new: NDArray[np.float32], share: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The planes after ``new`` (P, h, w), the last of which are variances if asked for."""
        mixed = mix(mean, new, share)
        if self._disagreement:
            variances = mixed[self._outputs :]
            for place in range(self._outputs):
                between = share * (1 - share) * (new[place] - mean[place]) ** 2
                variances[place % self._disagreement] += between
        return mixed

    def _apart(self, tile: Tile, variance: NDArray[np.float32]) -> NDArray[np.float32]:
        """The disagreement, of the shape of the ``variance``, in what ``tile`` settles."""
        height, width = variance.shape[1:]
        down = self._paired[self._place(tile.rows)][:height, np.newaxis]
        across = self._paired[self._place(tile.cols)][:width]
        pairs = (down + across - down * across).astype(np.float32)
        square = np.divide(variance, pairs, out=np.full_like(variance, np.nan), where=pairs > 0)
        return np.sqrt(square)

    def _place(self, span: Span) -> int:
        """Of a tile in its row or column, counted as long as the shares differ."""
        return min(span.begin // self._grid.stride, len(self._shares) - 1)


def are_finite(outputs: NDArray[np.float32]) -> bool:
    """Whether there is neither NaN nor infinity among them."""
    # One pass without a temporary array: a sum hides neither, but may overflow itself.
    return bool(np.isfinite(outputs.sum()) or np.isfinite(outputs).all())


def are_probabilities(outputs: NDArray[np.float32]) -> bool:
    """Whether ``outputs`` (B, K, H, W) are, over K."""
    # Half-precision graphs miss one by a thousandth or two.
    return bool(outputs.min() >= -0.01 and np.abs(outputs.sum(axis=1) - 1).max() <= 0.01)


def check_probabilities(outputs: NDArray[np.float32]) -> None:
    """Raise ModelError where what should be probabilities (B, K, H, W) is not, over K."""
    if len(outputs) and not are_probabilities(outputs):
        sums = outputs.sum(axis=1)
        raise ModelError(
            f"The model returned values from {outputs.min():.3g} to {outputs.max():.3g} that sum to "
            f"{sums.min():.3g} to {sums.max():.3g} over the classes; its description says "
            'probabilities, which sum to 1. If it has no softmax, write "output": "logits".'
        )


def check_shares(outputs: NDArray[np.float32]) -> None:
    """Raise ModelError where what should be probabilities, each by itself, is not."""
    # Half-precision graphs miss 0 and 1 by a little.
    if len(outputs) and not (outputs.min() >= -0.01 and outputs.max() <= 1.01):
        raise ModelError(
            f"The model returned values from {outputs.min():.3g} to {outputs.max():.3g}; its "
            'description says probabilities. If it has no sigmoid, write "output": "logits".'
        )


def check_finite(outputs: NDArray[np.float32], tiles: Sequence[Tile]) -> None:
    """Raise ModelError, naming the tile, where the model returned NaN or infinity."""
    if are_finite(outputs):
        return
    for tile, values in zip(tiles, outputs, strict=False):
        if not np.isfinite(values).all():
            raise ModelError(
                f"The model returned NaN or infinity for the tile at row {tile.rows.start}, column "
                f"{tile.cols.start}. Look at that place in the scene, or export in higher precision."
            )
