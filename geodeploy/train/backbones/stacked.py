"""A vision transformer with several tokens at each place: of dates, or of groups of bands."""

# B batch, C band, S stack, H row, W column, N token, D width

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class StackedViT(VisionTransformer):
    """Cuts a tile into stacks of patches, and joins the stacks of each map again.

    The last block gives its tokens normalised, all others as they are.
    """

    pos_embed: Tensor  # type: ignore[assignment]
    """(1, N, D), of the prefix and of each stack's patches; not trained."""
    stacks: int
    """Tokens at each place."""

    def cut(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, S H W, D), the patches of all stacks, one stack after the other."""
        raise NotImplementedError

    def join(self, stacks_BSDHW: Tensor) -> Tensor:
        """One map (B, D, H, W) of those of the stacks; it may be wider than they are."""
        raise NotImplementedError

    def forward_intermediates(  # type: ignore[override]
        self, pixels_BCHW: Tensor, indices: Sequence[int], **_: object
    ) -> list[Tensor]:
        """The maps of the blocks ``indices``; timm's other arguments change nothing here."""
        tokens = self._pos_embed(self.cut(pixels_BCHW))
        maps = {}
        for number, block in enumerate(self.blocks[: max(indices) + 1]):
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if number in indices:
                last = number == len(self.blocks) - 1
                maps[number] = self._as_map(self.norm(tokens) if last else tokens)
        return [maps[index] for index in indices]

    def _as_map(self, tokens_BND: Tensor) -> Tensor:
        rows, cols = self.patch_embed.grid_size
        patches = tokens_BND[:, self.num_prefix_tokens :]
        # Of 1 tile or more, of 1 stack or more: the batch stays free for the export.
        stacks = patches.shape[1] // (rows * cols)
        grid = patches.reshape(-1, stacks, rows, cols, self.embed_dim)
        return self.join(grid.permute(0, 1, 4, 2, 3))
