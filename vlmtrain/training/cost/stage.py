"""What the parts of a stage cost for one sample: FLOPs, and memory for activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...connectors import VisionFeatures
from ...connectors.base import are_several
from ...data.geometry import Geometry
from ...data.records import BadSample, VideoFacts
from ...model.blocks import block_list, first_blocks
from ...model.encoder_decoder import BLOCKS, is_encoder_decoder
from ...model.experts import routing_of
from ...model.llm import hidden_width
from ...model.logits import logits_at
from ...model.media import Media
from ...objectives.token_losses import token_losses
from ...settings import STAGE_PARTS, Stage
from ...visual import MediaPlan, Size
from ..quantized import quantized_layers
from ..trainable import Group, is_frozen
from .measuring import Meter, PartCost, use_counted_attention

VISUAL = {"vision", "connector"}
RECOMPUTED = {"llm", "fusion"}  # with gradient checkpointing; a fusion's layers run within the blocks
WORTHWHILE = 9  # blocks of a language model from which on only a few of them run


OF_VIDEOS = " of videos"
"""Ends the names of the costs of videos, which are apart from those of images."""
RATE = 30  # frames per second of an expected video
LARGE = (4320, 7680)  # its size (H, W), which the limits of `video` reduce


def expected_video(stage: Stage, geometry: Geometry | None) -> MediaPlan | None:
    """The plan of a video as the stage expects it, with frames of the largest size; None if it expects none.

    Raises ValueError if no frame of it fits in a sample.
    """
    expected = stage.expected
    if geometry is None or not expected.videos:
        return None
    times = np.arange(max(1, round(expected.video_seconds * RATE))) / RATE
    try:
        room = stage.max_length - round(expected.text_tokens)
        return geometry.plan([VideoFacts(times, len(times) / RATE, LARGE)], room)
    except BadSample as error:
        beside = f"beside expected.text_tokens={expected.text_tokens:g}"
        raise ValueError(f"{stage.prefix}.max_length={stage.max_length} {beside}: {error}") from None


def video_tokens(plan: MediaPlan | None) -> int:
    """Tokens of an expected video and around it, without the text of timestamps."""
    placements = plan.placements if plan else ()
    return sum(placement.slots + bool(placement.before) + bool(placement.after) for placement in placements)


def sample_tokens(stage: Stage, geometry: Geometry | None) -> int:
    """Tokens of a sample, as the stage expects them on average, whose images have the most tokens."""
    visual = 0 if geometry is None else (geometry.most_tokens + geometry.most_control_tokens) * stage.expected.images
    visual += stage.expected.videos * video_tokens(expected_video(stage, geometry))
    return min(stage.max_length, max(2, round(visual + stage.expected.text_tokens)))


def measure(
    parts: Mapping[str, nn.Module],
    groups: list[Group],
    stage: Stage,
    geometry: Geometry | None,
    *lengths: tuple[int, int],
) -> list[dict[str, PartCost]]:
    """The costs by part of a sample of each of `lengths`, in tokens and targets.

    Its images have the largest size and most views. FLOPs are those of all its images, or of all its videos; bytes are
    those of one.
    """
    views = (geometry.most_items, geometry.sizes(geometry.largest)) if geometry else (1, ())
    costs = measure_views(parts, groups, stage, *views)
    for part in VISUAL & costs.keys():
        costs[part] = costs[part].repeated(stage.expected.images)
    if video := expected_video(stage, geometry):
        joined = {"placements": video.placements, "frames": geometry.separate_frames}
        of_videos = measure_views(parts, groups, stage, len(video.items), video.items[0].pixels, joined)
        for part in VISUAL & of_videos.keys():
            costs[part + OF_VIDEOS] = replace(of_videos[part].repeated(stage.expected.videos), tokens=0)
    if "llm" not in parts:
        return [costs for _ in lengths]
    found = [{**costs, "llm": measure_text(parts, groups, *length)} for length in lengths]
    if reads_media(parts):
        images = max(1, round(stage.expected.images))
        for each, (tokens, _) in zip(found, lengths):
            each["fusion"] = measure_fusion(parts, groups, tokens, costs["connector"].tokens, images)
    return found


def measure_views(
    parts: Mapping[str, nn.Module],
    groups: list[Group],
    stage: Stage,
    items: int,
    sizes: Sequence[Size],
    joined: Mapping[str, Any] | None = None,
) -> dict[str, PartCost]:
    """The costs of encoder, connector and objective for so many views, run on the meta device.

    sizes: of a view for each encoder. joined: how a `JoiningConnector` joins the views.
    """
    meter = Meter()
    trains = {part: not is_frozen(part, groups) for part in STAGE_PARTS}
    features = None
    if "vision" in parts:
        vision = parts["vision"]
        use_counted_attention(vision)
        visual = (parts[part].parameters() for part in ("vision", "connector") if part in parts)
        dtype = next(chain.from_iterable(visual)).dtype
        grid = vision.grid_of(sizes[0])
        images = [torch.empty(items, 3, *size, device="meta", dtype=dtype) for size in sizes]
        with meter.part("vision", vision, block_list(vision)[0]), torch.set_grad_enabled(trains["vision"]):
            features = vision.encode_all(images)
            every = features if are_several(features) else (features,)
            meter.backward("vision", [tensor for each in every for tensor in (each.patches, each.prefix, *each.levels)])
        prefixes = [0 if each.prefix is None else each.prefix.shape[1] for each in every]
        patches = [math.prod(each.patches.shape[1:3]) for each in every]
        meter.costs["vision"].tokens = sum(patches) + sum(prefixes)
        cut = tuple(_cut_off(each, trains["vision"]) for each in every)
        features = cut if are_several(features) else cut[0]
    if "connector" in parts:
        connector = parts["connector"]
        use_counted_attention(connector)
        text = {}
        if connector.joins:
            text |= joined or {}
        if connector.reads_text:
            ids = torch.zeros(items, stage.connector_text.max_length, device="meta", dtype=torch.long)
            text |= {"text_ids": ids, "text_mask": None}
        with meter.part("connector", connector):
            if "llm" in parts:
                visual = connector(features, **text)
                made = (visual[0], *visual[1]) if isinstance(visual, tuple) else (visual,)
            else:
                made = parts["objective"].rehearse(connector, features, text["text_ids"])
            meter.backward("connector", made)
        meter.costs["connector"].tokens = connector.num_tokens(*grid)
    if hasattr(parts.get("objective"), "text"):
        text = parts["objective"].text
        words = torch.zeros(1, parts["objective"].context_length, device="meta", dtype=torch.long)
        with meter.part("objective", text):
            meter.backward("objective", (text(words),))
    return meter.costs


def measure_text(parts: Mapping[str, nn.Module], groups: list[Group], tokens: int, targets: int) -> PartCost:
    """The cost of the language model for a sample, run on the meta device.

    Only a few of its blocks run if all are alike: the others cost the same. Of an encoder-decoder model, all run; the
    decoder reads a start token and the targets, the encoder all other tokens.
    """
    llm, (path, count) = parts["llm"], block_list(parts["llm"])
    decodes = is_encoder_decoder(llm.config)
    paths = BLOCKS if decodes else (path,)
    use_counted_attention(llm)
    gradient = "connector" in parts and not all(is_frozen(part, groups) for part in ("vision", "connector", "fusion"))

    def run() -> PartCost:
        meter = Meter()
        dtype = next(llm.parameters()).dtype
        split = {"inputs_embeds": tokens}
        if decodes:
            split = {"inputs_embeds": max(1, tokens - targets - 1), "decoder_inputs_embeds": targets + 1}
        rows = {
            name: torch.empty(1, length, hidden_width(llm), device="meta", dtype=dtype, requires_grad=gradient)
            for name, length in split.items()
        }
        kept = torch.arange(targets, device="meta")
        routed = {}
        if routing_of(llm) is not None:  # a position costs the same for each of the two experts
            routed = {"visual_mask": torch.arange(tokens, device="cpu")[None] < tokens // 2}
        trains = gradient or not is_frozen("llm", groups)
        with meter.part("llm", llm, *paths), torch.set_grad_enabled(trains):
            if decodes:
                with logits_at(llm, kept, torch.Size((1, targets + 1))):
                    logits = llm(**rows, use_cache=False).logits
            else:
                logits = llm(**rows, use_cache=False, logits_to_keep=kept, **routed).logits
            meter.backward("llm", (token_losses(logits.flatten(0, -2), kept),))
        return meter.costs["llm"]

    if decodes or count < WORTHWHILE or not _are_alike(llm):
        return run()
    with first_blocks(llm, 2):
        two = run()
    with first_blocks(llm, 3):
        three = run()
    return three.with_last_block_repeated(two, count - 3)


def reads_media(parts: Mapping[str, nn.Module]) -> bool:
    """Whether the fusion has layers between the blocks of the language model."""
    return "fusion" in parts and bool(parts["fusion"].before_blocks)


def measure_fusion(
    parts: Mapping[str, nn.Module], groups: list[Group], tokens: int, media_tokens: int, images: int = 1
) -> PartCost:
    """The cost of the fusion's layers for a sample with some images, of which each position sees one."""
    fusion, meter = parts["fusion"], Meter()
    dtype = next(fusion.parameters()).dtype
    trains = not all(is_frozen(part, groups) for part in VISUAL)
    shape = (images, media_tokens, fusion.media_width)
    media = Media(
        torch.empty(shape, device="meta", dtype=dtype, requires_grad=trains),
        torch.zeros(1, 1, device="meta", dtype=torch.long),
        torch.ones(1, tokens, 1, device="meta", dtype=torch.bool),
        torch.ones(1, tokens, media_tokens, device="meta", dtype=torch.bool),
    )
    states = torch.empty(1, tokens, fusion.width, device="meta", dtype=dtype, requires_grad=True)
    gradient = trains or not all(is_frozen(part, groups) for part in ("fusion", "llm"))
    with meter.part("fusion", fusion, block_list(fusion)[0]), torch.set_grad_enabled(gradient):
        for layer in fusion.before_blocks.values():
            states = layer(states, *layer.read(media), media.sees, media.mask)
        meter.backward("fusion", (states,))
    return meter.costs["fusion"]


def _are_alike(llm: nn.Module) -> bool:
    """Whether all blocks have the same class, kind of layer, and trained and frozen parameters."""
    config, blocks = llm.config.get_text_config(), llm.get_submodule(block_list(llm)[0])
    kinds = set(getattr(config, "layer_types", None) or ())
    shapes = (
        (type(block), *((name, p.shape, p.requires_grad) for name, p in block.named_parameters())) for block in blocks
    )
    return len(kinds) < 2 and len(set(shapes)) == 1


def _cut_off(features: VisionFeatures, trains: bool) -> VisionFeatures:
    """Features detached from the encoder, which require gradients if it trains."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_(trains)

    return VisionFeatures(cut(features.patches), cut(features.prefix), tuple(map(cut, features.levels)))


def quantized_sizes(parts: Mapping[str, nn.Module]) -> tuple[int, int, int]:
    """Number of weights stored in 4 bits, their bytes, and the number of weights in the largest such layer."""
    layers = [layer for module in parts.values() for layer in quantized_layers(module).values()]
    sizes = [math.prod(layer.shape) for layer in layers]
    return sum(sizes), sum(bits.numel() for layer in layers for bits in layer.packed), max(sizes, default=0)


def kept_bytes(costs: Mapping[str, PartCost], checkpointing: bool, images: float, videos: float = 0.0) -> int:
    """Bytes of activations and live gradients in the backward pass of a row.

    images, videos: their numbers in the row. Encoder and connector keep that many times what they keep for one image
    and for one video; without either they run on a placeholder.
    """
    times = dict.fromkeys(VISUAL, max(0.0 if videos else 1.0, images))
    times |= {part + OF_VIDEOS: videos for part in VISUAL}
    kept, at_work = 0.0, dict.fromkeys(costs, 0.0)
    for part, cost in costs.items():
        count = times.get(part, 1.0)
        kept += count * (cost.kept_checkpointed if checkpointing and part in RECOMPUTED else cost.kept)
        at_work[part.removesuffix(OF_VIDEOS)] += count * cost.at_work
    return round(kept + max(at_work.values()))
