"""Attention that reads from the batch who sees whom: samples of a packed row, prefixes, branches and image tokens.

Each sample of a packed row attends only to itself, without a mask over the complete row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import some
from .encoder_decoder import is_encoder_decoder
from .varlen import has_kernel, varlen_attention

NAME = "vlmtrain_segments"
APART = {"full_attention", "sliding_attention", "attention"}  # types of layers that keep segments separate
# arguments that need a dense mask, and the settings that lead to them
_SETTINGS = {
    "prefix": "fusion.attention=prefix",
    "branch": "share_images=true",
    "bidirectional": "fusion.attention=images",
}
RULES = tuple(_SETTINGS)


def segments_obstacle(llm: nn.Module) -> str | None:
    """Why the samples of a row would see each other in a language model, whatever `attend_in_segments` does.

    None if they would not. Convolutions and recurrences continue from one sample into the next, and some attention
    cannot be replaced.
    """
    if is_encoder_decoder(llm.config):
        return f"{type(llm).__name__} is an encoder-decoder model"
    config = llm.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - APART)
    if kinds or getattr(llm, "_is_stateful", False):
        return f"{type(llm).__name__} has layers other than attention ({some(kinds) or 'recurrent'})"
    if _has_own_segments(llm):
        return None
    sinks = any(name.endswith(".sinks") for name, _ in llm.named_parameters())
    exchangeable = getattr(llm, "_supports_attention_backend", False) and not sinks
    if not exchangeable or getattr(config, "attention_chunk_size", None):
        return f"{type(llm).__name__} has a custom attention"
    return None


def _has_own_segments(llm: nn.Module) -> bool:
    used = llm.config.get_text_config()._attn_implementation
    return used.startswith("flash_attention") or used == NAME


def attend_in_segments(llm: nn.Module, given: str = "layout=packed") -> None:
    """Make a language model keep the samples of packed rows separate. Rows that are not packed are not affected.

    Nothing is changed if the model uses variable-length flash attention, which already keeps them separate. Raises
    ValueError, naming the setting `given`, for a model that has a `segments_obstacle`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    obstacle = segments_obstacle(llm)
    if obstacle is not None:
        raise ValueError(
            f"{given}: {obstacle}, in which the samples of a row would see each other; use layout=padded padding=auto"
        )
    if _has_own_segments(llm):
        return
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, _mask)
    llm.set_attn_implementation(NAME)


@contextmanager
def plain_attention(llm: nn.Module) -> Iterator[None]:
    """Let a language model run on any device: with eager attention instead of one that may need a GPU."""
    used = getattr(llm.config, "_attn_implementation", None)
    needs_gpu = used not in (None, "eager", "sdpa")
    if needs_gpu:
        llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        if needs_gpu:
            llm.set_attn_implementation(used)


def follow_rules(llm: nn.Module, arguments: Iterable[str]) -> None:
    """Make a language model follow the named arguments of `attention_arguments`, if it does not yet.

    `boundaries` needs `attend_in_segments` before training. Raises ValueError for a model that cannot follow one.
    """
    rules = ", ".join(_SETTINGS[name] for name in sorted(set(arguments) & set(RULES)))
    used = llm.config.get_text_config()._attn_implementation
    if not rules or used == NAME:
        return
    if used.startswith("flash_attention"):
        raise ValueError(
            f"{type(llm).__name__} with {used} attention does not support {rules}: flash attention takes no mask; use "
            "llm.attn_implementation=sdpa"
        )
    obstacle = segments_obstacle(llm)
    if obstacle is not None:
        raise ValueError(f"{obstacle} and does not support {rules}")
    attend_in_segments(llm)


def attention_arguments(
    boundaries: Tensor | None = None,
    prefix: Tensor | None = None,
    branch: Tensor | None = None,
    bidirectional: Tensor | None = None,
    *,
    segments: Tensor | None = None,
) -> dict:
    """Arguments that Hugging Face models pass on to attention; empty if nothing is given.

    Args:
        boundaries: ``(S + 1,)`` int32, where the samples of a packed row start and end.
        prefix: ``(B,)``, or ``(S,)`` for a packed row; that many first positions of each sample see each other in
            both directions, and later ones are causal. Padding is not counted.
        branch: ``(B, T)``, on the host; 0 for positions that all branches of a message tree share, i >= 1 for those of
            branch i. A position sees only shared positions and those of its own branch.
        bidirectional: ``(B, T)``; positions with the same number >= 0 see each other in both directions, and those
            with -1 are causal. Padding on the right must have -1.
        segments: ``(S,)``, lengths of the samples of a packed row, on the host; None to read them from `boundaries`.

    In a packed row, all of them apply within each sample.
    """
    arguments = {"prefix": prefix, "branch": branch, "bidirectional": bidirectional}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    rules = list(arguments)
    if boundaries is not None:
        segments = boundaries.diff().cpu() if segments is None else segments
        longest = int(segments.max())
        arguments |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "segments": segments}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
        if rules == ["branch"]:
            arguments |= {"trees": _trees(branch[0].cpu(), segments, boundaries.device)}
    return arguments


class Tree(NamedTuple):
    """A sample of a packed row, from position `start` to `end`, whose first `shared` positions are causal.

    seen ``(end - start - shared, end - start)`` bool: whom the positions behind them see, those of the branches; None
    for a sample without branches, all of whose positions are shared. place ``(end - start,)``: the position of each in
    its own dialogue.
    """

    start: int
    end: int
    shared: int
    seen: Tensor | None = None
    place: Tensor | None = None


def _trees(branch: Tensor, segments: Tensor, device: torch.device) -> list[Tree] | None:
    """The samples of a row with `branch` ``(T,)``; None unless each consists of shared positions and then branches."""
    trees, start = [], 0
    for own in branch.split(segments.tolist()):
        ids, counts = own.unique_consecutive(return_counts=True)
        if (ids.diff() <= 0).any():
            return None
        end, shared = start + len(own), int(counts[0]) if ids[0] == 0 else 0
        if shared == len(own):
            trees.append(Tree(start, end, shared))
        else:
            position, own = torch.arange(len(own), device=device), own.to(device, non_blocking=True)
            seen = ((own == own[shared:, None]) & (position <= position[shared:, None])) | (own == 0)
            trees.append(Tree(start, end, shared, seen, torch.cat([position[:shared], seen.sum(1) - 1])))
        start = end
    return trees


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
    segments: Tensor | None = None,
    prefix: Tensor | None = None,
    branch: Tensor | None = None,
    bidirectional: Tensor | None = None,
    trees: Sequence[Tree] | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of a row, with the signature that Hugging Face models expect.

    query ``(B, H, T, d)``; key, value ``(B, G, T, d)`` with G groups of heads; cu_seq_lens_q ``(S + 1,)`` and segments
    ``(S,)`` for a packed row (B = 1), None for rows of one sample. Returns ``(B, T, H, d)``.

    `prefix`, `branch` and `bidirectional` change which positions see each other, see `attention_arguments`. They
    describe all keys, so they need an empty cache. They are ignored for a single query, the next token of a
    generation, which sees all earlier positions.
    """
    assert unused.get("s_aux") is None, "attention sinks"
    attend = partial(_attend, window=sliding_window, softcap=softcap, scale=scaling, dropout_p=dropout)
    rules = dict(zip(RULES, (prefix, branch, bidirectional)))
    if query.shape[2] > 1 and any(rule is not None for rule in rules.values()):
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"{', '.join(RULES)} need an empty cache that grows with the sequence")
        if trees is not None:
            return _attend_trees(attend, sliding_window, query, key, value, trees).transpose(1, 2), None
        attend = partial(_attend_by_rules, attend, sliding_window)
        if cu_seq_lens_q is None:
            return attend(query, key, value, attention_mask, **rules).transpose(1, 2), None
        return _attend_each(attend, query, key, value, segments, **rules).transpose(1, 2), None
    if cu_seq_lens_q is None:
        return attend(query, key, value, attention_mask).transpose(1, 2), None
    if softcap is None and has_kernel(query, dropout):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return varlen_attention(*rows, cu_seq_lens_q, unused["max_length_q"], scaling, window)[None], None
    return _attend_each(attend, query, key, value, segments).transpose(1, 2), None


# It would be recompiled for every number of segments. torch.compiler.disable would import the compiler here.
@torch._disable_dynamo
def _attend_each(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, segments: Tensor, **rules: Tensor | None
) -> Tensor:
    """Attention within each segment, one segment at a time, with the rules of each; ``(B, H, T, d)``."""
    sizes = segments.tolist()
    pieces = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)))
    own = [{} for _ in sizes]
    for name, rule in rules.items():
        if rule is not None:
            parts = rule.split(1) if name == "prefix" else rule.split(sizes, dim=1)
            for one, part in zip(own, parts, strict=True):
                one[name] = part
    return torch.cat([attend(*piece, mask=None, **one) for piece, one in zip(pieces, own)], dim=2)


@torch._disable_dynamo
def _attend_trees(
    attend: Callable[..., Tensor],
    window: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trees: Sequence[Tree],
) -> Tensor:
    """Attention within each sample of a row, ``(B, H, T, d)``; only branches need a mask."""
    found = []
    for start, end, shared, seen, place in trees:
        own = [tensor[:, :, start:end] for tensor in (query, key, value)]
        if shared:
            found.append(attend(*(tensor[:, :, :shared] for tensor in own), mask=None))
        if seen is not None:
            if window is not None:
                seen = seen & (place > place[shared:, None] - window)
            found.append(attend(own[0][:, :, shared:], *_ungrouped(*own), mask=seen[None, None]))
    return torch.cat(found, dim=2)


def _ungrouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as the query: on CUDA, a mask and groups can rule out all fused kernels."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _attend_by_rules(
    attend: Callable[..., Tensor],
    window: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **rules: Tensor | None,
) -> Tensor:
    """Attention with a dense mask made from the rules; of `mask` ``(B, 1, T, T)`` only the padding is kept."""
    assert mask is None or mask.dtype == torch.bool, "a mask that `_mask` has not made"
    # Such a mask lets a position see itself unless it is padding.
    real = None if mask is None else mask[:, 0].diagonal(dim1=1, dim2=2)
    mask = _allowed(query.shape[2], query.device, real, window, **rules)
    return attend(query, *_ungrouped(query, key, value), mask)


def _allowed(
    length: int,
    device: torch.device,
    real: Tensor | None,
    window: int | None,
    prefix: Tensor | None = None,
    branch: Tensor | None = None,
    bidirectional: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees, ``(B, 1, T, T)`` bool; real ``(B, T)`` bool is False for padding."""
    position = torch.arange(length, device=device)
    ahead = position - position[:, None]
    seen = (ahead <= 0)[None]
    if prefix is not None:
        count = position[None] + 1 if real is None else real.cumsum(1)  # rows may be padded on the left
        inside = count <= prefix[:, None]
        seen = seen | (inside[:, :, None] & inside[:, None])
    if bidirectional is not None:
        same = bidirectional[:, :, None] == bidirectional[:, None]
        seen = seen | (same & (bidirectional >= 0)[:, None])
    if branch is not None:
        branch = branch.to(device)
        of_dialogue = (branch[:, :, None] == branch[:, None]) | (branch == 0)[:, None]
        seen = seen & of_dialogue
    if window is not None:
        # As in transformers' Gemma 3: the window limits how far back a position sees, also within its prefix or
        # image, but not how far ahead. Positions of other branches do not count.
        later = -ahead[None] if branch is None else _count_back(of_dialogue & (ahead <= 0))
        seen = seen & (later < window)
    if real is not None:
        seen = (seen & real[:, None]) | (ahead == 0)  # padding sees itself, because a softmax over nothing is NaN
    return seen[:, None]


def _count_back(seen: Tensor) -> Tensor:
    """From each query back to each key, the number of keys that the query sees, without the key; ``(B, T, T)``."""
    return seen.flip(-1).cumsum(-1).flip(-1) - 1


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
    # The lowest number, not -inf: padding on the left sees nothing, and its softmax would be NaN.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.float().softmax(-1).to(query.dtype), dropout_p)
    return weights @ value
