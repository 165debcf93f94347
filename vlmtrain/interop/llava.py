"""Export to Hugging Face's LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision classes."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from ..connectors.in_turn import ConnectorsInTurn
from ..connectors.layers import ACTIVATIONS
from ..connectors.mlp import MLP
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, VIDEO_MARK
from ..data.tile_styles import TILE_STYLES
from ..data.video_plan import VideoPlan
from ..frames import Joining
from ..model import VLMWrapper
from ..model.joining import JoiningConnector
from .chat_template import Speech, typed_speech
from .fitting import DoesNotFit, filled
from .towers import as_hf_tower

ROUNDING = (
    "transformers resizes them with torchvision, whose rounding differs by one gray level for some pixels; "
    'AutoProcessor.from_pretrained(OUT_DIR, backend="pil") resizes as in training'
)


_CLASSES = {
    "llava": (LlavaForConditionalGeneration, LlavaConfig, LlavaProcessor),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig, LlavaNextProcessor),
    "llava_onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, LlavaOnevisionProcessor),
}
ONEVISION_VIDEO = VideoPlan(fps=1.0, frames=32, fit="squash", joining=Joining("bilinear", 2, "video"))
"""How LLaVA-OneVision shows videos (published code); which frames, transformers leaves to its caller."""


class Exported(NamedTuple):
    """A model and its processor as Hugging Face classes, and how they deviate from vlmtrain."""

    model: PreTrainedModel
    processor: ProcessorMixin
    remarks: tuple[str, ...]


@torch.no_grad()
def as_llava(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to LlavaForConditionalGeneration, or if images are tiled to the class of LLaVA-NeXT or LLaVA-OneVision.

    Unchanged tensors are shared. Raises DoesNotFit for parts that these classes do not support.
    """
    geometry = processor.geometry
    kind = _kind(geometry)
    connector = model.connector.connector if isinstance(model.connector, JoiningConnector) else model.connector
    projector, activation = _projector(connector)
    if getattr(model.vision, "final_norm", False):
        raise DoesNotFit("vision.final_norm=true: LLaVA's classes take features before the encoder's final norm")
    tower, prefix = as_hf_tower(model.vision)
    speech = typed_speech(processor, video=VIDEO_MARK if kind == "llava_onevision" else None)
    if prefix > 1:
        raise DoesNotFit(
            f"the encoder has {prefix} prefix tokens: LLaVA's classes drop at most one, and would treat registers as "
            "patches"
        )
    text_config, language = language_state(model.llm, max(speech.media_ids))
    image_processor, remarks = _image_processor(geometry)
    strategy = "default" if prefix else "full"
    options = {
        "vision_config": tower.config,
        "text_config": text_config,
        "image_token_index": speech.image_id,
        "projector_hidden_act": activation,
        "vision_feature_layer": model.vision.layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": text_config.tie_word_embeddings,
    }
    parts, told = [image_processor, speech.tokenizer], {"chat_template": speech.template}
    told["vision_feature_select_strategy"] = strategy
    state = {
        **{f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()},
        **{f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.items()},
        **language,
    }
    if kind != "llava":
        options["image_grid_pinpoints"] = image_processor.image_grid_pinpoints
        state["model.image_newline"] = model.connector.newline.detach()
    if kind == "llava_onevision":
        aspect = {"vision_aspect_ratio": f"anyres_max_{geometry.tiles_most}"}
        options |= {**aspect, "video_token_index": speech.video_id}
        parts.append(_video_processor(geometry))
        told |= {**aspect, "num_image_tokens": geometry.tokens + prefix}
        remarks = (*remarks, _video_remark(geometry))
    else:
        options["image_seq_length"] = geometry.tokens
        told |= {"patch_size": model.vision.patch_size[0], "num_additional_image_tokens": prefix}
        told["image_token"] = IMAGE_MARK
    model_class, config_class, processor_class = _CLASSES[kind]
    exported = filled(model_class, config_class(**options), state, next(model.llm.parameters()).dtype)
    exported.generation_config = generation_settings(processor, speech)
    return Exported(exported, processor_class(*parts, **told), remarks)


def _kind(geometry: Geometry) -> str:
    """The ``model_type`` of the class that shows images in the same way. Raises DoesNotFit if none does."""
    if geometry.fit != "tiles":
        return "llava"
    if not TILE_STYLES[geometry.tile_style].newline:
        raise DoesNotFit(
            f"image_tile_style={geometry.tile_style}: LLaVA-NeXT's class puts a newline after each row of tiles"
        )
    if bool(geometry.tiles_most) != geometry.tiles_alone:
        raise DoesNotFit(
            "LLaVA-NeXT's class supports neither image_tiles_most nor image_tiles_alone, LLaVA-OneVision's only both"
        )
    return "llava_onevision" if geometry.tiles_alone else "llava_next"


def _projector(connector: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Weights of a two-layer LLaVA projector that is equivalent to `connector`, and the name of its activation."""
    if isinstance(connector, ConnectorsInTurn):
        raise DoesNotFit("vision.join=tokens: LLaVA's classes have one encoder and one connector")
    if not isinstance(connector, MLP):
        raise DoesNotFit(
            f"connector={connector.config['name']}: LLaVA's classes support only linear and mlp (train "
            "with connector=mlp)"
        )
    layers = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    if len(layers) > 2:
        raise DoesNotFit(f"connector.depth={len(layers)}: LLaVA's projector has two layers")
    first, width = layers[0], connector.out_dim
    if len(layers) == 1:  # add a second layer that passes on the output of the first
        identity, nothing = torch.eye(width).to(first.weight), torch.zeros(width).to(first.weight)
        found = {"linear_1.weight": first.weight, "linear_1.bias": first.bias}
        return {**found, "linear_2.weight": identity, "linear_2.bias": nothing}, "linear"
    second, hidden = layers[1], first.out_features
    if hidden > width:
        raise DoesNotFit(
            f"connector.hidden_dim={hidden}: LLaVA's projector cannot be wider than the language model, {width}"
        )
    # all supported activations map zero to zero, so units with zero weights have no effect
    pad = width - hidden
    found = {
        "linear_1.weight": nn.functional.pad(first.weight, (0, 0, 0, pad)),
        "linear_1.bias": nn.functional.pad(first.bias, (0, pad)),
        "linear_2.weight": nn.functional.pad(second.weight, (0, pad)),
        "linear_2.bias": second.bias,
    }
    return found, next(name for name, kind in ACTIVATIONS.items() if isinstance(connector.layers[1], kind))


def language_state(llm: nn.Module, last_id: int) -> tuple:
    """Configuration and tensors of the language model under LLaVA's names, with rows for all ids up to `last_id`."""
    head, base = llm.get_output_embeddings(), llm.base_model
    if base is llm or head is None or getattr(head, "bias", None) is not None:
        raise DoesNotFit(f"{type(llm).__name__}: transformers' classes require a language model whose head has no bias")
    config = copy.deepcopy(llm.config.get_text_config())
    table = llm.get_input_embeddings().weight
    lacking = max(0, last_id + 1 - len(table))
    config.vocab_size = len(table) + lacking
    # these classes tie the head only to an embedding table of this name
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and hasattr(base, "embed_tokens")
    state = {}
    for name, tensor in base.state_dict().items():
        is_table = tensor.data_ptr() == table.data_ptr() and tensor.shape == table.shape
        state[f"model.language_model.{name}"] = _with_rows(tensor, lacking) if is_table else tensor
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = _with_rows(head.weight, lacking)
    return config, state


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """Append zero rows to an embedding table: their logits are 0, and generation suppresses these tokens."""
    return nn.functional.pad(table.detach(), (0, 0, 0, rows)) if rows else table.detach()


def generation_settings(processor: Processor, speech: Speech) -> GenerationConfig:
    """Greedy decoding that stops at the template's end of answers."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=processor.renderer.stop_ids,
        bos_token_id=speech.tokenizer.bos_token_id,
        pad_token_id=speech.tokenizer.pad_token_id,
        decoder_start_token_id=processor.renderer.decoder_start,
        suppress_tokens=speech.media_ids,
    )


def _image_processor(geometry: Geometry):
    """The Hugging Face image processor that is closest to training, and how it deviates."""
    side = geometry.size[0]
    square = {"height": side, "width": side}
    options = {"image_mean": list(geometry.mean), "image_std": list(geometry.std), "resample": 3}
    cropping = {**options, "size": {"shortest_edge": side}, "crop_size": square}
    remarks = (f"images that are not {side}x{side}: {ROUNDING}",)
    if geometry.fit == "squash":
        return CLIPImageProcessorPil(**options, size=square, do_center_crop=False), remarks
    if geometry.fit == "crop":
        return CLIPImageProcessorPil(**cropping), remarks
    if geometry.fit == "native":
        raise DoesNotFit("image_fit=native: LLaVA's classes take images of one size")
    if geometry.fit == "tiles":
        pinpoints = [[rows * side, columns * side] for rows, columns in geometry.tile_grids]
        if geometry.tiles_alone:
            return LlavaOnevisionImageProcessorPil(**options, size=square, image_grid_pinpoints=pinpoints), remarks
        return LlavaNextImageProcessorPil(**cropping, image_grid_pinpoints=pinpoints), remarks
    return LlavaImageProcessorPil(**options, size=square, do_center_crop=False, do_pad=True), remarks


def shows_videos(geometry: Geometry) -> bool:
    """Whether the class of LLaVA-OneVision shows the frames of videos as a geometry does."""
    plan = geometry.video
    same = {name: getattr(ONEVISION_VIDEO, name) for name in ("fit", "joining", "timestamps", "frame_tokens")}
    return plan is not None and all(getattr(plan, name) == value for name, value in same.items())


def _video_processor(geometry: Geometry) -> LlavaOnevisionVideoProcessor:
    height, width = geometry.size
    look = {"image_mean": list(geometry.mean), "image_std": list(geometry.std), "resample": 3}
    return LlavaOnevisionVideoProcessor(**look, size={"height": height, "width": width})


def _video_remark(geometry: Geometry) -> str:
    if not shows_videos(geometry):
        return "videos: transformers pools frames bilinearly, with stride 2 and one newline per video, unlike training"
    plan = geometry.video
    rate = "" if plan.fps is None else f"{plan.fps:g} per second, "
    return f"videos: transformers shows all frames that it is given; training showed {rate}at most {plan.frames}"
