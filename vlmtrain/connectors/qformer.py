"""`qformer`: a BERT whose queries read the image (BLIP-2, 2023) and an instruction (InstructBLIP, 2023)."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import some
from .base import Features, QueryConnector, VisionFeatures
from .checks import require_divisible, require_fraction, require_positive
from .layers import Attention, init_linears, sequences
from .published import Names

EPS = 1e-12  # BERT's


class FeedForward(nn.Module):
    """Linear, GELU, linear; residual, then LayerNorm."""

    def __init__(self, dim: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.up, self.down = nn.Linear(dim, intermediate_size), nn.Linear(intermediate_size, dim)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=EPS), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class AttentionNorm(nn.Module):
    """Attention; residual, then LayerNorm."""

    def __init__(self, dim: int, kv_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = Attention(dim, kv_dim, num_heads, dim // num_heads, dim, dropout=dropout)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=EPS), nn.Dropout(dropout)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        return self.norm(x + self.dropout(self.attention(x, keys, keys, mask)))


class QFormerLayer(nn.Module):
    """Shared self-attention; cross-attention of queries to the image (if `cross`); separate text FFN (if any)."""

    def __init__(
        self,
        dim: int,
        vision_dim: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        cross: bool,
        text: bool,
    ):
        super().__init__()
        self.self_attention = AttentionNorm(dim, dim, num_heads, dropout)
        self.cross_attention = AttentionNorm(dim, vision_dim, num_heads, dropout) if cross else None
        self.query_ffn = FeedForward(dim, intermediate_size, dropout)
        self.text_ffn = FeedForward(dim, intermediate_size, dropout) if text else None

    def forward(
        self, x: Tensor, num_queries: int, vision: Tensor | None, mask: Tensor | None, vision_mask: Tensor | None
    ) -> Tensor:
        x = self.self_attention(x, x, mask)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if num_queries:
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, vision, vision_mask)
            queries = self.query_ffn(queries)
        if text.shape[1]:
            text = (self.text_ffn or self.query_ffn)(text)
        return torch.cat([queries, text], dim=1)


class Words(nn.Embedding):
    """Word embeddings, also used as tied output layer: states ``(..., dim)`` to logits ``(..., vocabulary)``."""

    def forward(self, ids: Tensor | None, states: Tensor | None = None) -> Tensor:
        return super().forward(ids) if states is None else F.linear(states, self.weight)


class TextEmbedding(nn.Module):
    """Word plus position embeddings: ids ``(B, T)`` -> ``(B, T, dim)``."""

    def __init__(self, vocabulary: int, positions: int, dim: int):
        super().__init__()
        self.words, self.positions = Words(vocabulary, dim), nn.Embedding(positions, dim)

    def forward(self, ids: Tensor) -> Tensor:
        length, limit = ids.shape[1], self.positions.num_embeddings
        if length > limit:
            raise ValueError(
                f"the text has {length} tokens, but connector.text_positions={limit}: shorten it or raise the option"
            )
        return self.words(ids) + self.positions(torch.arange(length, device=ids.device))


class QFormerCore(nn.Module):
    """The Q-Former transformer, which can run on queries, on text, or on both.

    With `vision` ``(B, N, vision_dim)`` the sequence is [queries; text], without it only text. `mask` is boolean
    ``(B, T, T)`` over that sequence (or broadcastable to it), True where a row may attend to a column; None allows
    everything. `vision_mask` ``(B, N)`` is True where queries may attend. Every row of a mask must have at least one
    True. Returns the hidden states ``(B, T, hidden_size)``, queries first.

    BLIP-2's first stage is three calls with its three masks; the heads belong to the objective. Cross-attention is
    in layers 0, `cross_every`, ... Text has separate feed-forward layers only if `text_ffn`.
    """

    def __init__(
        self,
        vision_dim: int,
        num_queries: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        intermediate_size: int,
        cross_every: int,
        dropout: float,
        text_vocab: int | None,
        text_positions: int,
        text_ffn: bool,
    ):
        super().__init__()
        require_positive(
            num_queries=num_queries,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            intermediate_size=intermediate_size,
            cross_every=cross_every,
            text_positions=text_positions,
        )
        require_divisible(hidden_size, "connector.hidden_size", num_heads, "num_heads")
        require_fraction(dropout=dropout)
        self.num_queries = num_queries
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, hidden_size))
        self.embedding = None
        if text_vocab is not None:
            require_positive(text_vocab=text_vocab)
            self.embedding = TextEmbedding(text_vocab, text_positions, hidden_size)
        self.norm, self.dropout = nn.LayerNorm(hidden_size, eps=EPS), nn.Dropout(dropout)
        text_ffn = text_ffn and text_vocab is not None
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_size, vision_dim, num_heads, intermediate_size, dropout, i % cross_every == 0, text_ffn)
            for i in range(depth)
        )
        init_linears(self)
        tables = [] if self.embedding is None else self.embedding.parameters()
        for table in (self.query_tokens, *tables):
            nn.init.normal_(table, std=0.02)

    def forward(
        self,
        vision: Tensor | None = None,
        text_ids: Tensor | None = None,
        mask: Tensor | None = None,
        vision_mask: Tensor | None = None,
    ) -> Tensor:
        parts = []
        if vision is not None:
            parts.append(self.query_tokens.expand(len(vision), -1, -1))
        if text_ids is not None:
            parts.append(self.embedding(text_ids))
        x = self.dropout(self.norm(torch.cat(parts, dim=1)))
        num_queries = 0 if vision is None else self.num_queries
        mask = None if mask is None else mask.unsqueeze(-3)  # the same for all heads
        vision_mask = None if vision_mask is None else vision_mask[:, None, None]
        for layer in self.layers:
            x = layer(x, num_queries, vision, mask, vision_mask)
        return x


# Our names to LAVIS's, except the projection, which LAVIS names after the language model; and to Hugging Face's.
_LAVIS = (
    (r"^core\.embedding\.words", "Qformer.bert.embeddings.word_embeddings"),
    (r"^core\.embedding\.positions", "Qformer.bert.embeddings.position_embeddings"),
    (r"^core\.norm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^core\.layers", "Qformer.bert.encoder.layer"),
    (r"self_attention\.attention\.out", "attention.output.dense"),
    (r"cross_attention\.attention\.out", "crossattention.output.dense"),
    (r"(self|cross)_attention\.norm", r"\1attention.output.LayerNorm"),
    (r"(self|cross)_attention\.attention\.q\.", r"\1attention.self.query."),
    (r"(self|cross)_attention\.attention\.k\.", r"\1attention.self.key."),
    (r"(self|cross)_attention\.attention\.v\.", r"\1attention.self.value."),
    (r"selfattention", "attention"),
    (r"query_ffn\.up", "intermediate_query.dense"),
    (r"query_ffn\.down", "output_query.dense"),
    (r"query_ffn\.norm", "output_query.LayerNorm"),
    (r"text_ffn\.up", "intermediate.dense"),
    (r"text_ffn\.down", "output.dense"),
    (r"text_ffn\.norm", "output.LayerNorm"),
    (r"^core\.", ""),
)
_HF = (
    *_LAVIS,
    (r"attention\.self\.", "attention.attention."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^ln_vision", "vision_model.post_layernorm"),
    (r"^proj\.", "language_projection."),
)


class QFormer(QueryConnector):
    """Learned queries in a BERT with cross-attention, then a linear layer (BLIP-2, section 3 and published code).

    ``(B, H, W, in_dim)`` -> ``(B, num_queries, out_dim)``, for any grid; ``features.prefix`` (CLS) is read as well,
    before the patches. With `text_vocab` (BERT's: 30523 with BLIP-2's extra token) it also reads an instruction
    (InstructBLIP, section 2.2): ``forward(features, text_ids, text_mask)``, with ids ``(B, T)`` and a mask that is
    True at real tokens. `vision_norm` normalizes the features first: LAVIS's ``ln_vision``, which Hugging Face keeps
    in the encoder (with another `vision_norm_eps`). It is part of this connector and is trained even if the encoder is
    frozen, as published. `core` is the Q-Former without `proj`, for training without a language model: `out_dim` is
    then None and tokens have width `hidden_size`.

    In the last layer the feed-forward part for the instruction cannot influence the queries, here as in the published
    model, so its gradient is zero.
    """

    PUBLISHED = (
        # BLIP-2 keeps the text embeddings outside the Q-Former, InstructBLIP inside.
        Names(
            "model.",
            (*_HF, (r"qformer\.embeddings\.LayerNorm", "qformer.layernorm"), (r"qformer\.embeddings", "embeddings")),
            ignored="position_ids",
        ),
        Names("model.", (*_HF, (r"embeddings\.LayerNorm", "embeddings.layernorm")), ignored="position_ids"),
        *(
            Names("", (*_LAVIS, (r"^proj\.", projection)), ignored="position_ids")
            for projection in ("opt_proj.", "t5_proj.", "llm_proj.")
        ),
    )

    stands_alone = True

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None,
        num_queries: int = 32,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        cross_every: int = 2,
        dropout: float = 0.1,
        text_vocab: int | None = None,
        text_positions: int = 512,
        vision_norm: bool = False,
        vision_norm_eps: float = 1e-5,
    ):
        super().__init__(in_dim, hidden_size if out_dim is None else out_dim)
        self.num_queries, self.reads_text = num_queries, text_vocab is not None
        self.ln_vision = nn.LayerNorm(in_dim, eps=vision_norm_eps) if vision_norm else nn.Identity()
        layers = (hidden_size, depth, num_heads, intermediate_size, cross_every, dropout)
        self.core = QFormerCore(in_dim, num_queries, *layers, text_vocab, text_positions, text_ffn=True)
        self.proj = nn.Identity() if out_dim is None else nn.Linear(hidden_size, out_dim)

    def tokens(self, features: Features, text_ids: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        self.check(features)
        vision, vision_mask = sequences(features)
        mask = instruction_mask(self, text_ids, text_mask)
        states = self.core(self.ln_vision(vision), text_ids, mask, vision_mask)
        return self.proj(states[:, : self.num_queries])

    def read(self, features: VisionFeatures) -> Tensor:
        """Return the sequence that the queries read from an image, ``(B, P + H*W, in_dim)``."""
        self.check(features)
        vision, vision_mask = sequences(features)
        assert vision_mask is None, "the sequences are not equally long: they cannot be read without their mask"
        return self.ln_vision(vision)

    def load_bert(self, state_dict: dict[str, Tensor]) -> None:
        """Initialize from BERT (section 3.1): self-attention, feed-forward layers (queries and text), word embeddings.

        state_dict: that of Hugging Face's ``BertForMaskedLM``. Queries, cross-attention and rows of a larger vocabulary
        have no counterpart there and are left unchanged. Raises ValueError listing the tensors that do not fit.
        """
        missing, shapes, found = set(), set(), []  # each feed-forward layer is looked up twice
        for name, own in self.core.state_dict().items():
            theirs = f"core.{name}"
            for pattern, replacement in _LAVIS:
                theirs = re.sub(pattern, replacement, theirs)
            theirs = theirs.removeprefix("Qformer.").replace("_query", "")
            if theirs == "query_tokens" or "crossattention" in theirs:
                continue
            tensor = state_dict.get(theirs)
            if tensor is None:
                missing.add(theirs)
            elif tensor.shape != own.shape and (
                name != "embedding.words.weight" or tensor.shape[1:] != own.shape[1:] or len(tensor) > len(own)
            ):
                shapes.add(f"{theirs} (expected {tuple(own.shape)}, got {tuple(tensor.shape)})")
            else:
                found.append((own, tensor))
        problems = [f"{what}: {some(names)}" for what, names in (("shape", shapes), ("missing", missing)) if names]
        if problems:
            raise ValueError(f"this BERT does not fit the Q-Former, and nothing was loaded: {'; '.join(problems)}")
        with torch.no_grad():
            for own, tensor in found:
                own[: len(tensor)].copy_(tensor)


def instruction_mask(connector: QueryConnector, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor | None:
    """Mask ``(B, 1, queries + T)``: every position may attend to the queries and to real instruction tokens."""
    if connector.reads_text != (text_ids is not None):
        raise ValueError(
            "connector.text_vocab is set, so the connector requires text_ids: pass the instruction or unset the option"
            if connector.reads_text
            else "got text_ids, but connector.text_vocab is not set: set it to the size of the text's vocabulary"
        )
    if text_mask is None:
        return None
    queries = text_mask.new_ones(len(text_mask), connector.num_queries, dtype=torch.bool)
    return torch.cat([queries, text_mask.bool()], dim=1)[:, None]
