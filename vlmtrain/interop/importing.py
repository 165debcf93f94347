"""Import of published checkpoints as model folders: the families of `FAMILIES` in Hugging Face's format, and single
projectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from ..data.processor import Processor
from ..errors import first_line
from ..files import check_new_folder, new_folder
from ..model import VLMWrapper
from ..model.llm import load_tokenizer
from ..model.loading import load_hf_config, load_hf_model
from ..reporting.card import write_import_card
from . import (
    importing_blip,
    importing_fuyu,
    importing_idefics,
    importing_llava,
    importing_molmo2,
    importing_native,
    importing_paligemma,
)
from .importing_llava import fixed_geometry
from .importing_projectors import projector_parts
from .preparation import read_preparation
from .source import Source, processor_of

_MODULES = (
    *(importing_llava, importing_blip, importing_native),
    *(importing_molmo2, importing_fuyu, importing_paligemma, importing_idefics),
)
# modules that check, read and compare a family of models, by model_type
FAMILIES = {kind: family for family in _MODULES for kind in family.MODEL_CLASSES}
MODEL_CLASSES = {kind: family.MODEL_CLASSES[kind] for kind, family in FAMILIES.items()}


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

    source: a folder or Hub ID of Hugging Face with a LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, BLIP-2, InstructBLIP,
    Qwen2-VL, Qwen2.5-VL, Qwen3-VL, HunyuanOCR, Molmo2, Fuyu, PaliGemma or IDEFICS, or a single projector (a LLaVA
    ``mm_projector.bin``, InternVL's ``mlp1``, nanoVLM's ``MP``; torch or safetensors), which requires `llm`, and
    `vision` unless the ``config.json`` next to it names the encoder.
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
        geometry = fixed_geometry(model, image_fit or fitting)
        processor = processor_of(source, tokenizer, geometry, model.llm, template)
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
    family = FAMILIES.get(config.model_type)
    if family is None:
        dense = " (only dense models)" if "_moe" in config.model_type else ""
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {config.model_type}, expected {' or '.join(FAMILIES)}{dense}"
        )
    family.check(folder, config, fit)
    tokenizer = load_tokenizer(str(folder), "SOURCE")
    loaded = load_hf_model(MODEL_CLASSES[config.model_type], str(folder), is_ours=True, dtype=family.DTYPE).eval()
    file, preparation = read_preparation(folder)
    source = Source(folder, config, loaded, tokenizer, preparation, file, template, fit)
    model, processor = family.read(source)
    return model, processor, family.compare(source, model, processor)
