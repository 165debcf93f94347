"""Builds the processor that turns conversations into batches: image geometry, tokenizers and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..connectors import Connector
from ..connectors.checks import GridError
from ..data.actions import Binning
from ..data.boxes import Writing
from ..data.connector_text import TextReader, text_vocabulary
from ..data.geometry import Geometry, View
from ..data.positions import WITH_TIME
from ..data.processor import Processor
from ..data.records import IMAGE_MARK, BadSample, VideoFacts
from ..data.video_plan import TIME_FORMAT, VideoPlan
from ..frames import Joining
from ..model.encoder_decoder import start_token
from ..model.experts import experts_of
from ..model.llm import load_tokenizer, max_positions
from ..model.rotary import positions_of
from ..model.vision import VisionEncoder
from ..objectives import Objective
from ..settings import Run, Stage
from ..settings.stage import VideoOptions
from ..visual import ATTENTION, CAUSAL

_NOT_IN_TEXT = "needs fusion=concatenation: with other fusions, visual tokens are not part of the text"


@contextmanager
def naming_size(run: Run, stage: Stage) -> Iterator[None]:
    """Add the key of the image size to errors about a grid that the connector of `stage` does not support."""
    try:
        yield
    except GridError as error:
        resized = run.resized_by(stage)
        if resized is None:
            raise
        raise GridError(f"{resized.prefix}.image_size={resized.image_size}: {error}") from None


def text_vocab(options: Mapping, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The vocabulary size of a stage's connector; None if it does not read text."""
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
    """Build the processor of a stage, which turns conversations into batches. Raises ValueError for invalid lengths."""
    with naming_size(run, stage):
        geometry = build_geometry(stage, parts, objective, *image_controls(run))
    if geometry is not None:
        _check_controls(run, stage, geometry, tokenizer)
    check_lengths(stage, geometry, parts)
    positions = positions_of(parts["llm"]) if "llm" in parts else None
    if stage.video.positions_per_second is not None and "llm" in parts and positions not in WITH_TIME:
        raise ValueError(
            f"{stage.prefix}.video.positions_per_second={stage.video.positions_per_second} needs "
            f"llm.positions={' or '.join(WITH_TIME)}, got {positions or 'null'}"
        )
    reader = _build_reader(run, stage, parts, tokenizer)
    if stage.share_images and reader is not None and reader.reads is not None:
        raise ValueError(
            f"{stage.prefix}.share_images=true: the connector reads the {reader.reads} of each dialogue, so its tokens "
            "of an image differ between dialogues; use share_images=false"
        )
    return Processor(
        tokenizer,
        geometry,
        stage.template,
        stage.max_length,
        run.llm.chat_template,
        reader,
        in_pairs=objective.compares_samples,
        positions=positions,
        encoder_batch_size=stage.encoder_batch_size,
        share_images=stage.share_images,
        attention=_attention(run, stage),
        decoder_start=start_token(parts["llm"]) if "llm" in parts else None,
        **writings(run),
    )


def check_lengths(stage: Stage, geometry: Geometry | None, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if an image, or one frame of a video, leaves no room, or a sample may exceed the positions."""
    if geometry is not None and geometry.most_tokens >= stage.max_length:
        raise ValueError(
            f"{stage.prefix}.max_length={stage.max_length} leaves no room for text: an image takes up to "
            f"{geometry.most_tokens} tokens"
        )
    if geometry is not None and geometry.video is not None:
        _check_one_frame(stage, geometry)
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


def _check_one_frame(stage: Stage, geometry: Geometry) -> None:
    """Raise ValueError if not even the smallest video of one frame can be shown."""
    room, budget = stage.max_length - 1, stage.video.token_budget
    try:
        geometry.plan([VideoFacts(np.zeros(1), 1.0, (1, 1))], room)
    except BadSample as error:
        is_budget = budget is not None and budget < room
        key = f"video.token_budget={budget}" if is_budget else f"max_length={stage.max_length}"
        raise ValueError(f"{stage.prefix}.{key} leaves no room for a frame: {error}") from None


def _build_reader(
    run: Run, stage: Stage, parts: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase
) -> TextReader | None:
    """Build the reader for the text input of the stage's connector; None if it does not read text."""
    if "connector" not in parts or not parts["connector"].reads_text:
        return None
    key = f"{stage.prefix}.connector_text"
    if stage.connector_text.read is None and run.init_from is not None:
        return Processor.from_pretrained(run.init_from).reader  # the reader that its connector was trained with
    reader = TextReader(_text_tokenizer(stage, tokenizer), stage.connector_text.read, stage.connector_text.max_length)
    if reader.reads == "answer" and "llm" in parts:
        raise ValueError(f"{key}.read=answer would show the connector what the language model has to predict")
    size, positions = (run.connector.options[key] for key in ("text_vocab", "text_positions"))
    if size is not None and size < reader.vocabulary.size:
        raise ValueError(f"connector.text_vocab={size}, but the vocabulary of {key} has size {reader.vocabulary.size}")
    if positions < reader.max_length:
        raise ValueError(f"{key}.max_length={reader.max_length} is longer than connector.text_positions={positions}")
    return reader


def image_controls(run: Run) -> tuple[tuple[str, str], str, bool]:
    """The tokens around images and after their rows, and whether images share the former, as `Geometry` says.

    They are those of the settings, or else of `init_from`. Empty strings where there are none.
    """
    frame, newline, shared = run.llm.image_frame, run.llm.image_newline, run.llm.image_frame_shared
    if None in (frame, newline) and run.init_from is not None:
        held = Processor.from_pretrained(run.init_from).geometry
        if held is not None:
            if frame is None:
                frame, shared = held.frame, held.frame_shared if shared is None else shared
            newline = held.newline if newline is None else newline
    return frame or ("", ""), newline or "", shared or False


def _attention(run: Run, stage: Stage) -> str:
    """Which positions see each other: as the settings say, or else as in `init_from`, or else none."""
    attention = run.fusion.options.get("attention")
    if attention not in (None, *ATTENTION):
        raise ValueError(f"fusion.attention={attention}: expected null, {' or '.join(ATTENTION)}")
    if attention is None and run.init_from is not None:
        attention = Processor.from_pretrained(run.init_from).attention
    if attention == "prefix" and stage.share_images:
        raise ValueError(
            f"{stage.prefix}.share_images=true: with fusion.attention=prefix an image sees the question, so its tokens "
            "differ between dialogues; use share_images=false"
        )
    return attention or CAUSAL


def writings(run: Run) -> dict[str, Writing | Binning | None]:
    """How regions and actions are written: as the settings say, or else as in `init_from`; None if neither says it."""
    chosen = {"boxes": run.boxes.writing, "actions": run.actions.binning}
    if None not in chosen.values() or run.init_from is None:
        return chosen
    held = Processor.from_pretrained(run.init_from)
    return {name: writing or getattr(held, name) for name, writing in chosen.items()}


def _check_controls(run: Run, stage: Stage, geometry: Geometry, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless what the template writes for images and videos are tokens of the tokenizer."""
    style, of_videos = f"{stage.prefix}.image_tile_style={stage.image_tile_style}", stage.video.frame_tokens or ()
    for key, words in (
        ("llm.image_frame", geometry.frame),
        ("llm.image_newline", [geometry.newline]),
        (style, geometry.view_words),
        (f"{stage.prefix}.video.frame_tokens", of_videos),
    ):
        for word in filter(None, words):
            if word not in tokenizer.get_vocab():
                raise ValueError(f"{key}: '{word}' is not a token of the tokenizer: list it in llm.new_tokens")


def build_geometry(
    stage: Stage,
    parts: dict[str, nn.Module],
    objective: Objective,
    frame: tuple[str, str] = ("", ""),
    newline: str = "",
    frame_shared: bool = False,
) -> Geometry | None:
    """Build the image geometry of a stage: preprocessing and number of tokens. None without an encoder.

    frame, newline, frame_shared: see `image_controls`.
    """
    vision: VisionEncoder | None = parts.get("vision")
    if vision is None:
        return None
    connector: Connector | None = parts.get("connector")
    in_text = "fusion" not in parts or parts["fusion"].in_text
    shows = connector is not None and objective.sees_pictures_as_tokens
    tokens, grid, framed_grid = 0, None, None
    if shows:
        counts = (connector.num_tokens, connector.output_grid, connector.framed_grid)
        tokens, grid, framed_grid = (count(*vision.grid) for count in counts)
    if not in_text and experts_of(parts["llm"]):
        raise ValueError(f"llm.visual_experts {_NOT_IN_TEXT}")
    first, *others = _views(vision, stage)
    fit, multiple = first.fit or stage.image_fit, math.lcm(vision.multiple, connector.multiple if shows else 1)
    geometry = Geometry(
        vision.image_size,
        fit,
        vision.image_mean,
        vision.image_std,
        tokens,
        grid,
        stage.image_tiles if fit == "tiles" else (),
        stage.image_tiles_most or 0,
        stage.image_tiles_alone,
        vision.patch_size,
        *((stage.image_pixels, multiple) if fit == "native" and shows else ()),
        connector=connector.config if shows and (fit == "native" or stage.image_tiles_margin is not None) else None,
        framed_grid=framed_grid,
        frame=frame if shows else ("", ""),
        tile_style=stage.image_tile_style,
        tile_margin=stage.image_tiles_margin or 0,
        size_rule=vision.size_rule,
        others=tuple(others),
        video=video_plan(stage.video, f"{stage.prefix}.video.", vision.grid, vision.frames_per_item, connector, fit)
        if shows and in_text
        else None,
        slot_token=None if in_text else IMAGE_MARK,
        newline=newline if shows else "",
        frame_shared=frame_shared and shows,
    )
    if geometry.newline:
        _check_newline(geometry, parts)
    if fit == "native":
        _check_native(geometry, stage, vision)
    return geometry


def _check_newline(geometry: Geometry, parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless the tokens of every image stand in the text as one grid."""
    key, positions = f"llm.image_newline={geometry.newline}", positions_of(parts["llm"]) if "llm" in parts else None
    if geometry.slot_token:
        raise ValueError(f"{key} {_NOT_IN_TEXT}")
    if geometry.fit == "tiles":
        raise ValueError(f"{key} does not go with image_fit=tiles: expected squash, pad, crop or native")
    if geometry.grid is None:
        raise ValueError(f"{key} needs a connector whose tokens form a grid, such as linear or mlp")
    if positions is not None:
        raise ValueError(f"{key} does not go with llm.positions={positions}, whose rows count the grids of images")


def video_plan(
    options: VideoOptions, prefix: str, grid: tuple[int, int], per_item: int, connector: Connector, fit: str
) -> VideoPlan:
    """How videos are shown to an encoder with this grid that reads `per_item` frames together.

    prefix: of the keys of `options` in messages. Raises ValueError for pooling that the connector does not support.
    """
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    joining = Joining(given.pop("pool"), given.pop("stride"), given.pop("newline"))
    (height, width), tokens, grid = grid, None, None
    if fit != "native":
        more = {}
        if joining.pool == "features":
            height, width = height // joining.stride, width // joining.stride
        if joining.pool == "window":
            more = {"window": joining.stride}
            if not connector.takes_window:
                raise ValueError(f"{prefix}pool=window needs a connector with windows (avgpool, attentional_pool)")
        try:
            grid = connector.output_grid(height, width, **more)
            tokens = grid[0] * grid[1] if more else connector.num_tokens(height, width)
        except GridError as error:
            raise GridError(f"{prefix}pool={joining.pool}: {error}") from None
        if grid is None and joining.pool in ("bilinear", "average"):
            raise ValueError(
                f"{prefix}pool={joining.pool} needs a connector whose tokens form a grid; use another "
                "connector, or none"
            )
        if grid is None and joining.newline == "row":
            raise ValueError(f"{prefix}newline=row needs a connector whose tokens form a grid")
    given["time_format"] = options.time_format or TIME_FORMAT
    given["fit"] = None if fit == "native" else options.fit or _fit_of_frames(fit)
    return VideoPlan(**given, joining=joining, per_item=per_item, tokens=tokens, grid=grid)


def video_options(plan: VideoPlan, fit: str) -> VideoOptions:
    """The options of which `video_plan` makes this plan with an `image_fit`."""
    given = {field.name: getattr(plan, field.name, None) for field in fields(VideoOptions)}
    given |= dict(zip(("pool", "stride", "newline"), plan.joining))
    if plan.timestamps != "frame" or plan.time_format == TIME_FORMAT:
        given["time_format"] = None
    if plan.fit == _fit_of_frames(fit):
        given["fit"] = None
    return VideoOptions(**given)


def _fit_of_frames(fit: str) -> str:
    return "squash" if fit == "tiles" else fit


def _views(vision: VisionEncoder, stage: Stage) -> list[View]:
    """How the images are prepared for each encoder. Raises ValueError for an image_fit that a stage cannot follow."""
    fits = {name: look.get("image_fit") for name, look in getattr(vision, "looks", {}).items()}
    for name, fit in fits.items():
        if fit is not None and stage.image_fit in ("tiles", "native"):
            raise ValueError(
                f"vision.encoders.{name}.image_fit={fit}: with {stage.prefix}.image_fit={stage.image_fit}, all "
                "encoders see the same parts of an image; leave it null"
            )
    # a View without a fit has that of the first encoder, which may differ from the stage's
    default = next(iter(fits.values()), None) and stage.image_fit
    return [
        View(each.image_size, fits.get(name) or default, each.image_mean, each.image_std, each.patch_size)
        for name, each in vision.encoders.items()
    ]


def _check_native(geometry: Geometry, stage: Stage, vision: VisionEncoder) -> None:
    """Raise ValueError if the encoder or the connector does not support images of their own sizes."""
    vision.check_any_size()
    try:
        for size in {geometry.smallest, geometry.largest}:
            geometry.plan([size])
    except GridError as error:
        raise ValueError(
            f"{stage.prefix}.image_fit=native: the connector does not support every grid ({error}): use another "
            "connector or image_fit"
        ) from None


def image_size_of(parts: dict[str, nn.Module]) -> tuple[int, int]:
    """Image size ``(H, W)`` of the encoder, or a default without an encoder."""
    return parts["vision"].image_size if "vision" in parts else (224, 224)
