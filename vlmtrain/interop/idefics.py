"""Export to Hugging Face's IDEFICS, and comparison with it: prompts, pixels and logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    CLIPVisionModel,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from ..batch import Batch
from ..connectors.identity import Identity
from ..connectors.perceiver import IdeficsResampler
from ..connectors.published import published_state
from ..data.images import ImageInMemory
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..errors import first_line
from ..model import VLMWrapper
from ..model.fusion import GatedCrossAttention
from ..model.vision.base import block_index
from .chat_template import Speech
from .fitting import DoesNotFit, filled, relative_difference, require, tolerance
from .llava import Exported, generation_settings
from .probes import noise
from .towers import as_hf_tower, renamed

FAKE, END = "<fake_token_around_image>", "<end_of_utterance>"
"""What IDEFICS's processor writes around images, and the end of an answer of the models for dialogue."""
LAYER_NAMES = (
    (r"\.norm\.", ".input_layernorm."),
    (r"\.feed_forward_norm\.", ".post_attention_layernorm."),
    (r"\.(q|k)_norm\.", r".cross_attn.\1_layer_norm."),
    (r"\.(q|k|v)\.", r".cross_attn.\1_proj."),
    (r"\.out\.", ".cross_attn.o_proj."),
    (r"\.feed_forward\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.feed_forward_gate$", ".alpha_dense"),
    (r"\.gate$", ".alpha_cross_attn"),
    (r"^layers\.", "model.gated_cross_attn_layers."),
)
"""Names of the tensors of a `GatedCrossAttention` in the class."""
VISION_KEYS = (
    *("image_size", "patch_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("layer_norm_eps", "attention_dropout"),
)
"""Keys of the configuration of the encoder that are the same in CLIP's."""
_TALKS = (
    (Turn("user", f"{IMAGE_MARK}What is this?"),),
    (Turn("user", f"Look: {IMAGE_MARK} and {IMAGE_MARK} {IMAGE_MARK}. Which is red?"),),
    (Turn("user", f"{IMAGE_MARK}{IMAGE_MARK}What?"), Turn("assistant", "a cat"), Turn("user", f"And {IMAGE_MARK}?")),
    (Turn("user", "Hello"),),
)


@torch.no_grad()
def as_idefics(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to IdeficsForVisionText2Text. Unchanged tensors are shared, except those of the embeddings.

    Raises DoesNotFit for parts that the class does not support.
    """
    _check(model, processor)
    fusion, llm, geometry, tokenizer = model.fusion, model.llm, processor.geometry, copy.deepcopy(processor.tokenizer)
    tower, prefix = as_hf_tower(model.vision)
    if not isinstance(tower, CLIPVisionModel) or prefix != 1:
        raise DoesNotFit(f"{type(tower).__name__}: the encoder of IDEFICS is CLIP's, with one token before its patches")
    (connector, resampler), layers = _resampler(model), renamed(fusion.state_dict(), LAYER_NAMES)
    base = min(tokenizer.convert_tokens_to_ids([FAKE, IMAGE_MARK]))
    state = {
        **{f"model.vision_model.{name}": tensor for name, tensor in tower.state_dict().items()},
        **connector,
        **{name: _as_gate(each) if "alpha" in name else each for name, each in layers.items()},
        **_split(llm, base),
    }
    config = _config(model, tower, base, resampler)
    exported = filled(IdeficsForVisionText2Text, config, state, next(llm.parameters()).dtype)
    shown = {"size": dict(zip(("height", "width"), geometry.size))}
    images = IdeficsImageProcessorPil(**shown, image_mean=list(geometry.mean), image_std=list(geometry.std))
    settings = generation_settings(processor, Speech(tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_MARK), ""))
    settings.suppress_tokens.append(tokenizer.convert_tokens_to_ids(FAKE))
    exported.generation_config = settings
    tokenizer.bos_token = tokenizer.bos_token or ""  # which the processor writes in any case
    tokenizer.chat_template = None  # the processor takes lists of texts and images
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for generation
    remarks = (
        "images: transformers resizes them with torchvision, whose rounding differs by one gray level for some pixels",
        "prompts: the class's processor takes lists of texts and images, and has no chat template",
    )
    return Exported(exported, IdeficsProcessor(images, tokenizer), remarks)


def _as_gate(gate: Tensor) -> Tensor:
    """A gate in the shape that it has in the class."""
    return gate[None, None] if len(gate) > 1 else gate


def _check(model: VLMWrapper, processor: Processor) -> None:
    fusion, llm, geometry, config = model.fusion, model.llm, processor.geometry, model.llm.config
    if not isinstance(fusion, GatedCrossAttention):
        raise DoesNotFit(f"IDEFICS requires fusion=gated_cross_attention, got {fusion.config['name']}")
    if type(llm) is not LlamaForCausalLM:
        raise DoesNotFit(f"{type(llm).__name__}: the language model of IDEFICS is Llama")
    if fusion.style != "idefics":
        raise DoesNotFit(
            f"fusion.style={fusion.style}: gated cross-attention can be exported only as IDEFICS, which needs "
            "fusion.style=idefics"
        )
    last, layer = model.vision.num_blocks, block_index(model.vision.layer, model.vision.num_blocks) + 1
    require(
        "IDEFICS",
        ("fusion.attend", fusion.attend, "last"),
        ("fusion.on_text", fusion.layers[0].on_text, True),
        ("fusion.heads", fusion.layers[0].heads, config.num_attention_heads),
        ("num_key_value_heads", config.num_key_value_heads, config.num_attention_heads),
        ("hidden_act", config.hidden_act, "silu"),
        ("vision.layer", layer, last),
        ("vision.levels", model.vision.levels, []),
        ("vision.final_norm", getattr(model.vision, "final_norm", False), False),
        ("image_fit", geometry.fit, "squash"),
        ("llm.image_frame", list(geometry.frame), [FAKE, FAKE]),
        ("llm.image_frame_shared", geometry.frame_shared, True),
    )
    if config.num_hidden_layers % fusion.every:
        raise DoesNotFit(
            f"fusion.every={fusion.every}: IDEFICS requires a divisor of the {config.num_hidden_layers} blocks of the "
            "language model"
        )
    if lacking := [word for word in (FAKE, IMAGE_MARK) if word not in processor.tokenizer.get_vocab()]:
        raise DoesNotFit(f"the tokenizer has no {lacking[0]}, which IDEFICS's processor writes")


def _resampler(model: VLMWrapper) -> tuple[dict[str, Tensor], dict]:
    """The tensors of the connector, and its settings in a configuration. Raises DoesNotFit for another connector."""
    connector = model.connector
    if isinstance(connector, Identity) and connector.prefix == 1:
        return {}, {"use_resampler": False}
    if not isinstance(connector, IdeficsResampler):
        raise DoesNotFit(
            f"connector={connector.config['name']}: IDEFICS has idefics_resampler, or identity with connector.prefix=1"
        )
    (names,), attention = connector.PUBLISHED, connector.layers[0].attention
    sizes = {
        "resampler_n_latents": connector.num_queries,
        "resampler_depth": len(connector.layers),
        "resampler_n_heads": attention.num_heads,
        "resampler_head_dim": attention.head_dim,
        "qk_layer_norms_perceiver": isinstance(attention.q_norm, nn.LayerNorm),
    }
    state = {names.prefix + name: tensor for name, tensor in published_state(connector, names).items()}
    return state, {"use_resampler": True, "perceiver_config": {"use_resampler": True, **sizes}}


def _split(llm: nn.Module, base: int) -> dict[str, Tensor]:
    """The tensors of the language model, whose tables end after `base` rows; the class has others for the rest."""
    state, tables = dict(llm.state_dict()), {"model.embed_tokens": "additional_embedding", "lm_head": "additional_fc"}
    if llm.config.tie_word_embeddings:
        del state["lm_head.weight"], tables["lm_head"]
    for table, more in tables.items():
        rows = state.pop(f"{table}.weight")
        state |= {f"{table}.weight": rows[:base].clone(), f"{table}.{more}.weight": rows[base:].clone()}
    return state


def _config(model: VLMWrapper, tower: CLIPVisionModel, base: int, resampler: dict) -> IdeficsConfig:
    text, layer = model.llm.config, model.fusion.layers[0]
    same = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "initializer_range"),
        *("bos_token_id", "eos_token_id"),
    )
    pad = text.pad_token_id  # of the first table, in the class
    return IdeficsConfig(
        **{key: getattr(text, key) for key in same},
        pad_token_id=pad if pad is not None and pad < base else None,
        vocab_size=base,
        additional_vocab_size=model.llm.get_input_embeddings().num_embeddings - base,
        cross_layer_interval=model.fusion.every,
        qk_layer_norms=not isinstance(layer.q_norm, nn.Identity),
        alpha_type="vector" if len(layer.gate) > 1 else "float",
        vision_config={
            "embed_dim": tower.config.hidden_size,
            **{key: getattr(tower.config, key) for key in VISION_KEYS},
        },
        **resampler,
    )


@torch.no_grad()
def compare_idefics(exported: Exported, model: VLMWrapper, processor: Processor) -> float:
    """The largest difference of the logits for conversations with several images, one and none, in a padded batch.

    Raises DoesNotFit if prompts or pixels differ, or logits by more than rounding.
    """
    dtype = next(exported.model.parameters()).dtype
    renderer, eos = processor.renderer, processor.tokenizer.eos_token_id
    # images are hidden behind the end of a text, with which some templates end answers
    talks = [turns for turns in _TALKS if len(turns) == 1 or renderer.stop_ids[0] != eos]
    batch, inputs = _asked(exported, processor, talks)
    expected = model(batch.to(torch.device("cpu"), dtype))
    found = exported.model(**inputs, use_cache=False).logits[..., : expected.shape[-1]]
    rows = zip(found, inputs["attention_mask"].bool(), expected, batch.lengths)
    worst = max(relative_difference(row[real], own[: int(length)]) for row, real, own, length in rows)
    if not worst <= tolerance(dtype):
        raise DoesNotFit(
            "IdeficsForVisionText2Text gives different logits with the same weights (by "
            f"{worst:.1g} relative to the largest)"
        )
    return worst


def _asked(exported: Exported, processor: Processor, talks: Sequence[tuple[Turn, ...]]) -> tuple[Batch, BatchFeature]:
    """Conversations about images of noise as inputs of both. Raises DoesNotFit if they differ."""
    height, width = processor.geometry.size
    images = [
        [noise((height + seed, 2 * width), seed) for seed in range(sum(turn.text.count(IMAGE_MARK) for turn in turns))]
        for turns in talks
    ]
    start = exported.processor.tokenizer.bos_token
    texts = [_pieces(processor, start, *each) for each in zip(talks, images)]
    prompts = [processor.prompt(Conversation("probe", turns, tuple(shown))) for turns, shown in zip(talks, images)]
    batch = processor.collate(prompts)
    try:
        inputs = exported.processor(text=texts)
    except Exception as error:  # processors of transformers raise anything for settings that do not fit
        raise DoesNotFit(f"IDEFICS's processor cannot prepare questions about images: {first_line(error)}") from None
    for ids, real, prompt in zip(inputs["input_ids"], inputs["attention_mask"].bool(), prompts):
        if not ids[real].equal(prompt.tokens.input_ids):
            told = (_told(processor.tokenizer, each) for each in (ids[real], prompt.tokens.input_ids))
            raise DoesNotFit("IDEFICS's processor makes other prompts: got {}, expected {}".format(*told))
    shown = torch.cat([pixels[: len(own)] for pixels, own in zip(inputs["pixel_values"], images)])
    ours = batch.visual.normalized().pixels[0]
    if shown.shape != ours.shape:
        raise DoesNotFit(f"IDEFICS's processor makes images {tuple(shown.shape)}, expected {tuple(ours.shape)}")
    levels = float(((shown - ours).abs() * torch.tensor(processor.geometry.std)[:, None, None]).max()) * 255
    if not levels <= 1.5:
        raise DoesNotFit(f"IDEFICS's processor makes other pixels, by {levels:.0f} of 255 levels")
    return batch, inputs


def _told(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def _pieces(
    processor: Processor, start: str | None, turns: Sequence[Turn], images: Sequence[ImageInMemory]
) -> list[str | Image]:
    """A prompt as IDEFICS's processor takes it: texts and images in turn, without the `start` that it writes."""
    renderer = processor.renderer
    texts = [] if renderer.shows_captions else renderer.template_texts((*turns, Turn("assistant", "answer")))
    if start is None or not texts or not texts[0].startswith(start):
        raise DoesNotFit(
            f"template={renderer.template}: IDEFICS's processor writes conversations that start with {start}"
        )
    said = "".join(text + turn.text for text, turn in zip(texts, turns)) + texts[len(turns)].rstrip(" ")
    first, *rest = said.removeprefix(start).split(IMAGE_MARK)
    pieces = [first]
    for image, piece in zip(images, rest, strict=True):
        pieces += [image.load(), piece]
    return [piece for piece in pieces if not isinstance(piece, str) or piece.strip(" ")]
