"""Training speed compared with Hugging Face's Trainer: same weights, data, precision and machine, in one run.

    python benchmarks/training_speed.py                                    # parts of realistic shape, random weights
    python benchmarks/training_speed.py --vision DIR --llm DIR --data DIR   # published parts, LLaVA JSON with images
    python benchmarks/training_speed.py --workload align --precision bf16 --repeats 3 --write speed.md

Each job is a separate process. All sides run in turn, `--repeats` times; the table reports medians. Time is measured
from the end of step `--warmup` to the end of the last step. The losses on the first batch of all runs must agree within
1e-4 (bf16: 2 %, because the two sides round at different places; packed rows contain other samples, so for `packed` the
losses of `ours` are compared), otherwise the comparison is reported as void. The share of the matrix rate is the
arithmetic that the update requires (without padding and without unused logits) per second, divided by the best rate of
large matrix products measured between the jobs. Sides: `ours` (no feature cache), `cold` and `cached` (an empty and a
warm cache), `packed`, `trainer`, `trl` (TRL's SFTTrainer, if it is installed), `ranks` and `ranks-zero2` (two ranks
with half the threads each, plain and with ZeRO-2).

Workloads: `align` trains the connector on captions. `instruct` trains connector and language model on conversations
like those of LLaVA-1.5's mixture: 6 % without an image (40,688 of its 665,298), 1 to 6 questions (geometric, mean 1.8),
half of the answers with 1 to 5 words and half log-normal around 40 words. `quickstart` is the small model of that
recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from speed_inputs import DTYPES, Case, prepare  # noqa: E402

WORKLOADS = ("align", "instruct", "quickstart")
TRAINED = {"align": ["connector"], "instruct": ["connector", "llm"], "quickstart": ["connector", "llm"]}
SIDES = ("ours", "cold", "cached", "packed", "ranks", "ranks-zero2", "trainer", "trl")
THEIRS = ("trainer", "trl")
PACKED = ("layout=packed", "micro_batch_size=null")
THEIR_SETTINGS = (
    "trainer, trl: text tokenized in advance, no gradients for frozen parts, rows grouped by length, images decoded in "
    "a worker, their own bf16 autocast, no gradient checkpointing (also in ours), no saving or logging."
)
BASES = {
    "ranks": None,
    "ranks-zero2": "ranks",
    "trainer": None,
}  # the baseline of a side's ratio; trainer for all others
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}  # in bf16 the two sides round at different places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: those of the workload")
    parser.add_argument("--vision", help="folder of a Hugging Face vision encoder")
    parser.add_argument("--llm", help="folder of a Hugging Face language model")
    parser.add_argument("--data", help="folder with images/, align.json and instruct.json")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="additional settings for our side")
    parser.add_argument("--write", type=Path, help="file for the table")
    options = parser.parse_args()
    if not 0 < options.warmup < options.steps:
        parser.error(f"--warmup {options.warmup}: expected at least 1 and less than --steps {options.steps}")
    if "trl" in (options.sides or ()) and find_spec("trl") is None:
        parser.error("--sides trl requires trl: pip install trl")
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            run_case(workload, precision, Path(folder) / f"{workload}-{precision}", options)
            for workload in options.workload
            for precision in options.precision
        ]
        text = table(cases, options)
    print(text)
    if options.write:
        options.write.write_text(text + "\n")


def run_case(workload: str, precision: str, folder: Path, options: argparse.Namespace) -> Case:
    case = Case(workload, precision, folder, options)
    folder.mkdir(parents=True)
    prepare(case)
    sides = options.sides or ["ours", *(["cached"] if workload == "align" else ["packed"]), "trainer"]
    for repeat in range(options.repeats):
        for side in sides:
            case.rates.append(matrix_rate(precision, options.threads))
            out = folder / f"{side}-{repeat}"
            run = run_trainer(case, side, out) if side in THEIRS else run_ours(case, side, out)
            case.sides.setdefault(side, []).append(run)
            print(f"{workload} {precision} {side}: {run['samples_per_second']:.2f} samples/s", file=sys.stderr)
    return case


def run_ours(case: Case, side: str, out: Path) -> dict:
    """Run `python -m vlmtrain.train` in a separate process."""
    more = []
    if side == "packed":
        more = [f"stages.{case.stage}.{setting}" for setting in PACKED]
    if side == "cold":
        more = [f"features.cache={out}-cache"]
    if side == "cached":
        more = [f"features.cache={case.folder / 'cache'}"]
        if not (case.folder / "cache").exists() and out.name != "filling":
            run_ours(case, side, case.folder / "filling")
    launcher, threads = ["-m"], case.options.threads
    if side.startswith("ranks"):
        launcher, threads = [*"-m torch.distributed.run --standalone --nproc_per_node 2 -m".split()], threads // 2
        more = [
            f"engine={'zero2' if side == 'ranks-zero2' else 'zero0'}",
            f"stages.{case.stage}.micro_batch_size={case.options.batch_size // 2}",
        ]
    command = [sys.executable, *launcher, "vlmtrain.train", *case.line, *more, f"run_dir={out}"]
    return measure(command, out / case.stage / "metrics.jsonl", case.options.warmup, threads)


def measure(command: list[str], metrics: Path, warmup: int, threads: int, steps: int | None = None, **options) -> dict:
    """Run a command of ours that writes `metrics`, and return means over the steps after `warmup`.

    Step times are when their metrics appear in the file. steps, options: see `watch`.
    """
    records, ends = watch(command, metrics, threads, steps, **options)
    timed = records[warmup:]
    seconds = ends[-1] - ends[warmup - 1]
    samples = sum(r["samples"] for r in timed)
    phases = {name for record in timed for name in record["phase_seconds"]}
    return {
        "first": records[0]["loss"],
        "samples_per_second": samples / seconds,
        "targets_per_second": sum(r["target_tokens"] for r in timed) / seconds,
        "step_seconds": seconds / len(timed),
        "peak": max(r["peak_memory_bytes"] for r in records),
        "waited": sum(r["data_seconds"] for r in timed) / seconds,
        "phases": {name: sum(r["phase_seconds"].get(name, 0.0) for r in timed) / len(timed) for name in phases},
        "flops": sum(r["flops"] for r in timed) / samples,  # of a sample
        "tokens": sum(r["tokens"] for r in timed) / samples,
        "padding": statistics.mean(r["padding_fraction"] for r in timed),
    }


def run_trainer(case: Case, side: str, out: Path, **limits) -> dict:
    out.mkdir()
    options = case.options
    vocabulary = json.loads((case.weights / "model" / "llm" / "config.json").read_text())["vocab_size"]
    job = {
        "trainer": side,
        "model": str(case.weights / "export"),
        "samples": str(case.folder / "samples.jsonl"),
        "images": str(case.folder / "images"),
        "trained": TRAINED[case.workload],
        "vocabulary": vocabulary,
        "batch_size": options.batch_size,
        "warmup": options.warmup,
        "steps": options.steps,
        "precision": case.precision,
        "stored": case.stored,
        "lora": case.lora,
        "workers": case.workers,
        "group_by_length": case.workload == "instruct",
        "out": str(out),
    }
    (out / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(ROOT / "benchmarks" / "hf_trainer.py"), str(out / "job.json")]
    records, _ = watch(command, out / "clock.jsonl", options.threads, **limits)
    seconds = records[-1]["time"] - records[options.warmup]["time"]
    samples = options.batch_size * (options.steps - options.warmup)
    said = [json.loads(line) for line in (case.folder / "samples.jsonl").read_text().splitlines()]
    targets = sum(label != -100 for record in said for label in record["labels"]) / len(said)
    return {
        "first": json.loads((out / "first.json").read_text())["loss"],
        "samples_per_second": samples / seconds,
        "targets_per_second": targets * samples / seconds,
        "peak": records[-1]["peak"],
    }


def watch(
    command: list[str],
    file: Path,
    threads: int,
    lines: int | None = None,
    limit: float = math.inf,
    awaited: Path | None = None,
) -> tuple[list[dict], list[float]]:
    """Run a command; return the JSON lines of a file that it writes, and the time when each line appeared.

    lines: end the command after so many lines, and after the file `awaited` exists, if there is one; None to wait for
    its end. limit: seconds after which it is ended with a TimeoutError. Raises RuntimeError if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    ends: list[float] = []
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None:
                if file.exists():
                    ends += [time.time()] * (file.read_bytes().count(b"\n") - len(ends))
                if lines is not None and len(ends) >= lines and (awaited is None or awaited.exists()):
                    break
                if time.monotonic() - started > limit:
                    raise TimeoutError(f"{len(ends)} steps after {limit:.0f} s")
                time.sleep(0.002)
        finally:
            is_ended = process.poll() is not None
            process.kill()
            process.wait()
        if is_ended and process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{errors.read().decode()[-3000:]}")
    records = [json.loads(line) for line in file.read_text().splitlines()[:lines]]
    return records, (ends + [time.time()] * (len(records) - len(ends)))[:lines]


def matrix_rate(precision: str, threads: int) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    torch.set_num_threads(threads)
    dtype = DTYPES[precision]
    one, other = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        one @ other
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def table(cases: list[Case], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    parts = "published parts" if options.llm else "random weights"
    lines = [
        f"{options.threads} threads, {parts}, {options.batch_size} samples per step, "
        f"{options.steps - options.warmup} steps timed, medians of {options.repeats}",
        "",
        "| workload | side | samples/s | ratio | target tokens/s | of matrix rate | data wait | peak memory (ratio) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        lines += case_rows(case)
    return "\n".join([*lines, "", THEIR_SETTINGS])


def case_rows(case: Case) -> Iterator[str]:
    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in case.sides[side])

    title = f"{case.workload} {case.precision}"
    for side, runs in case.sides.items():
        speed, memory = median(side, "samples_per_second"), median(side, "peak")
        base = BASES.get(side, "trainer")
        ratio, share = "-" if base else "1", ""
        if base in case.sides:
            problem = disagreement(case, side, base)
            ratio = problem or f"{speed / median(base, 'samples_per_second'):.2f}"
            share = f" ({memory / median(base, 'peak'):.2f})"
        cells = [title, side, f"{speed:.2f}", ratio, f"{median(side, 'targets_per_second'):.0f}"]
        if side in THEIRS:
            cells += ["", ""]
        else:
            cells += [f"{speed * runs[0]['flops'] / max(case.rates):.2f}", f"{median(side, 'waited'):.1%}"]
        yield "| " + " | ".join([*cells, f"{memory / 2**30:.2f} GiB{share}"]) + " |"


def disagreement(case: Case, side: str, base: str, tolerance: float | None = None) -> str | None:
    """Why a side's speed cannot be compared with that of `base`: the first losses differ. None if it can.

    tolerance: relative; None for that of the precision.
    """
    tolerance = AGREEMENT[case.precision] if tolerance is None else tolerance
    checked = "ours" if side == "packed" else side
    if checked not in case.sides:
        return f"void: {side} requires {checked} in the same run, whose first losses are compared"
    ours, theirs = ([run["first"] for run in case.sides[name]] for name in (checked, base))
    losses = [math.nan if loss is None else loss for loss in (*ours, *theirs)]
    agree = all(map(math.isfinite, losses)) and max(losses) - min(losses) <= tolerance * losses[-1]
    if not agree:
        return f"void: first losses {ours[0]}, {theirs[0]}"
    return None


if __name__ == "__main__":
    main()
