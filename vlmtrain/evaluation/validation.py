"""Validation: the loss on held-out conversations, and the answers that the model generates.

Every answer of a conversation is generated from the conversation up to it, and scored (see scores.py). The same
questions with blanked images show how much can be answered from the text alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data.loader import prefetched
from ..data.processor import Processor
from ..data.records import BadSample, Dropped
from ..data.sources import Source
from ..distributed.world import Stopped, StopSignal, World
from ..model import VLMWrapper
from .few_shot import Demonstrations
from .held_out import HeldOut, HeldOutBatch, questions_of, shown
from .reading import Reader, Told
from .retrieval import GROUP, MediaOf, Nearest, merged, vectors
from .scores import FEWER, Answer, check_fits, grade
from .unfinished import Unfinished

SEEING, BLIND = False, True
PLANNED = 256  # number of conversations that are planned between two looks at the stop signal


class Validator:
    """Runs a model on held-out conversations; every rank takes its share and makes the same calls.

    Images are decoded by `workers` processes (0: in this process), a few batches ahead. sync_generation: keep
    generating until all ranks are done, as ZeRO-3 requires. skip_bad: skip broken records. metrics: names of the
    metrics to compute; None: all that the records have the data for. stop: a signal on any rank ends a method with
    `Stopped` after its current batch. tell: called with a description of the work, the number of conversations that
    are done, and their total. demonstrations: for few-shot scores.
    In all methods, `size` is the number of conversations to use, which are drawn from the whole source by `seed`; None
    means all. A larger draw contains the smaller ones.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        world: World,
        dtype: torch.dtype,
        batch_size: int,
        max_new_tokens: int,
        sync_generation: bool = False,
        skip_bad: bool = False,
        metrics: Sequence[str] | None = None,
        seed: int = 0,
        stop: StopSignal | None = None,
        workers: int = 0,
        tell: Callable[[str, int, int], None] | None = None,
        demonstrations: Demonstrations | None = None,
    ):
        self.source, self.processor, self.world, self.dtype = source, processor, world, dtype
        self.batch_size, self.skip_bad, self.metrics = batch_size, skip_bad, metrics
        self.generation = {"max_new_tokens": max_new_tokens, "synced_gpus": sync_generation}
        self.seed, self.stop, self.workers = seed, stop, workers
        self.tell = tell or (lambda what, done, total: None)
        self.order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
        self.demonstrations = demonstrations
        self._retrieved: set[int] = set()  # conversations whose demonstrations were chosen by their images
        self._lengths: dict[tuple[int, int], tuple[int, int] | None] = {}  # None: broken or left out

    def check_metrics(self, size: int | None) -> None:
        """Raise ValueError, before any model runs, if a named metric cannot score a question."""
        if self.metrics is not None:
            check_fits(self._references(size), self.metrics)

    def _references(self, size: int | None) -> Iterator[Answer]:
        """Every question with its reference, unanswered; broken records are reported where they are used."""
        for index in self._indices(size):
            with contextlib.suppress(BadSample):
                yield from questions_of(index, shown(self.processor, self.source[index]))

    def loss(self, model: VLMWrapper, size: int | None, blind: bool = False) -> float:
        """Mean cross-entropy per target token, over all ranks."""
        return mean_loss(self.losses(model, size, blind))

    def losses(self, model: VLMWrapper, size: int | None, blind: bool = False) -> dict[int, tuple[float, float]]:
        """Each conversation's summed cross-entropy and the weight of its targets, for all ranks on every rank."""
        return _losses(self._read(model, size, [blind], asks=False), 0)

    def answers(self, model: VLMWrapper, size: int | None, blind: bool = False) -> list[Answer]:
        """Greedy answers to all questions, in order; with `blind`, the images are blanked."""
        return _answers(self._read(model, size, [blind]), 0)

    def scores(
        self, model: VLMWrapper, size: int | None, unfinished: Unfinished | None = None
    ) -> tuple[dict, list[dict]]:
        """Values by name, each followed by its value with blanked images; and each question with both answers, their
        scores, and its conversation's loss and weight.

        With demonstrations, all of them again for each number of shots, with names that end in ``_N_shots``, and the
        number of conversations that have fewer demonstrations because of ``max_length``. unfinished: keeps finished
        conversations, and has those that are not read again; for a single process.
        """
        scores, shown = self._scored(self._read(model, size, [SEEING, BLIND], unfinished=unfinished))
        self.retrieve(model, size)
        for shots in self.demonstrations.shots[1:] if self.demonstrations else ():
            found = self._read(model, size, [SEEING, BLIND], unfinished=unfinished, shots=shots)
            _add(scores, shown, *self._scored(found), shots)
            before = {index: told.demonstrations for index, (told, _) in found.items()}
            scores[f"{FEWER}{shots}_shots"] = sum(len(ids) < shots for ids in before.values())
            for answer in shown:
                answer[f"demonstrations_{shots}_shots"] = list(before.get(answer["conversation"], ()))
        return scores, shown

    def _scored(self, found: Mapping[int, Sequence[Told]]) -> tuple[dict, list[dict]]:
        """The scores of conversations that were read with and without images, and each question."""
        (seeing, losses), (blind, blind_losses) = ((_answers(found, view), _losses(found, view)) for view in (0, 1))
        grades, blind_grades = grade(seeing, self.metrics), grade(blind, self.metrics)
        totals, blind_totals = (
            {"loss": mean_loss(own), "perplexity": perplexity(mean_loss(own)), **judged.total}
            for own, judged in ((losses, grades), (blind_losses, blind_grades))
        )
        scores = {**_beside(totals, blind_totals), "questions": len(seeing)}
        if grades.by_category:
            scores["by_category"] = {
                kind: {**_beside(values, blind_grades.by_category[kind]), "questions": values["questions"]}
                for kind, values in grades.by_category.items()
            }
        told = ("conversation", "turn", "question", "reference", "prediction")
        shown = [
            {
                **{key: getattr(answer, key) for key in told},
                "blind_prediction": other.prediction,
                "exact": answer.is_exact,
                "category": answer.grading.category,
                "scores": values,
                "blind_scores": blind_values,
                "conversation_loss": losses[answer.conversation],
            }
            for answer, other, values, blind_values in zip(seeing, blind, grades.each, blind_grades.each)
        ]
        return scores, shown

    def _read(
        self,
        model: VLMWrapper,
        size: int | None,
        views: Sequence[bool],
        asks: bool = True,
        unfinished: Unfinished | None = None,
        shots: int = 0,
    ) -> dict[int, list[Told]]:
        """Each conversation, after demonstrations, in each of the views, for all ranks on every rank."""
        known = {} if unfinished is None else unfinished.found
        found = {index: known[shots, index] for index in self._indices(size) if (shots, index) in known}
        planned = self._planned(size, shots)
        order = sorted(planned.keys() - found.keys(), key=lambda index: (-planned[index][0], index))
        batch_size = max(1, self.batch_size // (1 + shots))  # a demonstration needs about as much memory as a question
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        before = {index: count for index, (_, count) in planned.items()}
        held_out = HeldOut(self.source, self.processor, batches, batch_size, asks, self.demonstrations, before)
        reader = Reader(model, self.processor, self.world, self.dtype, self._check_stop, **self.generation)
        done, total = len(found), len(found) + len(order)
        what = f"validating with {shots} shots" if shots else "validating"
        self.tell(what, done, total)
        for held in self._prepared(held_out):
            self._check_problems(held.problems)
            each = dict(zip(held.indices, map(list, zip(*reader.read(held, views)))))
            found |= each
            if unfinished is not None:
                unfinished.add({(shots, index): told for index, told in each.items()})
            done += len(each) + len(held.problems)
            self.tell(what, done, total)
        return dict(sorted(item for rank in self.world.gather(found) for item in rank.items()))

    def _prepared(self, held_out: HeldOut) -> Iterator[HeldOutBatch]:
        """The batches of a rank, followed by empty ones if another rank has more."""
        rounds = int(self.world.max([len(held_out.batches)])[0])
        batches = [*held_out.batches, *[[] for _ in range(rounds - len(held_out.batches))]]
        workers = min(self.workers, max(0, rounds - 1))
        options = {"pin_memory": self.world.device.type == "cuda", "ahead": 1}
        for held in prefetched(replace(held_out, batches=batches), workers, **options):
            self._check_stop()
            yield held

    def retrieve(self, model: VLMWrapper, size: int | None) -> None:
        """Find the demonstrations that are chosen by similar images, unless they are known."""
        shots, indices = self.demonstrations, self.order[:size]
        if shots is None or not shots.rices or self._retrieved >= set(indices):
            return
        # a question is encoded alone and demonstrations in fixed groups, so that ranks and batch sizes change nothing
        own = {}
        for found in self._vectors(model, self.source, "validation", [[index] for index in self._indices(size)]):
            own |= found
        asked = {
            index: (self.source[index], vector)
            for index, vector in sorted(item for rank in self.world.gather(own) for item in rank.items())
        }
        if asked:
            nearest = Nearest(asked, shots.shots[-1])
            groups = [range(start, min(start + GROUP, len(shots))) for start in range(0, len(shots), GROUP)]
            for found in self._vectors(model, shots, shots.name, groups[self.world.rank :: self.world.size]):
                nearest.add(shots, found)
            shots.nearest |= merged(self.world.gather(nearest.found), nearest.count)
        self._retrieved |= set(indices)

    def _vectors(
        self, model: VLMWrapper, source: Source, split: str, batches: Sequence[Sequence[int]]
    ) -> Iterator[dict[int, Tensor]]:
        held_out, done, total = HeldOut(MediaOf(source), self.processor, batches, 1, False), 0, sum(map(len, batches))
        for held in self._prepared(held_out):
            self._check_problems(held.problems, split)
            yield vectors(model, held, self.world.device, self.dtype)
            done += len(held.indices) + len(held.problems)
            self.tell(f"encoding the images of data.{split} to choose demonstrations", done, total)

    def _planned(self, size: int | None, shots: int) -> dict[int, tuple[int, int]]:
        """Number of tokens of each of this rank's conversations, by index, and of the demonstrations before it.

        Without those that are skipped.
        """
        indices = self._indices(size)
        held_out = HeldOut(self.source, self.processor, [], self.batch_size, False, self.demonstrations)
        for start in range(0, self._share(size), PLANNED):
            self._check_stop()
            for index in indices[start : start + PLANNED]:
                if (shots, index) not in self._lengths:
                    try:
                        self._lengths[shots, index] = held_out.length(index, shots)
                    except Dropped:
                        self._lengths[shots, index] = None
                    except BadSample as error:
                        self._check_problems([str(error)])
                        self._lengths[shots, index] = None
            self.tell("planning", min(start + PLANNED, len(indices)), len(indices))
        return {index: self._lengths[shots, index] for index in indices if self._lengths[shots, index] is not None}

    def _check_problems(self, problems: Sequence[str], split: str = "validation") -> None:
        """Raise BadSample for a broken record, unless these are skipped."""
        if problems and not self.skip_bad:
            raise BadSample(f"data.{split}: {problems[0]}")

    def _check_stop(self) -> None:
        """Raise Stopped on all ranks if one of them received a stop signal."""
        if self.stop is not None and self.world.max([float(self.stop.received)])[0]:
            raise Stopped("stopped during validation; run the same command to resume")

    def _indices(self, size: int | None) -> list[int]:
        return sorted(self.order[:size])[self.world.rank :: self.world.size]

    def _share(self, size: int | None) -> int:
        """The largest number of conversations that any rank processes."""
        return -(-len(self.order[:size]) // self.world.size)


def _add(scores: dict, shown: list[dict], others: dict, answers: list[dict], shots: int) -> None:
    """Add the scores and answers after so many demonstrations."""
    suffix = f"_{shots}_shots"
    for kind, values in others.pop("by_category", {}).items():
        scores["by_category"][kind] |= {f"{key}{suffix}": value for key, value in values.items()}
    scores |= {f"{key}{suffix}": value for key, value in others.items()}
    known = {(answer["conversation"], answer["turn"]): answer for answer in shown}
    for answer in answers:
        place = known[answer["conversation"], answer["turn"]]
        place |= {f"{key}{suffix}": answer[key] for key in ("prediction", "blind_prediction")}
        for kind in ("scores", "blind_scores"):
            place[kind] |= {f"{key}{suffix}": value for key, value in answer[kind].items()}


def _losses(found: Mapping[int, Sequence[Told]], view: int) -> dict[int, tuple[float, float]]:
    return {index: (told[view].loss, told[view].weight) for index, told in found.items()}


def _answers(found: Mapping[int, Sequence[Told]], view: int) -> list[Answer]:
    return [answer for told in found.values() for answer in told[view].answers]


def mean_loss(losses: Mapping[int, tuple[float, float]]) -> float:
    """Mean loss per target token, given the sums and weights of conversations."""
    return sum(total for total, _ in losses.values()) / max(sum(weight for _, weight in losses.values()), 1e-9)


def perplexity(loss: float) -> float:
    """Perplexity for a mean cross-entropy in nats."""
    return math.exp(min(loss, 700.0))  # a float would overflow beyond this


def _beside(values: dict[str, float], blind: dict[str, float]) -> dict[str, float]:
    """Values, each followed by its value with blanked images."""
    pairs = {key: (value, blind[key]) for key, value in values.items() if key != "questions"}
    return {name: value for key, pair in pairs.items() for name, value in zip((key, f"blind_{key}"), pair)}
