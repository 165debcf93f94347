"""Typed settings of a run: the keys of configs/train.yaml, and those of configs/evaluate.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from ..connectors import CONNECTORS
from ..data.actions import Binning
from ..data.boxes import BOX_FORMATS, FRAMES, Writing
from ..data.records import IMAGE_MARK
from ..data.templates import check_fallback
from ..errors import nearest
from ..model.fusion import CONCATENATION, FUSIONS
from .data import PURPOSES, DataGroup, read_data
from .fields import (
    MAPPING,
    NAMES,
    POSITIVE,
    SWITCH,
    TEXT,
    Kind,
    key,
    list_of,
    number,
    one_of,
    optional,
    or_auto,
    read,
    section,
    whole,
)  # fmt: skip
from .model import CONNECTOR, FUSION, LANGUAGE_MODEL, LLM, VISION, Choice, Vision
from .stage import Stage

_LOGGERS = list_of(one_of("wandb", "tensorboard", "mlflow"), "a list of wandb, tensorboard, mlflow")
_FOR_VALIDATION = "for validation, which draws from all records: give a data set that is not streamed"
RANDOM, RICES = "random", "rices"


def _are_shots(value: Any) -> bool:
    if not list_of(whole(0, 1000), "").fits(value):
        return False
    return list(value[:1]) == [0] and all(fewer < more for fewer, more in pairwise(value))


_SHOTS = Kind(
    "0 and then increasing numbers of demonstrations, as in [0, 4, 8]", _are_shots, lambda value, key: tuple(value)
)
MODULES = Kind(
    "a list of module names",
    lambda value: isinstance(value, str) or NAMES.fits(value),
    lambda value, key: (value,) if isinstance(value, str) else tuple(value),
)


@dataclass(frozen=True)
class BadSampleLimit:
    """How many bad samples ``on_bad_sample=skip`` may skip before the run stops."""

    share: float = key(number(0, 1))  # largest fraction of bad records
    in_a_row: int = key(whole(1))  # number of consecutive bad samples that stops the run


@dataclass(frozen=True)
class BadStepOptions:
    """Handling of steps with a non-finite loss or gradient, and of loss spikes."""

    in_a_row: int = key(whole(1))  # number of consecutive skipped steps that stops the run
    spike: float | None = key(optional(number(1)))  # threshold in standard deviations above the mean loss
    skip_spikes: bool = key(SWITCH)  # skip the update when the loss spikes


@dataclass(frozen=True)
class Boxes:
    """How boxes and points of records are written."""

    format: str | None = key(optional(one_of(*BOX_FORMATS)))  # null: records with boxes or points are bad
    frame: str | None = key(optional(one_of(*FRAMES)))  # what coordinates refer to; null: that of the format

    def __post_init__(self) -> None:
        if self.frame is not None and self.format is None:
            raise ValueError(f"boxes.frame={self.frame} has no effect without boxes.format")

    @property
    def writing(self) -> Writing | None:
        return None if self.format is None else Writing(self.format, self.frame)


_ENDS = Kind(
    "a number, a list of one number per dimension, or null",
    lambda value: value is None or number().fits(value) or (bool(value) and list_of(number(), "").fits(value)),
    lambda value, key: tuple(map(float, value)) if isinstance(value, Sequence) else value,
)


@dataclass(frozen=True)
class Actions:
    """How actions of records are written."""

    bins: int | None = key(optional(whole(2, 10**5)))  # bins per dimension; null: records with actions are bad
    low: float | tuple[float, ...] | None = key(_ENDS)  # where the bins begin: of all dimensions, or each; null: -1
    high: float | tuple[float, ...] | None = key(_ENDS)  # where they end; null: 1

    def __post_init__(self) -> None:
        if self.bins is None and (self.low, self.high) != (None, None):
            raise ValueError(f"actions.low={self.low} and actions.high={self.high} have no effect without actions.bins")
        low, high = np.atleast_1d(self._ends[0]), np.atleast_1d(self._ends[1])
        if 1 not in (len(low), len(high)) and len(low) != len(high):
            raise ValueError(f"actions.low has {len(low)} dimensions, but actions.high has {len(high)}")
        if not np.all(low < high):
            raise ValueError(f"actions.low={self._ends[0]}: expected less than actions.high={self._ends[1]}")

    @property
    def _ends(self) -> tuple:
        return -1.0 if self.low is None else self.low, 1.0 if self.high is None else self.high

    @property
    def binning(self) -> Binning | None:
        return None if self.bins is None else Binning(self.bins, *self._ends)


@dataclass(frozen=True)
class Features:
    """The feature cache of frozen encoders."""

    cache: str = key(TEXT)  # folder of the cache, or off
    max_gb: float = key(number(0))  # limit on its size in GiB, for all runs that share it
    dtype: str | None = key(Kind("null or bf16", lambda value: value in (None, "bf16")))  # null: unchanged


@dataclass(frozen=True)
class Answers:
    """How a model answers the questions of held-out conversations."""

    samples: int | None = key(optional(whole(1)))  # conversations per validation during a stage; null: all
    batch_size: int = key(whole(1))  # conversations that a rank processes at once
    max_new_tokens: int = key(whole(1))  # maximum tokens per answer
    metrics: tuple[str, ...] | None = key(optional(NAMES))  # metrics besides exact match; null: all that apply
    shots: tuple[int, ...] = key(_SHOTS, (0,))  # numbers of demonstrations before a question
    shots_from: str | None = key(optional(TEXT), None)  # split that demonstrations are drawn from
    shots_by: str = key(one_of(RANDOM, RICES), RANDOM)  # how they are chosen: by seed, or by similar images

    def __post_init__(self) -> None:
        given = {"shots_from": (self.shots_from, None), "shots_by": (self.shots_by, RANDOM)}
        idle = [f"validation.{name}={value}" for name, (value, default) in given.items() if value != default]
        if len(self.shots) == 1 and idle:
            raise ValueError(f"{idle[0]} has no effect with validation.shots=[0]; add numbers of demonstrations")
        if len(self.shots) > 1 and self.shots_from is None:
            raise ValueError(
                f"validation.shots={list(self.shots)} needs validation.shots_from: the split of the demonstrations"
            )

    def check_splits(self, data: DataGroup, asked: str) -> None:
        """Raise ValueError unless demonstrations can be drawn for the questions of the split `asked`."""
        name, key = self.shots_from, f"validation.shots_from={self.shots_from}"
        if name is None:
            return
        if name == asked:
            raise ValueError(f"{key}: expected another split than that of the questions")
        if data.splits.get(name) is None:
            known = [split for split, sources in data.splits.items() if sources is not None and split != asked]
            raise ValueError(f"{key}: data.{name} is not set.{nearest(name, known)}")
        data.split(name).refuse_streams("for demonstrations, which are drawn from all records")


@dataclass(frozen=True)
class Validation(Answers):
    """Validation during a stage and after it."""

    final_samples: int | None = key(optional(whole(1)), None)  # conversations at the end of the stage; null: all
    lmms_eval: tuple[str, ...] = key(list_of(TEXT, "a list of names, or of YAML files"), ())  # tasks after each stage


@dataclass(frozen=True)
class Engine:
    """DeepSpeed's ZeRO stage and offloading."""

    zero_stage: int = key(whole(0, 3))
    offload_optimizer: str = key(one_of("none", "cpu"))
    offload_parameters: str = key(one_of("none", "cpu"))
    parameter_persistence_threshold: int | None = key(whole(0), None)  # in elements; ZeRO-3 only

    def __post_init__(self) -> None:
        if self.zero_stage == 3 and self.parameter_persistence_threshold is None:
            raise ValueError("engine.zero_stage=3 needs engine.parameter_persistence_threshold: choose engine=zero3")

    def used_stage(self, world_size: int, in_bf16: bool) -> int:
        """The ZeRO stage that runs on `world_size` ranks.

        One process has nothing to shard: without offloading, it needs neither ZeRO-3's hooks nor, in fp32, the copies
        of ZeRO-1 and 2. In bf16, ZeRO-2 needs less memory than the stages below it.
        """
        if world_size > 1 or self.offload_optimizer != "none" or self.offload_parameters != "none":
            return self.zero_stage
        return min(self.zero_stage, 2 if in_bf16 else 0)

    def shards_weights(self, world_size: int) -> bool:
        """Whether each of `world_size` ranks holds only a part of the weights."""
        return self.zero_stage == 3 and world_size > 1


def _stages(value: Mapping, key: str) -> Mapping[str, Stage]:
    complete = [name for name, keys in value.items() if isinstance(keys, Mapping) and "objective" in keys]
    for name, keys in value.items():
        if isinstance(keys, Mapping) and name not in complete:
            raise ValueError(f"{key}.{name}: the recipe has no such stage.{nearest(name, complete)}")
    return MappingProxyType(
        {
            name: read(Stage, MAPPING(keys, f"{key}.{name}"), f"{key}.{name}.", name=name, position=i)
            for i, (name, keys) in enumerate(value.items())
        }
    )


@dataclass(frozen=True)
class Run:
    """All settings of a run. `composed` holds them as plain values, as recorded in config.yaml."""

    composed: Mapping[str, Any]
    data: DataGroup
    name: str = key(TEXT)  # name of the recipe
    modules: tuple[str, ...] = key(MODULES)  # Python modules to import first
    stage: str | None = key(optional(TEXT))  # the only stage to run
    run_dir: str = key(TEXT)  # folder of the run
    init_from: str | None = key(optional(TEXT))  # model folder to start from
    named: tuple[str, ...] = key(NAMES)  # keys of the connector and of videos that the command sets
    mini: bool = key(SWITCH)  # small random parts and generated data
    seed: int = key(whole(0, 2**32 - 1))
    compile: bool = key(SWITCH)  # compile the transformer blocks
    precision: str = key(one_of("fp32", "bf16"))  # compute dtype
    on_bad_sample: str = key(one_of("raise", "skip"))
    bad_sample_limit: BadSampleLimit = key(section(BadSampleLimit))
    bad_steps: BadStepOptions = key(section(BadStepOptions))
    collective_timeout: float = key(number(1))  # seconds after which ranks that wait for each other exit
    workers: int | str = key(or_auto(whole(0, 1000)))  # data processes per rank; auto: more while a rank waits for data
    device_tflops: float | None = key(optional(POSITIVE))  # peak of one device, for MFU; null: known for some GPUs
    loggers: tuple[str, ...] = key(_LOGGERS)  # trackers
    wandb: str = key(one_of("disabled", "offline", "online"))
    wandb_project: str = key(TEXT)
    wandb_model: bool = key(SWITCH)  # upload the model folder of each stage
    boxes: Boxes = key(section(Boxes))
    actions: Actions = key(section(Actions))
    features: Features = key(section(Features))
    validation: Validation = key(section(Validation))
    vision: Vision = key(VISION)
    connector: Choice = key(CONNECTOR)
    fusion: Choice = key(FUSION)
    llm: LLM = key(LANGUAGE_MODEL)
    engine: Engine = key(section(Engine))
    stages: Mapping[str, Stage] = key(Kind("{name: {...}}", MAPPING.fits, _stages))

    def __post_init__(self) -> None:
        if self.stage is not None and self.stage not in self.stages:
            hint, known = nearest(self.stage, self.stages), ", ".join(self.stages)
            raise ValueError(f"unknown stage '{self.stage}'.{hint} The recipe's stages: {known}")
        attention = self.llm.attn_implementation
        if attention and attention.startswith("flash_attention") and self.precision == "fp32":
            raise ValueError(f"llm.attn_implementation={attention} does not support fp32: set precision=bf16")
        check_fallback(self.llm.chat_template, "llm.chat_template")
        for stage in self.stages.values():
            if stage.share_images and attention and attention.startswith("flash_attention"):
                raise ValueError(
                    f"{stage.prefix}.share_images=true: llm.attn_implementation={attention} cannot keep dialogues "
                    "about the same images apart; use sdpa, or leave it null"
                )
            self._check_optimizer(stage)
            for name, options in (stage.connector_options or {}).items():
                key = f"{stage.prefix}.connector_options"
                if name not in CONNECTORS:
                    raise ValueError(f"{key}: unknown connector {name}.{nearest(name, CONNECTORS)}")
                CONNECTORS.check_options(name, options, f"{key}.{name}")
            for option, known in (("data", {*self.data.splits, *PURPOSES}), ("validation", self.data.splits)):
                split = getattr(stage, option)
                if split is not None and split not in known:
                    key, hint = f"{stage.prefix}.{option}={split}", nearest(split, known)
                    raise ValueError(f"{key}: the data group has no such split.{hint}")
            if self.validates(stage):
                self.data.split(stage.validation).refuse_streams(_FOR_VALIDATION)
                self.validation.check_splits(self.data, stage.validation)

    def _check_optimizer(self, stage: Stage) -> None:
        key, name = f"{stage.prefix}.optimizer.name", stage.optimizer.name
        if name == "muon" and (self.engine.zero_stage or self.precision != "fp32"):
            raise ValueError(f"{key}=muon needs unsharded fp32 weights: set engine=zero0 and precision=fp32")
        if name == "adamw_8bit" and (self.engine.zero_stage == 3 or self.engine.offload_optimizer != "none"):
            raise ValueError(f"{key}=adamw_8bit supports engine=zero0, zero1 and zero2")
        if name == "adamw_8bit" and any(group.from_step for group in stage.groups):
            raise ValueError(f"{key}=adamw_8bit does not support groups with a from_step")

    @property
    def wanted(self) -> tuple[Stage, ...]:
        """The stages that the command trains, in order: all, or the one selected by ``stage``."""
        return tuple(stage for stage in self.stages.values() if self.stage in (None, stage.name))

    def before_connector(self) -> tuple[Stage, ...]:
        """The wanted stages before the recipe's first stage with a connector."""
        first = min((stage.position for stage in self.stages.values() if "connector" in stage.parts), default=None)
        return tuple(stage for stage in self.wanted if first is None or stage.position < first)

    def up_to(self, stage: Stage) -> tuple[Stage, ...]:
        """The recipe's stages up to and including `stage`."""
        return tuple(self.stages.values())[: stage.position + 1]

    def resized_by(self, stage: Stage) -> Stage | None:
        """The stage that set the image size of the encoder in `stage`: `stage` itself or an earlier one.

        None if the encoder has its original size.
        """
        sized = [each for each in self.up_to(stage) if "vision" in each.parts and each.image_size is not None]
        return sized[-1] if sized else None

    def connector_of(self, stage: Stage) -> Choice:
        """The connector of `stage`, with the options changed by that stage and the stages before it."""
        options = dict(self.connector.options)
        for each in self.up_to(stage):
            options |= (each.connector_options or {}).get(self.connector.name, {})
        return Choice(self.connector.name, MappingProxyType(options))

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """The tokens that the tokenizer must have: `llm.new_tokens`, the one that stands for an image, and actions'."""
        fusion = FUSIONS[self.fusion.name]
        own = () if fusion.in_text or IMAGE_MARK in self.llm.new_tokens else (IMAGE_MARK,)
        return (*self.llm.new_tokens, *own, *(self.actions.binning.tokens if self.actions.binning else ()))

    @property
    def newline(self) -> bool | None:
        """Whether some stage requires a newline token in the connector; None if none joins tokens, see `Stage`."""
        needed = [stage.newline for stage in self.stages.values() if stage.newline is not None]
        return any(needed) if needed else None

    def validates(self, stage: Stage) -> bool:
        """Whether a stage has validation data."""
        return stage.validation is not None and self.data.splits[stage.validation] is not None

    def with_values(self, **values: Any) -> Run:
        """Return a copy of the run with other values for some keys, in the format of config.yaml."""
        return read_run({**self.composed, **values})


def read_run(composed: Mapping[str, Any]) -> Run:
    """Read a run from its composed configuration, given as plain values. Raises ValueError naming the key."""
    given = dict(composed)
    fusion, stages = given.get("fusion"), given.get("stages")
    if isinstance(fusion, Mapping) and fusion.get("name") != CONCATENATION and isinstance(stages, Mapping):
        given["stages"] = {name: _with_fusion(stage) for name, stage in stages.items()}
    stages = [stage for stage in stages.values() if isinstance(stage, Mapping)] if isinstance(stages, Mapping) else []
    named = [stage.get(option) for stage in stages for option in ("data", "validation")]
    data = _data_of(given, named)
    return read(Run, given, data=data, composed=MappingProxyType(composed))


def _data_of(given: dict[str, Any], named: Iterable[Any]) -> DataGroup:
    """Take the data group out of the values that are `given`. named: the splits of the stages, if they are strings."""
    validation = given.get("validation")
    named = [*named, validation.get("shots_from") if isinstance(validation, Mapping) else None]
    return read_data(MAPPING(given.pop("data", None), "data"), [split for split in named if isinstance(split, str)])


def _with_fusion(stage: Any) -> Any:
    """A stage with the part ``fusion``, if it has the parts that a fusion joins."""
    parts = stage.get("parts") if isinstance(stage, Mapping) else None
    if not NAMES.fits(parts) or "fusion" in parts or not {"connector", "llm"} <= set(parts):
        return stage
    return {**stage, "parts": [*parts, "fusion"]}


@dataclass(frozen=True)
class Evaluation:
    """The settings of ``vlmtrain evaluate``: configs/evaluate.yaml."""

    data: DataGroup
    modules: Sequence[str] = key(MODULES)
    seed: int = key(whole(0, 2**32 - 1))
    workers: int = key(whole(0, 1000))  # data processes
    validation: Answers = key(section(Answers))

    def __post_init__(self) -> None:
        if self.data.splits.get("validation") is not None:
            self.data.split("validation").refuse_streams(_FOR_VALIDATION)
            self.validation.check_splits(self.data, "validation")


def read_evaluation(composed: Mapping[str, Any]) -> Evaluation:
    """Read the settings of ``vlmtrain evaluate`` from plain values. Raises ValueError naming the key."""
    given = dict(composed)
    data = _data_of(given, ())
    return read(Evaluation, given, data=data)
