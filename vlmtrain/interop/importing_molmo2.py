"""Import of Molmo2 from Hugging Face."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    GenerationConfig,
    Molmo2Processor,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ..connectors import Connector
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..data.records import IMAGE_MARK
from ..data.templates import CHATML
from ..errors import first_line
from ..model import VLMWrapper
from ..model.parts import make_connector
from ..model.vision import HFVision
from .fitting import filled
from .importing_llava import fixed_geometry
from .llava import Exported
from .molmo2 import COLUMN, FRAMES, PATCH, PLAN, WORDS, bos_of, compare_outputs, prompt_difference, tile_grids
from .preparation import read_video_preparation
from .source import Source, processor_of
from .towers import renamed

logger = logging.getLogger(__name__)

MODEL_CLASSES = {"molmo2": "Molmo2ForConditionalGeneration"}
DTYPE = "auto"
_FIXED = {
    "text_config": {"qk_norm_type": "qwen3", "norm_after": False, "attention_bias": False},
    "vision_config": {"attention_bias": True},
    "adapter_config": {"attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False},
}
_WRITTEN = {
    "image_use_col_tokens": True,
    "use_single_crop_col_tokens": False,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
}
_TO_SIGLIP = (
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^patch_embedding\.", "embeddings.patch_embedding."),
    (r"^layers\.", "encoder.layers."),
    (r"\.o_proj\.", ".out_proj."),
)


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError for an image fit other than ``tiles``, and for parts of Molmo2 that have no counterpart here."""
    if fit not in (None, "tiles"):
        raise ValueError(f"--image-fit {fit}: {folder} is a Molmo2, which supports only tiles")
    text, vision, adapter = config.text_config, config.vision_config, config.adapter_config
    found = [
        (f"{part}.{key}", getattr(getattr(config, part), key), expected)
        for part, keys in _FIXED.items()
        for key, expected in keys.items()
    ]
    side, heads = vision.image_size[0], vision.num_attention_heads
    found += [
        ("text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], "default"),
        ("vision_config.num_key_value_heads", vision.num_key_value_heads, heads),
        ("vision_config.head_dim", vision.head_dim, vision.hidden_size // heads),
        ("vision_config.image_size", list(vision.image_size), [side, side]),
        ("vision_config.num_position_embeddings", vision.num_position_embeddings, (side // vision.patch_size) ** 2),
        ("adapter_config.num_key_value_heads", adapter.num_key_value_heads, adapter.num_attention_heads),
    ]
    for key, got, expected in found:
        if got != expected:
            raise ValueError(f"{folder / 'config.json'}: {key}={got}, expected {expected}")
    if (levels := _levels(config)) != sorted(set(levels)):
        layers = list(adapter.vision_feature_layer)
        raise ValueError(
            f"{folder / 'config.json'}: adapter_config.vision_feature_layer={layers}, expected the deepest layer first"
        )


def _levels(config) -> list[int]:
    """The blocks that the adapter reads, counted from 1, in the reverse of their order."""
    depth, layers = config.vision_config.num_hidden_layers, config.adapter_config.vision_feature_layer
    return [layer + 1 if layer >= 0 else depth + 1 + layer for layer in reversed(layers)]


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors."""
    told = _hf_processor(source)
    _check_preparation(source, told)
    vision, llm = _tower(source), _language_model(source)
    model = VLMWrapper(vision, _connector(source, vision, llm), llm).eval()
    return model, _processor(source, told, model, _geometry(source, told, model))


def compare(source: Source, model: VLMWrapper, processor: Processor) -> float:
    """Difference of the logits from the source's. Raises DoesNotFit if it is more than rounding."""
    exported = Exported(source.model, _hf_processor(source), ())
    if source.template is None and (difference := prompt_difference(exported, model, processor)):
        logger.warning("%s: its processor makes other prompts than training: %s", source.folder, difference)
    return compare_outputs(exported, model, processor)


def _hf_processor(source: Source) -> Molmo2Processor:
    """The source's processor. Raises ValueError if it cannot be loaded."""
    try:
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything for files of a wrong kind
        raise ValueError(f"{source.folder} has no valid processor: {first_line(error)}") from None
    for key in ("do_rescale", "do_normalize"):  # published files leave them out; transformers 5.23 then does neither
        if getattr(processor.video_processor, key, None) is None:
            setattr(processor.video_processor, key, True)
    return processor


def _check_preparation(source: Source, told: Molmo2Processor) -> None:
    """Raise ValueError for settings of the processor that are not supported, and for tokens that it lacks."""
    known = source.tokenizer.get_vocab()
    if missing := [word for word in WORDS if word not in known]:
        raise ValueError(f"{source.folder}: the tokenizer lacks {', '.join(missing)}")
    images, videos, vision = told.image_processor, told.video_processor, source.config.vision_config
    video_file, _ = read_video_preparation(source.folder)
    found = [(source.folder / "config.json", source.config, "image_patch_id", known[PATCH])]
    found += [(source.folder / "processor_config.json", told, key, expected) for key, expected in _WRITTEN.items()]
    margins, side = [images.overlap_margins[0]] * 2, vision.image_size[0]
    found.append((source.preparation_file, images, "overlap_margins", margins))
    for file, each in ((source.preparation_file, images), (video_file, videos)):
        found += [(file, each, "resample", 2), (file, each, "patch_size", vision.patch_size)]
        found.append((file, each, "pooling_size", [each.pooling_size[0]] * 2))
        size = [each.size["height"], each.size["width"]]
        if size != [side, side]:
            raise ValueError(f"{file}: size={size[0]} x {size[1]}, expected {side} x {side} as for the encoder")
    for file, each, key, expected in found:
        got = getattr(each, key)
        if (list(got) if isinstance(got, tuple) else got) != expected:
            raise ValueError(f"{file}: {key}={got}, expected {expected}")


def _tower(source: Source) -> HFVision:
    """The encoder as a SigLIP of the same depth, which never applies the norm behind its last block."""
    values, state = source.config.vision_config, dict(source.model.model.vision_tower.state_dict())
    patch, state = values.patch_size, renamed(state, _TO_SIGLIP)
    name = "embeddings.patch_embedding.weight"
    state[name] = state[name].unflatten(1, (patch, patch, values.num_channels)).permute(0, 3, 1, 2)
    width, dtype = values.hidden_size, state[name].dtype
    state |= {
        "post_layernorm.weight": torch.ones(width, dtype=dtype),
        "post_layernorm.bias": torch.zeros(width, dtype=dtype),
    }
    shape = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=values.intermediate_size,
        num_hidden_layers=values.num_hidden_layers,
        num_attention_heads=values.num_attention_heads,
        image_size=values.image_size[0],
        patch_size=patch,
        hidden_act=values.hidden_act,
        layer_norm_eps=values.layer_norm_eps,
        attention_dropout=values.attention_dropout,
        vision_use_head=False,
    )
    tower, levels = filled(SiglipVisionModel, shape, state, dtype), _levels(source.config)
    return HFVision(tower, {"image_size": None, **source.look}, levels[-1], levels).eval()


def _connector(source: Source, vision: HFVision, llm: nn.Module) -> Connector:
    """The adapter; the embeddings of two tokens are what it adds to its tokens, and its newline."""
    adapter, table = source.config.adapter_config, source.model.get_input_embeddings().weight.detach()
    patch, column = source.tokenizer.convert_tokens_to_ids([PATCH, COLUMN])
    options = {
        "window": source.preparation.pooling_size[0],
        "levels": len(vision.levels),
        "num_heads": adapter.num_attention_heads,
        "head_dim": adapter.head_dim,
        "intermediate_size": adapter.intermediate_size,
        "token_bias": True,
    }
    connector = make_connector("attentional_pool", vision, llm, options, table.dtype, newline=True)
    state = source.model.model.multi_modal_projector.state_dict()
    connector.connector.load_published({**state, "token_bias": table[patch]})
    connector.newline.data.copy_(table[column])
    return connector


def _language_model(source: Source) -> nn.Module:
    """The language model as a Qwen3, whose head has rows of zeros for the tokens that are never answered."""
    text, head = source.config.text_config, source.model.get_output_embeddings().weight
    more = text.additional_vocab_size
    values = {key: value for key, value in text.to_dict().items() if key in Qwen3Config().to_dict()}
    values |= {"vocab_size": text.vocab_size + more, "tie_word_embeddings": False}
    values.pop("model_type")
    state = {f"model.{name}": tensor for name, tensor in source.model.model.language_model.state_dict().items()}
    state["lm_head.weight"] = nn.functional.pad(head.detach(), (0, 0, 0, more))
    llm = filled(Qwen3ForCausalLM, Qwen3Config(**values), state, head.dtype)
    llm.generation_config = GenerationConfig(suppress_tokens=list(range(text.vocab_size, text.vocab_size + more)))
    return llm


def _geometry(source: Source, told: Molmo2Processor, model: VLMWrapper) -> Geometry:
    images, videos, connector = told.image_processor, told.video_processor, model.connector
    geometry = fixed_geometry(model, "tiles", tuple(tile_grids(images.max_crops)))
    side = videos.pooling_size[0]
    rows, columns = connector.output_grid(*model.vision.grid, window=side)
    video = replace(
        PLAN,
        fps=videos.max_fps,
        frames=videos.num_frames,
        joining=PLAN.joining._replace(stride=side),
        frame_tokens=FRAMES[told.use_frame_special_tokens],
        tokens=rows * columns,
        grid=(rows, columns),
    )
    cut = {"tile_style": "molmo2", "tile_margin": images.overlap_margins[0], "connector": connector.config}
    return replace(geometry, **cut, video=video)


def _processor(source: Source, told: Molmo2Processor, model: VLMWrapper, geometry: Geometry) -> Processor:
    """The processor, with the first template that makes the source's prompts.

    Of the published template, that is all images and ChatML; it does not end the last answer itself.
    """
    tokenizer = source.tokenizer

    def made(template: str | None) -> Processor:
        return processor_of(source.folder, tokenizer, geometry, model.llm, template, attention="images")

    if source.template is not None:
        return made(source.template)
    own, start = tokenizer.chat_template or told.chat_template, bos_of(tokenizer)
    first = "{{ bos_token }}" if tokenizer.bos_token else "{{ eos_token }}"
    exported = Exported(source.model, told, ())
    tokenizer.chat_template = first + IMAGE_MARK + CHATML
    try:
        processor = made("chat")
        if prompt_difference(exported, model, processor) is None:
            return processor
    except ValueError:
        pass
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    begins = own and tokenizer.apply_chat_template(asked, chat_template=own, tokenize=False).startswith(start)
    tokenizer.chat_template = own if begins or not own else first + own
    return made(None)
