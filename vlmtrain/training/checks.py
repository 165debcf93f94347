"""Checks before training: contradicting settings, and parts or data that do not fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..data.mixture import Mixture
from ..data.records import BadSample
from ..data.sources import LOOKED_AT, build_source, first_look
from ..data.templates import INTERLEAVED
from ..evaluation.few_shot import why_zero_shot
from ..evaluation.lmms_eval import check_tasks
from ..evaluation.scores import check_metrics
from ..files import read_object
from ..model.attention import attend_in_segments, follow_rules
from ..model.deep_levels import receive_levels
from ..model.folder import read_manifest
from ..model.fusion import FACTS, FUSIONS
from ..model.llm import check_vocabulary, choose_attention, hidden_width
from ..model.loading import load_hf_config
from ..model.parts import connector_skeleton
from ..objectives import OBJECTIVES
from ..runs.folder import RunFolder
from ..settings import LLM, Run, Stage, Vision
from ..settings.data import DocumentSource, Split
from ..settings.run import RICES
from .assembly import build_skeleton, build_tokenizer, check_origins
from .batching import split_batch
from .handover import tensors_taken
from .log import logger
from .processing import build_processor, image_size_of
from .stage_validation import build_demonstrations
from .trainable import Group, check_starts, groups_of, trained_groups


def check_run(run: Run, world_size: int) -> None:
    """Raise ValueError for settings that cannot work on `world_size` processes, before anything is loaded or written.

    Individual keys are already checked when the settings are read.
    """
    check_metrics(run.validation.metrics)
    check_tasks(run.validation.lmms_eval, run.engine.shards_weights(world_size))
    for stage in run.stages.values():
        if stage.objective not in OBJECTIVES:
            raise ValueError(f"{stage.prefix}.objective={stage.objective}: expected one of {', '.join(OBJECTIVES)}")
        absent = [part for part in OBJECTIVES[stage.objective].needs if part not in stage.parts]
        if absent:
            raise ValueError(
                f"{stage.prefix}.objective={stage.objective} needs the part {absent[0]}: add it to {stage.prefix}.parts"
            )
        if stage.optimizer.name == "adamw_8bit" and not find_spec("bitsandbytes"):
            raise ValueError(f"{stage.prefix}.optimizer.name=adamw_8bit needs bitsandbytes: pip install -e '.[qlora]'")
        if stage.share_images and not OBJECTIVES[stage.objective].reads_packed:
            raise ValueError(
                f"{stage.prefix}.share_images=true: objective={stage.objective} may read the dialogues about an image "
                "as one sample; use share_images=false"
            )
        _check_layout(stage, run.data.splits.get(stage.data), world_size)
        if "llm" in stage.parts and stage.template != INTERLEAVED:
            for split in filter(None, (run.data.splits.get(name) for name in (stage.data, stage.validation))):
                _check_no_documents(stage, split)


def _check_no_documents(stage: Stage, split: Split) -> None:
    for name, source in split.sources.items():
        if isinstance(source, DocumentSource):
            raise ValueError(
                f"{stage.prefix}.template={stage.template} reads conversations, but the source {name} of "
                f"data.{split.name} has documents ({source.format}): use {stage.prefix}.template={INTERLEAVED}"
            )


def _check_layout(stage: Stage, split: Split | None, world_size: int) -> None:
    accumulation = 1 if stage.layout == "packed" else split_batch(stage, world_size)[0]
    if stage.sum_source_losses and split is not None and len(split.sources) > 1 and split.loss_weights is None:
        raise ValueError(
            f"{stage.prefix}.sum_source_losses=true, but the sources of data.{stage.data} have no loss_weight: give "
            "each one, or use false"
        )
    if not OBJECTIVES[stage.objective].compares_samples:
        return
    comparing = f"objective={stage.objective} compares the samples of a step with each other"
    if stage.layout == "packed":
        raise ValueError(f"{comparing}: {stage.prefix}.layout=packed cannot work; use padded")
    if stage.padding is False:
        raise ValueError(f"{comparing}: {stage.prefix}.padding=false cannot work; use true")
    if accumulation > 1:
        raise ValueError(
            f"{comparing}, so a step must be one micro-batch per rank: unset {stage.prefix}.micro_batch_size"
        )
    if stage.batch_size < 2:
        raise ValueError(f"{comparing}, but {stage.prefix}.batch_size={stage.batch_size}")
    if stage.loss_per != "token":
        raise ValueError(f"{comparing}: {stage.prefix}.loss_per={stage.loss_per} has no meaning; use token")
    if split is not None and (split.loss_weights is not None or split.weighs):
        raise ValueError(
            f"{comparing}: the sources of data.{stage.data} cannot have a loss_weight, loss_per or token_weight"
        )
    if stage.image_fit in ("tiles", "native"):
        key = f"{stage.prefix}.image_fit={stage.image_fit}"
        raise ValueError(f"{comparing}, one image of one size per text: {key} cannot work; use squash")


def check_stages(run: Run, folder: RunFolder) -> None:
    """Raise ValueError for unfinished stages whose parts, lengths or data cannot work. No weights are loaded."""
    tokenizer = build_tokenizer(run)
    source = Path(run.init_from) if run.init_from is not None else None
    handed_on = set(read_manifest(source)) if source else set()
    given = set(handed_on)  # parts that come from `init_from` rather than from the settings
    connector = connector_skeleton(source) if source else None
    zero_shot: dict[str, str | None] = {}  # why a stage that validates has no demonstrations
    if "fusion" in handed_on:
        check_fusion(run, read_object(source / "fusion" / "config.json"))
    for stage in run.stages.values():
        if folder.is_finished(stage.name):
            folder.summary(stage.name)  # raises if the file is damaged, before anything is trained
            connector = connector_skeleton(folder.model(stage.name))
        elif stage in run.wanted:
            check_origins(run, stage, stage.parts, handed_on)
            given -= set(stage.fresh)
            parts = build_skeleton(run, stage, tokenizer)
            if connector is not None and "connector" in parts and "connector" not in stage.fresh:
                if stage.builds_connector:
                    tensors_taken(parts["connector"], connector, stage)
                else:
                    parts["connector"] = connector
                    check_widths(run, stage, parts, given)
            connector = parts.get("connector", connector)
            groups = trained_groups(stage, parts)
            _check_bert(stage, parts)
            if "llm" in parts:
                choose_attention(parts["llm"], run.llm.attn_implementation)
                if "connector" in parts:
                    levels = parts["connector"].num_added
                    receive_levels(parts["llm"], parts["fusion"].num_added(levels) if "fusion" in parts else levels)
            if "llm" in parts and (source is None or "llm" in stage.fresh):
                check_vocabulary(parts["llm"], tokenizer)
                if stage.layout == "packed" or stage.padding is False:
                    attend_in_segments(parts["llm"], "layout=packed" if stage.layout == "packed" else "padding=false")
            processor = build_processor(run, stage, parts, OBJECTIVES[stage.objective], tokenizer)
            if "llm" in parts:
                follow_rules(parts["llm"], processor.rules)
            size, shots_from = image_size_of(parts), run.validation.shots_from
            data = _check_source(run, run.data.split(stage.data), size)
            held_out = [stage.validation, shots_from] if run.validates(stage) else []
            for name in held_out:
                if name not in (stage.data, None):
                    _check_source(run, run.data.split(name), size)
            if held_out and shots_from:
                build_demonstrations(run, size)
                zero_shot[stage.name] = why_zero_shot(processor)
                _check_retrieval(run, stage, parts, groups)
            if stage.layout == "padded":  # packed rows are counted when the stage starts
                steps = stage.max_steps or math.ceil(data.epoch_size / stage.batch_size) * stage.epochs
                check_starts(groups, stage, steps)
        else:
            continue
        handed_on = (handed_on | set(stage.parts)) - set(stage.drops) - {"objective"}
    if zero_shot and all(zero_shot.values()):
        reasons = "; ".join(f"stage {name}: {reason}" for name, reason in zero_shot.items())
        raise ValueError(f"validation.shots={list(run.validation.shots)}: no stage can show demonstrations ({reasons})")


def _check_retrieval(run: Run, stage: Stage, parts: Mapping[str, nn.Module], groups: Sequence[Group]) -> None:
    """Raise ValueError if demonstrations are chosen by features that the stage does not have or that it changes."""
    if run.validation.shots_by != RICES:
        return
    if "vision" not in parts or groups_of("vision", groups):
        what = "trains" if "vision" in parts else "does not have"
        raise ValueError(
            f"validation.shots_by={RICES} needs a frozen vision encoder, which stage {stage.name} {what}: use random, "
            f"or set {stage.prefix}.validation=null"
        )


def check_fusion(run: Run, held: Mapping) -> None:
    """Raise ValueError unless the settings choose the fusion that the model of `init_from` was trained with.

    Options that were added since have their defaults.
    """
    own = {key: value for key, value in held.items() if key not in FACTS}
    held = {"name": own["name"], **FUSIONS.options(own["name"]), **own}
    chosen = {"name": run.fusion.name, **run.fusion.options}
    if held != chosen:
        differing = {
            key: value for key, value in held.items() if key == "name" or key not in chosen or chosen[key] != value
        }
        words = " ".join(f"fusion{'' if key == 'name' else f'.{key}'}={value}" for key, value in differing.items())
        raise ValueError(f"fusion={run.fusion.name}, but the model of init_from={run.init_from} needs {words}")


def _check_bert(stage: Stage, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, naming the key, if the BERT model that a stage starts from does not fit its parts.

    None of its weights are read.
    """
    bert, key = stage.connector_text.bert, f"{stage.prefix}.connector_text.bert"
    starting = [module for module in parts.values() if hasattr(module, "load_bert")]
    if bert is None or not starting or not stage.starts_connector:
        return
    config = load_hf_config(bert, key)
    if config.model_type != "bert":
        raise ValueError(f"{key}={bert} is a {config.model_type} model: expected BERT")
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        state = AutoModelForMaskedLM.from_config(config).state_dict()
    for module in starting:
        try:
            module.load_bert(state)
        except ValueError as error:
            raise ValueError(f"{key}={bert}: {error}") from None


def check_widths(run: Run, stage: Stage, parts: Mapping[str, nn.Module], given: Collection[str]) -> None:
    """Raise ValueError if the connector of `init_from` does not fit the encoder or language model of the settings.

    given: the parts that also come from `init_from`, which fit each other.
    """
    connector, source = parts["connector"], f"init_from={run.init_from}"
    advice = f"use the one it was trained with, or list connector in {stage.prefix}.fresh"
    if "connector" not in given:
        return
    encoder, llm = _key("vision", run.vision), _key("llm", run.llm)
    if "vision" not in given and connector.in_dim not in (parts["vision"].width, (parts["vision"].width,)):
        raise ValueError(
            f"the connector of {source} expects features of width {connector.in_dim}, but the encoder of {encoder} "
            f"has width {parts['vision'].width}: {advice}"
        )
    if "llm" not in parts or "llm" in given or not FUSIONS[run.fusion.name].in_text:
        return  # other fusions are built for the width of the tokens
    if connector.out_dim != hidden_width(parts["llm"]):
        raise ValueError(
            f"the connector of {source} produces tokens of width {connector.out_dim}, but the language model of "
            f"{llm} has width {hidden_width(parts['llm'])}: {advice}"
        )


def _key(group: str, part: Vision | LLM) -> str:
    """Key and value that select an encoder or a language model."""
    for key in ("path", "name"):
        if getattr(part, key, None) is not None:
            return f"{group}.{key}={getattr(part, key)}"
    return group


def _check_source(run: Run, split: Split, size: tuple[int, int]) -> Mixture:
    source = build_source(split, size, run.seed)
    skips = run.on_bad_sample == "skip"
    if skips and not split.repairs:
        return source
    found = first_look(source, LOOKED_AT if skips else 1)
    if found.repaired:
        logger.info(f"data.{split.name}: repair changed {found.repaired:,} of the {found.records:,} records checked")
    if found.problems and not skips:
        raise BadSample(f"{found.problems[0]} (data.{split.name}; on_bad_sample=skip trains without it)")
    return source
