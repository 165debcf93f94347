"""Trains a few steps and prints the measured and the planned increase in memory. Run by test_memory_plan.py:

python memory_runs.py FOLDER ENGINE PRECISION PARTS BATCH_SIZE

PARTS: the trained parts, such as connector+llm; llm:nf4 trains adapters over 4-bit weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import deepspeed
import torch
from torch.nn import functional as F

from vlmtrain.distributed.world import leave_world
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.planning.plan import _Vocabulary, answer_tokens
from vlmtrain.settings import Run, Stage, compose
from vlmtrain.training import stage as stages
from vlmtrain.training.assembly import DTYPES, build_skeleton
from vlmtrain.training.cost.memory import States
from vlmtrain.training.cost.stage import kept_bytes, measure, quantized_sizes
from vlmtrain.training.engine.joining import join_world
from vlmtrain.training.engine.zero import bucket_elements
from vlmtrain.training.processing import build_geometry
from vlmtrain.training.run import train_run
from vlmtrain.training.trainable import freeze, part_size, trained_groups

WIDTH, LAYERS, HEADS = 768, 6, 12


def line(folder: str, engine: str, precision: str, trained: str, batch: int) -> list[str]:
    rates = {part: "1e-4" if part in re.split(r"\W", trained) else "null" for part in ("connector", "llm")}
    lora = "{llm: {rank: 16, quantize: nf4}}" if "llm:nf4" in trained else "null"
    return [
        "recipe=quickstart",
        "stage=instruct",
        "stages.instruct.fresh=[vision,connector,llm]",
        "stages.instruct.max_steps=3",
        "stages.instruct.gradient_checkpointing=false",
        f"stages.instruct.batch_size={batch}",
        *(f"stages.instruct.train.{part}={rate}" for part, rate in rates.items()),
        f"stages.instruct.lora={lora}",
        f"llm.config.hidden_size={WIDTH}",
        f"llm.config.intermediate_size={4 * WIDTH}",
        f"llm.config.num_hidden_layers={LAYERS}",
        f"llm.config.num_attention_heads={HEADS}",
        f"llm.config.num_key_value_heads={HEADS}",
        "data.validation=null",
        "workers=0",
        f"engine={engine}",
        f"precision={precision}",
        f"run_dir={folder}",
    ]


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def settle() -> None:
    """Return free memory to the system, and reset the peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def warm_up(engine: str, dtype: torch.dtype) -> None:
    """Trigger one-time allocations of libraries: a step of a small engine, attention and matrix products."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(engine[4])},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is torch.bfloat16},
    }
    small = torch.nn.Linear(HEADS, HEADS, dtype=dtype)
    runner, *_ = deepspeed.initialize(model=small, optimizer=torch.optim.AdamW(small.parameters()), config=config)
    runner.backward(runner(torch.ones(1, HEADS, dtype=dtype)).sum())
    runner.step()
    runner.destroy()
    states = torch.randn(1024, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(WIDTH, 4 * WIDTH, dtype=dtype)
    heads = states.view(1, 1024, HEADS, -1).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
    (F.silu(attended @ weight) @ weight.T).sum().backward()


def kept_by_sample(run: Run, stage: Stage, tokens: int) -> int:
    """Bytes that the backward pass of a stage needs for a sample of `tokens` tokens."""
    parts = build_skeleton(run, stage, _Vocabulary(run), DTYPES[run.precision])
    groups = trained_groups(stage, parts)
    freeze(parts, groups, checkpointing=False)
    geometry = build_geometry(stage, parts, OBJECTIVES[stage.objective])
    (costs,) = measure(parts, groups, stage, geometry, (tokens, answer_tokens(stage.expected, tokens)))
    return kept_bytes(costs, stage.gradient_checkpointing, stage.expected.images)


def main(folder: str, engine: str, precision: str, trained: str, batch: str) -> None:
    settings, world = compose(line(folder, engine, precision, trained, int(batch))), join_world()
    found = {"peak": 0}

    class Watched(stages.StageEngine):
        def __init__(self, stage, options, dtype, parts, objective, groups, *more):
            warm_up(engine, DTYPES[precision])
            settle()
            found["before"] = status("VmRSS")
            sizes = {part: part_size(module) for part, module in parts.items()}
            held = (p for module in parts.values() for p in module.parameters())
            found["weights"] = sum(p.numel() * p.element_size() for p in held)
            number = sum(parts[g.part].get_parameter(name).numel() for g in groups for name in g.names)
            inside = sizes["llm"] + sizes["connector"]
            in_bits = quantized_sizes(parts)
            found["states"] = States(
                number, inside - number, sizes["vision"], precision == "bf16", *in_bits, bucket=bucket_elements(parts)
            )
            super().__init__(stage, options, dtype, parts, objective, groups, *more)

        def loss(self, batch):
            settle()
            return super().loss(batch)

        def grad_norm(self):
            found["peak"] = max(found["peak"], status("VmHWM"))
            return super().grad_norm()

    stages.StageEngine = Watched
    train_run(settings, world)
    steps = [json.loads(step) for step in Path(folder, "instruct", "metrics.jsonl").read_text().splitlines()]
    positions = max(step["tokens"] / (1 - step["padding_fraction"]) for step in steps) / int(batch)
    activations = kept_by_sample(settings, settings.stages["instruct"], round(positions)) * int(batch) // world.size
    if world.is_main:
        planned = found["states"].bytes(int(engine[4]), world.size, activations) - found["weights"]
        print(json.dumps({"grown": found["peak"] - found["before"], "planned": planned, "activations": activations}))
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
