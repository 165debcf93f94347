"""Validation: the loss on held-out conversations, and the answers that the model generates.

Every answer of a conversation is generated from the conversation up to it, and scored (see scores.py). The same
questions with blanked images show how much can be answered from the text alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from ..batch import Batch
from ..data.processor import Processor, Sample
from ..data.records import IMAGE_MARK, BadSample, Conversation, Turn
from ..data.sources import Source
from ..distributed.world import Stopped, StopSignal, World
from ..model import VLMWrapper
from ..visual import groups
from .generation import Likelihood, generate, likelihoods
from .scores import Answer, check_fits, grade


class Validator:
    """Runs a model on held-out conversations; every rank takes its share and makes the same calls.

    sync_generation: keep generating until all ranks are done, as ZeRO-3 requires. skip_bad: skip broken records.
    metrics: names of the metrics to compute; None: all that the records have the data for. stop: a signal on any rank
    ends a method with `Stopped` after its current batch.
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
    ):
        self.source, self.processor, self.world, self.dtype = source, processor, world, dtype
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.sync_generation, self.skip_bad, self.metrics = sync_generation, skip_bad, metrics
        self.seed, self.stop = seed, stop
        self.order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()

    def check_metrics(self, size: int | None) -> None:
        """Raise ValueError, before any model runs, if a named metric cannot score a question."""
        if self.metrics is not None:
            check_fits(self._references(size), self.metrics)

    def _references(self, size: int | None) -> Iterator[Answer]:
        """Every question with its reference, unanswered; broken records are reported where they are used."""
        for index in self._indices(size):
            with contextlib.suppress(BadSample):
                conversation = self.processor.renderer.showable(self.source[index])
                spoken = [turn for turn in conversation.turns if turn.role != "system"]
                for turn, (asked, true) in enumerate(zip(spoken[::2], spoken[1::2])):
                    question = asked.text.replace(IMAGE_MARK, "").strip()
                    yield Answer(index, turn, question, true.text.strip(), "", true.grading)

    def loss(self, model: VLMWrapper, size: int | None, blind: bool = False) -> float:
        """Mean cross-entropy per target token, over all ranks."""
        return mean_loss(self.losses(model, size, blind))

    def losses(self, model: VLMWrapper, size: int | None, blind: bool = False) -> dict[int, tuple[float, float]]:
        """Each conversation's summed cross-entropy and the weight of its targets, for all ranks on every rank."""
        samples = sorted(self._samples(size), key=lambda item: len(item[2].tokens))
        found = {}
        for i in range(0, self._share(size), self.batch_size):
            self._check_stop()
            chunk = samples[i : i + self.batch_size]
            rows = [_blanked(sample) if blind else sample for *_, sample in chunk]
            batch = self._collate(rows)
            keep = batch.weights > 0
            weighted = torch.zeros(batch.weights.shape, dtype=torch.double, device=self.world.device)
            losses = F.cross_entropy(model(batch, keep=keep).float(), batch.targets[keep], reduction="none")
            weighted[keep] = (losses * batch.weights[keep]).double()
            sums = zip(weighted.sum(1).tolist(), batch.weights.sum(1).tolist())
            found |= {index: pair for (index, *_), pair in zip(chunk, sums)}
        return dict(sorted(item for rank in self.world.gather(found) for item in rank.items()))

    def answers(self, model: VLMWrapper, size: int | None, blind: bool = False) -> list[Answer]:
        """Greedy answers to all questions, in order; with `blind`, the images are blanked."""
        asked, offered = [], []
        for index, conversation, sample in self._samples(size):
            sample = _blanked(sample) if blind else sample
            spoken = [turn for turn in conversation.turns if turn.role != "system"]
            for turn, (start, _) in enumerate(sample.tokens.answers):
                if start == 0:
                    continue  # text without an image under `plain`: there is no prompt
                question, true = spoken[2 * turn].text.replace(IMAGE_MARK, "").strip(), spoken[2 * turn + 1]
                asked.append((_prompt(sample, start), index, turn, question, true.text.strip(), true.grading))
                for number, choice in enumerate(true.grading.choices):
                    tokens = self.processor.render(_answered(conversation, turn, choice))
                    offered.append((sample.cut(tokens), index, turn, number))
        likely = self._likelihoods(model, offered)
        asked.sort(key=lambda item: len(item[0].tokens))
        # ranks may have different numbers of questions, but must generate equally often
        rounds = int(self.world.max([-(-len(asked) // self.batch_size)])[0])
        answers = []
        for i in range(rounds):
            self._check_stop()
            chunk = asked[i * self.batch_size : (i + 1) * self.batch_size]
            batch = self._collate([item[0] for item in chunk])
            options = {"max_new_tokens": self.max_new_tokens, "synced_gpus": self.sync_generation}
            for (_, *facts, grading), ids in zip(chunk, generate(model, self.processor, batch, **options)):
                found = tuple(likely[facts[0], facts[1], number] for number in range(len(grading.choices)))
                answers.append(Answer(*facts, self.processor.renderer.decode(ids), grading, found))
        everyone = [answer for rank in self.world.gather(answers) for answer in rank]
        return sorted(everyone, key=lambda answer: (answer.conversation, answer.turn))

    def _likelihoods(
        self, model: VLMWrapper, offered: list[tuple[Sample, int, int, int]]
    ) -> dict[tuple[int, int, int], Likelihood]:
        """Likelihood of each choice as the last answer of its conversation, by conversation, turn and choice."""
        offered = sorted(offered, key=lambda item: len(item[0].tokens))
        rounds = int(self.world.max([-(-len(offered) // self.batch_size)])[0])
        found = {}
        for i in range(rounds):
            self._check_stop()
            chunk = offered[i * self.batch_size : (i + 1) * self.batch_size]
            samples = [item[0] for item in chunk]
            found |= {
                tuple(where): likelihood
                for (_, *where), likelihood in zip(chunk, likelihoods(model, self._collate(samples), samples))
            }
        return found

    def scores(self, model: VLMWrapper, size: int | None) -> tuple[dict, list[dict]]:
        """Values by name, each followed by its value with blanked images; and each question with both answers, their
        scores, and its conversation's loss and weight."""
        seeing, blind = self.answers(model, size), self.answers(model, size, blind=True)
        grades, blind_grades = grade(seeing, self.metrics), grade(blind, self.metrics)
        losses, blind_losses = self.losses(model, size), self.losses(model, size, blind=True)
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

    def _collate(self, samples: list[Sample]) -> Batch:
        """A batch of at least one row, for which all ranks make the same calls."""
        calls, geometry = 1, self.processor.geometry
        if geometry is not None and geometry.fit == "native":  # other fits have one size on every rank
            sizes = groups([item for sample in samples for item in sample.tokens.media.items])
            calls = int(self.world.max([sizes])[0])
        return self.processor.collate(samples, rows=1, calls=calls).to(self.world.device, self.dtype)

    def _check_stop(self) -> None:
        """Raise Stopped on all ranks if one of them received a stop signal."""
        if self.stop is not None and self.world.max([float(self.stop.received)])[0]:
            raise Stopped("stopped during validation; run the same command to resume")

    def _indices(self, size: int | None) -> list[int]:
        return sorted(self.order[:size])[self.world.rank :: self.world.size]

    def _share(self, size: int | None) -> int:
        """The largest number of conversations that any rank processes."""
        return -(-len(self.order[:size]) // self.world.size)

    def _samples(self, size: int | None) -> list[tuple[int, Conversation, Sample]]:
        samples = []
        for index in self._indices(size):
            try:
                conversation = self.processor.renderer.showable(self.source[index])
                samples.append((index, conversation, self.processor(conversation)))
            except BadSample as error:
                if not self.skip_bad:
                    raise BadSample(f"data.validation: {error}") from None
        return samples


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


def _blanked(sample: Sample) -> Sample:
    """A sample whose images have the mean color in every pixel."""
    return sample._replace(
        pixels=tuple(tuple(torch.zeros(image.shape) for image in pixels) for pixels in sample.pixels)
    )


def _answered(conversation: Conversation, turn: int, words: str) -> Conversation:
    """A conversation up to an exchange, with another final answer."""
    first = conversation.turns[0].role == "system"
    turns = (*conversation.turns[: first + 2 * turn + 1], Turn("assistant", words))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    return replace(conversation, turns=turns, media=conversation.media[:marks])


def _prompt(sample: Sample, length: int) -> Sample:
    """The first `length` tokens of a sample, with the images that they refer to."""
    return sample.cut(sample.tokens.until(length))
