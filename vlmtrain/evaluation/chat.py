"""Chat with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..data.images import ImageOnDisk
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, ImageSource, Turn, VideoSource, is_video
from ..data.rendering import Renderer
from ..model import VLMWrapper
from .generation import generate

CHARACTERS_PER_TOKEN = 100
"""Number of characters per token of ``max_length`` above which a conversation is refused before it is tokenized."""


class Chat:
    """A conversation with a model about images and videos. It keeps the previous turns.

    images: of the first question, as for `show`.
    """

    def __init__(
        self, model: VLMWrapper, processor: Processor, images: Sequence[ImageSource | VideoSource | str | Path] = ()
    ):
        self.model, self.processor = model, processor
        self.media: tuple[ImageSource | VideoSource, ...] = ()
        self.turns: tuple[Turn, ...] = ()
        for image in images:
            self.show(image)
        embeddings = model.llm.get_input_embeddings().weight
        self.device, self.dtype = embeddings.device, embeddings.dtype

    def show(self, medium: ImageSource | VideoSource | str | Path) -> None:
        """Add an image, given by its path or as a source, or a video to the next question.

        Raises BadSample if it cannot be read, or if the model does not accept videos.
        """
        source = ImageOnDisk(Path(medium)) if isinstance(medium, str | Path) else medium
        if is_video(source):
            self.processor.prompt(Conversation("chat", (Turn("user", IMAGE_MARK),), (source,)))
        else:
            source.load()
        self.media = (*self.media, source)

    def say(self, words: str, max_new_tokens: int = 128, on_text: Callable[[str], None] | None = None) -> str:
        """The model's greedy answer to `words`, up to the template's end of turn.

        on_text: called with each new piece of the answer as it is generated; the pieces add up to the answer. Raises
        ValueError if the conversation is longer than the model's ``max_length``.
        """
        shown = sum(turn.text.count(IMAGE_MARK) for turn in self.turns if turn.role == "user")
        words = "\n".join([*[IMAGE_MARK] * (len(self.media) - shown), words])
        asked = (*self.turns, Turn("user", words))
        renderer = self.processor.renderer
        longest = renderer.max_length
        characters = sum(len(turn.text) for turn in asked)
        if characters > CHARACTERS_PER_TOKEN * longest:
            raise ValueError(
                f"the conversation has {characters:,} characters: too many for max_length={longest} tokens"
            )
        prompt = self.processor.prompt(Conversation("chat", asked, self.media))
        if len(prompt.tokens) >= longest:
            raise ValueError(
                f"the conversation has {len(prompt.tokens):,} tokens, but the model's max_length is {longest}"
            )
        batch = self.processor.collate([prompt]).to(self.device, self.dtype)
        streamer = on_text and Pieces(renderer, on_text)
        ids = generate(self.model, self.processor, batch, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = renderer.decode(ids[0])
        # a caption model (template plain or prefix) supports a single exchange
        self.turns = () if renderer.shows_captions else (*asked, Turn("assistant", answer))
        return answer


class Pieces(BaseStreamer):
    """Streams the text of one row to `on_text`; incomplete characters and trailing spaces wait for further tokens."""

    def __init__(self, renderer: Renderer, on_text: Callable[[str], None]):
        self.renderer, self.on_text = renderer, on_text
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        if value.dim() > 1:  # the prompt, which has no ids
            return
        self.ids += value.tolist()
        text = self.renderer.decode(torch.tensor(self.ids))
        if not text.endswith("\ufffd"):
            self._give(text)

    def end(self) -> None:
        if self.ids:
            self._give(self.renderer.decode(torch.tensor(self.ids)))

    def _give(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            self.on_text(text[len(self.text) :])
            self.text = text
