"""Which weights a stage starts from: each part from the stage before, its published source, or fresh."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..connectors import CONNECTORS, Connector
from ..connectors.checks import GridError
from ..data.connector_text import TextReader, text_vocabulary
from ..data.processor import Geometry, Processor
from ..data.sources import vocabulary
from ..errors import nearest
from ..model.llm import (
    add_tokens,
    build_llm,
    build_llm_skeleton,
    build_random_llm,
    choose_attention,
    give_tokens,
    hidden_width,
    load_tokenizer,
    max_positions,
)
from ..model.loading import load_hf_config, load_hf_model
from ..model.parts import PARTS, load_part, make_connector, read_manifest
from ..model.tiled import TiledConnector
from ..model.tiny_tokenizer import build_tiny_tokenizer
from ..model.vision import VisionEncoder, build_vision
from ..objectives import Objective, build_objective
from ..paths import CONFIGS
from .adapters import add_adapters
from .handover import builds_anew, check_names, take_over
from .trainable import ALL_PARTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUILD_ORDER = ("vision", "llm", "connector", "objective")  # a connector's widths come from what it joins


def build_tokenizer(settings: DictConfig) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, with its new tokens; with `init_from`, that model's."""
    if settings.init_from is not None:
        read_manifest(Path(settings.init_from))
        tokenizer = Processor.from_pretrained(settings.init_from).tokenizer
    elif settings.llm.provider == "tiny":
        tokenizer = build_tiny_tokenizer(vocabulary(settings.data))
    else:
        tokenizer = load_tokenizer(settings.llm.path, trust_remote_code=settings.llm.trust_remote_code)
    add_tokens(tokenizer, settings.llm.new_tokens)
    return tokenizer


def build_parts(
    settings: DictConfig, name: str, previous: Path | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, nn.Module]:
    """The parts that stage `name` needs, with the weights that it starts from, in the compute dtype.

    previous: the model folder of the stage before, or `init_from`; None for a run's first stage.
    Raises ValueError for weights that are not there or do not fit.
    """
    stage = settings.stages[name]
    dtype = DTYPES[settings.precision]
    saved = read_manifest(previous) if previous is not None else {}
    parts: dict[str, nn.Module] = {}
    check_origins(settings, name, saved)
    for part in (p for p in BUILD_ORDER if p in stage.parts):
        seed_for(settings.seed, part)
        if part in PARTS and part in saved and part not in stage.fresh:
            parts[part] = load_part(part, previous, dtype, bool(settings[part].get("trust_remote_code")))
            if part == "connector" and builds_anew(stage):
                handed_on = parts.pop(part)
                parts[part] = _build(settings, name, part, parts, tokenizer, dtype)
                take_over(parts[part], handed_on, stage, name)
            elif part == "connector" and stage.image_fit == "tiles" and not isinstance(parts[part], TiledConnector):
                parts[part] = TiledConnector(parts[part]).to(dtype)  # it comes from a run without tiles
        else:
            parts[part] = _build(settings, name, part, parts, tokenizer, dtype)
        if part == "vision" and stage.image_size is not None:
            parts[part].resize(_pixels(stage.image_size), f"stages.{name}.image_size")
        if part == "llm":
            give_tokens(parts[part], tokenizer, settings.llm.new_tokens)
            choose_attention(parts[part], settings.llm.attn_implementation)
    seed_for(settings.seed, "adapters")
    add_adapters(stage, name, parts)
    return parts


def check_origins(settings: DictConfig, name: str, handed_on: Collection[str]) -> None:
    """Raise ValueError if a part of stage `name` would silently start from random weights.

    handed_on: the parts that the stage before, or `init_from`, leaves to it.
    """
    stage = settings.stages[name]
    check_names(stage, name)
    for part in stage.parts:
        if part not in ALL_PARTS:
            raise ValueError(f"stages.{name}.parts names {part}; the parts are {', '.join(ALL_PARTS)}")
        if part not in handed_on and part not in stage.fresh and not _has_source(settings, part):
            raise ValueError(
                f"stage {name} needs weights for its {part}, and nothing before it has any: run the stage that "
                f"trains it first, set init_from, or list {part} in stages.{name}.fresh to start it from random weights"
            )


def build_skeleton(
    settings: DictConfig, name: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """The parts of stage `name` without weights, on the meta device: what sizes and lengths depend on."""
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for part in (p for p in BUILD_ORDER if p in settings.stages[name].parts):
            with _naming_size(settings, name):
                parts[part] = _build(settings, name, part, parts, tokenizer, dtype, weights=False)
            resized = resized_by(settings, name)
            if part == "vision" and resized is not None:
                parts[part].resize(_pixels(settings.stages[resized].image_size), f"stages.{resized}.image_size")
            if part == "llm":
                give_tokens(parts[part], tokenizer, settings.llm.new_tokens)
        add_adapters(settings.stages[name], name, parts)
    return parts


def resized_by(settings: DictConfig, name: str) -> str | None:
    """The stage that gave the encoder of stage `name` its size: that, or one before; None for the size it came with."""
    names = list(settings.stages)
    for each in reversed(names[: names.index(name) + 1]):
        if "vision" in settings.stages[each].parts and settings.stages[each].image_size is not None:
            return each
    return None


@contextmanager
def _naming_size(settings: DictConfig, name: str) -> Iterator[None]:
    """Say which stage's image_size makes a grid that the connector of stage `name` cannot take."""
    try:
        yield
    except GridError as error:
        resized = resized_by(settings, name)
        if resized is None:
            raise
        raise GridError(f"stages.{resized}.image_size={settings.stages[resized].image_size}: {error}") from None


def _connector_options(settings: DictConfig, name: str) -> dict:
    """What the connector that is chosen is built from in a stage, with what it and the stages before it change."""
    options = OmegaConf.to_container(settings.connector)
    names = list(settings.stages)
    for stage in (settings.stages[n] for n in names[: names.index(name) + 1]):
        by_choice = stage.connector_options or {}
        for choice in (choice for choice in by_choice if choice not in CONNECTORS):
            raise ValueError(f"stages.*.connector_options names no connector: {choice}.{nearest(choice, CONNECTORS)}")
        options |= by_choice.get(settings.connector.name, {})
    return options


def _pixels(size: int | ListConfig) -> int | tuple[int, ...]:
    return size if isinstance(size, int) else tuple(size)


def published_llm(path: str) -> dict | None:
    """The Hugging Face configuration of a language model that recipes name, where it is known without a hub."""
    known = OmegaConf.to_container(OmegaConf.load(CONFIGS / "published_llms.yaml"))
    return known.get(path)


def _has_source(settings: DictConfig, part: str) -> bool:
    """Whether a part's configuration says where its weights come from (or, for a mini run, that it needs none)."""
    if part == "vision":
        return settings.mini or settings.vision.provider == "hf" or settings.vision.pretrained is not None
    return part == "llm" and (settings.mini or settings.llm.provider == "hf")


def _build(
    settings: DictConfig,
    stage: str,
    part: str,
    parts: dict[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    weights: bool = True,
) -> nn.Module:
    options = OmegaConf.to_container(settings[part]) if part in settings else {}
    if part == "vision":
        return build_vision(**options, dtype=dtype, weights=weights)
    if part == "llm":
        if settings.llm.provider == "tiny":
            return build_random_llm(options["config"], tokenizer, dtype)
        if not weights:
            return build_llm_skeleton(
                options["path"], dtype, published_llm(options["path"]), options["trust_remote_code"]
            )
        return build_llm(options["path"], dtype, options["attn_implementation"], options["trust_remote_code"])
    bert = settings.stages[stage].connector_text.bert if weights else None
    if part == "connector":
        options = _connector_options(settings, stage)
        newline = any(stage.image_fit == "tiles" for stage in settings.stages.values())
        if "text_vocab" in options:
            options["text_vocab"] = _text_vocab(options, settings.stages[stage], tokenizer)
        built = make_connector(options.pop("name"), parts["vision"], parts.get("llm"), options, dtype, newline)
    else:
        built = build_objective(settings.stages[stage].objective, settings, tokenizer, parts).to(dtype)
    if bert is not None and hasattr(built, "load_bert"):
        built.load_bert(load_hf_model("AutoModelForMaskedLM", bert).state_dict())
    return built


def check_bert(settings: DictConfig, name: str, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, naming the key, if the BERT that stage `name` begins with does not fit its parts' skeletons.

    None of its weights are read.
    """
    bert, key = settings.stages[name].connector_text.bert, f"stages.{name}.connector_text.bert"
    starting = [module for module in parts.values() if hasattr(module, "load_bert")]
    if bert is None or not starting or not _builds_connector(settings.stages[name]):
        return
    config = load_hf_config(bert, key)
    if config.model_type != "bert":
        raise ValueError(f"{key}={bert} is a {config.model_type}: expected a BERT")
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        state = AutoModelForMaskedLM.from_config(config).state_dict()
    for module in starting:
        try:
            module.load_bert(state)
        except ValueError as error:
            raise ValueError(f"{key}={bert}: {error}") from None


def _builds_connector(stage: DictConfig) -> bool:
    return "connector" in stage.fresh or builds_anew(stage)


def check_widths(settings: DictConfig, name: str, parts: Mapping[str, nn.Module], given: Collection[str]) -> None:
    """Raise ValueError if the connector of `init_from` does not fit an encoder or language model of the settings.

    given: the parts that come from `init_from` too, which fit each other.
    """
    connector, source = parts["connector"], f"init_from={settings.init_from}"
    advice = f"give it the one it was trained with, or list connector in stages.{name}.fresh"
    if "connector" not in given:
        return
    if "vision" not in given and connector.in_dim not in (parts["vision"].width, (parts["vision"].width,)):
        raise ValueError(
            f"the connector of {source} reads features {connector.in_dim} wide, the encoder of {_key(settings.vision)} "
            f"makes them {parts['vision'].width} wide: {advice}"
        )
    if "llm" in parts and "llm" not in given and connector.out_dim != hidden_width(parts["llm"]):
        raise ValueError(
            f"the connector of {source} makes tokens {connector.out_dim} wide, the language model of "
            f"{_key(settings.llm)} reads them {hidden_width(parts['llm'])} wide: {advice}"
        )


def _key(part: DictConfig) -> str:
    """Key and value that choose an encoder or a language model."""
    group = part._key()
    for key in ("path", "name"):
        if part.get(key) is not None:
            return f"{group}.{key}={part[key]}"
    return group


def _text_vocab(options: dict, stage: DictConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many words a stage's connector knows; None where it reads none."""
    if stage.connector_text.read is None:
        return None
    return options["text_vocab"] or text_vocabulary(_text_tokenizer(stage, tokenizer)).size


def _text_tokenizer(stage: DictConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    bert = stage.connector_text.bert
    return tokenizer if bert is None else load_tokenizer(bert, "connector_text.bert")


def build_processor(
    settings: DictConfig,
    name: str,
    parts: dict[str, nn.Module],
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> Processor:
    """What turns conversations into this stage's batches. Raises ValueError if lengths cannot work."""
    stage = settings.stages[name]
    with _naming_size(settings, name):
        geometry = build_geometry(stage, parts, objective)
    check_lengths(stage, name, geometry, parts)
    return Processor(
        tokenizer,
        geometry,
        stage.template,
        stage.max_length,
        settings.llm.chat_template,
        _build_reader(settings, name, parts, tokenizer),
        in_pairs=objective.compares_samples,
    )


def check_lengths(stage: DictConfig, name: str, geometry: Geometry | None, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a picture leaves no room for words, or a sample is longer than a model's positions."""
    if geometry is not None and geometry.most_tokens >= stage.max_length:
        raise ValueError(
            f"stages.{name}.max_length={stage.max_length} leaves no room for text: a picture takes up to "
            f"{geometry.most_tokens} tokens"
        )
    limit = max_positions(parts["llm"]) if "llm" in parts else None
    if limit is not None and stage.max_length > limit:
        raise ValueError(
            f"stages.{name}.max_length={stage.max_length} is longer than the {limit} positions of the language model"
        )
    limit = getattr(parts.get("objective"), "context_length", None)
    if limit is not None and stage.max_length > limit:
        raise ValueError(
            f"stages.{name}.max_length={stage.max_length} is longer than the text tower's positions, "
            f"vision.model_config.text_cfg.context_length={limit}"
        )


def _build_reader(
    settings: DictConfig, name: str, parts: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase
) -> TextReader | None:
    """What the stage's connector reads of a conversation, if it reads text."""
    if "connector" not in parts or not parts["connector"].reads_text:
        return None
    stage, key = settings.stages[name], f"stages.{name}.connector_text"
    if stage.connector_text.read is None and settings.init_from is not None:
        return Processor.from_pretrained(settings.init_from).reader  # what its connector has read so far
    reader = TextReader(_text_tokenizer(stage, tokenizer), stage.connector_text.read, stage.connector_text.max_length)
    if reader.reads == "answer" and "llm" in parts:
        raise ValueError(f"{key}.read=answer would show the connector what the language model is to say")
    size, positions = settings.connector.text_vocab, settings.connector.text_positions
    if size is not None and size < reader.vocabulary.size:
        raise ValueError(f"connector.text_vocab={size}, but the words of {key} are {reader.vocabulary.size}")
    if positions < reader.max_length:
        raise ValueError(f"{key}.max_length={reader.max_length} is longer than connector.text_positions={positions}")
    return reader


def build_geometry(stage: DictConfig, parts: dict[str, nn.Module], objective: Objective) -> Geometry | None:
    """How pictures reach the stage's encoder, and how many tokens they become; None without an encoder."""
    vision: VisionEncoder | None = parts.get("vision")
    if vision is None:
        return None
    connector: Connector | None = parts.get("connector")
    shows = connector is not None and objective.sees_pictures_as_tokens
    tokens, grid = (f(*vision.grid) for f in (connector.num_tokens, connector.output_grid)) if shows else (0, None)
    tile_grids = tuple(map(tuple, stage.image_tiles)) if stage.image_fit == "tiles" else ()
    look = (vision.image_mean, vision.image_std)
    limits = (stage.image_tiles_most or 0, stage.image_tiles_alone)
    return Geometry(vision.image_size, stage.image_fit, *look, tokens, grid, tile_grids, *limits)


def picture_size(parts: dict[str, nn.Module]) -> tuple[int, int]:
    """``(H, W)`` that pictures are wanted in, where there is an encoder to say so."""
    return parts["vision"].image_size if "vision" in parts else (224, 224)


def seed_for(*key: object) -> None:
    """Seed torch for one purpose, so that what comes before does not shift it."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
