"""Import of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and HunyuanOCR from Hugging Face."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..connectors import Connector
from ..data.frame_sampling import QWEN_LEAST
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..data.video_plan import VideoPlan
from ..errors import first_line
from ..model import VLMWrapper
from ..model.parts import make_connector
from ..model.rotary import use_multimodal_rotary
from ..model.vision import VisionEncoder
from ..model.vision.native import NativeVision
from .fitting import filled
from .llava import Exported
from .native_families import FAMILIES, Family
from .native_parity import compare_native
from .preparation import read_video_preparation
from .source import Source, processor_of

MODEL_CLASSES = {kind: family.model_class for kind, family in FAMILIES.items()}
DTYPE = "auto"
_MERGERS = ("merger.", "deepstack_merger_list.", "patch_merger.")


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError for an image fit other than ``native``, and for positions that are not supported."""
    if fit not in (None, "native"):
        raise ValueError(f"--image-fit {fit}: {folder} is a {config.model_type}, which supports only native")
    text = config.text_config
    section = (text.rope_parameters or {}).get("mrope_section")
    rows = 4 if FAMILIES[config.model_type].positions == "xdrope" else 3
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    if section is None or len(section) != rows or sum(section) != half:
        raise ValueError(
            f"{folder / 'config.json'}: mrope_section={section}, expected {rows} numbers, one for each row of "
            f"positions, which sum to half of the width of a head, {half}"
        )


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors."""
    family = FAMILIES[source.config.model_type]
    vision, llm = _tower(source, family), _language_model(source, family)
    model = VLMWrapper(vision, _connector(source.model, vision, llm, family), llm).eval()
    frame = tuple(_token(source, key) for key in family.frame)
    limits = source.preparation.size.shortest_edge, source.preparation.size.longest_edge
    geometry = native_geometry(vision, model.connector, limits, frame, _video_plan(source, family, vision))
    return model, processor_of(
        source.folder, source.tokenizer, geometry, llm, source.template, positions=family.positions
    )


def _video_plan(source: Source, family: Family, vision: NativeVision) -> VideoPlan | None:
    """How the source's processor shows videos. Raises ValueError for settings that are not supported."""
    if family.video is None:
        return None
    file, told = read_video_preparation(source.folder)
    for key, expected in (("min_frames", QWEN_LEAST), ("resample", 3), ("cap_pixels_per_frame", False)):
        if (got := getattr(told, key)) not in (expected, None):
            raise ValueError(f"{file}: {key}={got}, expected {expected}")
    limits = {name: (told.size.shortest_edge, told.size.longest_edge) for name in ("pixels", "pixels_total")}
    return replace(
        family.video,
        fps=None if told.num_frames else told.fps or family.video.fps,
        frames=told.num_frames or told.max_frames,
        **{name: pixels for name, pixels in limits.items() if getattr(family.video, name)},
        positions_per_second=getattr(source.config.vision_config, "tokens_per_second", None),
        per_item=vision.frames_per_item,
    )


def _token(source: Source, key: str) -> str:
    """The token around images whose id the configuration has under `key`."""
    number = getattr(source.config, key, None)
    token = None if number is None else source.tokenizer.convert_ids_to_tokens(number)
    if token is None:
        raise ValueError(f"{source.folder / 'config.json'}: {key}={number} is not the id of a token of the tokenizer")
    return token


def compare(source: Source, model: VLMWrapper, processor: Processor) -> float:
    """See `compare_native`."""
    return compare_native(Exported(source.model, _hf_processor(source), ()), model, processor)


def _hf_processor(source: Source) -> ProcessorMixin:
    """The source's processor, with images resized by Pillow, as here. Raises ValueError if it cannot be loaded."""
    try:
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything for files of a wrong kind
        raise ValueError(f"{source.folder} has no valid processor: {first_line(error)}") from None
    processor.image_processor = source.preparation
    if FAMILIES[source.config.model_type].video is not None:
        processor.video_processor.cap_pixels_per_frame = False  # as by default, but without a warning
    return processor


def native_geometry(
    vision: VisionEncoder,
    connector: Connector,
    image_pixels: tuple[int, int],
    frame: tuple[str, str],
    video: VideoPlan | None,
) -> Geometry:
    """The geometry of a model for images and videos of their own sizes."""
    counts = (connector.num_tokens, connector.output_grid, connector.framed_grid)
    tokens, grid, framed_grid = (count(*vision.grid) for count in counts)
    return Geometry(
        vision.image_size,
        "native",
        vision.image_mean,
        vision.image_std,
        tokens,
        grid,
        patch_size=vision.patch_size,
        image_pixels=image_pixels,
        multiple=math.lcm(vision.multiple, connector.multiple),
        connector=connector.config,
        framed_grid=framed_grid,
        frame=frame,
        size_rule=vision.size_rule,
        video=video,
    )


def _tower(source: Source, family: Family) -> NativeVision:
    config, tower = source.config.vision_config, getattr(source.model.model, family.tower_name)
    side = family.tower.nominal_side(config, {})
    levels = [block + 1 for block in getattr(config, "deepstack_visual_indexes", ())]
    with torch.device("meta"):
        vision = family.tower(config, {"image_size": side, **source.look}, -1, levels or None)
    state = tower.state_dict()
    vision.load_state_dict({name: state[name] for name in vision.state_dict()}, assign=True)
    return vision.eval()


def _connector(source: PreTrainedModel, vision: NativeVision, llm: nn.Module, family: Family) -> Connector:
    tower = getattr(source.model, family.tower_name)
    options = {"factor": tower.config.spatial_merge_size}
    if vision.levels:
        options["levels"] = len(vision.levels)
    published = f"model.{family.tower_name}."
    state = {f"{published}{name}": each for name, each in tower.state_dict().items() if name.startswith(_MERGERS)}
    connector = make_connector(family.connector, vision, llm, options, next(iter(state.values())).dtype)
    connector.load_published(state)
    return connector


def _language_model(source: Source, family: Family) -> nn.Module:
    """The source's language model as an ordinary one that reads rows of positions, with its own head."""
    head, table = (each.weight for each in (source.model.get_output_embeddings(), source.model.get_input_embeddings()))
    values, known = source.config.text_config.to_dict(), AutoConfig.for_model(family.llm).to_dict()
    values = {key: value for key, value in values.items() if key in known and key != "model_type"}
    rope = dict(values.pop("rope_parameters"))
    section = rope.pop("mrope_section")
    rope.pop("mrope_interleaved", None)
    values["tie_word_embeddings"] = head.data_ptr() == table.data_ptr()
    config = AutoConfig.for_model(family.llm, **values, rope_parameters=rope)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    state = {f"model.{name}": tensor for name, tensor in source.model.model.language_model.state_dict().items()}
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = head.detach()
    llm = filled(model_class, config, state, head.dtype)
    use_multimodal_rotary(llm, family.positions, section)
    return llm
