"""One optimizer step on all ranks: totals, forward and backward passes, and detection of bad steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.loader import BadRecord, StepData
from ..distributed.processes import peak_resident_bytes
from ..distributed.world import World
from ..objectives import Objective
from .bad_steps import BadSteps, Fault
from .engine.stage_engine import StageEngine
from .log import logger
from .seeding import seed_for
from .skips import Skips
from .watch import Watch


class StepDone(NamedTuple):
    """Metrics of a step, whether any rank has to stop or save, and the number of samples from each source."""

    values: dict
    stopping: bool
    is_late: bool
    drawn: list[int]


@dataclass
class StepRunner:
    """Runs the optimizer steps of a stage. Every rank runs the same steps."""

    stage: str
    seed: int
    skips_bad_samples: bool
    engine: StageEngine
    objective: Objective
    world: World
    watch: Watch
    skips: Skips
    bad_steps: BadSteps

    def run(self, step: int, data: StepData, started: float, waited: float, stopping: bool, is_late: bool) -> StepDone:
        """Train on a step's data.

        started: ``time.perf_counter()`` before waiting for the data. waited: seconds spent waiting. stopping: whether
        this rank received a stop signal. is_late: whether a checkpoint is due by time.
        """
        ids = [sample for batch in data.micro_batches for sample in batch.ids]
        self.watch.doing(f"{self.stage} step {step + 1}: summing totals over ranks", ids)
        plans, weight, samples, tokens, image_tokens, target_tokens, padded, bad, stops, late, *drawn = self.world.sum(
            [
                data.plan,
                self.objective.weight(data),
                data.samples,
                data.tokens,
                data.image_tokens,
                data.target_tokens,
                data.padded_tokens,
                len(data.bad),
                float(stopping),
                float(is_late),
                *data.drawn,
            ]
        )
        if plans != data.plan * self.world.size:
            raise ValueError(
                f"{self.stage} step {step + 1}: the ranks have planned different steps: their data files or images are "
                "not the same, or an image has changed since an earlier run; delete $XDG_CACHE_HOME/vlmtrain/lengths "
                "(~/.cache) on all machines and run the same command again"
            )
        if bad:
            self._handle_bad([found for rank in self.world.gather(data.bad) for found in rank], step)
        rates = self.engine.set_rates(step)
        loss, norm = self._update(step, data, max(weight, 1e-9))
        seconds = time.perf_counter() - started
        on_gpu = self.world.device.type == "cuda"
        values = {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rates,
            "samples": int(samples),
            "tokens": int(tokens),
            "image_tokens": int(image_tokens),
            "target_tokens": int(target_tokens),
            "padding_fraction": 1 - tokens / max(padded, 1),
            "step_seconds": seconds,
            "data_seconds": waited,
            "samples_per_second": int(samples) / seconds,
            "tokens_per_second": int(tokens) / seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        }
        return StepDone(values, stops > 0, late > 0, [int(number) for number in drawn])

    def _update(self, step: int, data: StepData, weight: float) -> tuple[float, float]:
        """Run the micro-batches of a step and update the weights. Returns the loss and the gradient norm.

        Bad steps make no update: every engine skips a step whose gradient is not finite on some rank.
        """
        losses: list[Tensor] = []
        for i, batch in enumerate(data.micro_batches):
            # Randomness (dropout) depends on the position in the run, so resuming needs no generator state.
            seed_for(self.seed, self.stage, step, i, self.world.rank)
            where = f"{self.stage} step {step + 1}, micro-batch {i + 1} of {len(data.micro_batches)}"
            self.watch.doing(f"{where}: forward", batch.ids)
            loss = self.engine.loss(batch.to(self.world.device, self.engine.dtype))
            losses.append(loss.detach().float())
            loss = loss * (1 + 0 * loss.detach())  # a non-finite loss becomes NaN, and so do all gradients
            if self.bad_steps.skip_spikes and i + 1 == len(data.micro_batches):  # waits for the device
                fault = self.bad_steps.judge(self._mean_loss(losses, weight))
                loss = loss * math.nan if fault else loss
            self.watch.doing(f"{where}: backward{' and update' * (i + 1 == len(data.micro_batches))}", batch.ids)
            self.engine.backward(loss, weight)
        mean, norm = self._mean_loss(losses, weight), self.engine.grad_norm()
        fault = self.bad_steps.judge(mean)
        if not fault and not math.isfinite(norm):
            fault = Fault("the gradient is not finite", True)
        if not (fault and fault.skipped):
            self.engine.average()
        self.bad_steps.count(step + 1, mean, fault, self._suspects(data, losses) if fault else ())
        return mean, norm

    def _mean_loss(self, losses: list[Tensor], weight: float) -> float:
        """Loss of a step over all ranks, from the summed losses of this rank's micro-batches."""
        return self.world.sum([float(torch.stack(losses).sum())])[0] / weight

    def _suspects(self, data: StepData, losses: list[Tensor]) -> list[str]:
        """Sample IDs, over all ranks, of micro-batches with a non-finite loss, or of the step if there are none."""
        found = [(batch.ids, bool(torch.isfinite(loss))) for batch, loss in zip(data.micro_batches, losses)]
        everyone = [batch for rank in self.world.gather(found) for batch in rank]
        wrong = [batch for batch in everyone if not batch[1]]
        return [sample for ids, _ in wrong or everyone for sample in ids]

    def _handle_bad(self, found: list[BadRecord], step: int) -> None:
        found.sort()
        if not self.skips_bad_samples:
            raise ValueError(f"{found[0].problem} (step {step + 1}; on_bad_sample=skip trains without it)")
        if self.world.is_main:
            for bad in found:
                logger.warning(f"{self.stage} step {step + 1}: skipped: {bad.problem}")
        self.skips.add(found)
