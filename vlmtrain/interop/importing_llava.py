"""Import of LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision from Hugging Face."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel

from ..connectors.layers import ACTIVATIONS
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, Conversation, Turn
from ..model import VLMWrapper
from ..model.joining import JoiningConnector
from ..model.parts import make_connector
from ..model.vision import HFVision, VisionEncoder
from ..visual import MediaPlan
from .export import compare_logits
from .fitting import filled
from .llava import ONEVISION_VIDEO, Exported
from .preparation import check_pixels, fit_of, read_video_preparation
from .source import Source, processor_of

logger = logging.getLogger(__name__)

MODEL_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
_TILED = {"llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision"}
DTYPE = "auto"


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError if a model that cuts images into tiles is to be imported with another image fit."""
    if config.model_type in _TILED and fit not in (None, "tiles"):
        raise ValueError(f"--image-fit {fit}: {folder} is a {_TILED[config.model_type]}, which supports only tiles")


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors."""
    vision, llm = _encoder(source.folder, source.model, source.look), language_model(source.model)
    model = VLMWrapper(vision, _connector(source.folder, source.model, vision, llm), llm).eval()
    is_tiled = source.config.model_type in _TILED
    grids = _tile_grids(source.folder, source.config, vision) if is_tiled else ()
    geometry = fixed_geometry(model, source.fit or ("tiles" if grids else fit_of(source.preparation)), grids)
    if source.config.model_type == "llava_onevision":
        most = _tiles_most(source.folder, source.config)
        video = replace(ONEVISION_VIDEO, tokens=geometry.tokens, grid=geometry.grid)
        geometry = replace(geometry, tiles_most=most, tiles_alone=True, video=video)
    processor = processor_of(source.folder, source.tokenizer, geometry, llm, source.template)
    if source.fit is None:
        check_pixels(source.preparation_file, source.preparation, geometry)
        if geometry.video is not None:
            _check_video(source.folder, geometry)
    return model, processor


def _warn_of_prompts(source: Source, processor: Processor) -> None:
    """Warn if prompts are not those of the source's processor, whose published template treats images apart."""
    told = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    expected = told.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    question = Conversation("probe", (Turn("user", f"{IMAGE_MARK}\nWhat is this?"),), (None,))
    prompt = processor.renderer.prompt(question, MediaPlan.of_slots(1))
    ids = prompt.input_ids.masked_fill(prompt.index >= 0, source.config.image_token_id)
    if ids.tolist() != told.tokenizer(expected).input_ids:
        found = told.tokenizer.decode(ids)
        logger.warning("%s: its processor makes the prompt %r, but training makes %r", source.folder, expected, found)


def _check_video(folder: Path, geometry: Geometry) -> None:
    """Raise ValueError unless frames are prepared as by the source's processor, which must not choose them."""
    file, preparation = read_video_preparation(folder)
    if preparation.do_sample_frames:
        raise ValueError(
            f"{file}: do_sample_frames=true, expected false, with which video.sampling=interval shows frames"
        )
    check_pixels(file, preparation, geometry)


def compare(source: Source, model: VLMWrapper, processor: Processor) -> float:
    """Difference of the logits from the source's. Raises DoesNotFit if it is more than rounding."""
    if source.config.model_type == "llava_onevision" and source.template is None:
        _warn_of_prompts(source, processor)
    return compare_logits(Exported(source.model, None, ()), model, processor)


def fixed_geometry(model: VLMWrapper, fit: str, tile_grids: tuple[tuple[int, int], ...] = ()) -> Geometry:
    """The geometry of a model whose encoder sees images of one size."""
    vision, connector = model.vision, model.connector
    tokens, grid = connector.num_tokens(*vision.grid), connector.output_grid(*vision.grid)
    look = (vision.image_mean, vision.image_std)
    tile_grids = tile_grids if fit == "tiles" else ()
    return Geometry(vision.image_size, fit, *look, tokens, grid, tile_grids, patch_size=vision.patch_size)


def _encoder(folder: Path, source: PreTrainedModel, look: dict) -> HFVision:
    config, layer = source.config, source.config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(
            f"{folder / 'config.json'}: vision_feature_layer={list(layer)} combines several layers, expected one number"
        )
    tower = source.model.vision_tower
    vision = HFVision(tower, {"image_size": tower.config.image_size, **look}, layer).eval()
    with torch.no_grad():
        parameter = next(vision.parameters())
        prefix = vision(torch.zeros(1, 3, *vision.image_size).to(parameter)).prefix
    count = 0 if prefix is None else prefix.shape[1]
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    if count != dropped:
        raise ValueError(
            f"{folder / 'config.json'}: vision_feature_select_strategy={config.vision_feature_select_strategy} drops "
            f"{dropped} tokens, expected {count}, the number that the encoder has before its patches"
        )
    return vision


def language_model(source: PreTrainedModel) -> nn.Module:
    """The source's language model with its own head."""
    config = source.config.text_config
    head, table = source.get_output_embeddings().weight, source.get_input_embeddings().weight
    config.tie_word_embeddings = head.data_ptr() == table.data_ptr()
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    state = {
        f"{model_class.base_model_prefix}.{name}": tensor
        for name, tensor in source.model.language_model.state_dict().items()
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = head.detach()
    return filled(model_class, config, state, head.dtype)


def _connector(folder: Path, source: PreTrainedModel, vision: VisionEncoder, llm: nn.Module) -> nn.Module:
    act = source.config.projector_hidden_act
    state = {name: tensor.detach() for name, tensor in source.model.multi_modal_projector.state_dict().items()}
    first, second = state["linear_1.weight"], state["linear_2.weight"]
    for layer, weight in (("linear_1", first), ("linear_2", second)):
        state.setdefault(f"{layer}.bias", weight.new_zeros(len(weight)))
    if act == "linear":  # two layers without an activation in between are one
        bias = second @ state["linear_1.bias"] + state["linear_2.bias"]
        state, name, options = {"weight": second @ first, "bias": bias}, "linear", {}
    elif act in ACTIVATIONS:
        name, options = "mlp", {"activation": act}
    else:
        raise ValueError(
            f"{folder / 'config.json'}: projector_hidden_act={act}, expected one of {', '.join(ACTIVATIONS)}, linear"
        )
    connector = make_connector(name, vision, llm, options, first.dtype)
    connector.load_published(state)
    if source.config.model_type not in _TILED:
        return connector
    tiled = JoiningConnector(connector).to(first.dtype)
    tiled.newline.data.copy_(source.model.image_newline.detach())
    return tiled


def _tile_grids(folder: Path, config, vision: VisionEncoder) -> tuple[tuple[int, int], ...]:
    side = vision.image_size[0]
    if any(height % side or width % side for height, width in config.image_grid_pinpoints):
        raise ValueError(
            f"{folder / 'config.json'}: image_grid_pinpoints={config.image_grid_pinpoints}, expected multiples of the "
            f"encoder's {side} pixels"
        )
    return tuple((height // side, width // side) for height, width in config.image_grid_pinpoints)


def _tiles_most(folder: Path, config) -> int:
    """The largest number of tiles whose tokens an image keeps."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
    if found is None:
        raise ValueError(
            f"{folder / 'config.json'}: vision_aspect_ratio={config.vision_aspect_ratio}, expected anyres_max_N"
        )
    return int(found[1])
