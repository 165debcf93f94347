"""`meq_former`: one Q-Former over the features of several encoders (BRAVE, 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Features, QueryConnector
from .checks import require_fraction, require_positive
from .layers import sequences
from .qformer import QFormerCore, instruction_mask


class MEQFormer(QueryConnector):
    """Multi-encoder querying transformer (BRAVE, Kar et al., ECCV 2024, section 3).

    `in_dim` is a tuple with one width per encoder, and `forward` takes a tuple of features in the same order; for a
    single encoder, a plain width and plain features are accepted. The features of each encoder, prefix included, are
    projected to `hidden_dim` and concatenated along the sequence (grids may differ). A Q-Former reads them with
    `num_queries` queries (None: 32 per encoder): ``(B, num_queries, out_dim)``.

    No code is published. Choices where the paper does not specify: no encoder embedding; cross-attention in every
    second layer, as in BLIP-2; a prompt (`text_vocab`) has word and position embeddings but shares the feed-forward
    layers of the queries, because only then does the size match the paper's 116M (for five encoders, without the
    prompt's embeddings, which the paper does not count); `encoder_dropout`, the paper's 20% masking of encoders in
    training, masks encoders independently for each sample, except for a sample that would lose all of them.
    With `text_vocab` None there is no prompt.
    """

    several_encoders = True
    in_dim: tuple[int, ...]

    def __init__(
        self,
        in_dim: int | tuple[int, ...],
        out_dim: int,
        num_queries: int | None = None,
        hidden_dim: int = 1408,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        cross_every: int = 2,
        dropout: float = 0.1,
        encoder_dropout: float = 0.2,
        text_vocab: int | None = None,
        text_positions: int = 512,
    ):
        super().__init__((in_dim,) if isinstance(in_dim, int) else tuple(in_dim), out_dim)
        require_positive(hidden_dim=hidden_dim)
        require_fraction(encoder_dropout=encoder_dropout)
        self.num_queries = 32 * len(self.in_dim) if num_queries is None else num_queries
        self.reads_text = text_vocab is not None
        self.encoder_dropout = encoder_dropout
        self.projections = nn.ModuleList(nn.Linear(width, hidden_dim) for width in self.in_dim)
        layers = (hidden_size, depth, num_heads, intermediate_size, cross_every, dropout)
        self.core = QFormerCore(hidden_dim, self.num_queries, *layers, text_vocab, text_positions, text_ffn=False)
        self.proj = nn.Linear(hidden_size, out_dim)

    def tokens(
        self,
        features: Features | tuple[Features, ...],
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        read = [sequences(encoder) for encoder in self.check_encoders(features)]
        mask = instruction_mask(self, text_ids, text_mask)
        parts = [project(x) for project, (x, _) in zip(self.projections, read, strict=True)]
        shown = self.encoder_mask(parts)
        if any(real is not None for _, real in read):
            real = [x.new_ones(x.shape[:2], dtype=torch.bool) if real is None else real for x, real in read]
            shown = torch.cat(real, dim=1) if shown is None else shown & torch.cat(real, dim=1)
        return self.proj(self.core(torch.cat(parts, dim=1), text_ids, mask, shown)[:, : self.num_queries])

    def encoder_mask(self, parts: list[Tensor]) -> Tensor | None:
        """Mask ``(B, N)`` of the concatenated features that are visible: in training some encoders are hidden."""
        if not self.training or not self.encoder_dropout:
            return None
        first = parts[0]
        shown = torch.rand(len(first), len(parts), device=first.device) >= self.encoder_dropout
        shown = shown | ~shown.any(1, keepdim=True)
        return torch.cat([shown[:, i, None].expand(-1, part.shape[1]) for i, part in enumerate(parts)], dim=1)
