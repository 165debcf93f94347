"""`GatedLayer`: text attends to media between the blocks of a language model (Flamingo, 2022, section 3.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .media import Media


class SwiGLU(nn.Module):
    """Feed-forward layer with a gate, as in Llama."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _gelu_layers(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))


class Style(NamedTuple):
    """How published models differ.

    norm: from a width and the epsilon of the language model; feed_forward: from a width and that of the language
    model's own feed-forward layers. offset: a layer is before block i if ``(i + offset) % every == 0``. shape: number
    and width of the heads; None for those of the language model. grouped: whether there are only as many heads of keys
    and values as in the language model.
    """

    norm: Callable[[int, float], nn.Module]
    feed_forward: Callable[[int, int], nn.Module]
    offset: int
    shape: tuple[int, int] | None
    grouped: bool = False


STYLES = {
    "openflamingo": Style(lambda width, eps: nn.LayerNorm(width), _gelu_layers, 1, (8, 64)),
    "idefics": Style(nn.RMSNorm, SwiGLU, 0, None),
    "mllama": Style(nn.RMSNorm, SwiGLU, 1, None, grouped=True),
}
GATES = ("scalar", "vector")


class GatedLayer(nn.Module):
    """Cross-attention to media and a feed-forward layer; pre-norm, residual, each behind the tanh of a learned gate.

    Gates are 0 at first, which makes the layer an identity. There are no biases. Where a position sees no image, the
    cross-attention adds nothing; neither does the feed-forward layer unless `on_text`. qk_norm: whether the queries and
    keys of each head are normalized. gates: one of `GATES`, a gate for all channels or one for each.
    """

    def __init__(
        self,
        style: Style,
        width: int,
        media_width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        inner: int,
        eps: float,
        on_text: bool,
        qk_norm: bool,
        gates: str,
    ):
        super().__init__()
        self.heads, self.head_dim, self.is_grouped, self.on_text = heads, head_dim, kv_heads != heads, on_text
        self.norm = style.norm(width, eps)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.k = nn.Linear(media_width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(media_width, kv_heads * head_dim, bias=False)
        self.q_norm, self.k_norm = (style.norm(head_dim, eps) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(width if gates == "vector" else 1))
        self.feed_forward_norm = style.norm(width, eps)
        self.feed_forward = style.feed_forward(width, inner)
        self.feed_forward_gate = nn.Parameter(torch.zeros_like(self.gate))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def read(self, media: Media) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, n * M, d)`` of the images of each row."""
        keys, values = (self._by_head(each(media.tokens)[media.images].flatten(1, 2)) for each in (self.k, self.v))
        return self.k_norm(keys), values

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, sees: Tensor, mask: Tensor) -> Tensor:
        """From states ``(B, T, D)``, the keys and values of `read`, and `Media.sees` and `Media.mask`."""
        queries = self.q_norm(self._by_head(self.q(self.norm(states))))
        attended = F.scaled_dot_product_attention(queries, keys, values, mask.unsqueeze(1), enable_gqa=self.is_grouped)
        attended = self.out(attended.transpose(1, 2).flatten(2)).masked_fill(~sees, 0.0)
        states = states + self.gate.tanh() * attended
        made = self.feed_forward(self.feed_forward_norm(states))
        if not self.on_text:
            made = made.masked_fill(~sees, 0.0)
        return states + self.feed_forward_gate.tanh() * made
