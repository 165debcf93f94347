"""Attention for packed rows: each sample attends only to itself, without a mask over the complete row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import some

NAME = "vlmtrain_segments"
APART = {"full_attention", "sliding_attention", "attention"}  # types of layers that keep segments separate


def attend_in_segments(llm: nn.Module) -> None:
    """Make a language model keep the samples of packed rows separate. Rows that are not packed are not affected.

    Nothing is changed if the model uses variable-length flash attention, which already keeps them separate. Raises
    ValueError for a model whose attention cannot be replaced, and for one with layers other than attention, because
    convolutions and recurrences continue from one sample into the next.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = llm.config.get_text_config()
    used = config._attn_implementation
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - APART)
    if kinds or getattr(llm, "_is_stateful", False):
        raise ValueError(
            f"layout=packed: {type(llm).__name__} has layers other than attention "
            f"({some(kinds) or 'recurrent'}), in which the samples of a row would see each other; use layout=padded"
        )
    if used.startswith("flash_attention") or used == NAME:
        return
    sinks = any(name.endswith(".sinks") for name, _ in llm.named_parameters())
    exchangeable = getattr(llm, "_supports_attention_backend", False) and not sinks
    if not exchangeable or getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"layout=packed: {type(llm).__name__} has a custom attention, in which the samples of a row would "
            "see each other; use layout=padded"
        )
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, _mask)
    llm.set_attn_implementation(NAME)


def segment_arguments(boundaries: Tensor) -> dict:
    """Arguments that Hugging Face models pass on to attention; `boundaries` ``(S + 1,)`` int32."""
    longest = int(boundaries.diff().max())
    bounds = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    return {**bounds, "max_length_q": longest, "max_length_k": longest}


def _mask(*arguments, attention_mask: Tensor | None = None, **options) -> Tensor | None:
    """No mask for training; in generation, where rows are padded on the left, the given mask is used."""
    from transformers.masking_utils import sdpa_mask

    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a row, with the signature that Hugging Face models expect.

    query ``(B, H, T, d)``; key, value ``(B, G, T, d)`` with G groups of heads; cu_seq_lens_q ``(S + 1,)`` for a
    packed row (B = 1), None for rows of one sample. Returns ``(B, T, H, d)``.
    """
    assert unused.get("s_aux") is None, "attention sinks"
    attend = partial(_attend, window=sliding_window, softcap=softcap, scale=scaling, dropout_p=dropout)
    if cu_seq_lens_q is None:
        return attend(query, key, value, attention_mask).transpose(1, 2), None
    if query.is_cuda and softcap is None and (flash := _flash_varlen()) and query.dtype != torch.float32:
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        bounds = (cu_seq_lens_q, cu_seq_lens_q, unused["max_length_q"], unused["max_length_q"])
        options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True, "window_size": window}
        return flash(*rows, *bounds, **options)[None], None
    return _attend_each(attend, query, key, value, cu_seq_lens_q).transpose(1, 2), None


# It would be recompiled for every number of segments. torch.compiler.disable would import the compiler here.
@torch._disable_dynamo
def _attend_each(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor
) -> Tensor:
    """Causal attention within each segment, one segment at a time; ``(B, H, T, d)``."""
    sizes = boundaries.diff().tolist()
    pieces = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)))
    return torch.cat([attend(*piece, mask=None) for piece in pieces], dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Attention with `mask`, or causal attention without one; ``(B, H, T, d)``."""
    rows, columns = query.shape[2], key.shape[2]
    if mask is None and window is not None and columns > window:
        own = torch.arange(columns - rows, columns, device=query.device)[:, None]
        ahead = torch.arange(columns, device=query.device) - own
        mask = (ahead <= 0) & (ahead > -window)
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        options = {"is_causal": mask is None and rows > 1, "enable_gqa": groups > 1, "scale": scale}
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **options)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.float().softmax(-1).to(query.dtype), dropout_p)
    return weights @ value


def _flash_varlen():
    """FlashAttention's variable-length kernel, or None if it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func
