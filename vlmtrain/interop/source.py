"""A published model that is imported, and its chat template."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import (
    GenerationConfig,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.connector_text import TextReader
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..data.rendering import Renderer
from ..files import read_json
from ..model.encoder_decoder import start_token
from ..model.llm import max_positions
from ..visual import CAUSAL

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 2048

# Templates of processors expect typed items; here content is a string that already contains the image marks.
_ITEMS = (
    "{%- set said = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set said.messages = said.messages + [dict(message, content=[{'type': 'text', 'text': message.content}])] -%}"
    "{%- endfor -%}"
    "{%- set messages = said.messages -%}"
)


class Source(NamedTuple):
    """A Hugging Face folder whose class has been loaded.

    preparation: its image processor, and preparation_file, which configures it. template, fit: what replaces the
    source's own template and image fit, or None.
    """

    folder: Path
    config: PreTrainedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    preparation: ImageProcessingMixin
    preparation_file: Path
    template: str | None
    fit: str | None

    @property
    def look(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the channels."""
        return {key: getattr(self.preparation, key) for key in ("image_mean", "image_std")}


def processor_of(
    where: Path,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
    llm: nn.Module,
    template: str | None,
    reader: TextReader | None = None,
    positions: str | None = None,
    attention: str = CAUSAL,
) -> Processor:
    """The processor of an imported model. template: None for the source's own, which is in the folder `where`."""
    length = max_positions(llm) or DEFAULT_LENGTH
    template = template or template_of(where, tokenizer)
    options = {"positions": positions, "attention": attention, "decoder_start": start_token(llm)}
    return Processor(tokenizer, geometry, template, length, reader=reader, **options)


def end_answers(tokenizer: PreTrainedTokenizerBase, *settings: GenerationConfig | PreTrainedConfig) -> None:
    """Use the end of answers that the first of the source's `settings` with one names (OPT's: a newline)."""
    for each in settings:
        end = each.eos_token_id[0] if isinstance(each.eos_token_id, list) else each.eos_token_id
        if end is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
            return


def template_of(where: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that renders conversations as the source does; the tokenizer's own is adapted to string content."""
    own = tokenizer.chat_template
    if own is None:
        own = (where / "chat_template.jinja").read_text() if (where / "chat_template.jinja").exists() else None
    if own is None and (where / "chat_template.json").exists():
        own = read_json(where / "chat_template.json").get("chat_template")
    if own is None:
        raise ValueError(
            f"{where} has no chat template: choose one with --template (vicuna_v1 for LLaVA-1.5 with Vicuna)"
        )
    problem: ValueError | None = None
    for candidate in (own, _ITEMS + own):
        tokenizer.chat_template = _with_bos(tokenizer, candidate)
        try:
            Renderer(tokenizer, "chat", DEFAULT_LENGTH)
            return "chat"
        except ValueError as error:
            problem = error
    if "USER:" in own and "ASSISTANT:" in own and tokenizer.eos_token:
        tokenizer.chat_template = None
        logger.warning("%s: its chat template does not end answers; vicuna_v1 is used instead", where)
        return "vicuna_v1"
    raise ValueError(f"{where}: its chat template cannot be trained on ({problem}): choose another with --template")


def _with_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template, preceded by the token that the tokenizer itself would put first."""
    adds = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    if not adds or "bos_token" in template or tokenizer.bos_token in template:
        return template
    return "{{ bos_token }}" + template
