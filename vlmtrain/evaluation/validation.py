"""Validation: the loss on held-out conversations, and the answers that the model really gives.

Every answer of a conversation is asked for with the conversation up to it, and compared with the
reference. The same questions on a blanked picture tell what the words alone give away.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch.nn import functional as F

from ..data.processor import Batch, Processor, Sample
from ..data.records import IMAGE_MARK, BadSample, Conversation
from ..data.rendering import IGNORE, Rendered
from ..data.sources import Source
from ..model import VLMWrapper
from ..world import World


@dataclass(frozen=True)
class Answer:
    """One question put to the model. `conversation` and `turn` say where it stands."""

    conversation: int
    turn: int
    question: str
    reference: str
    prediction: str

    @property
    def is_exact(self) -> bool:
        return self.prediction.strip() == self.reference.strip()


class Validator:
    """Runs a model over held-out conversations; every rank takes its share and makes the same calls.

    sync_generation: keep generating until all ranks are done, as ZeRO-3 needs. skip_bad: leave broken records out.
    Everywhere, `size` is the number of conversations looked at, from the start of the source; None means all.
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
    ):
        self.source, self.processor, self.world, self.dtype = source, processor, world, dtype
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.sync_generation, self.skip_bad = sync_generation, skip_bad

    def loss(self, model: VLMWrapper, size: int | None) -> float:
        """Mean cross-entropy of a target token, over all ranks."""
        samples = [sample for _, _, sample in self._samples(size)]
        total, weight = 0.0, 0.0
        for batch in self._batches(samples, self._share(size)):
            keep = batch.weights > 0
            logits = model(
                batch.input_ids,
                batch.images,
                batch.is_image,
                keep=keep,
                tiles=batch.tiles,
                text_ids=batch.text_ids,
                text_mask=batch.text_mask,
            )
            losses = F.cross_entropy(logits.float(), batch.targets[keep], reduction="none")
            total += float((losses * batch.weights[keep]).sum())
            weight += float(batch.weights.sum())
        total, weight = self.world.sum([total, weight])
        return total / max(weight, 1e-9)

    def answers(self, model: VLMWrapper, size: int | None, blind: bool = False) -> list[Answer]:
        """Greedy answers to every question, in order; with `blind`, the pictures are blanked."""
        asked = []
        for index, conversation, sample in self._samples(size):
            words = [turn.text for turn in conversation.turns if turn.role != "system"]
            for turn, (start, _) in enumerate(sample.tokens.answers):
                if start == 0:
                    continue  # a bare text under `plain`: there is nothing to go on from
                question = words[2 * turn].replace(IMAGE_MARK, "").strip()
                asked.append((_prompt(sample, start, blind), index, turn, question, words[2 * turn + 1].strip()))
        asked.sort(key=lambda item: len(item[0].tokens))
        # ranks may have different numbers of questions, but must generate equally often
        rounds = int(self.world.max([-(-len(asked) // self.batch_size)])[0])
        answers = []
        for i in range(rounds):
            chunk = asked[i * self.batch_size : (i + 1) * self.batch_size]
            batch = self.processor.collate([item[0] for item in chunk], rows=1)
            for (_, *where), ids in zip(chunk, self._generate(model, batch)):
                answers.append(Answer(*where, self.processor.renderer.decode(ids)))
        everyone = [answer for rank in self.world.gather(answers) for answer in rank]
        return sorted(everyone, key=lambda answer: (answer.conversation, answer.turn))

    def scores(self, model: VLMWrapper, size: int | None) -> tuple[dict[str, float], list[dict]]:
        """Loss, exact match and blind exact match; and each question with both answers."""
        seeing, blind = self.answers(model, size), self.answers(model, size, blind=True)
        scores = {
            "loss": self.loss(model, size),
            "exact_match": exact_match(seeing),
            "blind_exact_match": exact_match(blind),
            "questions": len(seeing),
        }
        shown = [
            {**asdict(answer), "blind_prediction": other.prediction, "exact": answer.is_exact}
            for answer, other in zip(seeing, blind)
        ]
        return scores, shown

    def _indices(self, size: int | None) -> range:
        total = len(self.source) if size is None else min(size, len(self.source))
        return range(self.world.rank, total, self.world.size)

    def _share(self, size: int | None) -> int:
        """The largest number of conversations that any rank looks at."""
        total = len(self.source) if size is None else min(size, len(self.source))
        return -(-total // self.world.size)

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

    def _batches(self, samples: Sequence[Sample], share: int) -> list[Batch]:
        ordered = sorted(samples, key=lambda sample: len(sample.tokens))
        size = self.batch_size
        return [
            self.processor.collate(ordered[i : i + size], rows=1).to(self.world.device, self.dtype)
            for i in range(0, share, size)
        ]

    def _generate(self, model: VLMWrapper, batch: Batch) -> torch.Tensor:
        batch = batch.to(self.world.device, self.dtype)
        return model.generate(
            batch.input_ids,
            batch.images,
            batch.is_image,
            batch.lengths,
            batch.tiles,
            batch.text_ids,
            batch.text_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self.processor.renderer.stop_ids,
            pad_token_id=self.processor.filler,
            synced_gpus=self.sync_generation,
        )


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers that equal their reference, white space at the ends aside."""
    return sum(answer.is_exact for answer in answers) / max(1, len(answers))


def _prompt(sample: Sample, length: int, blind: bool) -> Sample:
    """The first `length` tokens of a sample, with the pictures that they show (blanked to the mean colour)."""
    tokens = sample.tokens
    shown = int(tokens.image_index[:length].max()) + 1 if length else 0
    tiles = sample.tiles and sample.tiles[:shown]
    views = shown if tiles is None else sum(cut.views for cut in tiles)
    images, texts = sample.images[:views], sample.texts[:views]
    prompt = Rendered(
        tokens.input_ids[:length],
        torch.full((length,), IGNORE),
        torch.zeros(length),
        tokens.image_index[:length],
        (),
    )
    return Sample(sample.id, prompt, torch.zeros_like(images) if blind else images, tiles, texts)


def picture_uri(image: Image.Image, side: int = 160) -> str:
    """A picture as a data URI, at most (and if it is tiny, about) `side` pixels wide."""
    scale = side / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
