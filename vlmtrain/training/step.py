"""One optimizer step on all ranks: totals, forward and backward passes, and detection of bad steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.layouts import BadRecord
from ..data.loader import StepData, Work
from ..distributed.processes import peak_resident_bytes
from ..distributed.world import World
from ..objectives import Objective
from .bad_steps import BadSteps, Fault
from .cost.flops import StepFlops
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


def _shares(loss_weights: Sequence[float], totals: Sequence[float], summed: bool = False) -> list[float]:
    """Factors on the weights of targets by source, with which the loss is the weighted mean of the sources' losses.

    totals: of the weights of the targets in a step, by source. A source without targets in the step does not count.
    summed: the loss is the weighted sum instead.
    """
    present = 1.0 if summed else sum(weight for weight, total in zip(loss_weights, totals) if total)
    return [weight / present / total if total else 0.0 for weight, total in zip(loss_weights, totals)]


class Totals(NamedTuple):
    """The numbers of `StepData`, summed over ranks.

    bad: number of bad records. stops, late: numbers of ranks that stop, and that are due to save.
    """

    plan: float
    weight: float
    samples: float
    tokens: float
    image_tokens: float
    target_tokens: float
    padded_tokens: float
    bad: float
    stops: float
    late: float
    drawn: list[float]
    source_weights: list[float]
    work: Work


@dataclass
class StepRunner:
    """Runs the optimizer steps of a stage. Every rank runs the same steps.

    sources: names of the data sources. loss_weights: weights of the sources' mean losses; None if the loss is the mean
    over the targets of all sources. sums_sources: whether the loss is the weighted sum of these mean losses rather than
    their weighted mean. flops: counts those of a step, on the main rank. peak_tflops: of one device, if it is known.
    """

    stage: str
    seed: int
    skips_bad_samples: bool
    engine: StageEngine
    objective: Objective
    world: World
    watch: Watch
    skips: Skips
    bad_steps: BadSteps
    sources: Sequence[str]
    loss_weights: Sequence[float] | None
    sums_sources: bool
    flops: StepFlops | None
    peak_tflops: float | None

    def run(self, step: int, data: StepData, started: float, waited: float, stopping: bool, is_late: bool) -> StepDone:
        """Train on a step's data.

        started: ``time.perf_counter()`` before waiting for the data. waited: seconds spent waiting. stopping: whether
        this rank received a stop signal. is_late: whether a checkpoint is due by time.
        """
        self.engine.timer.reset()  # a validation may have run since the last step
        ids = [sample for batch in data.micro_batches for sample in batch.ids]
        self.watch.doing(f"{self.stage} step {step + 1}: summing totals over ranks", ids)
        totals = self._totals(data, stopping, is_late)
        if totals.plan != data.plan * self.world.size:
            raise ValueError(
                f"{self.stage} step {step + 1}: the ranks have planned different steps: their data files or images are "
                "not the same, or an image has changed since an earlier run; delete $XDG_CACHE_HOME/vlmtrain/lengths "
                "(~/.cache) on all machines and run the same command again"
            )
        if totals.bad:
            self._handle_bad([found for rank in self.world.gather(data.bad) for found in rank], step)
        rates = self.engine.set_rates(step)
        shares = self.loss_weights and _shares(self.loss_weights, totals.source_weights, self.sums_sources)
        loss, by_source, norm = self._update(step, data, 1.0 if shares else max(totals.weight, 1e-9), shares)
        seconds = time.perf_counter() - started
        on_gpu = self.world.device.type == "cuda"
        values = {
            "step": step + 1,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rates,
            "samples": int(totals.samples),
            "tokens": int(totals.tokens),
            "image_tokens": int(totals.image_tokens),
            "target_tokens": int(totals.target_tokens),
            "padding_fraction": 1 - totals.tokens / max(totals.padded_tokens, 1),
            "step_seconds": seconds,
            "data_seconds": waited,
            "samples_per_second": int(totals.samples) / seconds,
            "tokens_per_second": int(totals.tokens) / seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
            "phase_seconds": {"data": waited, **self.engine.timer.seconds()},
            **self._flops(totals, seconds),
            **self._loss_by_source(by_source, totals.source_weights, shares),
        }
        return StepDone(values, totals.stops > 0, totals.late > 0, [int(number) for number in totals.drawn])

    def _totals(self, data: StepData, stopping: bool, is_late: bool) -> Totals:
        """The counts of a step, summed over ranks."""
        counts = (data.samples, data.tokens, data.image_tokens, data.target_tokens, data.padded_tokens, len(data.bad))
        numbers = [data.plan, self.objective.weight(data), *counts, float(stopping), float(is_late)]
        sums = self.world.sum([*numbers, *data.drawn, *data.source_weights, *data.work])
        first, sources = len(numbers), len(data.drawn)
        last = first + 2 * sources
        return Totals(*sums[:first], sums[first : first + sources], sums[first + sources : last], Work(*sums[last:]))

    def _flops(self, totals: Totals, seconds: float) -> dict[str, float]:
        """FLOPs of a step, and their share of what the devices could do."""
        if self.flops is None:
            return {}
        flops = self.flops(totals.samples, totals.tokens, totals.target_tokens, totals.work)
        if self.peak_tflops is None:
            return {"flops": flops}
        return {"flops": flops, "mfu": flops / (seconds * self.peak_tflops * 1e12 * self.world.size)}

    def _loss_by_source(
        self, sums: list[float], weights: list[float], shares: list[float] | None
    ) -> dict[str, dict[str, float]]:
        """The mean loss of each source in a step, given the sums by source of the losses times `shares`."""
        found = zip(self.sources, sums, weights, shares or [1.0] * len(weights))
        means = {name: total / (weight * share) for name, total, weight, share in found if weight}
        return {"loss_by_source": means} if sums else {}

    def _update(
        self, step: int, data: StepData, weight: float, shares: list[float] | None
    ) -> tuple[float, list[float], float]:
        """Run the micro-batches of a step and update the weights.

        shares: factors on the weights of the targets, by source; None for 1. Returns the loss, the summed losses by
        source, if there are several, and the gradient norm. Bad steps make no update: every engine skips a step whose
        gradient is not finite on some rank.
        """
        losses: list[Tensor] = []
        by_source = torch.zeros(len(self.sources), dtype=torch.double, device=self.world.device)
        for i, batch in enumerate(data.micro_batches):
            # Randomness (dropout) depends on the position in the run, so resuming needs no generator state.
            seed_for(self.seed, self.stage, step, i, self.world.rank)
            where = f"{self.stage} step {step + 1}, micro-batch {i + 1} of {len(data.micro_batches)}"
            self.watch.doing(f"{where}: forward", batch.ids)
            moved = batch.to(self.world.device, self.engine.dtype)
            if shares is not None:
                factors = moved.trained.weights.new_tensor(shares)[moved.trained.sources]
                moved = moved._replace(trained=moved.trained._replace(weights=moved.trained.weights * factors))
            loss, of_targets = self.engine.loss(moved)
            losses.append(loss.detach().float())
            if of_targets is not None:
                by_source.index_add_(0, moved.trained.sources, of_targets.double())
            loss = loss * (1 + 0 * loss.detach())  # a non-finite loss becomes NaN, and so do all gradients
            if self.bad_steps.skip_spikes and i + 1 == len(data.micro_batches):  # waits for the device
                fault = self.bad_steps.judge(self._sums(losses, by_source[:0])[0] / weight)
                loss = loss * math.nan if fault else loss
            self.watch.doing(f"{where}: backward{' and update' * (i + 1 == len(data.micro_batches))}", batch.ids)
            self.engine.backward(loss, weight)
        has_sources = len(self.sources) > 1 and of_targets is not None
        total, *found = self._sums(losses, by_source if has_sources else by_source[:0])
        mean, norm = total / weight, self.engine.grad_norm()
        fault = self.bad_steps.judge(mean)
        if not fault and not math.isfinite(norm):
            fault = Fault("the gradient is not finite", True)
        if not (fault and fault.skipped):
            self.engine.average()
        self.bad_steps.count(step + 1, mean, fault, self._suspects(data, losses) if fault else ())
        return mean, found, norm

    def _sums(self, losses: list[Tensor], by_source: Tensor) -> list[float]:
        """The loss of a step, and those of its sources, summed over this rank's micro-batches and over all ranks."""
        return self.world.sum(torch.cat([torch.stack(losses).sum().double()[None], by_source]).tolist())

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
