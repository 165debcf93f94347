"""Export to Hugging Face's PaliGemma, and comparison with it: prompts and logits."""

from __future__ import annotations

import copy

import torch
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

from ..batch import Batch
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..data.templates import PALIGEMMA
from ..errors import first_line
from ..model import VLMWrapper
from .chat_template import Speech
from .fitting import DoesNotFit, filled, relative_difference, require, tolerance
from .llava import ROUNDING, Exported, generation_settings, language_state
from .probes import noise
from .towers import as_hf_tower

QUESTION, ANSWER = "what is this?", "a cat"


@torch.no_grad()
def as_paligemma(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to PaliGemmaForConditionalGeneration. Unchanged tensors are shared.

    Raises DoesNotFit for parts that the class does not support.
    """
    _check(model, processor)
    geometry, vision = processor.geometry, model.vision
    tower, _ = as_hf_tower(vision)
    side = {"height": geometry.size[0], "width": geometry.size[1]}
    images = SiglipImageProcessorPil(size=side, image_mean=geometry.mean, image_std=geometry.std, resample=3)
    images.image_seq_length = geometry.tokens
    prepare = PaliGemmaProcessor(images, copy.deepcopy(processor.tokenizer))  # adds tokens of places and shapes
    text, language = language_state(model.llm, len(prepare.tokenizer) - 1)
    text.use_bidirectional_attention = None
    state = {
        **{f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()},
        **{
            f"model.multi_modal_projector.linear.{name}": tensor
            for name, tensor in model.connector.layers[0].state_dict().items()
        },
        **language,
    }
    config = PaliGemmaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text.to_dict(),
        image_token_index=prepare.image_token_id,
        projection_dim=model.connector.out_dim,
        hidden_size=model.connector.out_dim,
        vocab_size=text.vocab_size,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    exported = filled(PaliGemmaForConditionalGeneration, config, state, next(model.llm.parameters()).dtype)
    exported._weight_conversions = None  # so that it is saved under the published names, not those of `state`
    exported.generation_config = generation_settings(processor, Speech(prepare.tokenizer, prepare.image_token_id, ""))
    remarks = (
        f"images that are not {side['height']}x{side['width']}: {ROUNDING}",
        "training: pass token_type_ids (0 for the prompt, 1 for the answer), without which the class shows answers to "
        "the positions that predict them",
    )
    if window := getattr(text, "sliding_window", None):
        remarks += (
            f"rows of more than {window} tokens: transformers lets the positions of a prompt see beyond the window",
        )
    return Exported(exported, prepare, remarks)


def _check(model: VLMWrapper, processor: Processor) -> None:
    require(
        "PaliGemma",
        ("connector", model.connector.config["name"], "linear"),
        ("fusion.attention", processor.attention, "prefix"),
        ("template", processor.renderer.template, PALIGEMMA),
        ("image_fit", processor.geometry.fit, "squash"),
        ("llm.image_frame", list(processor.geometry.frame), ["", ""]),
    )
    if model.llm.config.model_type not in ("gemma", "gemma2"):
        raise DoesNotFit(f"{type(model.llm).__name__}: the language model of PaliGemma is Gemma or Gemma 2")
    if not getattr(model.vision, "final_norm", False):
        raise DoesNotFit("vision.final_norm=false: PaliGemma's features are those after the encoder's final norm")


@torch.no_grad()
def compare_paligemma(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for a question about an image, alone and with its answer.

    Raises DoesNotFit if prompts differ, or logits by more than rounding.
    """
    dtype, worst = next(exported.model.parameters()).dtype, 0.0
    for answer in (None, ANSWER):
        batch, inputs = _asked(exported, processor, answer)
        expected = model(batch.to(torch.device("cpu"), dtype))
        inputs.pop("labels", None)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        found = exported.model(**inputs, use_cache=False).logits[..., : expected.shape[-1]]
        difference = relative_difference(found, expected)
        if not difference <= tolerance(dtype):
            raise DoesNotFit(
                "PaliGemmaForConditionalGeneration gives different logits with the same weights (by "
                f"{difference:.1g} relative to the largest)"
            )
        worst = max(worst, difference)
    return worst


def _asked(exported: Exported, processor: Processor, answer: str | None) -> tuple[Batch, dict]:
    """A question about an image as inputs of both. Raises DoesNotFit if they differ."""
    image, turns = noise(processor.geometry.size), (Turn("user", IMAGE_MARK + QUESTION),)
    if answer is None:
        sample = processor.prompt(Conversation("probe", turns, (image,)))
    else:
        sample = processor(Conversation("probe", (*turns, Turn("assistant", answer)), (image,)))
    batch = processor.collate([sample])
    try:
        given = {"images": image.load(), "text": IMAGE_MARK + QUESTION, "suffix": answer}
        inputs = dict(exported.processor(**given, return_tensors="pt"))
    except Exception as error:  # processors of transformers raise anything for settings that do not fit
        raise DoesNotFit(f"PaliGemma's processor cannot prepare a question: {first_line(error)}") from None
    wanted = batch.input_ids.masked_fill(batch.visual.mask, exported.model.config.image_token_id)
    if not inputs["input_ids"].equal(wanted):
        tokens = (processor.tokenizer.convert_ids_to_tokens(ids[0].tolist()) for ids in (inputs["input_ids"], wanted))
        raise DoesNotFit(f"PaliGemma's processor makes other prompts: got {', expected '.join(map(' '.join, tokens))}")
    inputs["pixel_values"] = batch.visual.normalized().pixels[0]
    return batch, inputs
