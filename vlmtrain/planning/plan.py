"""Estimate what each stage of a recipe needs: parameters, tokens, FLOPs, time, memory. Needs no weights and no hub."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import nn

from ..data.sources import build_source
from ..model.loading import load_hf_config
from ..objectives import OBJECTIVES
from ..settings import AUTO, Expected, Run, Stage
from ..settings.fields import POSITIVE, whole
from ..training.assembly import DTYPES, build_skeleton, published_llm
from ..training.checks import check_run
from ..training.cost.fitting import Fitting
from ..training.cost.memory import ZERO_STAGES
from ..training.cost.stage import RECOMPUTED, expected_video, measure, sample_tokens, video_tokens
from ..training.processing import build_geometry, check_lengths, image_controls, image_size_of
from ..training.trainable import Group, check_starts, freeze, part_size, trained_groups


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind. gpu_tflops: peak of one GPU in the compute dtype; utilisation: the fraction of it reached."""

    gpus: int = 8
    gpu_memory_gb: float = 80.0
    gpu_tflops: float = 312.0
    utilisation: float = 0.4


@dataclass
class StagePlan:
    """The plan of one stage. Sizes are in parameters, tokens, FLOPs and bytes.

    parts: part -> its trainable and frozen parameters. view_tokens: part -> its tokens per view. picture_tokens:
    minimum (with tiles, of one view) and maximum of one image in the language model's sequence; if these differ, every
    image counts as the maximum, and tokens_per_sample, FLOPs and hours are upper bounds. video_tokens, video_frames: of
    an expected video, 0 if the stage expects none. flops: FLOPs that the update
    needs; hardware_flops: including what gradient checkpointing recomputes. recomputes: ZeRO stage -> whether gradient
    checkpointing is on. memory: ZeRO stage -> bytes per GPU at `micro_batch_size`. fits: ZeRO stage -> the largest
    micro-batch that fits, 0 if none does.
    """

    name: str
    parts: dict[str, dict[str, int]]
    view_tokens: dict[str, int]
    picture_tokens: tuple[int, int]
    video_tokens: int
    video_frames: int
    max_length: int
    samples: int | None
    tokens_per_sample: int
    steps: int | None
    batch_size: int
    micro_batch_size: int
    flops_per_sample: float
    flops: float | None
    hardware_flops: float | None
    gpu_hours: float | None
    recomputes: dict[int, bool] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    fits: dict[int, int] = field(default_factory=dict)
    suggested_zero_stage: int | None = None
    suggested_micro_batch_size: int | None = None
    obstacle: str | None = None

    @property
    def trainable(self) -> int:
        return sum(part["trainable"] for part in self.parts.values())

    @property
    def frozen(self) -> int:
        return sum(part["frozen"] for part in self.parts.values())


def plan_run(run: Run, machine: Machine) -> list[StagePlan]:
    """Plan the stages of a run. Raises ValueError for invalid settings."""
    for name, value in vars(machine).items():
        (whole(1) if name == "gpus" else POSITIVE)(value, name)
    if machine.utilisation > 1:
        raise ValueError(f"utilisation={machine.utilisation}: expected a fraction of at most 1")
    check_run(run, 1)
    return [_plan_stage(run, stage, machine) for stage in run.wanted]


def _plan_stage(run: Run, stage: Stage, machine: Machine) -> StagePlan:
    parts = build_skeleton(run, stage, _Vocabulary(run), DTYPES[run.precision])
    groups = trained_groups(stage, parts)
    geometry = build_geometry(stage, parts, OBJECTIVES[stage.objective], *image_controls(run))
    check_lengths(stage, geometry, parts)
    expected = stage.expected
    tokens, video = sample_tokens(stage, geometry), expected_video(stage, geometry)
    samples = expected.samples
    if run.data.splits.get(stage.data) is not None:
        samples = build_source(run.data.split(stage.data), image_size_of(parts), run.seed).epoch_size
    steps = stage.max_steps or (samples and math.ceil(samples / stage.batch_size) * stage.epochs)
    check_starts(groups, stage, steps)
    lengths = (tokens, answer_tokens(expected, tokens)), (stage.max_length, stage.max_length // 2)
    needed = recomputed = 0.0
    for share, training in _phases(groups, steps):  # all groups train in the last one
        freeze(parts, training, checkpointing=False)
        mean, longest = measure(parts, training, stage, geometry, *lengths)
        flops = sum(cost.all_flops for cost in mean.values())
        needed += share * flops
        recomputed += share * sum(mean[part].recomputed_flops for part in RECOMPUTED & mean.keys())
    trained_on = steps and steps * stage.batch_size
    most = max(1, stage.batch_size // machine.gpus)
    plan = StagePlan(
        stage.name,
        {part: _sizes(part, module, groups) for part, module in parts.items()},
        {part: cost.tokens for part, cost in longest.items() if cost.tokens},
        (0, 0) if geometry is None else (geometry.least_tokens, geometry.most_tokens),
        video_tokens(video),
        sum(len(item.times) for item in video.items) if video else 0,
        stage.max_length,
        samples,
        tokens,
        steps,
        stage.batch_size,
        min(most if stage.micro_batch_size in (None, AUTO) else stage.micro_batch_size, most),
        needed,
        trained_on and needed * trained_on,
        trained_on and needed * trained_on,
        trained_on and needed * trained_on / (machine.gpu_tflops * 1e12 * machine.utilisation) / 3600,
    )
    fitting = Fitting.of(run, stage, parts, groups, longest, tokens, machine.gpus)
    _plan_memory(plan, stage, fitting, machine.gpu_memory_gb * 2**30)
    if trained_on and plan.recomputes[plan.suggested_zero_stage or ZERO_STAGES[-1]]:
        plan.hardware_flops += recomputed * trained_on
    return plan


class _Vocabulary:
    """The part of a tokenizer that sizes depend on: the size of its vocabulary."""

    def __init__(self, run: Run):
        from ..data.sources import vocabulary
        from ..model.tiny_tokenizer import build_tiny_tokenizer

        if run.llm.provider == "tiny":
            self.size = len(build_tiny_tokenizer(vocabulary(run.data.format)))
        else:
            path = run.llm.path
            config = published_llm(path) or load_hf_config(path, "llm.path").get_text_config().to_dict()
            self.size = config["vocab_size"]
        self.bos_token_id = self.eos_token_id = self.pad_token_id = 0
        self.cls_token_id = self.sep_token_id = None
        self.new_tokens = list(run.new_tokens)

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return list(range(self.size - len(tokens), self.size))


def answer_tokens(expected: Expected, tokens: int) -> int:
    return min(tokens, max(1, round(expected.text_tokens * expected.answer_share)))


def _sizes(part: str, module: nn.Module, groups: list[Group]) -> dict[str, int]:
    trained = sum(group.size(module) for group in groups if group.part == part)
    return {"trainable": trained, "frozen": part_size(module) - trained}


def _phases(groups: list[Group], steps: int | None) -> list[tuple[float, list[Group]]]:
    """Fractions of a stage's steps, and the groups that train in each, as groups join at their `from_step`."""
    starts = sorted({0, *(group.from_step for group in groups)})
    if steps is None or len(starts) == 1:
        return [(1.0, groups)]
    ends = [*starts[1:], steps]
    return [
        ((end - start) / steps, [group for group in groups if group.from_step <= start])
        for start, end in zip(starts, ends)
    ]


def _plan_memory(plan: StagePlan, stage: Stage, fitting: Fitting, memory: float) -> None:
    if stage.layout == "padded" and plan.batch_size % fitting.gpus:
        plan.obstacle = f"nothing: batch_size={plan.batch_size} is not a multiple of {fitting.gpus} GPUs"
    for zero_stage in ZERO_STAGES:
        recompute = plan.recomputes[zero_stage] = fitting.recomputes(stage, zero_stage, memory)
        plan.fits[zero_stage] = 0 if plan.obstacle else fitting.largest(zero_stage, memory, recompute)
        plan.memory[zero_stage] = fitting.bytes(zero_stage, plan.micro_batch_size, recompute)
    plan.suggested_zero_stage = next((zero_stage for zero_stage, size in plan.fits.items() if size), None)
    if plan.suggested_zero_stage is not None:
        plan.suggested_micro_batch_size = fitting.divisor(plan.fits[plan.suggested_zero_stage])
    if stage.micro_batch_size == AUTO and plan.suggested_micro_batch_size:
        plan.micro_batch_size = plan.suggested_micro_batch_size
        _plan_memory(plan, replace(stage, micro_batch_size=plan.micro_batch_size), fitting, memory)
