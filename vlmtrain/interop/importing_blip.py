"""Import of BLIP-2 and InstructBLIP from Hugging Face."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..connectors.qformer import EPS
from ..data.connector_text import TextReader
from ..data.processor import Processor
from ..data.templates import BLIP
from ..model import VLMWrapper
from ..model.encoder_decoder import FAMILIES, is_encoder_decoder, prepared
from ..model.llm import load_tokenizer
from ..model.parts import make_connector
from ..model.vision import HFVision
from .importing_llava import compare, fixed_geometry
from .preparation import check_pixels, fit_of
from .source import Source, end_answers, processor_of

MODEL_CLASSES = {
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
}
DTYPE = torch.float32  # BLIP-2's classes keep the Q-Former in fp32 regardless of the dtype of the rest
__all__ = ["DTYPE", "MODEL_CLASSES", "check", "compare", "read"]
READING_TOKENIZER = "qformer_tokenizer"  # folder in which InstructBLIP's processor stores it


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError with the key if the model cannot be represented by a `VLMWrapper`."""
    text, qformer = config.text_config, config.qformer_config
    for key, got, expected in (
        ("text_config.model_type", text.model_type, text.model_type if _is_known(text) else None),
        ("qformer_config.hidden_act", qformer.hidden_act, "gelu"),
        ("qformer_config.layer_norm_eps", qformer.layer_norm_eps, EPS),
    ):
        if got != expected:
            wanted = expected or f"a decoder-only model (OPT, Llama) or one of {', '.join(FAMILIES)}"
            raise ValueError(f"{folder / 'config.json'}: {key}={got}, expected {wanted}")


def _is_known(text: PreTrainedConfig) -> bool:
    return is_encoder_decoder(text) or not text.is_encoder_decoder


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors."""
    model = _parts(source.model, source.look)
    geometry = fixed_geometry(model, source.fit or fit_of(source.preparation))
    reader = _reader_of(source.folder, source.config)
    if source.tokenizer("").input_ids[:1] != [source.tokenizer.bos_token_id]:
        source.tokenizer.bos_token = None  # the tokenizer does not add it
    settings = source.model.generation_config, source.model.language_model.generation_config, source.config.text_config
    end_answers(source.tokenizer, *settings)
    processor = processor_of(source.folder, source.tokenizer, geometry, model.llm, source.template or BLIP, reader)
    if source.fit is None:
        check_pixels(source.preparation_file, source.preparation, geometry)
    return model, processor


def _parts(source: PreTrainedModel, look: dict) -> VLMWrapper:
    """The parts of a BLIP-2 or InstructBLIP model, which share its tensors. look: image_mean and image_std."""
    tower = source.vision_model
    vision = HFVision(tower, {"image_size": tower.config.image_size, **look}, layer=-1)
    llm = prepared(source.language_model)
    connector = make_connector("qformer", vision, llm, _options(source.config))
    connector.load_published({name: tensor for name, tensor in source.state_dict().items() if _is_connector(name)})
    return VLMWrapper(vision, connector, llm).eval()


def _options(config) -> dict:
    qformer = config.qformer_config
    reads = config.model_type == "instructblip"
    return {
        "num_queries": config.num_query_tokens,
        "hidden_size": qformer.hidden_size,
        "depth": qformer.num_hidden_layers,
        "num_heads": qformer.num_attention_heads,
        "intermediate_size": qformer.intermediate_size,
        "cross_every": qformer.cross_attention_frequency,
        "dropout": qformer.hidden_dropout_prob,
        "text_vocab": qformer.vocab_size if reads else None,
        "text_positions": qformer.max_position_embeddings,
        "vision_norm": True,
        "vision_norm_eps": config.vision_config.layer_norm_eps,
    }


def _is_connector(name: str) -> bool:
    return name.startswith(("query_tokens", "qformer.", "language_projection.", "vision_model.post_layernorm."))


def _reader_of(folder: Path, config) -> TextReader | None:
    """The reader of instructions for InstructBLIP's Q-Former. Raises ValueError if its tokenizer is missing."""
    if config.model_type != "instructblip":
        return None
    tokenizer = load_tokenizer(str(folder / READING_TOKENIZER), "SOURCE")
    reader = TextReader(tokenizer, "instruction", config.qformer_config.max_position_embeddings)
    if max(reader.vocabulary.start, reader.vocabulary.end, len(tokenizer) - 1) >= config.qformer_config.vocab_size:
        raise ValueError(
            f"{folder / READING_TOKENIZER} has {len(tokenizer)} tokens, expected at most qformer_config.vocab_size="
            f"{config.qformer_config.vocab_size}"
        )
    return reader
