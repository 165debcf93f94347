"""Import of PaliGemma and PaliGemma 2 from Hugging Face."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor

from ..data.processor import Processor
from ..data.templates import PALIGEMMA
from ..errors import first_line
from ..model import VLMWrapper
from ..model.parts import make_connector
from ..model.vision import HFVision
from .importing_llava import fixed_geometry, language_model
from .llava import Exported
from .paligemma import compare_paligemma
from .preparation import check_pixels
from .source import Source, end_answers, processor_of

MODEL_CLASSES = {"paligemma": "PaliGemmaForConditionalGeneration"}
DTYPE = "auto"


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError for an image fit other than ``squash``, and for tokens of images and text of two widths."""
    if fit not in (None, "squash"):
        raise ValueError(f"--image-fit {fit}: {folder} is a PaliGemma, which supports only squash")
    if config.projection_dim != config.text_config.hidden_size:
        raise ValueError(
            f"{folder / 'config.json'}: projection_dim={config.projection_dim}, expected the hidden_size of "
            f"text_config, {config.text_config.hidden_size}"
        )


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors."""
    tower, layer = source.model.model.vision_tower, source.model.model.multi_modal_projector.linear
    vision = HFVision(tower, {"image_size": tower.config.image_size, **source.look}, -1, final_norm=True).eval()
    source.config.text_config.use_bidirectional_attention = False  # the batch says who sees whom
    llm = language_model(source.model)
    connector = make_connector("linear", vision, llm, {}, layer.weight.dtype)
    connector.load_published(layer.state_dict())
    model = VLMWrapper(vision, connector, llm).eval()
    end_answers(source.tokenizer, source.model.generation_config, source.config.text_config)
    geometry, template = fixed_geometry(model, "squash"), source.template or PALIGEMMA
    if source.fit is None:
        check_pixels(source.preparation_file, source.preparation, geometry)
    return model, processor_of(source.folder, source.tokenizer, geometry, llm, template, attention="prefix")


def compare(source: Source, model: VLMWrapper, processor: Processor) -> float:
    """See `compare_paligemma`."""
    try:
        told = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False, backend="pil")
    except Exception as error:  # transformers raises anything for files of a wrong kind
        raise ValueError(f"{source.folder} has no valid processor: {first_line(error)}") from None
    return compare_paligemma(Exported(source.model, told, ()), model, processor)
