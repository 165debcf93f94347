"""Format a plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from ..objectives import OBJECTIVES
from ..reporting.tables import text_table
from ..settings import Run
from .plan import Machine, StagePlan


def show_plan(run: Run, plans: Sequence[StagePlan], machine: Machine) -> str:
    """The plans of all stages of a recipe, one after the other."""
    head = (
        f"{run.name}, connector {run.connector.name}, {run.precision}, on {machine.gpus} GPUs of "
        f"{machine.gpu_memory_gb:g} GB, {machine.gpu_tflops:g} TFLOP/s at {machine.utilisation:.0%}"
    )
    return "\n\n".join([head, *(_show_stage(plan, run, machine) for plan in plans)])


def _show_stage(plan: StagePlan, run: Run, machine: Machine) -> str:
    least, most = plan.picture_tokens
    fit = run.stages[plan.name].image_fit
    is_native, per_view = fit == "native", " per view" if fit == "tiles" else ""
    per_image = f"{least:,}" if least == most else f"{least:,}{per_view}, up to {most:,}"
    if not most:
        per_image = "none in a language model's sequence"
    seconds = run.stages[plan.name].expected.video_seconds
    bound = "at most " if least != most else ""
    view = ", ".join(f"{tokens:,} from {part}" for part, tokens in plan.view_tokens.items())
    rows = [("", "trained", "frozen")]
    rows += [(part, f"{sizes['trainable']:,}", f"{sizes['frozen']:,}") for part, sizes in plan.parts.items()]
    rows.append(("total", f"{plan.trainable:,}", f"{plan.frozen:,}"))
    facts = [
        *([("tokens of the largest image" if is_native else "tokens per view", view)] if view else []),
        ("tokens per image", per_image),
        *([("tokens per video", f"{plan.video_tokens:,} for {plan.video_frames:,} frames of a video of {seconds:g} s")]
          if plan.video_frames else []),
        ("tokens per sample", f"{bound}{plan.tokens_per_sample:,} expected, {plan.max_length:,} at most"),
        ("samples", "unknown: set the data, or stages.<name>.expected.samples" if plan.samples is None
         else f"{plan.samples:,}"),
    ]  # fmt: skip
    if plan.steps is not None:
        facts += [
            ("steps", f"{plan.steps:,} of {plan.batch_size:,} samples"),
            ("tokens trained on", f"{bound}{plan.steps * plan.batch_size * plan.tokens_per_sample:,}"),
            ("training FLOPs", f"{bound}{plan.flops:.3g} ({plan.hardware_flops:.3g} with recomputation)"),
            (
                "GPU-hours",
                f"{bound}{plan.gpu_hours:,.1f} ({plan.gpu_hours / machine.gpus:,.1f} h on {machine.gpus} GPUs)",
            ),
        ]
    else:
        facts.append(("training FLOPs per sample", f"{bound}{plan.flops_per_sample:.3g}"))
    if not plan.obstacle or plan.batch_size >= machine.gpus:
        memory = ", ".join(f"ZeRO-{stage} {size / 2**30:.1f} GiB" for stage, size in plan.memory.items())
        on = [f"ZeRO-{stage}" for stage, recomputes in plan.recomputes.items() if recomputes]
        on = "on" if len(on) == len(plan.recomputes) else f"on with {', '.join(on)}" if on else "off"
        facts.append(("gradient checkpointing", on))
        facts.append((f"memory per GPU, micro-batch {plan.micro_batch_size}", memory))
    if plan.suggested_zero_stage is None:
        less = "gradient_checkpointing, a shorter max_length"
        if OBJECTIVES[run.stages[plan.name].objective].compares_samples:  # it needs all samples of a rank at once
            less = "a smaller batch_size"
        facts.append(("fits", plan.obstacle or f"no ZeRO stage: use more GPUs, {less}, or offloading"))
    else:
        facts.append(
            ("fits", f"engine=zero{plan.suggested_zero_stage} "
                     f"stages.{plan.name}.micro_batch_size={plan.suggested_micro_batch_size}")
        )  # fmt: skip
    tables = text_table(rows, indent=2), text_table(facts, indent=2, numbers=False)
    return "\n".join([f"stage {plan.name}", *tables])
