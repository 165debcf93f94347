"""The settings of one stage: the keys under ``stages.<name>``.

configs/objective/language_modelling.yaml documents each key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..data.encoded import MAX_PIXELS
from ..data.frame_sampling import CHOOSES_LAST, SAMPLINGS
from ..data.images import FITS, FRAME_FITS
from ..data.layouts import LAYOUTS
from ..data.rendered import LOSS_PER
from ..data.templates import CAPTIONS, INTERLEAVED
from ..data.tile_styles import LLAVA_NEXT, TILE_STYLES
from ..frames import NEWLINES, POOLS
from .fields import (
    IMAGE_SIZE,
    MAPPING,
    NAMES,
    POSITIVE,
    SWITCH,
    TEXT,
    Kind,
    by_name,
    key,
    list_of,
    number,
    one_of,
    optional,
    or_auto,
    section,
    whole,
)  # fmt: skip

STAGE_PARTS = ("vision", "connector", "fusion", "llm", "objective")
"""The parts that a stage may have and train. The heads and towers of the objective do not belong to the model."""


_RATE = Kind("a positive learning rate, or null to freeze", lambda value: value is None or POSITIVE.fits(value))
_BELOW_1 = Kind("a number of at least 0 and below 1", lambda value: number(0).fits(value) and value < 1)
_SHARE = Kind("a number above 0 and up to 1", lambda value: number(0, 1).fits(value) and value > 0)
_DECAY = Kind("a number above 0 and below 1", lambda value: number(0, 1).fits(value) and 0 < value < 1)
_LIMITS = Kind(
    f"null, or [MIN, MAX] pixels up to {MAX_PIXELS:,}",
    lambda value: value is None or (list_of(whole(1, MAX_PIXELS), "", sizes=(2,)).fits(value) and value[0] <= value[1]),
    lambda value, name: value and tuple(value),
)
_TOTAL_LIMITS = Kind(
    "null, or [MIN, MAX] pixels",
    lambda value: value is None or (list_of(whole(1), "", sizes=(2,)).fits(value) and value[0] <= value[1]),
    lambda value, name: value and tuple(value),
)
_GRID = list_of(whole(1), "[rows, columns]", sizes=(2,))


def _formats_a_time(value: object) -> bool:
    try:
        return isinstance(value, str) and value.format(time=1.0) != value
    except (ValueError, LookupError):
        return False


_TIME_FORMAT = Kind("text with {time}, such as '{time:.1f} s'", _formats_a_time)


@dataclass(frozen=True)
class Pattern:
    """One entry of ``groups``: parameters of a part with a separate learning rate."""

    match: str = key(TEXT)  # the parameters: a pattern of their names, or blocks of a part
    lr: float | None = key(_RATE)  # learning rate; null: frozen
    # factor on the learning rate per block, counted from the last block down
    layer_decay: float | None = key(optional(_SHARE), None)
    from_step: int = key(whole(0), 0)  # steps of the stage before the parameters start to train
    warmup_steps: int | None = key(optional(whole(0)), None)  # warm-up of these parameters; null: that of the schedule
    weight_decay: float | None = key(optional(number(0)), None)  # of these parameters; null: that of the optimizer

    @property
    def part(self) -> str:
        return self.match.split(".")[0]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of one part."""

    rank: int = key(whole(1), 16)
    alpha: float = key(POSITIVE, 32)  # the adapters' output is scaled by alpha / rank
    dropout: float = key(_BELOW_1, 0.0)  # dropout probability of the adapters' input
    targets: str | tuple[str, ...] = key(
        Kind(
            "all, or a list of at least one name",
            lambda value: isinstance(value, str) or (NAMES.fits(value) and len(value) > 0),
            lambda value, name: value if isinstance(value, str) else tuple(value),
        ),
        "all",
    )
    init_from: str | None = key(optional(TEXT), None)  # folder of trained adapters to start from
    quantize: str | None = key(Kind("null or nf4", lambda value: value in (None, "nf4")), None)  # of the base weights


@dataclass(frozen=True)
class ConnectorText:
    """Text input of a connector that reads text."""

    read: str | None = key(optional(one_of("instruction", "answer")))  # text that the connector reads; null: none
    bert: str | None = key(optional(TEXT))  # Hub ID or folder of its vocabulary; null: the LLM's
    max_length: int = key(whole(1))  # maximum tokens per text, including [CLS] and [SEP]


@dataclass(frozen=True)
class VideoOptions:
    """How videos are shown in a stage. docs/video.md has the values of published models."""

    fps: float | None = key(optional(POSITIVE))  # frames shown per second; null: as many as `frames` allows
    frames: int = key(whole(1, 100_000))  # maximum number of frames
    sampling: str = key(one_of(*SAMPLINGS))  # which frames are shown
    last: bool = key(SWITCH)  # whether the last frame is always shown; interval, seconds
    fit: str | None = key(optional(one_of(*FRAME_FITS)))  # null: image_fit, or squash with tiles
    pixels: tuple[int, int] | None = key(_LIMITS)  # native: smallest and largest number of pixels of a frame
    pixels_total: tuple[int, int] | None = key(_TOTAL_LIMITS)  # native: of all frames together, instead of `pixels`
    pool: str = key(one_of(*POOLS))  # how the tokens of a frame are pooled
    stride: int = key(whole(1, 1000))  # side of the squares that are pooled
    newline: str = key(one_of(*NEWLINES))  # a learned token after each video, frame or row
    timestamps: str = key(one_of("none", "frame", "sentence"))  # text with the times of the frames
    time_format: str | None = key(optional(_TIME_FORMAT))  # timestamps=frame: of the time before each frame
    frame_tokens: tuple[str, str] | None = key(optional(list_of(TEXT, "two strings", sizes=(2,))))
    positions_per_second: float | None = key(optional(POSITIVE))  # of the rotary positions; null: one per frame or pair
    token_budget: int | None = key(optional(whole(1)))  # maximum tokens of a video; null: what max_length leaves

    def __post_init__(self) -> None:
        if self.sampling == "uniform" and self.fps is not None:
            raise ValueError(f"video.fps={self.fps} has no effect with video.sampling=uniform: set video.fps=null")
        if self.time_format is not None and self.timestamps != "frame":
            raise ValueError(f"video.time_format needs video.timestamps=frame, got {self.timestamps}")
        if self.last and self.sampling not in CHOOSES_LAST:
            raise ValueError(f"video.last=true needs video.sampling={' or '.join(CHOOSES_LAST)}, got {self.sampling}")
        if (self.pool == "none") != (self.stride == 1):
            raise ValueError(f"video.pool={self.pool} with video.stride={self.stride}: stride must be 1 without pool")
        if self.pixels is not None and self.pixels_total is not None:
            raise ValueError("video.pixels has no effect with video.pixels_total: set one of them to null")
        if self.newline == "video" and self.timestamps == "frame":
            raise ValueError("video.newline=video: expected frame, row or none with video.timestamps=frame")


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of the optimizer. Muon updates matrices; the other parameters are updated by AdamW with these options."""

    name: str = key(one_of("adamw", "adamw_8bit", "muon"))
    betas: tuple[float, float] = key(list_of(_BELOW_1, "two numbers, each at least 0 and below 1", sizes=(2,)))
    eps: float = key(number(0))  # added to the denominator of the update
    weight_decay: float = key(number(0))  # weight decay, applied to matrices only


@dataclass(frozen=True)
class ScheduleOptions:
    """Learning-rate schedule of a stage."""

    name: str = key(
        one_of("cosine", "linear", "constant", "constant_with_warmup", "wsd")
    )  # shape of the schedule after the warm-up
    warmup_ratio: float = key(number(0, 1))  # warm-up, as a fraction of the stage's steps
    warmup_steps: int | None = key(optional(whole(0)))  # warm-up in steps; overrides warmup_ratio
    min_lr: float = key(number(0))  # learning rate after the last step, unless the schedule is constant
    min_lr_ratio: float = key(number(0, 1), 0.0)  # the same as a share of the rate of each part; the larger one counts
    decay_ratio: float = key(_SHARE, 0.1)  # wsd: decay, as a fraction of the stage's steps


@dataclass(frozen=True)
class Expected:
    """Assumptions of `vlmtrain plan` about data that is not available."""

    samples: int | None = key(optional(whole(1)))  # number of records
    images: float = key(number(0))  # images per sample, on average
    videos: float = key(number(0))  # videos per sample, on average
    video_seconds: float = key(POSITIVE)  # length of a video
    text_tokens: float = key(number(0))  # text tokens per sample, on average
    answer_share: float = key(number(0, 1))  # fraction of the text tokens that are trained on


@dataclass(frozen=True)
class Stage:
    """One stage. `name` is its key under ``stages``; `position` is its zero-based position among them."""

    name: str
    position: int = field(compare=False)
    objective: str = key(TEXT)  # name of the training loss
    parts: tuple[str, ...] = key(NAMES)  # parts that the stage uses
    fresh: tuple[str, ...] = key(NAMES)  # parts, or modules of the connector, that start from random weights
    drops: tuple[str, ...] = key(NAMES)  # parts, or modules of the connector, removed
    train: Mapping[str, float | None] = key(by_name(_RATE, "{part: learning rate}"))
    groups: tuple[Pattern, ...] = key(list_of(section(Pattern), "a list of {match: PATTERN, lr: LR}"))
    lora: Mapping[str, LoRA] | None = key(optional(by_name(section(LoRA), "{part: {rank: 16, ...}}")))
    data: str = key(TEXT)  # split to train on, a key of the data group
    validation: str | None = key(optional(TEXT))  # split to validate on; null: none
    template: str = key(TEXT)  # name of the template that renders conversations
    image_size: int | tuple[int, int] | None = key(IMAGE_SIZE)  # in pixels; null: unchanged
    image_fit: str = key(one_of(*FITS))  # how images are fitted to the image size
    image_pixels: tuple[int, int] | None = key(_LIMITS)  # native: smallest and largest number of pixels of an image
    image_tiles: tuple[tuple[int, int], ...] = key(list_of(_GRID, "a list of [rows, columns]", sizes=range(1, 10_000)))
    image_tile_style: str = key(one_of(*TILE_STYLES))  # tiles: which grid is chosen, order of the views
    image_tiles_most: int | None = key(optional(whole(1)))  # maximum tokens per image, in tiles
    image_tiles_alone: bool = key(SWITCH)  # tile only images that are alone in their sample
    image_tiles_margin: int | None = key(optional(whole(0)))  # molmo2: patches that each of two neighboring crops drops
    video: VideoOptions = key(section(VideoOptions))
    encoder_batch_size: int | None = key(optional(whole(1)))  # images and frames that an encoder processes at once
    connector_options: Mapping[str, Mapping] | None = key(optional(by_name(MAPPING, "{connector: {option: value}}")))
    connector_text: ConnectorText = key(section(ConnectorText))
    layout: str = key(one_of(*LAYOUTS))  # padded: steps of batch_size samples; packed: steps of rows of max_length
    # of a padded micro-batch, to rows of equal length; false: one row that joins them; auto: false if that is faster
    padding: bool | str = key(or_auto(SWITCH))
    pack_by: str | None = key(optional(one_of("source")))  # source: a packed row has samples of one source
    share_images: bool = key(SWITCH)  # packed: dialogues about the same images are one sample, which shows them once
    max_length: int = key(whole(2))  # tokens per sample and per packed row
    epochs: int = key(whole(1))  # passes over the data, unless max_steps is set
    max_steps: int | None = key(optional(whole(1)))  # optimizer steps; null: as many as the epochs have
    batch_size: int = key(whole(1, 10**6))  # samples per optimizer step, over all ranks
    # samples that a rank processes at once; null: all; auto: as many as the memory allows
    micro_batch_size: int | str | None = key(optional(or_auto(whole(1))))
    loss_per: str = key(one_of(*LOSS_PER))  # unit with equal weight in the loss; sqrt lies between token and sample
    sum_source_losses: bool = key(SWITCH)  # with loss weights: the weighted sum of the sources' losses
    optimizer: OptimizerOptions = key(section(OptimizerOptions))
    schedule: ScheduleOptions = key(section(ScheduleOptions))
    ema: float | None = key(optional(_DECAY))  # decay of the average of the weights; null: no average
    max_grad_norm: float | None = key(optional(number(0)))  # limit on the gradient norm; null: none
    # recompute the language model's activations; auto: only if they would not fit in memory otherwise
    gradient_checkpointing: bool | str = key(or_auto(SWITCH))
    save_every: int | None = key(optional(whole(1)))  # steps between checkpoints
    save_every_minutes: float | None = key(optional(number(0.1)))  # minutes between checkpoints
    keep_last: int = key(whole(1))  # number of checkpoints to keep
    keep_best: bool = key(SWITCH)  # keep the model with the best validation
    validate_every: int | None = key(optional(whole(1)))  # steps between validations
    early_stopping: int | None = key(optional(whole(1)))  # validations in a row that are not the best, to end the stage
    best_metric: str = key(TEXT)  # by which the best validation is chosen: the lowest loss, or the best other score
    expected: Expected = key(section(Expected))

    @property
    def prefix(self) -> str:
        """Prefix of the stage's keys in messages: ``stages.<name>``."""
        return f"stages.{self.name}"

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by part, for the parts that have one in ``train``."""
        return {part: rate for part, rate in self.train.items() if rate is not None}

    @property
    def newline(self) -> bool | None:
        """Whether the connector needs a newline token to join the tokens of tiles or frames.

        None if the tokens of each item enter the text as they are.
        """
        tiled = self.image_fit == "tiles" and TILE_STYLES[self.image_tile_style].newline
        if tiled or self.video.newline != "none":
            return True
        return None if self.video.pool == "none" else False

    def trains(self, part: str) -> bool:
        """Whether any parameter of a part trains at some step of the stage."""
        return part in self.rates or any(group.part == part and group.lr is not None for group in self.groups)

    @property
    def builds_connector(self) -> bool:
        """Whether the stage builds a new connector even if it receives one."""
        within = any(entry.startswith("connector.") for entry in (*self.fresh, *self.drops))
        return within or bool(self.connector_options)

    @property
    def starts_connector(self) -> bool:
        """Whether the stage starts the connector, or a module in it, from weights other than those it receives."""
        return "connector" in self.fresh or self.builds_connector

    def __post_init__(self) -> None:
        self._check_parts()
        self._check_training()
        for option in ("keep_best", "early_stopping"):
            if getattr(self, option) and (self.validate_every is None or self.validation is None):
                value = str(getattr(self, option)).lower()
                raise ValueError(f"{self.prefix}.{option}={value} needs {self.prefix}.validate_every and validation")
        if self.best_metric != "loss" and not self.keep_best and self.early_stopping is None:
            key = f"{self.prefix}.best_metric={self.best_metric}"
            raise ValueError(f"{key} has no effect without {self.prefix}.keep_best or early_stopping")
        if self.padding is True and self.layout == "packed":
            raise ValueError(f"{self.prefix}.padding=true: expected auto or false with layout=packed")
        if self.pack_by and self.layout != "packed":
            raise ValueError(f"{self.prefix}.pack_by={self.pack_by}: expected null, or source with layout=packed")
        if self.share_images and self.layout != "packed":
            raise ValueError(f"{self.prefix}.share_images=true: expected false, or true with layout=packed")
        if self.share_images and self.template == INTERLEAVED:
            raise ValueError(
                f"{self.prefix}.share_images=true: documents with template={INTERLEAVED} cannot share images"
            )
        if self.share_images and self.template in CAPTIONS:
            raise ValueError(
                f"{self.prefix}.share_images=true needs a template with questions: with template={self.template}, the "
                "last token of an image predicts the first of its caption, so captions cannot share it"
            )

    def _check_parts(self) -> None:
        if self.image_size is not None and "vision" not in self.parts:
            raise ValueError(f"{self.prefix}.image_size={self.image_size} needs the part vision, which the stage lacks")
        if (self.image_fit == "native") != (self.image_pixels is not None):
            value = None if self.image_pixels is None else list(self.image_pixels)
            raise ValueError(
                f"{self.prefix}.image_fit={self.image_fit} with image_pixels={value}: image_pixels=[MIN, MAX] must be "
                "set with image_fit=native, and only then"
            )
        native_only = [name for name in ("pixels", "pixels_total") if getattr(self.video, name) is not None]
        if self.image_fit == "native":
            only = {"pool": self.video.pool, "newline": self.video.newline, "fit": self.video.fit}
            if used := {name: value for name, value in only.items() if value not in (None, "none")}:
                name, value = next(iter(used.items()))
                raise ValueError(f"{self.prefix}.video.{name}={value} does not go with {self.prefix}.image_fit=native")
        elif native_only:
            raise ValueError(f"{self.prefix}.video.{native_only[0]} needs {self.prefix}.image_fit=native")
        if self.image_tile_style != LLAVA_NEXT:
            said = f"{self.prefix}.image_tile_style={self.image_tile_style}"
            if self.image_fit != "tiles":
                raise ValueError(f"{said} needs {self.prefix}.image_fit=tiles, got {self.image_fit}")
            if self.image_tiles_most is not None:
                raise ValueError(f"{said} does not support {self.prefix}.image_tiles_most={self.image_tiles_most}")
        if TILE_STYLES[self.image_tile_style].overlaps != (self.image_tiles_margin is not None):
            value = "null" if self.image_tiles_margin is None else self.image_tiles_margin
            raise ValueError(
                f"{self.prefix}.image_tiles_margin={value} with image_tile_style={self.image_tile_style}: expected a "
                "number with the style molmo2, or else null"
            )
        modules = ("fresh", "drops")  # may also name modules of the connector
        for option in ("parts", "train", *modules):
            for entry in getattr(self, option):
                if entry not in STAGE_PARTS and not (option in modules and entry.startswith("connector.")):
                    expected = f"expected {', '.join(STAGE_PARTS)}" + " or connector.MODULE" * (option in modules)
                    raise ValueError(f"{self.prefix}.{option} names {entry}: {expected}")
        used = {f"train.{part}": part for part in self.rates}
        used |= {f"groups[{i}].match={group.match}": group.part for i, group in enumerate(self.groups)}
        used |= {f"lora.{part}": part for part in self.lora or ()}
        used |= {"layout=packed": "llm"} if self.layout == "packed" else {}
        used |= {"padding=false": "llm"} if self.padding is False else {}
        for entry, part in used.items():
            if part not in self.parts:
                has = ", ".join(self.parts)
                hint = ": a fusion with weights, in a stage with a connector and a language model" * (part == "fusion")
                raise ValueError(f"{self.prefix}.{entry} needs the part {part}, but the stage has only {has}{hint}")

    def _check_training(self) -> None:
        for i, group in enumerate(self.groups):
            if self.max_steps is not None and group.from_step >= self.max_steps:
                key = f"{self.prefix}.groups[{i}].from_step={group.from_step}"
                raise ValueError(f"{key}: expected a number of steps below max_steps={self.max_steps}")
        moving = [group for group in self.groups if group.lr is not None]
        if not self.rates and not moving:
            raise ValueError(f"stage {self.name} would train nothing: set a learning rate in {self.prefix}.train")
        if not self.rates and all(group.from_step for group in moving):
            raise ValueError(f"stage {self.name} would train nothing at first: each of its groups has a from_step")
        rates = self.rates | {group.match: group.lr for group in moving}
        too_low = [label for label, rate in rates.items() if rate < self.schedule.min_lr]
        if too_low:
            key = f"{self.prefix}.schedule.min_lr={self.schedule.min_lr}"
            raise ValueError(f"{key} is above the learning rate of {', '.join(too_low)}")
        for part in self.lora or ():
            if not self.trains(part):
                key = f"{self.prefix}.lora.{part}"
                raise ValueError(f"{key}, but {part} is frozen: set {self.prefix}.train.{part} to a learning rate")
