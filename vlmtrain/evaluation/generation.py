"""Generate answers to prompts, and compute the likelihood of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch import Batch
from ..data.processor import Processor, Sample
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


def generate(model: VLMWrapper, processor: Processor, batch: Batch, **options) -> Tensor:
    """Generate tokens after each row of a batch, greedily unless `options`, passed to ``generate``, say otherwise."""
    options = {"do_sample": False, "eos_token_id": processor.renderer.stop_ids, **options}
    return model.generate(batch, pad_token_id=processor.filler, **options)


@torch.no_grad()
def likelihoods(model: VLMWrapper, batch: Batch, samples: Sequence[Sample]) -> list[Likelihood]:
    """Likelihood of the last answer of each of the `samples` in a batch, which may have further rows."""
    device, height = batch.input_ids.device, len(batch.input_ids)
    starts = torch.tensor([sample.tokens.answers[-1][0] for sample in samples], dtype=torch.long, device=device)
    starts = F.pad(starts, (0, height - len(samples)))
    # a target is one position before its token
    ahead = torch.arange(batch.input_ids.shape[1], device=device)[None] >= starts[:, None] - 1
    keep = ahead & (batch.targets != IGNORE)
    keep[:, 0] |= not samples
    rows = keep.nonzero()[:, 0]
    logits, targets = model(batch, keep=keep).float(), batch.targets[keep]
    losses = F.cross_entropy(logits, targets, reduction="none").double()
    totals = torch.zeros(len(starts), dtype=torch.double, device=device).index_add_(0, rows, -losses)
    missed = torch.zeros(len(starts), device=device).index_add_(0, rows, (logits.argmax(-1) != targets).float())
    return [
        Likelihood(total, tokens, not wrong)
        for _, total, tokens, wrong in zip(samples, totals.tolist(), keep.sum(1).tolist(), missed.tolist())
    ]
