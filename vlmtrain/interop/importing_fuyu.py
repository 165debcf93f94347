"""Import of Fuyu from Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import AutoProcessor

from ..data.processor import Processor
from ..data.templates import FUYU
from ..errors import first_line
from ..model import VLMWrapper
from ..model.parts import make_connector
from ..model.vision import PatchVision
from .fuyu import NEWLINE, START, compare_fuyu
from .importing_llava import language_model
from .importing_native import native_geometry
from .llava import Exported
from .source import Source, end_answers, processor_of

MODEL_CLASSES = {"fuyu": "FuyuForCausalLM"}
DTYPE = "auto"


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError for an image fit other than ``native``, and for images without three channels."""
    if fit not in (None, "native"):
        raise ValueError(f"--image-fit {fit}: {folder} is a Fuyu, which supports only native")
    if config.num_channels != 3:
        raise ValueError(f"{folder / 'config.json'}: num_channels={config.num_channels}, expected 3")


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors."""
    _check_preparation(source)
    largest = source.preparation.size.height, source.preparation.size.width
    vision, llm = PatchVision(source.config.patch_size, largest), language_model(source.model)
    layer = source.model.model.vision_embed_tokens
    connector = make_connector("linear", vision, llm, {}, layer.weight.dtype)
    connector.load_published(layer.state_dict())
    model = VLMWrapper(vision, connector, llm).eval()
    tokenizer = source.tokenizer
    end_answers(tokenizer, source.model.generation_config, source.config.text_config)
    tokenizer.bos_token = START
    geometry = native_geometry(vision, connector, (1, largest[0] * largest[1]), ("", ""), None)
    geometry = replace(geometry, newline=NEWLINE)
    return model, processor_of(source.folder, tokenizer, geometry, llm, source.template or FUYU)


def compare(source: Source, model: VLMWrapper, processor: Processor) -> float:
    """See `compare_fuyu`."""
    try:
        told = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything for files of a wrong kind
        raise ValueError(f"{source.folder} has no valid processor: {first_line(error)}") from None
    return compare_fuyu(Exported(source.model, told, ()), model, processor)


def _check_preparation(source: Source) -> None:
    """Raise ValueError for settings of the image processor that are not supported."""
    patch, told, file = source.config.patch_size, source.preparation, source.preparation_file
    size = {key: getattr(told.size, key) for key in ("height", "width")}
    if any(side is None or side % patch for side in size.values()):
        raise ValueError(f"{file}: size={size}, expected multiples of patch_size={patch} of config.json")
    got = {"height": told.patch_size.height, "width": told.patch_size.width}
    if got != dict.fromkeys(got, patch):
        raise ValueError(f"{file}: patch_size={got}, expected {patch} as in config.json")
    for key in ("image_mean", "image_std"):
        if (value := getattr(told, key)) not in (0.5, [0.5] * 3):
            raise ValueError(f"{file}: {key}={value}, expected 0.5")
