"""Generate answers to prompts, and compute the likelihood of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.processor import Batch, Processor, Sample
from ..data.rendering import IGNORE
from ..model import VLMWrapper


class Likelihood(NamedTuple):
    """Log-probability of an answer with its end of turn; its number of tokens; whether each is the most likely one."""

    total: float
    tokens: int
    is_greedy: bool = False

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)


def model_inputs(batch: Batch) -> dict:
    """The texts and images of a batch, as the arguments of `VLMWrapper.forward` and `VLMWrapper.generate`."""
    names = ("input_ids", "images", "is_image", "tiles", "text_ids", "text_mask")
    return {name: getattr(batch, name) for name in names}


def generate(model: VLMWrapper, processor: Processor, batch: Batch, **options) -> Tensor:
    """Generate tokens after each row of a batch, greedily unless `options`, passed to ``generate``, say otherwise."""
    options = {"do_sample": False, "eos_token_id": processor.renderer.stop_ids, **options}
    return model.generate(**model_inputs(batch), lengths=batch.lengths, pad_token_id=processor.filler, **options)


def target_logits(model: VLMWrapper, batch: Batch, keep: Tensor) -> Tensor:
    """Logits at the positions in `keep`, as float32."""
    return model(**model_inputs(batch), keep=keep).float()


@torch.no_grad()
def likelihoods(
    model: VLMWrapper, processor: Processor, samples: Sequence[Sample], device: torch.device, dtype: torch.dtype
) -> list[Likelihood]:
    """Likelihood of each sample's last answer, in one batch. Without samples, the model is called all the same."""
    batch = processor.collate(list(samples), rows=1).to(device, dtype)
    starts = torch.tensor([sample.tokens.answers[-1][0] for sample in samples] or [0], device=device)
    # a target is one position before its token
    ahead = torch.arange(batch.input_ids.shape[1], device=device)[None] >= starts[:, None] - 1
    keep = ahead & (batch.targets != IGNORE)
    keep[:, 0] |= not samples
    rows = keep.nonzero()[:, 0]
    logits, targets = target_logits(model, batch, keep), batch.targets[keep]
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    totals = torch.zeros(len(starts), dtype=torch.double, device=device).index_add_(0, rows, -losses)
    missed = torch.zeros(len(starts), device=device).index_add_(0, rows, (logits.argmax(-1) != targets).float())
    return [
        Likelihood(total, tokens, not wrong)
        for _, total, tokens, wrong in zip(samples, totals.tolist(), keep.sum(1).tolist(), missed.tolist())
    ]
