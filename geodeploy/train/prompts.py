"""Visual prompt tuning: trained tokens beside those of the patches (arXiv 2203.12119)."""

# B batch, N token, D width

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Prompted(nn.Module):
    """A transformer block that sees prompts between the class token and the patches."""

    def __init__(self, block: nn.Module, prompts: Tensor, *, after: int, dropout: float, keep: bool):
        super().__init__()
        self.block = block
        self.prompts = nn.Parameter(prompts)
        """(1, prompts, D)"""
        self.dropout = nn.Dropout(dropout)
        self.after = after
        """Tokens that stand before the prompts."""
        self.keep = keep
        """Whether the prompts go on to the next block."""

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """The block's output, with as many tokens as came in unless the prompts are kept."""
        first, patches = tokens_BND[:, : self.after], tokens_BND[:, self.after :]
        prompts = self.dropout(self.prompts).expand(tokens_BND.shape[0], -1, -1)
        out: Tensor = self.block(torch.cat([first, prompts, patches], dim=1))
        if self.keep:
            return out
        past = self.after + self.prompts.shape[1]
        return torch.cat([out[:, : self.after], out[:, past:]], dim=1)


def add_prompts(vit: VisionTransformer, tokens: int, *, deep: bool, dropout: float) -> None:
    """Put ``tokens`` prompts into every block of ``vit``, or into the first for all (not ``deep``)."""
    # As the paper draws them: by the width of a patch's pixels and of a token.
    patch = vit.patch_embed.proj.weight[0].numel()
    bound = math.sqrt(6 / (patch + vit.embed_dim))
    for number, block in enumerate(vit.blocks):
        if deep or number == 0:
            prompts = torch.empty(1, tokens, vit.embed_dim).uniform_(-bound, bound)
            vit.blocks[number] = Prompted(
                block, prompts, after=vit.num_prefix_tokens, dropout=dropout, keep=not deep
            )
    if not deep:
        # What timm leaves out of its maps: everything before the patches.
        vit.num_prefix_tokens += tokens
