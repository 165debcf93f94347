"""Import of published checkpoints as model folders: LLaVA-1.5, LLaVA-NeXT, BLIP-2 and InstructBLIP of Hugging Face, and
single projectors."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..connectors.layers import ACTIVATIONS
from ..data.connector_text import TextReader
from ..data.geometry import Geometry
from ..data.images import show_items
from ..data.processor import Processor
from ..data.rendering import Renderer
from ..data.templates import BLIP
from ..errors import first_line
from ..files import check_new_folder, new_folder, read_json
from ..model import VLMWrapper
from ..model.llm import load_tokenizer, max_positions
from ..model.loading import load_hf_config, load_hf_model
from ..model.parts import make_connector
from ..model.tiled import TiledConnector
from ..model.vision import HFVision, VisionEncoder
from ..reporting.card import write_import_card
from .export import compare_logits
from .fitting import filled
from .importing_blip import MODEL_CLASSES as BLIP_CLASSES
from .importing_blip import blip_parts, check_blip, end_answers, reader_of
from .importing_projectors import projector_parts
from .llava import Exported

logger = logging.getLogger(__name__)

LLAVA_CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
MODEL_CLASSES = {**LLAVA_CLASSES, **BLIP_CLASSES}
DEFAULT_LENGTH = 2048

_TOLD = ("size", "crop_size", "do_resize", "do_center_crop", "do_pad", "do_rescale", "rescale_factor", "do_normalize")

# Templates of processors expect typed items; here content is a string that already contains the image marks.
_ITEMS = (
    "{%- set said = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set said.messages = said.messages + [dict(message, content=[{'type': 'text', 'text': message.content}])] -%}"
    "{%- endfor -%}"
    "{%- set messages = said.messages -%}"
)


class Import(NamedTuple):
    """What was read and written. largest_relative_difference: of the logits from the source's, if it has any."""

    folder: str
    source: str
    connector: str
    template: str
    image_fit: str
    largest_relative_difference: float | None


def import_model(
    source: Path,
    out: Path,
    llm: str | None = None,
    vision: str | None = None,
    template: str | None = None,
    image_fit: str | None = None,
) -> Import:
    """Convert `source` to a model folder at `out` that ``init_from`` accepts.

    source: a LLaVA-1.5, LLaVA-NeXT, BLIP-2 or InstructBLIP folder or Hub ID of Hugging Face, or a single projector
    (an original LLaVA ``mm_projector.bin``, InternVL's ``mlp1``, nanoVLM's ``MP``; torch or safetensors), which
    requires `llm`, and `vision` unless the ``config.json`` next to it names the encoder.
    template: one of vlmtrain's, if the source's cannot be trained on. image_fit: replaces the source's. Raises
    ValueError with the file, the tensor and what was expected.
    """
    check_new_folder(out, "OUT_DIR")
    source = _local(source)
    if source.is_dir():
        if llm or vision:
            raise ValueError(f"{source} contains an encoder and a language model: omit --llm and --vision")
        model, processor, difference = _from_folder(source, template, image_fit)
        classes = {"class": MODEL_CLASSES[load_hf_config(str(source), "SOURCE").model_type]}
    elif source.is_file():
        model, tokenizer, fitting = projector_parts(source, llm, vision)
        processor = _processor(source, tokenizer, model, image_fit or fitting, (), template)
        difference, classes = None, {}
    else:
        raise ValueError(f"{source} does not exist: expected a Hugging Face folder or Hub ID, or a projector file")
    fitted, name = processor.geometry.fit, model.connector.config["name"]
    done = Import(str(out), str(source), name, processor.renderer.template, fitted, difference)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_import_card(partial, done._asdict(), classes)
    return done


def _local(source: Path) -> Path:
    """The folder or file, or the local copy of a Hub ID, which is downloaded. Raises ValueError if that fails."""
    if source.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return source
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is neither a folder nor a Hub ID that can be downloaded: {first_line(error)}"
        ) from None


def _from_folder(folder: Path, template: str | None, fit: str | None) -> tuple[VLMWrapper, Processor, float]:
    config = load_hf_config(str(folder), "SOURCE")
    if config.model_type not in MODEL_CLASSES:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {config.model_type}, expected {' or '.join(MODEL_CLASSES)}"
        )
    if config.model_type == "llava_next" and fit not in (None, "tiles"):
        raise ValueError(f"--image-fit {fit}: {folder} is a LLaVA-NeXT, which supports only tiles")
    is_blip = config.model_type in BLIP_CLASSES
    if is_blip:
        check_blip(folder, config)
    tokenizer = load_tokenizer(str(folder), "SOURCE")
    # BLIP-2's classes keep the Q-Former in fp32 regardless of the dtype of the rest
    dtype = torch.float32 if is_blip else "auto"
    source = load_hf_model(MODEL_CLASSES[config.model_type], str(folder), is_ours=True, dtype=dtype).eval()
    file, preparation = _preparation(folder)
    look = {key: getattr(preparation, key) for key in ("image_mean", "image_std")}
    grids, reader = (), None
    if is_blip:
        model, reader, template = blip_parts(source, look), reader_of(folder, config), template or BLIP
        end_answers(tokenizer, source)
    else:
        vision, llm = _encoder(folder, source, look), _language_model(source)
        model = VLMWrapper(vision, _connector(folder, source, vision, llm), llm).eval()
        grids = _tile_grids(folder, config, vision) if config.model_type == "llava_next" else ()
    fitting = fit or ("tiles" if grids else _fit(preparation))
    processor = _processor(folder, tokenizer, model, fitting, grids, template, reader)
    if fit is None:
        _check_pixels(file, preparation, processor.geometry)
    return model, processor, compare_logits(Exported(source, None, ()), model, processor)


def _preparation(folder: Path) -> tuple[Path, ImageProcessingMixin]:
    """The source's image processor, and the file that configures it."""
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.exists():
            settings = read_json(file)
            settings = settings.get("image_processor", settings)
            if settings.get("image_mean") and settings.get("image_std"):
                try:
                    return file, AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
                except (ValueError, OSError, ImportError, TypeError) as error:
                    raise ValueError(f"{file} is not a valid image processor: {first_line(error)}") from None
    raise ValueError(f"{folder / 'preprocessor_config.json'} is missing, or has no image_mean and image_std")


def _fit(preparation: ImageProcessingMixin) -> str:
    if getattr(preparation, "do_pad", False):
        return "pad"
    return "crop" if getattr(preparation, "do_center_crop", False) else "squash"


def _check_pixels(file: Path, preparation: ImageProcessingMixin, geometry: Geometry) -> None:
    """Raise ValueError unless a smooth, wide image is prepared as by the source's processor."""
    height, width = geometry.size
    across, down = torch.linspace(0, 255, 2 * width), torch.linspace(0, 255, height + height // 4)
    x, y = torch.meshgrid(across, down, indexing="xy")
    image = Image.fromarray(torch.stack([x, y, 255 - x], dim=-1).to(torch.uint8).numpy())
    items = geometry.plan([(image.height, image.width)]).items
    ours = torch.stack(show_items(image, items, geometry.mean, geometry.std))
    problem = f"resample={int(preparation.resample)}, expected 3 (bicubic)" if preparation.resample != 3 else None
    if problem is None:
        try:
            theirs = preparation(images=[image], return_tensors="pt")["pixel_values"].flatten(0, -4)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{file} cannot prepare an image: {first_line(error)}") from None
        if theirs.shape != ours.shape:
            problem = f"images of {_by(theirs)} pixels, expected {_by(ours)} as for the encoder"
        else:
            levels = (theirs - ours).abs() * torch.tensor(geometry.std)[:, None, None] * 255
            worst = float(levels.max())
            if worst > 1.5:
                told = preparation.to_dict()
                said = ", ".join(f"{key}={told[key]}" for key in _TOLD if told.get(key) is not None)
                problem = f"{said}: pixels differ from image_fit={geometry.fit} by {worst:.0f} of 255 levels"
    if problem:
        raise ValueError(f"{file}: {problem} (vlmtrain import with --image-fit imports the model anyway)")


def _by(views: Tensor) -> str:
    return " x ".join(str(side) for side in (len(views), *views.shape[-2:]))


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


def _language_model(source: PreTrainedModel) -> nn.Module:
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
    if source.config.model_type != "llava_next":
        return connector
    tiled = TiledConnector(connector).to(first.dtype)
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


def _processor(
    where: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: VLMWrapper,
    fit: str,
    grids: tuple[tuple[int, int], ...],
    template: str | None,
    reader: TextReader | None = None,
) -> Processor:
    vision, connector = model.vision, model.connector
    tokens, grid = connector.num_tokens(*vision.grid), connector.output_grid(*vision.grid)
    look = (vision.image_mean, vision.image_std)
    tile_grids = grids if fit == "tiles" else ()
    geometry = Geometry(vision.image_size, fit, *look, tokens, grid, tile_grids, patch_size=vision.patch_size)
    length = max_positions(model.llm) or DEFAULT_LENGTH
    return Processor(tokenizer, geometry, template or _template(where, tokenizer), length, reader=reader)


def _template(where: Path, tokenizer: PreTrainedTokenizerBase) -> str:
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
