"""Generate answers to prompts, and compute the likelihood of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..batch import Batch
from ..connectors import Features
from ..data.processor import Processor
from ..data.rendered import IGNORE
from ..model import VLMWrapper
from ..model.encoder_decoder import is_encoder_decoder
from ..model.fusion import Concatenation
from ..model.rotary import rows_of_positions


class Likelihood(NamedTuple):
    """Log-probability of an answer with its end of turn; its number of tokens; whether each is the most likely one."""

    total: float
    tokens: int
    is_greedy: bool = False

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)


def generate(
    model: VLMWrapper, processor: Processor, batch: Batch, features: Features | None = None, **options
) -> Tensor:
    """Generate tokens after each row of a batch, greedily unless `options`, passed to ``generate``, say otherwise.

    features: see `VLMWrapper.embed`.
    """
    return model.generate(batch, features, **_with_defaults(processor, options))


def _with_defaults(processor: Processor, options: dict) -> dict:
    ends = {"eos_token_id": processor.renderer.stop_ids, "pad_token_id": processor.filler}
    return {"do_sample": False, **ends, **options}


MOST_BYTES = 4 * 2**30
"""Largest size of shared prefixes; they are in memory up to twice."""


class Prefixes:
    """The keys and values of complete conversations, from which generation continues at any prompt within them.

    Pass `cache` to the model's forward pass over the conversations, then call `generate`.
    """

    def __init__(self, model: VLMWrapper):
        self.model = model
        self.cache = DynamicCache()  # without a configuration: sliding windows keep all positions

    @staticmethod
    def serve(model: VLMWrapper) -> bool:
        """Whether a prompt's state is the beginning of its conversation's state.

        That excludes encoder-decoder models, language models with a recurrent state or a cache of their own, and
        fusions that may read later text.
        """
        llm = model.llm
        if is_encoder_decoder(llm.config) or llm._is_stateful or llm.generation_config.cache_implementation:
            return False
        if not llm._supports_default_dynamic_cache():
            return False
        layers = DynamicCache(config=llm.config.get_text_config(decoder=True)).layers
        kinds = {type(layer) for layer in layers}
        return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and type(model.fusion) is Concatenation

    @staticmethod
    def fit(llm: nn.Module, batch: Batch) -> bool:
        """Whether the keys and values of a batch take at most `MOST_BYTES`."""
        config, embeddings = llm.config.get_text_config(decoder=True), llm.get_input_embeddings()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = 2 * config.num_hidden_layers * heads * width * embeddings.weight.element_size()
        return size * batch.input_ids.numel() <= MOST_BYTES

    @property
    def are_complete(self) -> bool:
        """Whether the forward pass filled the cache of every layer."""
        layers = self.cache.layers
        return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)

    @staticmethod
    def allow(batch: Batch) -> bool:
        """Whether the last position of each prompt can be read alone: it is text, and attention is causal."""
        if any(rule is not None for rule in (batch.prefix, batch.branch, batch.bidirectional)):
            return False
        return batch.visual is None or not bool(_last(batch.visual.mask, batch.lengths).any())

    def generate(
        self, processor: Processor, batch: Batch, rows: Sequence[int], is_last: bool = False, **options
    ) -> Tensor:
        """As the function `generate`, for prompts that are beginnings of the given `rows` of the forward pass.

        is_last: whether to free the prefixes while they are copied, because no further prompts use them.
        """
        llm, width, lengths = self.model.llm, batch.input_ids.shape[1], batch.lengths
        columns = torch.arange(width, device=lengths.device)[None]
        padding = (width - lengths)[:, None]  # generation requires padding on the left
        source = torch.tensor(rows, device=lengths.device)[:, None], (columns - padding).clamp(min=0)[:, :-1]
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            keys, values = (states.transpose(1, 2)[source].transpose(1, 2) for states in (layer.keys, layer.values))
            cache.update(keys, values, number)
            if is_last:
                layer.keys = layer.values = None
        last = llm.get_input_embeddings()(_last(batch.input_ids, lengths)[:, None])
        # `generate` reads only the last of these, but derives the length of the prompts from them
        embeddings = F.pad(last, (0, 0, width - 1, 0))
        options = _with_defaults(processor, options)
        with rows_of_positions(llm, batch.positions, lengths, are_read=True):
            mask = (columns >= padding).long()
            return llm.generate(inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, **options)


def _last(values: Tensor, lengths: Tensor) -> Tensor:
    """The last real value of each row of ``(B, T)``."""
    return values.gather(1, lengths[:, None] - 1)[:, 0]


@torch.no_grad()
def likelihoods(
    model: VLMWrapper, batch: Batch, starts: Sequence[int], features: Features | None = None
) -> list[Likelihood]:
    """Likelihood of the end of each row, from position ``starts[row]``. The batch may have further rows.

    features: see `VLMWrapper.embed`.
    """
    device, height = batch.input_ids.device, len(batch.input_ids)
    first = F.pad(torch.tensor(starts, dtype=torch.long, device=device), (0, height - len(starts)))
    # a target is one position before its token
    ahead = torch.arange(batch.input_ids.shape[1], device=device)[None] >= first[:, None] - 1
    keep = ahead & (batch.targets != IGNORE)
    keep[:, 0] |= not starts
    positions = keep.flatten().nonzero()[:, 0]
    rows, targets = positions // keep.shape[1], batch.targets.flatten()[positions]
    logits = model(batch, features, keep=positions).float()
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    totals = torch.zeros(height, dtype=torch.double, device=device).index_add_(0, rows, -losses)
    missed = torch.zeros(height, device=device).index_add_(0, rows, (logits.argmax(-1) != targets).float())
    return [
        Likelihood(total, tokens, not wrong)
        for _, total, tokens, wrong in zip(starts, totals.tolist(), keep.sum(1).tolist(), missed.tolist())
    ]
