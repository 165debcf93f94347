"""Prepares held-out conversations for a model, batch by batch, in the processes of a data loader.

lengths of all conversations -> batches of similar lengths -> decoded images, prompts and choices of one batch
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..batch import Batch
from ..data.processor import Processor, Sample
from ..data.records import IMAGE_MARK, BadSample, Conversation, Turn
from ..data.rendered import Rendered
from ..data.sources import Source
from ..visual import MediaPlan
from .few_shot import Demonstrations, preceded
from .scores import Answer


class Rows(NamedTuple):
    """Prompts, or conversations up to one of the choices, whose images are among those of a `HeldOutBatch`.

    batch: their tokens; the pixels are placeholders. conversations: the row of each in the batch of conversations.
    turns: the number of the exchange at which each ends. choices: the number of the choice; -1 for a prompt. starts:
    where the answer starts. items: indices of the items that are shown, among those of the conversations.
    """

    batch: Batch
    conversations: list[int]
    turns: list[int]
    choices: list[int]
    starts: list[int]
    items: list[int]


class HeldOutBatch(NamedTuple):
    """Complete conversations with their images, and what is asked about them.

    indices: of the conversations in their source. batch: one row for each, or an empty row if there are none.
    questions: those of each conversation by turn, without a prediction; turns count demonstrations. demonstrations:
    the ids of those before each conversation. prompts, choices: in batches of similar lengths. problems: of the records
    that were left out.
    """

    indices: list[int]
    batch: Batch
    questions: list[dict[int, Answer]]
    demonstrations: list[tuple[str, ...]]
    prompts: list[Rows]
    choices: list[Rows]
    problems: list[str]


class _Row(NamedTuple):
    sample: Sample
    conversation: int
    turn: int
    choice: int
    start: int


@dataclass
class HeldOut(IterableDataset):
    """Batches of held-out conversations, given the indices in each.

    asks: whether to prepare prompts and choices. shots: number of `demonstrations` before each conversation, by index.
    """

    source: Source
    processor: Processor
    batches: Sequence[Sequence[int]]
    batch_size: int
    asks: bool
    demonstrations: Demonstrations | None = None
    shots: Mapping[int, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for indices in self.batches[worker::workers]:
            yield self._prepare(indices)

    def length(self, index: int, shots: int = 0) -> tuple[int, int]:
        """Number of tokens of a conversation, whose images are not decoded, and of the demonstrations before it.

        These are as many as fit into ``max_length`` beside the complete conversation, at most `shots`. Raises
        BadSample.
        """
        if shots and not self._fits(index, shots):
            shots = bisect_left(range(1, shots), True, key=lambda count: not self._fits(index, count))
        return len(self.processor.render(self._conversation(index, shots)[0])), shots

    def _fits(self, index: int, shots: int) -> bool:
        conversation = _with_longest_choices(self.processor, self._conversation(index, shots)[0])
        # videos are not shortened in favor of demonstrations
        return self.processor.renderer.excess(conversation, self.processor.plan(conversation)) <= 0

    def _conversation(self, index: int, shots: int) -> tuple[Conversation, tuple[str, ...]]:
        """A conversation after `shots` demonstrations, and the ids of these."""
        own = self.source[index]
        before = self.demonstrations.before(index, own, shots) if shots else ()
        return shown(self.processor, preceded(own, before)), tuple(shot.id for shot in before)

    def _prepare(self, indices: Sequence[int]) -> HeldOutBatch:
        kept: list[int] = []
        samples: list[Sample] = []
        questions: list[dict[int, Answer]] = []
        demonstrations: list[tuple[str, ...]] = []
        prompts: list[_Row] = []
        choices: list[_Row] = []
        problems = []
        for index in indices:
            try:
                conversation, before = self._conversation(index, self.shots.get(index, 0))
                tokens = self.processor.render(conversation, self._plan(conversation))
                sample = self.processor.load(conversation, tokens)
                asked = dict(self._asked(index, conversation, tokens, len(before))) if self.asks else {}
                offered = list(self._offered(conversation, sample, asked, len(kept)))
            except BadSample as error:
                problems.append(str(error))
                continue
            for turn in asked:
                start = tokens.answers[turn][0]
                prompt = _without_pixels(sample.cut(tokens.until(start, tokens.answers[:turn])))
                prompts.append(_Row(prompt, len(kept), turn, -1, start))
            kept.append(index)
            samples.append(sample)
            questions.append(asked)
            demonstrations.append(before)
            choices += offered
        firsts = [0]
        for sample in samples:
            firsts.append(firsts[-1] + len(sample.tokens.media.items))
        batch = self.processor.collate(samples, rows=1)
        rows = (self._rows(found, firsts) for found in (prompts, choices))
        return HeldOutBatch(kept, batch, questions, demonstrations, *rows, problems)

    def _plan(self, conversation: Conversation) -> MediaPlan:
        """What is shown of the media: the same with every choice, so there is room for the longest one."""
        return self.processor.fitted(_with_longest_choices(self.processor, conversation))

    def _asked(
        self, index: int, conversation: Conversation, tokens: Rendered, shots: int
    ) -> Iterator[tuple[int, Answer]]:
        for turn, answer in enumerate(questions_of(index, conversation, shots), shots):
            # a conversation that is too long loses turns; text without an image under `plain` has no prompt
            if turn < len(tokens.answers) and tokens.answers[turn][0] > 0:
                yield turn, answer

    def _offered(
        self, conversation: Conversation, sample: Sample, asked: dict[int, Answer], number: int
    ) -> Iterator[_Row]:
        for turn, answer in asked.items():
            for choice, words in enumerate(answer.grading.choices):
                answered, plan = _answered(conversation, turn, words), sample.tokens.media
                count = sum(placement.medium < len(answered.media) for placement in plan.placements)
                tokens = self.processor.render(answered, plan.first(count))
                yield _Row(_without_pixels(sample.cut(tokens)), number, turn, choice, tokens.answers[-1][0])

    def _rows(self, found: list[_Row], firsts: Sequence[int]) -> list[Rows]:
        found = sorted(found, key=lambda row: len(row.sample.tokens))
        chunks = (found[start : start + self.batch_size] for start in range(0, len(found), self.batch_size))
        return [self._chunk(chunk, firsts) for chunk in chunks]

    def _chunk(self, rows: Sequence[_Row], firsts: Sequence[int]) -> Rows:
        samples, *facts = map(list, zip(*rows))
        shown = (
            range(firsts[row.conversation], firsts[row.conversation] + len(row.sample.tokens.media.items))
            for row in rows
        )
        return Rows(self.processor.collate(samples, rows=1), *facts, [item for items in shown for item in items])


def shown(processor: Processor, conversation: Conversation) -> Conversation:
    """The part of a held-out conversation that a model is shown, with boxes and points as text. Raises BadSample."""
    return processor.renderer.showable(processor.written(conversation))


def questions_of(index: int, conversation: Conversation, shots: int = 0) -> Iterator[Answer]:
    """The questions of a conversation with their references, unanswered.

    index: of the conversation in its source. shots: number of demonstrations before its own turns.
    """
    spoken = [turn for turn in conversation.turns if turn.role != "system"][2 * shots :]
    for turn, (asked, true) in enumerate(zip(spoken[::2], spoken[1::2])):
        question = asked.text.replace(IMAGE_MARK, "").strip()
        yield Answer(index, turn, question, true.text.strip(), "", true.grading)


def _with_longest_choices(processor: Processor, conversation: Conversation) -> Conversation:
    """The conversation with the longest choice, in tokens, in place of each answer that has choices."""

    def tokens(text: str) -> int:
        return len(processor.tokenizer(text).input_ids)

    turns = (
        replace(turn, text=max(turn.text, *turn.grading.choices, key=tokens)) if turn.grading.choices else turn
        for turn in conversation.turns
    )
    return replace(conversation, turns=tuple(turns))


def _answered(conversation: Conversation, turn: int, words: str) -> Conversation:
    """A conversation up to an exchange, with another final answer."""
    first = conversation.turns[0].role == "system"
    turns = (*conversation.turns[: first + 2 * turn + 1], Turn("assistant", words))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    return replace(conversation, turns=turns, media=conversation.media[:marks])


def _without_pixels(sample: Sample) -> Sample:
    """The sample with a single pixel for each item: its features are already known."""
    return sample._replace(pixels=tuple(tuple(torch.zeros(3, 1, 1) for _ in pixels) for pixels in sample.pixels))
