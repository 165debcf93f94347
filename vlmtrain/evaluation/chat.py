"""Talking with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.images import ImageOnDisk
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, ImageSource, Turn
from ..model import VLMWrapper


class Chat:
    """A conversation with a model about some pictures; remembers what was said.

    images: paths, or anything with ``load() -> PIL.Image``. Raises BadSample for one that cannot be read.
    """

    def __init__(self, model: VLMWrapper, processor: Processor, images: Sequence[ImageSource | str | Path] = ()):
        self.model, self.processor = model, processor
        self.images = tuple(ImageOnDisk(Path(i)) if isinstance(i, str | Path) else i for i in images)
        for image in self.images:
            image.load()
        embeddings = model.llm.get_input_embeddings().weight
        self.device, self.dtype = embeddings.device, embeddings.dtype
        self.turns: tuple[Turn, ...] = ()

    def say(self, words: str, max_new_tokens: int = 128) -> str:
        """The model's greedy answer to `words`."""
        if not self.turns:
            words = "\n".join([*(IMAGE_MARK for _ in self.images), words])
        asked = (*self.turns, Turn("user", words))
        prompt = self.processor.prompt(Conversation("chat", asked, self.images))
        batch = self.processor.collate([prompt]).to(self.device, self.dtype)
        ids = self.model.generate(
            batch.input_ids,
            batch.images,
            batch.is_image,
            batch.lengths,
            batch.tiles,
            batch.text_ids,
            batch.text_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.processor.renderer.stop_ids,
            pad_token_id=self.processor.filler,
        )
        answer = self.processor.renderer.decode(ids[0])
        # a caption model (template plain) knows one exchange only
        self.turns = () if self.processor.renderer.template == "plain" else (*asked, Turn("assistant", answer))
        return answer
