"""Does merging alike tokens pay? A tuned vision transformer with fewer tokens in its later blocks.

    python bench/merging.py RUN [RUN ...]

Before a block the patches are split into two halves like a chessboard's; those of the one half that are
most like a patch of the other are averaged with it, and attention counts the pair as two (Bolya and
others, arXiv 2210.09461). What a decoder taps is spread out again, each patch with what it was merged
into. Nothing is trained again. Each RUN is a plain ViT of this project; it is scored on the blocks of
its scenes that it did not train on. Processor seconds in PyTorch on one thread, the ways taking turns,
in fractions of those without merging.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from geodeploy.export.merge import merge
from geodeploy.tiles import TileGrid
from geodeploy.train.data import VALIDATION, open_scenes
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import load_run

RESULTS = Path(__file__).parent / "results" / "merging.md"
WAYS: tuple[dict[int, float], ...] = (
    {},
    {9: 0.25},
    {6: 0.25},
    {3: 0.25},
    {6: 0.5},
    {3: 0.5},
    {3: 0.25, 6: 0.25, 9: 0.25},
)
"""Before which block which share of the patches is merged into others, half of them at most."""


class Merging(nn.Module):
    """A timm ViT that computes with fewer tokens, behind the one method that `TunedModel` calls."""

    def __init__(self, encoder: Any, shares: dict[int, float]) -> None:
        super().__init__()
        self.encoder, self.shares = encoder, shares

    def forward_intermediates(
        self, pixels_BCHW: Tensor, *, indices: Sequence[int], norm: bool, **_: object
    ) -> list[Tensor]:
        """The maps (B, D, h, w) after the blocks ``indices``."""
        encoder = self.encoder
        tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(pixels_BCHW)))
        prefix, side = encoder.num_prefix_tokens, encoder.patch_embed.grid_size[0]
        batch, count, _ = tokens.shape
        sizes = torch.ones(batch, count)
        merged_into = torch.arange(count).expand(batch, -1)
        maps = []
        for number, block in enumerate(encoder.blocks[: max(indices) + 1]):
            if share := self.shares.get(number):
                tokens, sizes, into = merge_alike(tokens, sizes, share, prefix)
                merged_into = into.gather(1, merged_into)
            bias = sizes.log()[:, None, None] if self.shares else None
            tokens = tokens + block.ls1(attend(block.attn, block.norm1(tokens), bias))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            if number in indices:
                whole = spread(encoder.norm(tokens) if norm else tokens, merged_into)[:, prefix:]
                maps.append(whole.transpose(1, 2).reshape(batch, -1, side, side))
        return maps


def attend(attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """What timm's attention gives, with ``bias`` on the keys (B, 1, 1, N)."""
    batch, count, width = tokens.shape
    heads = attention.qkv(tokens).reshape(batch, count, 3, attention.num_heads, -1)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    projected: Tensor = attention.proj(found.transpose(1, 2).reshape(batch, count, width))
    return projected


def merge_alike(
    tokens: Tensor, sizes: Tensor, share: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fewer tokens (B, n, D), how many patches each is (B, n), and where each went (B, N)."""
    batch, count, width = tokens.shape
    alike = normalize(tokens[:, prefix:], dim=-1)
    here, there = torch.arange(prefix, count, 2), torch.arange(prefix + 1, count, 2)
    best, partner = (alike[:, ::2] @ alike[:, 1::2].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=1, descending=True)
    lost = min(round(share * (count - prefix)), len(here))
    gone, stays = here[order[:, :lost]], here[order[:, lost:]].sort(dim=1).values
    first = torch.arange(prefix).expand(batch, -1)
    kept = torch.cat([first, stays, there.expand(batch, -1)], dim=1)
    into = torch.zeros(batch, count, dtype=torch.long)
    into.scatter_(1, kept, torch.arange(kept.shape[1]).expand(batch, -1))
    target = into.gather(1, there[partner.gather(1, order[:, :lost])])
    into.scatter_(1, gone, target)
    weighted, fewer = tokens * sizes[..., None], kept.shape[1]
    sums = torch.zeros(batch, fewer, width).scatter_add_(
        1, into[..., None].expand(-1, -1, width), weighted
    )
    counts = torch.zeros(batch, fewer).scatter_add_(1, into, sizes)
    return sums / counts[..., None], counts, into


def spread(tokens: Tensor, merged_into: Tensor) -> Tensor:
    """Every token again, (B, N, D)."""
    return tokens.gather(1, merged_into[..., None].expand(-1, -1, tokens.shape[-1]))


def main() -> None:
    """Score and time every way, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    torch.set_num_threads(1)
    lines = ["# Merging tokens", "", *(line for line in __doc__.splitlines()[2:] if line)]
    for run in parser.parse_args().runs:
        spec = json.loads((run / "spec.json").read_text())
        lines += ["", f"## {spec['name']}: {spec['backbone']['name']}, tiles of {spec['tile']} pixels"]
        lines += ["", *table(run, spec["tile"])]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def table(run: Path, tile: int) -> Iterator[str]:
    """A row for each way."""
    model = merge(load_run(run).model).eval()
    encoder: Any = model.backbone
    tiles = list(cut_tiles(run, tile))
    check_same(model, encoder, tiles[0][0])
    seconds: list[list[float]] = [[] for _ in WAYS]
    classes = 1 + max(int(truth[truth < 255].max()) for _, truth in tiles)
    counts = [np.zeros((classes, classes), np.int64) for _ in WAYS]
    for pixels, truth in tiles:
        for way, shares in enumerate(WAYS):
            model.backbone = Merging(encoder, shares)
            begun = time.process_time()
            with torch.inference_mode():
                found = model(pixels)[0].argmax(dim=0).numpy().astype(np.uint8)
            seconds[way].append(time.process_time() - begun)
            known = truth < 255
            counts[way] += np.bincount(
                truth[known].astype(np.int64) * classes + found[known], minlength=classes**2
            ).reshape(classes, classes)
    yield "| merged before a block | tokens left at the end | time | accuracy | mean IoU |"
    yield "|---" * 5 + "|"
    for way, shares in enumerate(WAYS):
        told = ", ".join(f"{share:.0%} before {block}" for block, share in shares.items()) or "none"
        left = np.prod([1 - share for share in shares.values()])
        ratio = statistics.median(
            one / base for one, base in zip(seconds[way], seconds[0], strict=True)
        )
        hits = np.diagonal(counts[way])
        ious = hits / np.maximum(counts[way].sum(axis=0) + counts[way].sum(axis=1) - hits, 1)
        yield (
            f"| {told} | {left:.0%} | {ratio:.3f} | {hits.sum() / counts[way].sum():.4f} "
            f"| {ious.mean():.4f} |"
        )


def check_same(model: Any, encoder: Any, pixels: Tensor) -> None:
    """Without merging, the wrapper is the backbone."""
    with torch.inference_mode():
        needed = model(pixels)
        model.backbone = Merging(encoder, {})
        torch.testing.assert_close(model(pixels), needed, rtol=1e-4, atol=1e-4)


def cut_tiles(run: Path, tile: int) -> Iterator[tuple[Tensor, NDArray[np.uint8]]]:
    """Tiles (1, C, tile, tile) with validation pixels, and classes (tile, tile), 255 elsewhere."""
    with open_scenes(load_recipe(run / "recipe.toml")) as scenes:
        for scene in scenes:
            raster = scene.raster
            if not scene.count(VALIDATION) or min(raster.height, raster.width) < tile:
                continue
            truth = np.where(scene.part == VALIDATION, scene.codes, np.uint8(255))
            for place in TileGrid(raster.height, raster.width, tile, 0):
                rows, cols = place.window.toslices()
                known = truth[rows, cols].copy()
                if (known < 255).any():
                    pixels, valid = raster.read_pixels(place.window)
                    yield torch.from_numpy(np.where(valid, pixels, 0.1))[None], known
                    truth[rows, cols] = 255  # the last tile of a row slides back over the one before


if __name__ == "__main__":
    main()
