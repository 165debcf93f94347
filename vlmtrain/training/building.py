"""`build_model`: a new model and its processor, for use in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..data.processor import Processor
from ..errors import nearest
from ..model import VLMWrapper
from ..model.fusion import CONCATENATION
from ..model.llm import max_positions
from ..objectives import OBJECTIVES
from ..settings import compose_model
from .assembly import build_parts, build_tokenizer
from .processing import build_processor

INPUTS = (
    "template",
    "max_length",
    "image_fit",
    "image_pixels",
    "image_tiles",
    "image_tile_style",
    "image_tiles_most",
    "image_tiles_alone",
    "image_tiles_margin",
    "connector_text",
)
"""The keys of a stage that say how its inputs are prepared."""

Choice = str | Mapping[str, Mapping[str, Any]]


def build_model(
    vision: Choice,
    connector: Choice,
    llm: Choice,
    *,
    fusion: Choice = CONCATENATION,
    seed: int = 0,
    precision: str = "fp32",
    **inputs: Any,
) -> tuple[VLMWrapper, Processor]:
    """Build a model, on the CPU and in evaluation mode, and the processor that makes its batches.

    vision, connector, llm, fusion: a choice of the configuration group, such as ``"tiny"`` or ``"mlp"``, or a choice
    with options, ``{"hf": {"path": "openai/clip-vit-large-patch14"}}`` or ``{"qformer": {"num_queries": 16}}``. The
    choices and their keys are those of the command line, documented in ``configs/``; keys that are not given have the
    value in the choice's file. Parts of your own are choices once their module is imported.
    seed: of random weights, which are those of a run with this seed; the state of torch's CPU generator is kept.
    precision: ``fp32`` or ``bf16``.
    inputs: how inputs are prepared, by keys of a stage: ``template``, ``max_length`` (default: 2048 tokens, or the
    positions of the language model if it has fewer), ``image_fit``, ``image_pixels``, ``image_tiles``,
    ``image_tile_style``, ``image_tiles_most``, ``image_tiles_alone``, ``image_tiles_margin`` and ``connector_text``.

    Raises ValueError, naming the key, for an unknown key, a value out of bounds, and parts that do not fit.
    """
    for name in inputs:
        if name not in INPUTS:
            raise ValueError(f"unknown key '{name}'.{nearest(name, INPUTS)} Available: {', '.join(INPUTS)}")
    choices = {"vision": vision, "connector": connector, "fusion": fusion, "llm": llm}
    run = compose_model(choices, inputs, seed=seed, precision=precision)
    (stage,) = run.wanted
    tokenizer = build_tokenizer(run)
    with torch.random.fork_rng(devices=[]):
        parts = build_parts(run, stage, None, tokenizer)
    if "max_length" not in inputs:
        limit = max_positions(parts["llm"]) or stage.max_length
        stage = replace(stage, max_length=min(stage.max_length, limit))
    processor = build_processor(run, stage, parts, OBJECTIVES[stage.objective], tokenizer)
    return VLMWrapper(**parts).eval(), processor
