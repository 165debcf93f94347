"""Import of IDEFICS from Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from ..connectors import Connector
from ..data.processor import Processor
from ..data.records import IMAGE_MARK
from ..data.templates import IDEFICS
from ..errors import first_line
from ..model import VLMWrapper
from ..model.fusion import FUSIONS, Fusion, build_fusion
from ..model.parts import make_connector
from ..model.vision import HFVision
from .fitting import filled
from .idefics import END, FAKE, LAYER_NAMES, VISION_KEYS, compare_idefics
from .importing_llava import fixed_geometry
from .llava import Exported
from .source import Source, processor_of
from .towers import renamed

MODEL_CLASSES = {"idefics": "IdeficsForVisionText2Text"}
DTYPE = "auto"
GATED = "gated_cross_attention"


def check(folder: Path, config, fit: str | None) -> None:
    """Raise ValueError for an image fit other than ``squash``, and with the key of settings that are not supported."""
    if fit not in (None, "squash"):
        raise ValueError(f"--image-fit {fit}: {folder} is an IDEFICS, which supports only squash")
    interval = config.cross_layer_interval
    for key, got, expected in (
        ("dropout", config.dropout, 0),
        ("hidden_act", config.hidden_act, "silu"),
        ("vision_config.num_channels", config.vision_config.num_channels, 3),
        (
            "cross_layer_interval",
            interval,
            interval
            if config.num_hidden_layers % interval == 0
            else f"a divisor of num_hidden_layers={config.num_hidden_layers}",
        ),
    ):
        if got != expected:
            raise ValueError(f"{folder / 'config.json'}: {key}={got}, expected {expected}")


def read(source: Source) -> tuple[VLMWrapper, Processor]:
    """The model and the processor of a source, which share its tensors except those of the embeddings."""
    vision, llm = _tower(source), _language_model(source)
    fusion = _fusion(source, llm, vision.width)
    model = VLMWrapper(vision, _connector(source, vision, llm), llm, fusion).eval()
    tokenizer, words = source.tokenizer, source.tokenizer.get_vocab()
    if lacking := [word for word in (FAKE, IMAGE_MARK) if word not in words]:
        raise ValueError(f"{source.folder}: the tokenizer has no {lacking[0]}, which stands in prompts with images")
    geometry = replace(fixed_geometry(model, "squash"), slot_token=IMAGE_MARK, frame=(FAKE, FAKE), frame_shared=True)
    template = source.template or (IDEFICS if END in words else "bare")
    return model, processor_of(source.folder, tokenizer, geometry, llm, template)


def compare(source: Source, model: VLMWrapper, processor: Processor) -> float:
    """See `compare_idefics`."""
    try:
        told = AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything for files of a wrong kind
        raise ValueError(f"{source.folder} has no valid processor: {first_line(error)}") from None
    told.image_processor = source.preparation
    return compare_idefics(Exported(source.model, told, ()), model, processor)


def _tower(source: Source) -> HFVision:
    """The source's encoder as CLIP's, whose last block it reads, without the norm after it."""
    told, tower = source.config.vision_config, source.model.model.vision_model
    config = CLIPVisionConfig(hidden_size=told.embed_dim, **{key: getattr(told, key) for key in VISION_KEYS})
    encoder = filled(CLIPVisionModel, config, tower.state_dict(), source.model.dtype)
    return HFVision(encoder, {"image_size": told.image_size, **source.look}, layer=-1)


def _connector(source: Source, vision: HFVision, llm: nn.Module) -> Connector:
    if not source.config.use_resampler:
        return make_connector("identity", vision, llm, {"prefix": 1}, source.model.dtype, fusion=GATED)
    told, resampler = source.config.perceiver_config, source.model.model.perceiver_resampler
    options = {
        "num_queries": told.resampler_n_latents,
        "depth": told.resampler_depth,
        "num_heads": told.resampler_n_heads,
        "head_dim": told.resampler_head_dim,
        "qk_norm": told.qk_layer_norms_perceiver,
    }
    connector = make_connector("idefics_resampler", vision, llm, options, source.model.dtype, fusion=GATED)
    connector.load_published(resampler.state_dict())
    return connector


def _fusion(source: Source, llm: nn.Module, width: int) -> Fusion:
    """The layers between the blocks of the source's language model."""
    config, state = source.config, source.model.state_dict()
    options = {
        "style": "idefics",
        "every": config.cross_layer_interval,
        "qk_norm": config.qk_layer_norms,
        "gates": "vector" if config.alpha_type == "vector" else "scalar",
    }
    with torch.device("meta"):
        fusion = build_fusion(GATED, **FUSIONS[GATED].facts(llm, width), **options)
    names = renamed({name: name for name in fusion.state_dict()}, LAYER_NAMES)
    found = {name: state[told].flatten() if "alpha" in told else state[told] for told, name in names.items()}
    fusion.load_state_dict(found, assign=True)
    return fusion


def _language_model(source: Source) -> nn.Module:
    """The source's language model as a Llama, whose embeddings and head have the rows of both of its tables."""
    told, state = source.config, source.model.state_dict()
    head, table = (each.weight for each in (source.model.lm_head, source.model.model.embed_tokens))
    same = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    )
    config = LlamaConfig(
        **{key: getattr(told, key) for key in same},
        vocab_size=told.vocab_size + told.additional_vocab_size,
        tie_word_embeddings=head.data_ptr() == table.data_ptr(),
    )
    own = {name: each for name, each in state.items() if name.startswith(("model.layers.", "model.norm."))}
    own["model.embed_tokens.weight"] = _joined(state, "model.embed_tokens", "additional_embedding")
    if not config.tie_word_embeddings:
        own["lm_head.weight"] = _joined(state, "lm_head", "additional_fc")
    return filled(LlamaForCausalLM, config, own, head.dtype)


def _joined(state: dict[str, Tensor], table: str, more: str) -> Tensor:
    """The rows of a table and of the one that adds to it, if there is one."""
    names = (f"{table}.weight", f"{table}.{more}.weight")
    return torch.cat([state[name] for name in names if name in state])
