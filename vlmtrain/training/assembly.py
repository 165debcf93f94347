"""Which weights a stage starts from: each part from the stage before, its published source, or fresh."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..connectors import Connector
from ..connectors.checks import GridError
from ..data.connector_text import TextReader, text_vocabulary
from ..data.processor import Geometry, Processor
from ..data.sources import vocabulary
from ..model.folder import read_manifest
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
from ..model.parts import PARTS, load_part, make_connector
from ..model.tiled import TiledConnector
from ..model.tiny_tokenizer import build_tiny_tokenizer
from ..model.vision import VisionEncoder, build_vision
from ..objectives import Objective, build_objective
from ..settings import LLM, STAGE_PARTS, Run, Stage, Vision, options_of
from ..settings.locations import CONFIGS
from .adapters import add_adapters
from .handover import take_over

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUILD_ORDER = ("vision", "llm", "connector", "objective")  # a connector's widths come from what it joins


def build_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, with its new tokens; with `init_from`, that model's."""
    if run.init_from is not None:
        read_manifest(Path(run.init_from))
        tokenizer = Processor.from_pretrained(run.init_from).tokenizer
    elif run.llm.provider == "tiny":
        tokenizer = build_tiny_tokenizer(vocabulary(run.data))
    else:
        tokenizer = load_tokenizer(run.llm.path, trust_remote_code=run.llm.trust_remote_code)
    add_tokens(tokenizer, run.llm.new_tokens)
    return tokenizer


def build_parts(
    run: Run,
    stage: Stage,
    previous: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    only: Collection[str] = STAGE_PARTS,
) -> dict[str, nn.Module]:
    """The parts that a stage needs, with the weights that it starts from, in the compute dtype.

    previous: the model folder of the stage before, or `init_from`; None for a run's first stage. only: leaves out the
    stage's other parts.
    Raises ValueError for weights that are not there or do not fit.
    """
    dtype = DTYPES[run.precision]
    saved = read_manifest(previous) if previous is not None else {}
    parts: dict[str, nn.Module] = {}
    wanted = [part for part in BUILD_ORDER if part in stage.parts and part in only]
    check_origins(run, stage, wanted, saved)
    for part in wanted:
        seed_for(run.seed, part)
        if part in PARTS and part in saved and part not in stage.fresh:
            parts[part] = load_part(part, previous, dtype, _trusts_code(run, part))
            if part == "connector" and stage.builds_connector:
                handed_on = parts.pop(part)
                parts[part] = _build(run, stage, part, parts, tokenizer, dtype)
                take_over(parts[part], handed_on, stage)
            elif part == "connector" and stage.image_fit == "tiles" and not isinstance(parts[part], TiledConnector):
                parts[part] = TiledConnector(parts[part]).to(dtype)  # it comes from a run without tiles
        else:
            parts[part] = _build(run, stage, part, parts, tokenizer, dtype)
        if part == "vision" and stage.image_size is not None:
            parts[part].resize(stage.image_size, f"{stage.prefix}.image_size")
        if part == "llm":
            give_tokens(parts[part], tokenizer, run.llm.new_tokens)
            choose_attention(parts[part], run.llm.attn_implementation)
    seed_for(run.seed, "adapters")
    add_adapters(stage, parts)
    return parts


def _trusts_code(run: Run, part: str) -> bool:
    return part in ("vision", "llm") and getattr(run, part).trust_remote_code


def check_origins(run: Run, stage: Stage, parts: Collection[str], handed_on: Collection[str]) -> None:
    """Raise ValueError if one of the `parts` of a stage would silently start from random weights.

    handed_on: the parts that the stage before, or `init_from`, leaves to it.
    """
    for part in parts:
        if part not in handed_on and part not in stage.fresh and not _has_source(run, part):
            raise ValueError(
                f"stage {stage.name} needs weights for its {part}, and nothing before it has any: run the stage that "
                f"trains it first, set init_from, or list {part} in {stage.prefix}.fresh to start from random weights"
            )


def build_skeleton(
    run: Run, stage: Stage, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """The parts of a stage without weights, on the meta device: what sizes and lengths depend on."""
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for part in (p for p in BUILD_ORDER if p in stage.parts):
            with _naming_size(run, stage):
                parts[part] = _build(run, stage, part, parts, tokenizer, dtype, weights=False)
            resized = run.resized_by(stage)
            if part == "vision" and resized is not None:
                parts[part].resize(resized.image_size, f"{resized.prefix}.image_size")
            if part == "llm":
                give_tokens(parts[part], tokenizer, run.llm.new_tokens)
        add_adapters(stage, parts)
    return parts


@contextmanager
def _naming_size(run: Run, stage: Stage) -> Iterator[None]:
    """Say which stage's image_size makes a grid that the connector of `stage` cannot take."""
    try:
        yield
    except GridError as error:
        resized = run.resized_by(stage)
        if resized is None:
            raise
        raise GridError(f"{resized.prefix}.image_size={resized.image_size}: {error}") from None


def published_llm(path: str) -> dict | None:
    """The Hugging Face configuration of a language model that recipes name, where it is known without a hub."""
    known = OmegaConf.to_container(OmegaConf.load(CONFIGS / "published_llms.yaml"))
    return known.get(path)


def _has_source(run: Run, part: str) -> bool:
    """Whether a part's configuration says where its weights come from (or, for a mini run, that it needs none)."""
    if part == "vision":
        return run.mini or run.vision.provider == "hf" or run.vision.pretrained is not None
    return part == "llm" and (run.mini or run.llm.provider == "hf")


def _build(
    run: Run,
    stage: Stage,
    part: str,
    parts: dict[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    weights: bool = True,
) -> nn.Module:
    if part == "vision":
        return build_vision(**options_of(run.vision), dtype=dtype, weights=weights)
    if part == "llm":
        llm = run.llm
        if llm.provider == "tiny":
            return build_random_llm(llm.config, tokenizer, dtype)
        if not weights:
            return build_llm_skeleton(llm.path, dtype, published_llm(llm.path), llm.trust_remote_code)
        return build_llm(llm.path, dtype, llm.attn_implementation, llm.trust_remote_code)
    bert = stage.connector_text.bert if weights else None
    if part == "connector":
        name, options = run.connector_of(stage)
        if "text_vocab" in options:
            options["text_vocab"] = _text_vocab(options, stage, tokenizer)
        built = make_connector(name, parts["vision"], parts.get("llm"), options, dtype, run.has_tiles)
    else:
        built = build_objective(stage.objective, run.vision, tokenizer, parts).to(dtype)
    if bert is not None and hasattr(built, "load_bert"):
        built.load_bert(load_hf_model("AutoModelForMaskedLM", bert).state_dict())
    return built


def check_bert(stage: Stage, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, naming the key, if the BERT that a stage begins with does not fit its parts' skeletons.

    None of its weights are read.
    """
    bert, key = stage.connector_text.bert, f"{stage.prefix}.connector_text.bert"
    starting = [module for module in parts.values() if hasattr(module, "load_bert")]
    if bert is None or not starting or not stage.starts_connector:
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


def check_widths(run: Run, stage: Stage, parts: Mapping[str, nn.Module], given: Collection[str]) -> None:
    """Raise ValueError if the connector of `init_from` does not fit an encoder or language model of the settings.

    given: the parts that come from `init_from` too, which fit each other.
    """
    connector, source = parts["connector"], f"init_from={run.init_from}"
    advice = f"give it the one it was trained with, or list connector in {stage.prefix}.fresh"
    if "connector" not in given:
        return
    encoder, llm = _key("vision", run.vision), _key("llm", run.llm)
    if "vision" not in given and connector.in_dim not in (parts["vision"].width, (parts["vision"].width,)):
        raise ValueError(
            f"the connector of {source} reads features {connector.in_dim} wide, the encoder of {encoder} "
            f"makes them {parts['vision'].width} wide: {advice}"
        )
    if "llm" in parts and "llm" not in given and connector.out_dim != hidden_width(parts["llm"]):
        raise ValueError(
            f"the connector of {source} makes tokens {connector.out_dim} wide, the language model of "
            f"{llm} reads them {hidden_width(parts['llm'])} wide: {advice}"
        )


def _key(group: str, part: Vision | LLM) -> str:
    """Key and value that choose an encoder or a language model."""
    for key in ("path", "name"):
        if getattr(part, key, None) is not None:
            return f"{group}.{key}={getattr(part, key)}"
    return group


def _text_vocab(options: Mapping, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many words a stage's connector knows; None where it reads none."""
    if stage.connector_text.read is None:
        return None
    return options["text_vocab"] or text_vocabulary(_text_tokenizer(stage, tokenizer)).size


def _text_tokenizer(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    bert = stage.connector_text.bert
    return tokenizer if bert is None else load_tokenizer(bert, "connector_text.bert")


def build_processor(
    run: Run,
    stage: Stage,
    parts: dict[str, nn.Module],
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> Processor:
    """What turns conversations into this stage's batches. Raises ValueError if lengths cannot work."""
    with _naming_size(run, stage):
        geometry = build_geometry(stage, parts, objective)
    check_lengths(stage, geometry, parts)
    return Processor(
        tokenizer,
        geometry,
        stage.template,
        stage.max_length,
        run.llm.chat_template,
        _build_reader(run, stage, parts, tokenizer),
        in_pairs=objective.compares_samples,
    )


def check_lengths(stage: Stage, geometry: Geometry | None, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a picture leaves no room for words, or a sample is longer than a model's positions."""
    if geometry is not None and geometry.most_tokens >= stage.max_length:
        raise ValueError(
            f"{stage.prefix}.max_length={stage.max_length} leaves no room for text: a picture takes up to "
            f"{geometry.most_tokens} tokens"
        )
    limit = max_positions(parts["llm"]) if "llm" in parts else None
    if limit is not None and stage.max_length > limit:
        raise ValueError(
            f"{stage.prefix}.max_length={stage.max_length} is longer than the {limit} positions of the language model"
        )
    limit = getattr(parts.get("objective"), "context_length", None)
    if limit is not None and stage.max_length > limit:
        raise ValueError(
            f"{stage.prefix}.max_length={stage.max_length} is longer than the text tower's positions, "
            f"vision.model_config.text_cfg.context_length={limit}"
        )


def _build_reader(
    run: Run, stage: Stage, parts: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase
) -> TextReader | None:
    """What the stage's connector reads of a conversation, if it reads text."""
    if "connector" not in parts or not parts["connector"].reads_text:
        return None
    key = f"{stage.prefix}.connector_text"
    if stage.connector_text.read is None and run.init_from is not None:
        return Processor.from_pretrained(run.init_from).reader  # what its connector has read so far
    reader = TextReader(_text_tokenizer(stage, tokenizer), stage.connector_text.read, stage.connector_text.max_length)
    if reader.reads == "answer" and "llm" in parts:
        raise ValueError(f"{key}.read=answer would show the connector what the language model is to say")
    size, positions = (run.connector.options[key] for key in ("text_vocab", "text_positions"))
    if size is not None and size < reader.vocabulary.size:
        raise ValueError(f"connector.text_vocab={size}, but the words of {key} are {reader.vocabulary.size}")
    if positions < reader.max_length:
        raise ValueError(f"{key}.max_length={reader.max_length} is longer than connector.text_positions={positions}")
    return reader


def build_geometry(stage: Stage, parts: dict[str, nn.Module], objective: Objective) -> Geometry | None:
    """How pictures reach the stage's encoder, and how many tokens they become; None without an encoder."""
    vision: VisionEncoder | None = parts.get("vision")
    if vision is None:
        return None
    connector: Connector | None = parts.get("connector")
    shows = connector is not None and objective.sees_pictures_as_tokens
    tokens, grid = (f(*vision.grid) for f in (connector.num_tokens, connector.output_grid)) if shows else (0, None)
    tile_grids = stage.image_tiles if stage.image_fit == "tiles" else ()
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
