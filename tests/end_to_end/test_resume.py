"""A run that was killed or stopped resumes as if it had not been interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vlmtrain.model.parts import load_part, module_state

from ..conftest import ROOT, data_overrides, metrics, run_script, train

STEPS = 24
WORKER = Path(__file__).with_name("moment_runs.py")


def line(files, run_dir, *more: str) -> list[str]:
    return [
        "recipe=llava_1_5",
        "mini=true",
        *data_overrides(files),
        "validation.final_samples=2",
        "validation.samples=2",
        f"run_dir={run_dir}",
        "stages.align.max_steps=3",
        "stages.align.batch_size=4",
        f"stages.instruct.max_steps={STEPS}",
        "stages.instruct.batch_size=4",
        "stages.instruct.micro_batch_size=1",
        "stages.instruct.save_every=5",
        *more,
    ]


def interrupt(command: list[str], run_dir: Path, ranks: int, after_step: int, number: int) -> int:
    """Start a run, send it a signal after a step of instruct, and return its exit code."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    process = subprocess.Popen(
        [*launcher, "vlmtrain.train", *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file = run_dir / "instruct" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not file.exists() or file.read_text().count("\n") < after_step:
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, "the run did not reach the step in time"
        time.sleep(0.005)
    if number == signal.SIGTERM:  # as a scheduler does: to the trainer and to its data workers
        subprocess.run(["pkill", "-TERM", "-f", f"run_dir={run_dir}"])
    else:
        process.send_signal(number)
    code = process.wait(timeout=120)
    for _ in range(100):  # workers of a killed launcher end on their own
        if subprocess.run(["pgrep", "-f", f"run_dir={run_dir}"], capture_output=True).returncode:
            break
        subprocess.run(["pkill", "-KILL", "-f", f"run_dir={run_dir}"])
        time.sleep(0.1)
    return code


def struck(moment: str, *command: str, ranks: int) -> int:
    """Run a command that signals its first rank at a moment of moment_runs.py. Returns the exit code."""
    return run_script(WORKER, moment, "--", *command, ranks=ranks, check=False).returncode


@pytest.mark.parametrize(
    "engine, precision, ranks, number",
    [
        ("zero0", "fp32", 1, signal.SIGKILL),
        ("zero2", "bf16", 2, signal.SIGKILL),
        ("zero3", "fp32", 2, signal.SIGKILL),
        ("zero1", "fp32", 1, signal.SIGTERM),
    ],
)
def test_losses_after_an_interruption_are_bit_identical(engine, precision, ranks, number, llava_files, tmp_path):
    more = [f"engine={engine}", f"precision={precision}", "+llm.config.attention_dropout=0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more), ranks=ranks)
    if ranks == 1:  # a real launch
        code = interrupt(line(llava_files, broken, *more), broken, ranks, 8, number)
    else:
        code = struck(f"{number.name}@metrics.jsonl:8", *line(llava_files, broken, *more), ranks=ranks)
    interrupted_at = len(metrics(broken, "instruct"))
    assert interrupted_at < STEPS and not (broken / "instruct" / "summary.json").exists()
    if number == signal.SIGTERM:
        assert code == 0
        saved = [path.name for path in (broken / "instruct" / "checkpoints").iterdir()]
        assert f"step-{interrupted_at:06d}" in saved
    train(*line(llava_files, broken, *more), ranks=ranks)
    for key in ("step", "loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in metrics(broken, "instruct")] == [r[key] for r in metrics(whole, "instruct")]
    for part in ("vision", "connector", "llm"):
        hashes = [
            json.loads((run / "instruct" / "summary.json").read_text())["parts"][part]["sha256_after"]
            for run in (whole, broken)
        ]
        assert hashes[0] == hashes[1]
    assert not (broken / "instruct" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe, stage", [("flamingo", "pretrain"), ("mot", "joint"), ("fuyu", "align")])
def test_other_fusions_resume_with_bit_identical_losses(recipe, stage, tmp_path):
    """Gated layers on documents and captions, experts for visual tokens, and raw patches."""
    command = [
        f"recipe={recipe}",
        "mini=true",
        f"stage={stage}",
        f"stages.{stage}.max_steps=12",
        "data.validation=null",
    ]
    command += [f"stages.{stage}.batch_size=8", f"stages.{stage}.micro_batch_size=4", f"stages.{stage}.save_every=5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*command, f"run_dir={whole}")
    struck("SIGKILL@metrics.jsonl:8", *command, f"run_dir={broken}", ranks=1)
    assert len(metrics(broken, stage)) < 12
    train(*command, f"run_dir={broken}")
    for key in ("loss", "grad_norm", "target_tokens"):
        assert [r[key] for r in metrics(broken, stage)] == [r[key] for r in metrics(whole, stage)]
    parts = [json.loads((run / stage / "summary.json").read_text())["parts"] for run in (whole, broken)]
    assert all(parts[0][part]["sha256_after"] == parts[1][part]["sha256_after"] for part in parts[0])


def test_an_encoder_decoder_model_resumes_with_the_same_prefixes(llava_files, tmp_path):
    """Captions are cut at other places in every epoch."""
    records = json.loads(llava_files["align"].read_text())
    for record in records:
        record["conversations"][1]["value"] = "a red circle and a blue square in the middle"
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(records))
    more = ["engine=zero3", "llm.config.model_type=t5", "stages.instruct.data=align", "stages.instruct.template=prefix"]
    more += [f"data.align={captions}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more), ranks=2)
    struck("SIGKILL@metrics.jsonl:8", *line(llava_files, broken, *more), ranks=2)
    assert len(metrics(broken, "instruct")) < STEPS
    train(*line(llava_files, broken, *more), ranks=2)
    for key in ("loss", "grad_norm", "target_tokens"):
        assert [r[key] for r in metrics(broken, "instruct")] == [r[key] for r in metrics(whole, "instruct")]
    assert len({r["target_tokens"] for r in metrics(whole, "instruct")[::6]}) > 1  # an epoch has 6 steps


@pytest.mark.parametrize(
    "engine, precision, before, after",
    [
        ("zero1", "fp32", 1, 2),
        ("zero3", "fp32", 2, 1),
        pytest.param("zero0", "fp32", 1, 2, marks=pytest.mark.slow),
        pytest.param("zero1", "fp32", 2, 1, marks=pytest.mark.slow),
        pytest.param("zero2", "fp32", 2, 4, marks=pytest.mark.slow),
        pytest.param("zero3", "fp32", 1, 2, marks=pytest.mark.slow),
        pytest.param("zero2", "bf16", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_resumes_with_close_results(engine, precision, before, after, llava_files, tmp_path):
    """Everything trains, with two rates and a group with layer decay, so that misplaced state would show."""
    groups = "stages.instruct.groups=[{match: vision, lr: 1e-4, layer_decay: 0.8}]"
    more = [f"engine={engine}", f"precision={precision}", groups, "stages.instruct.optimizer.weight_decay=0.1"]
    more += ["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(*line(llava_files, whole, *more))
    assert struck("SIGTERM@metrics.jsonl:8", *line(llava_files, broken, *more), ranks=before) == 0
    assert len(metrics(broken, "instruct")) == 9  # the signal is seen in the next step
    train(*line(llava_files, broken, *more), ranks=after)
    found, wanted = metrics(broken, "instruct"), metrics(whole, "instruct")
    # in bf16, a different order of summation rounds to different weights
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx(
            [r[key] for r in wanted], rel=tolerance * (1 + 9 * (key != "loss"))
        )
    for key in ("step", "learning_rate", "samples", "tokens", "target_tokens"):
        assert [r[key] for r in found] == [r[key] for r in wanted]
    if precision == "fp32":
        for part in ("vision", "connector", "llm"):
            ours, theirs = (module_state(load_part(part, run / "instruct" / "model")) for run in (broken, whole))
            # AdamW changes an element by the learning rate however small its gradient, so single elements may differ
            difference = sum(float((ours[name] - tensor).square().sum()) for name, tensor in theirs.items())
            assert difference <= (1e-4) ** 2 * sum(float(tensor.square().sum()) for tensor in theirs.values()), part


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGE = {"flipped": flip_a_byte, "cut": cut, "deleted": Path.unlink}


@pytest.fixture(scope="module")
def stopped(llava_files, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run that was stopped with two checkpoints left, and the metrics of the uninterrupted run."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    train(*line(llava_files, whole))
    interrupt(line(llava_files, broken), broken, 1, 12, signal.SIGTERM)
    return broken, metrics(whole, "instruct")


RECORD, STATE = "vlmtrain.json", "state-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    "kind, which",
    [
        ("flipped", STATE),
        ("deleted", RECORD),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("cut", STATE), ("deleted", STATE), ("cut", RECORD))
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kind, which, stopped, llava_files, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped[0], run_dir)
    saved = sorted((run_dir / "instruct" / "checkpoints").iterdir())
    assert len(saved) == 2
    DAMAGE[kind](saved[-1] / which)
    (saved[-1].parent / "step-000099.partial").mkdir()
    done = train(*line(llava_files, run_dir))
    assert f"{saved[-1]} is damaged" in done.stdout and f"resuming after step {int(saved[0].name[5:])}" in done.stdout
    assert [r["loss"] for r in metrics(run_dir, "instruct")] == [r["loss"] for r in stopped[1]]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(stopped, llava_files, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped[0], run_dir)
    for folder in (run_dir / "instruct" / "checkpoints").iterdir():
        flip_a_byte(folder / "state-00000-of-00001.safetensors")
    before = (run_dir / "instruct" / "metrics.jsonl").read_bytes()
    refused = train(*line(llava_files, run_dir), check=False)
    assert refused.returncode == 2 and "every checkpoint in" in refused.stderr and "Traceback" not in refused.stderr
    assert (run_dir / "instruct" / "metrics.jsonl").read_bytes() == before


def test_checkpoints_hold_no_pickles_and_no_frozen_weights(stopped):
    files = [path for path in (stopped[0] / "instruct" / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    names = {name for path in files if path.suffix == ".safetensors" for name in load_file(path)}
    assert names and all(name.startswith(("connector.", "llm.")) for name in names)


def test_finished_stages_are_skipped_and_changed_keys_refused(llava_files, tmp_path):
    first = line(llava_files, tmp_path, "stages.instruct.max_steps=2")
    train(*first)
    before = (tmp_path / "instruct" / "metrics.jsonl").stat().st_mtime_ns
    assert "stage instruct is finished" in train(*first).stdout
    assert (tmp_path / "instruct" / "metrics.jsonl").stat().st_mtime_ns == before
    refused = train(*first, "stages.align.train.connector=5e-4", check=False)
    assert refused.returncode == 2
    assert "stages.align.train.connector" in refused.stderr and "Traceback" not in refused.stderr
    assert "stage instruct is finished" in train(*first, "workers=0", "wandb_project=other").stdout


def test_checkpoints_are_pruned(llava_files, tmp_path):
    command = line(llava_files, tmp_path, "stages.instruct.save_every=2", "stages.instruct.keep_last=2")
    interrupt(command, tmp_path, 1, 15, signal.SIGTERM)
    saved = sorted(path.name for path in (tmp_path / "instruct" / "checkpoints").iterdir())
    assert len(saved) == 2 and not any(name.endswith(".partial") for name in saved)
