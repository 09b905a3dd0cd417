"""From stripes of a scene to batches of tiles, and through the model."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geodeploy.blend import (
    are_finite,
    are_probabilities,
    check_finite,
    check_probabilities,
    check_shares,
    sigmoid,
    softmax,
)
from geodeploy.raster import Raster, Stripe
from geodeploy.runtime import Session
from geodeploy.runtime.graph import output_shape
from geodeploy.spec import ModelSpec
from geodeploy.tiles import Region, Tile

CutTile = tuple[Tile, NDArray[Any], NDArray[np.bool_]]
"""A tile, its stored values (C, h, w) and its valid pixels (h, w)."""


def cut_tiles(stripes: Iterator[Stripe], region: Region) -> Iterator[CutTile]:
    """The tiles of ``region`` in order, holding only the stripes that the row of tiles needs."""
    held: deque[Stripe] = deque()
    for rows in region.rows:
        while held and held[0].row + held[0].valid.shape[0] <= rows.start:
            held.popleft()
        while not held or held[-1].row + held[-1].valid.shape[0] < rows.stop:
            held.append(next(stripes))
        for col in region.cols:
            stored, valid = zip(
                *(
                    (
                        stripe.stored[
                            :,
                            max(rows.start - stripe.row, 0) : rows.stop - stripe.row,
                            col.start - stripe.col : col.stop - stripe.col,
                        ],
                        stripe.valid[
                            max(rows.start - stripe.row, 0) : rows.stop - stripe.row,
                            col.start - stripe.col : col.stop - stripe.col,
                        ],
                    )
                    for stripe in held
                ),
                strict=True,
            )
            if len(held) == 1:
                yield Tile(rows, col), stored[0], valid[0]
            else:
                yield Tile(rows, col), np.concatenate(stored, axis=1), np.concatenate(valid)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles of the grid, in order, those that the model must see stacked."""

    members: list[tuple[Tile, NDArray[np.bool_], int | None]]
    """Each with its valid pixels and its place in ``pixels``; None for a tile without data."""
    pixels: NDArray[np.float32]
    """(size, C, tile, tile) in the spec's units, finite."""

    @property
    def run(self) -> list[Tile]:
        """The tiles that the model must see."""
        return [tile for tile, _, place in self.members if place is not None]


def stack_tiles(
    tiles: Iterable[CutTile], raster: Raster, spec: ModelSpec, *, size: int, memories: int = 1
) -> Iterator[Batch]:
    """Batches of ``size`` tiles to run; tiles without a valid pixel ride along and cost nothing.

    All batches have one shape, so that no runtime plans anew: the last one's surplus is zeros. Their
    pixels lie in ``memories`` places that take turns: use those of a batch before as many others have
    been asked for.
    """
    fill = np.array([band.mean for band in spec.planes], np.float32).reshape(-1, 1, 1)
    shape = (size, len(spec.planes), spec.tile, spec.tile)
    places = cycle([np.empty(shape, np.float32) for _ in range(memories)])
    pixels = next(places)
    members: list[tuple[Tile, NDArray[np.bool_], int | None]] = []
    used = 0
    for tile, stored, valid in tiles:
        if valid.any():
            height, width = valid.shape
            values = raster.to_units(stored, out=pixels[used, :, :height, :width])
            if not valid.all():
                np.copyto(values, fill, where=~valid)
            below, right = spec.tile - height, spec.tile - width
            if below or right:
                pixels[used] = np.pad(values, ((0, 0), (0, below), (0, right)), mode="reflect")
            members.append((tile, valid, used))
            used += 1
        else:
            members.append((tile, valid, None))
        # An empty region must not gather tiles without end either.
        if used == size or len(members) == 4 * size:
            pixels[used:] = 0
            yield Batch(members, pixels)
            members, used = [], 0
            pixels = next(places)
    if members:
        pixels[used:] = 0
        yield Batch(members, pixels)


def whole_answers(session: Session, batch: Batch) -> NDArray[np.float32]:
    """What the model says of each place in ``batch.pixels``, (size, K, tile, tile).

    That is probabilities, which sum to 1, or the quantities of a regression. Of whole tiles it is
    (size, K), each a probability by itself.

    Raises:
        ModelError: it is no number, or no probability.
    """
    spec, outputs = session.spec, _outputs(session, batch)
    check_finite(outputs, batch.run)
    if spec.output == "probabilities":
        (check_shares if spec.whole_tiles else check_probabilities)(outputs)
    if spec.output != "logits":
        return outputs
    return sigmoid(outputs) if spec.whole_tiles else softmax(outputs)


def answers(session: Session, batch: Batch) -> tuple[NDArray[np.float32], dict[int, str]]:
    """The `whole_answers`, and what is wrong with those of a place, which are not to be looked at."""
    outputs = _outputs(session, batch)
    faults = {}
    for place, values in enumerate(outputs):
        if not are_finite(values):
            faults[place] = "The model returned NaN or infinity"
        elif session.spec.output == "probabilities" and not are_probabilities(values[np.newaxis]):
            faults[place] = "The model returned what are no probabilities"
        else:
            continue
        outputs[place] = 0
    return (softmax(outputs) if session.spec.output == "logits" else outputs), faults


def _outputs(session: Session, batch: Batch) -> NDArray[np.float32]:
    run = batch.run
    if not run:
        return np.empty((0, *output_shape(session.spec)), np.float32)
    return session.run(batch.pixels)[: len(run)]
