"""What the owner of one GPU measures first: tests that need a GPU, speed beside Hugging Face's Trainer, and a profile.

    benchmarks/gpu.sh                           # one H100 or H200, at most 12 minutes, offline
    benchmarks/gpu.sh --out FOLDER --only '0.6B|tests'
    benchmarks/gpu.sh --tiny                    # small shapes on a CPU, to check the command itself

Parts have random weights and the shapes of published ones: Qwen3-0.6B with SigLIP-so400m (256 image tokens) and a
LLaVA-1.5-7B (576 image tokens), whose language model is frozen in `align` and has LoRA adapters (rank 128) in
`instruct`. Data are generated; its lengths are those of `training_speed.py`. FOLDER (default: $OUT, or gpu-benchmark)
receives `gpu.md` and `gpu.json`, which grow with every piece. Pieces run in order of importance. Pieces that do not
fit into the time are listed as not run, and what fails is listed with its error; the exit status is then 1.

MFU is the useful arithmetic, without padding and recomputation, per second, relative to the device's peak; a sample of
the Trainer needs the same. Both sides have the same weights, samples and steps of one micro-batch, without gradient
checkpointing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu_page import page
from pieces import DONE, LEFT_OUT, Piece, Result, run_pieces
from speed_inputs import Case, Shapes, prepare, save_vision
from training_speed import PACKED, ROOT, WORKLOADS, disagreement, matrix_rate, measure, run_trainer

PROFILED = 2  # steps under the profiler
RECOMPILED = 4  # steps more before the timed ones, in which other shapes may be compiled
RECORDS = 512  # different samples
TOLERANCE = 2e-3  # of first losses: means over hundreds of targets, in which roundings to bf16 largely cancel
SPEEDRUN = {"samples": 558128, "published_hours": 19.32}  # recipes/speedrun.yaml


@dataclass(frozen=True)
class Size:
    """A model, and how it is measured.

    batch: samples per step of each workload. target: MFU to explain the gap to. stage_1: the encoder of the
    speedrun's first stage, if the model has the language model of that recipe.
    """

    shapes: Shapes
    image_size: int
    batch: dict[str, int]
    steps: int
    warmup: int
    target: float
    lora: dict | None = None
    stage_1: dict | None = None


def sizes(tiny: bool) -> dict[str, Size]:
    from vlmtrain.training.assembly import published_llm

    siglip = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    qwen, vicuna = published_llm("Qwen/Qwen3-0.6B"), published_llm("lmsys/vicuna-7b-v1.5")
    if tiny:
        siglip = clip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        little = {**clip, "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16}
        qwen, vicuna = qwen | little, vicuna | little
    naflex = {**siglip, "model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 256}
    siglip = {**siglip, "model_type": "siglip_vision_model", "patch_size": 16}
    clip = {**clip, "model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 768}
    small, large = Shapes(siglip, qwen), Shapes(clip, vicuna)
    if tiny:
        batch = {"align": 4, "instruct": 4}
        one = Size(small, 32, batch, 4, 1, 0.40, stage_1=naflex)
        return {"0.6B": one, "7B": Size(large, 28, batch, 4, 1, 0.45, {"r": 2, "lora_alpha": 4})}
    one = Size(small, 256, {"align": 32, "instruct": 32}, 16, 4, 0.40, stage_1=naflex)
    other = Size(large, 336, {"align": 8, "instruct": 8}, 10, 3, 0.45, {"r": 128, "lora_alpha": 256})
    return {"0.6B": one, "7B": other}


class Model:
    """The measurements of one model: its cases, and their rows by side."""

    def __init__(self, name: str, size: Size, folder: Path, options: argparse.Namespace):
        self.size, self.folder, self.options = size, folder / name, options
        self.workers = min(8, self.threads)
        self.cases: dict[str, Case] = {}

    def prepare(self, limit: float) -> dict[str, Any]:
        """Weights of both sides, and the samples of both workloads."""
        end = time.monotonic() + limit
        for workload in WORKLOADS[:2]:
            self.cases[workload] = in_process(prepared, end - time.monotonic(), self._case(workload))
        return {}

    def _case(self, workload: str) -> Case:
        size, stage = self.size, f"stages.{workload}"
        options = argparse.Namespace(
            **{"vision": None, "llm": None, "data": None, "set": [], "image_size": size.image_size},
            **{"batch_size": size.batch[workload], "steps": size.steps, "warmup": size.warmup, "threads": self.threads},
        )
        more = [f"workers={self.workers}", f"{stage}.max_steps=100000", f"{stage}.save_every=null"]
        lora = size.lora if workload == "instruct" else None
        if lora:
            more.append(f"{stage}.lora={{llm: {{rank: {lora['r']}, alpha: {lora['lora_alpha']}}}}}")
        records = 4 * options.batch_size if self.options.tiny else RECORDS
        shared = {"shapes": size.shapes, "weights": self.folder / "weights", "stored": "bf16", "records": records}
        more_shared = {"more": more, "lora": lora, "workers": self.workers}
        return Case(workload, "bf16", self.folder / workload, options, **shared, **more_shared)

    @property
    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // 2)

    def ours(self, workload: str, side: str, limit: float) -> dict[str, Any]:
        case = self.cases[workload]
        out = self.folder / f"{workload}-{side.replace(' ', '-')}"
        program, awaited = ["-m", "vlmtrain.train"], None  # a profile
        if (workload, side) == ("instruct", "packed"):
            awaited = self.folder / "profile.json"
            program = [str(ROOT / "benchmarks" / "profiled.py"), str(awaited), str(self.size.steps), str(PROFILED)]
        more = [f"stages.{workload}.{setting}" for setting in PACKED] if side.startswith("packed") else []
        warmup, steps = self.size.warmup, self.size.steps
        if side.endswith("compiled"):
            more, warmup, steps = [*more, "compile=true"], warmup + RECOMPILED, steps + RECOMPILED
        command = [sys.executable, *program, *case.line, *more, f"run_dir={out}"]
        metrics, limits = out / case.stage / "metrics.jsonl", {"limit": limit, "awaited": awaited}
        run = measure(command, metrics, warmup, self.threads, steps, **limits)
        case.sides[side] = [run]
        return self._row(run, run["flops"])

    def trainer(self, workload: str, limit: float) -> dict[str, Any]:
        case = self.cases[workload]
        run = run_trainer(case, "trainer", self.folder / f"{workload}-trainer", limit=limit)
        case.sides["trainer"] = [run]
        return self._row(run, case.sides["padded"][0]["flops"] if "padded" in case.sides else None)

    def _row(self, run: dict, flops: float | None) -> dict[str, Any]:
        rate = None if flops is None else flops * run["samples_per_second"] / 1e12
        peak = self.options.device_tflops
        return {**run, "tflops": rate, "mfu": rate / peak if rate and peak else None}

    def check(self, workload: str, limit: float) -> dict[str, Any]:
        """Compare the first losses of the rows that were measured."""
        case = self.cases[workload]
        sides = {side.replace("padded", "ours"): runs for side, runs in case.sides.items()}
        compared = Case(workload, case.precision, case.folder, case.options, sides=sides)
        pairs = [(side, "trainer") for side in sides if side.startswith("ours")]
        if "packed" in sides and "packed compiled" in sides:  # packed rows have other samples than padded ones
            pairs.append(("packed compiled", "packed"))
        problems = [disagreement(compared, side, base, TOLERANCE) for side, base in pairs]
        if problems := list(filter(None, problems)):
            raise ValueError("; ".join(problems))
        return {"first": {side: runs[0]["first"] for side, runs in case.sides.items()}}

    def profile(self, limit: float) -> dict[str, Any]:
        """Where the time of a packed step of `instruct` goes, in seconds; the largest first."""
        file, row = self.folder / "profile.json", self.cases["instruct"].sides["packed"][0]
        if not file.exists():
            raise ValueError("the profiler did not finish in the time of its row")
        found = json.loads(file.read_text())
        if "problem" in found:
            raise ValueError(found["problem"])
        step, waited = row["step_seconds"], row["waited"] * row["step_seconds"]
        parts = {**found["kinds"], "waiting for data": waited}
        parts["idle: the host has queued nothing"] = max(0.0, step - found["busy"] - waited)
        peak, flops = self.options.device_tflops, row["flops"] * row["samples_per_second"] * step
        at_peak = flops / (peak * 1e12) if peak else None
        ranked = dict(sorted(parts.items(), key=lambda entry: -entry[1]))
        values = {"step_seconds": step, "target": self.size.target, "seconds_at_peak": at_peak, "ranked": ranked}
        return {**values, "phases": row["phases"], "top": found["top"]}

    def stage_1(self, limit: float) -> dict[str, Any]:
        """Stage 1 of the recipe `speedrun` itself: SigLIP 2 NaFlex, 256 samples per step."""
        vision, images, out = self.folder / "naflex", self.cases["align"].folder, self.folder / "stage_1"
        end = time.monotonic() + limit
        in_process(save_vision, limit, self.size.stage_1, vision, 256, "bf16")
        batch, micro = (8, 4) if self.options.tiny else (256, 64)
        line = [
            *("recipe=speedrun", "stage=align", f"vision.path={vision}", f"llm.path={self.folder / 'weights' / 'llm'}"),
            *("data=llava_json", f"data.images={images / 'images'}", f"data.align={images / 'data.json'}"),
            *("data.validation=null", f"stages.align.batch_size={batch}", f"stages.align.micro_batch_size={micro}"),
            *("stages.align.max_steps=100000", "stages.align.save_every=null", f"workers={self.workers}"),
        ]
        command = [sys.executable, "-m", "vlmtrain.train", *line, f"run_dir={out}"]
        warmup, limits = (
            1 if self.options.tiny else 2,
            {"steps": 3 if self.options.tiny else 8, "limit": end - time.monotonic()},
        )
        run = measure(command, out / "align" / "metrics.jsonl", warmup, self.threads, **limits)
        hours = SPEEDRUN["samples"] / run["samples_per_second"] / 3600
        return {**self._row(run, run["flops"]), **SPEEDRUN, "hours": hours}


def in_process(function: Callable, limit: float, *arguments: Any) -> Any:
    """Call a function in a new process, so that its memory is free afterwards. Raises TimeoutError after `limit`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise TimeoutError(f"not ready after {limit:.0f} s")
        value, problem = receiver.recv()
        process.join(10)
    finally:
        process.kill()
    if problem is not None:
        raise RuntimeError(problem)
    return value


def _call(sender: Connection, function: Callable, arguments: tuple) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


def prepared(case: Case) -> Case:
    case.folder.mkdir(parents=True)
    prepare(case)
    return case


def gpu_tests(limit: float) -> dict[str, Any]:
    """Run the tests that are marked as needing a GPU."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    said = done.stdout.strip().splitlines()
    if done.returncode or (torch.cuda.is_available() and "passed" not in said[-1]):
        raise RuntimeError("\n".join(line for line in said if line.startswith(("FAILED", "ERROR", *said[-1:]))))
    return {"summary": said[-1]}


def pieces_of(models: dict[str, Model], tiny: bool) -> Iterator[Piece]:
    """All pieces, the most important first. What compares and explains rows follows them and takes no time."""
    yield Piece("tests that need a GPU", gpu_tests, 150)
    order = {"instruct": ("packed", "padded"), "align": ("packed", "padded")}
    for name, model in models.items():
        yield Piece(f"{name}: weights and data", model.prepare, 150 if name == "0.6B" else 240)
        start = (f"{name}: weights and data",)
        for workload, sides in order.items():
            for side in sides:
                yield Piece(f"{name} {workload} {side}", partial(model.ours, workload, side), 150, start)
            yield Piece(f"{name} {workload} trainer", partial(model.trainer, workload), 150, start)
        yield Piece(f"{name}: profile", model.profile, needs=(f"{name} instruct packed",))
        if model.size.stage_1:
            yield Piece("speedrun stage 1", model.stage_1, 120, start)
    for side in ("packed compiled", "padded compiled"):
        for workload in order:
            for name, model in models.items():
                reason = "--tiny compiles one row" if tiny and (name, workload, side) != COMPILED_IF_TINY else None
                needs = (f"{name}: weights and data",)
                yield Piece(f"{name} {workload} {side}", partial(model.ours, workload, side), 150, needs, reason)
    for name, model in models.items():
        for workload in order:
            needs = (f"{name} {workload} padded", f"{name} {workload} trainer")
            yield Piece(f"{name} {workload}: first losses agree", partial(model.check, workload), needs=needs)


def chosen(pieces: list[Piece], pattern: str) -> list[Piece]:
    """All pieces; those whose names do not match, and that no other one needs, are left out."""
    wanted = {piece.name for piece in pieces if re.search(pattern, piece.name)}
    for piece in reversed(pieces):
        if piece.name in wanted:
            wanted.update(piece.needs)
    return [piece if piece.name in wanted else replace(piece, left_out="not selected") for piece in pieces]


COMPILED_IF_TINY = ("0.6B", "instruct", "packed compiled")


def device_of(options: argparse.Namespace) -> str:
    """The name of the device; sets `device_tflops` where it is not given: of a CPU, it is measured."""
    from vlmtrain.training.cost.flops import peak_tflops

    if not torch.cuda.is_available():
        options.device_tflops = options.device_tflops or matrix_rate("bf16", os.cpu_count() or 1) / 1e12
        return f"CPU, {os.cpu_count()} cores"
    options.device_tflops = options.device_tflops or peak_tflops(torch.device("cuda"), torch.bfloat16)
    return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-benchmark"))
    parser.add_argument("--minutes", type=float, default=11.5, help="time for all pieces")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression of the pieces to run")
    parser.add_argument("--tiny", action="store_true", help="small shapes; the default without a GPU")
    parser.add_argument("--device-tflops", type=float, help="dense bf16 peak of the device, if it is not known")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, which ends the processes
    options.tiny = options.tiny or not torch.cuda.is_available()
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"device": device_of(options), "tflops": options.device_tflops}
    about |= {"torch": torch.__version__, "tiny": options.tiny}

    def write(results: dict[str, Result]) -> str:
        found = {"about": about, "pieces": {name: asdict(result) for name, result in results.items()}}
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(found))
        return page(found)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        models = {name: Model(name, size, Path(folder), options) for name, size in sizes(options.tiny).items()}
        pieces = chosen(list(pieces_of(models, options.tiny)), options.only)
        results = run_pieces(pieces, 60 * options.minutes, write)
    print(write(results))
    raise SystemExit(any(result.status not in (DONE, LEFT_OUT) for result in results.values()))


if __name__ == "__main__":
    main()
