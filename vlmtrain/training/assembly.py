"""Builds the parts of a stage with their initial weights: from the previous stage, a published model, or random."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.processor import Processor
from ..data.sources import vocabulary
from ..model.experts import add_experts
from ..model.folder import is_model_folder, read_manifest
from ..model.fusion import FUSIONS, build_fusion
from ..model.joining import joining
from ..model.llm import (
    LANGUAGE_MODELS,
    add_tokens,
    build_llm,
    build_llm_skeleton,
    build_random_llm,
    choose_attention,
    give_tokens,
    load_tokenizer,
)
from ..model.loading import load_hf_model
from ..model.parts import PARTS, load_part, make_connector, part_skeleton
from ..model.rotary import use_multimodal_rotary
from ..model.tiny_tokenizer import build_tiny_tokenizer
from ..model.vision import SeveralVision, VisionEncoder, build_vision, vision_from
from ..model.vision.several import of_encoder
from ..objectives import build_objective
from ..settings import STAGE_PARTS, Run, SeveralOptions, Stage, Vision
from ..settings.locations import CONFIGS
from .adapters import add_adapters
from .handover import take_over
from .processing import naming_size, text_vocab
from .seeding import seed_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The widths of a connector and of a fusion come from the parts that they connect.
BUILD_ORDER = ("vision", "llm", "connector", "fusion", "objective")


def build_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """Build the language model's tokenizer and add the new tokens. With `init_from`, it comes from that model."""
    if run.init_from is not None:
        read_manifest(Path(run.init_from))
        tokenizer = Processor.from_pretrained(run.init_from).tokenizer
    elif run.llm.provider == "tiny":
        tokenizer = build_tiny_tokenizer(vocabulary(run.data.format))
    elif run.llm.provider in LANGUAGE_MODELS:
        tokenizer = LANGUAGE_MODELS[run.llm.provider].tokenizer(**run.llm.options)
    else:
        tokenizer = load_tokenizer(run.llm.path, trust_remote_code=run.llm.trust_remote_code)
    add_tokens(tokenizer, run.new_tokens)
    return tokenizer


def build_parts(
    run: Run,
    stage: Stage,
    previous: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    only: Collection[str] = STAGE_PARTS,
) -> dict[str, nn.Module]:
    """Build the parts of a stage with their initial weights, in the compute dtype.

    previous: the model folder of the previous stage, or `init_from`; None for the first stage of a run. only: builds
    only these parts of the stage.
    Raises ValueError for weights that are missing or do not fit.
    """
    dtype = DTYPES[run.precision]
    saved = read_manifest(previous) if previous is not None else {}
    parts: dict[str, nn.Module] = {}
    wanted = [part for part in BUILD_ORDER if part in stage.parts and part in only]
    check_origins(run, stage, wanted, saved)
    for part in wanted:
        seed_for(run.seed, part)
        if part in PARTS and part in saved and part not in stage.fresh:
            trusts_code = getattr(getattr(run, part), "trust_remote_code", False)
            parts[part] = load_part(part, previous, dtype, trusts_code)
            if part == "connector" and stage.builds_connector:
                handed_on = parts.pop(part)
                parts[part] = _build(run, stage, part, parts, tokenizer, dtype)
                take_over(parts[part], handed_on, stage)
            elif part == "connector":
                parts[part] = joining(parts[part], stage.newline)  # may be trained in a run that joins nothing
        else:
            parts[part] = _build(run, stage, part, parts, tokenizer, dtype)
        if part == "vision":
            if stage.image_size is not None:
                parts[part].resize(stage.image_size, f"{stage.prefix}.image_size")
            for encoder in parts[part].encoders.values():
                encoder.batch_size = stage.encoder_batch_size
        if part == "llm":
            give_tokens(parts[part], tokenizer, run.new_tokens)
            choose_attention(parts[part], run.llm.attn_implementation)
            if run.llm.positions is not None:
                use_multimodal_rotary(parts[part], run.llm.positions)
            if run.llm.visual_experts is not None:
                add_experts(parts[part], run.llm.visual_experts)
    seed_for(run.seed, "adapters")
    add_adapters(stage, parts)
    return parts


def check_origins(run: Run, stage: Stage, parts: Collection[str], handed_on: Collection[str]) -> None:
    """Raise ValueError if one of the `parts` of a stage would silently start from random weights.

    handed_on: the parts that the previous stage or `init_from` provides.
    """
    chosen = {"vision": run.vision, "llm": run.llm}
    pretrained = {part for part, options in chosen.items() if run.mini or options.is_pretrained}
    pretrained.add("fusion")  # a new one starts from the initial values of its class
    for part in parts:
        if part not in {*handed_on, *stage.fresh, *pretrained}:
            raise ValueError(
                f"stage {stage.name} needs weights for its {part}, and nothing before it has any: run the stage that "
                f"trains it first, set init_from, or list {part} in {stage.prefix}.fresh to start from random weights"
            )
    new = "fusion" in parts and ("fusion" in stage.fresh or "fusion" not in handed_on)
    if new and FUSIONS[run.fusion.name].has_weights and not stage.trains("fusion"):
        raise ValueError(
            f"stage {stage.name} adds fusion={run.fusion.name} without training it, so images would have no effect: "
            f"set {stage.prefix}.train.fusion to a learning rate"
        )


def build_skeleton(
    run: Run, stage: Stage, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """Build the parts of a stage on the meta device, without weights, to determine sizes and lengths."""
    parts: dict[str, nn.Module] = {}
    inherited = _inherited(run, stage)
    with torch.device("meta"):
        for part in (p for p in BUILD_ORDER if p in stage.parts):
            with naming_size(run, stage):
                if part in inherited:
                    trusts_code = getattr(getattr(run, part), "trust_remote_code", False)
                    parts[part] = part_skeleton(part, Path(run.init_from), trusts_code).to(dtype)
                    if part == "vision":
                        _check_scales(run, stage, parts[part])
                        _check_several(run, stage, parts[part])
                    if part == "connector":
                        parts[part] = joining(parts[part], stage.newline)
                else:
                    parts[part] = _build(run, stage, part, parts, tokenizer, dtype, weights=False)
            resized = run.resized_by(stage)
            if part == "vision" and resized is not None:
                parts[part].resize(resized.image_size, f"{resized.prefix}.image_size")
            if part == "llm":
                give_tokens(parts[part], tokenizer, run.new_tokens)
                if run.llm.positions is not None:
                    use_multimodal_rotary(parts[part], run.llm.positions)
                if run.llm.visual_experts is not None:
                    add_experts(parts[part], run.llm.visual_experts)
        add_adapters(stage, parts)
    return parts


def _check_scales(run: Run, stage: Stage, vision: VisionEncoder) -> None:
    """Raise ValueError if the settings choose other scales than the encoder of `init_from` has."""
    chosen, held = run.vision.scales, getattr(vision, "scales", None)
    if chosen is not None and chosen != held:
        held = "null" if held is None else list(held)
        raise ValueError(
            f"vision.scales={list(chosen)}, but the model in init_from={run.init_from} was trained with {held}: set "
            f"vision.scales=null to keep that, or list vision in {stage.prefix}.fresh to build another encoder"
        )


def _check_several(run: Run, stage: Stage, vision: VisionEncoder) -> None:
    """Raise ValueError if the settings choose other encoders than `init_from` has, and one of them has several."""
    chosen, held = run.vision, vision
    wanted = found = "one encoder"
    if isinstance(chosen, SeveralOptions):
        wanted = f"the encoders {', '.join(chosen.encoders)}, join={chosen.join} and grid={_grid(chosen.grid)}"
    if isinstance(held, SeveralVision):
        found = f"the encoders {', '.join(held.names)}, join={held.join} and grid={_grid(held.grid_name)}"
    if wanted != found:
        raise ValueError(
            f"vision={chosen.provider} asks for {wanted}, but the model in init_from={run.init_from} has {found}: set "
            f"the keys of vision accordingly, or list vision in {stage.prefix}.fresh to build another encoder"
        )


def _grid(grid: str | Sequence[int] | None) -> str:
    return "null" if grid is None else grid if isinstance(grid, str) else str(list(grid))


def _inherited(run: Run, stage: Stage) -> set[str]:
    """The parts whose architecture a stage gets from the model folder `init_from`."""
    if run.init_from is None or not is_model_folder(Path(run.init_from)):
        return set()
    so_far = [each for each in run.wanted if each.position <= stage.position]
    anew = {part for each in so_far for part in each.fresh}
    anew |= {"connector" for each in so_far if each.starts_connector}
    return set(PARTS) & read_manifest(Path(run.init_from)).keys() - anew


def published_llm(path: str) -> dict | None:
    """The Hugging Face configuration of a language model used in recipes, if it is available without the hub."""
    return _published("published_llms.yaml", path)


def _vision_skeleton(options: Vision) -> VisionEncoder:
    if isinstance(options, SeveralOptions):
        encoders = {}
        for name, each in options.encoders.items():
            try:
                encoders[name] = _vision_skeleton(each.options)
            except ValueError as error:
                raise ValueError(of_encoder(name, error)) from None
        looks = {name: each.look for name, each in options.encoders.items()}
        return SeveralVision(encoders, options.join, options.grid, options.align_corners, looks)
    return _published_encoder(options) or build_vision(**options.arguments, weights=False)


def _published_encoder(options: Vision) -> VisionEncoder | None:
    """The architecture of a vision tower used in recipes, if it is available without the hub."""
    known = _published("published_encoders.yaml", options.path)
    if known is None:
        return None
    given = {name: options.arguments[name] for name in known["geometry"]}
    geometry = {**known["geometry"], **{name: value for name, value in given.items() if value is not None}}
    chosen = {"layer": options.layer, "levels": options.levels, "scales": options.scales}
    chosen |= {"final_norm": options.final_norm} if options.provider == "hf" else {}
    return vision_from({**known, "geometry": geometry, **chosen})


def _published(file: str, path: str | None) -> dict | None:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / file)).get(path)


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
        return build_vision(**run.vision.arguments, dtype=dtype) if weights else _vision_skeleton(run.vision).to(dtype)
    if part == "llm":
        llm = run.llm
        if llm.provider == "tiny":
            return build_random_llm(llm.config, tokenizer, dtype)
        if llm.provider in LANGUAGE_MODELS:
            own = LANGUAGE_MODELS[llm.provider]
            return own.build(**llm.options, tokenizer=tokenizer, dtype=dtype, weights=weights).to(dtype)
        if not weights:
            return build_llm_skeleton(llm.path, dtype, published_llm(llm.path), llm.trust_remote_code)
        return build_llm(llm.path, dtype, llm.attn_implementation, llm.trust_remote_code)
    if part == "fusion":
        name = run.fusion.name
        facts = FUSIONS[name].facts(parts["llm"], parts["connector"].out_dim)
        return build_fusion(name, **facts, **run.fusion.options).to(dtype)
    bert = stage.connector_text.bert if weights else None
    if part == "connector":
        name, options = run.connector_of(stage)
        if "text_vocab" in options:
            options = {**options, "text_vocab": text_vocab(options, stage, tokenizer)}
        built = make_connector(name, parts["vision"], parts.get("llm"), options, dtype, run.newline, run.fusion.name)
    else:
        built = build_objective(stage.objective, run.vision, tokenizer, parts).to(dtype)
    if bert is not None and hasattr(built, "load_bert"):
        built.load_bert(load_hf_model("AutoModelForMaskedLM", bert).state_dict())
    return built
