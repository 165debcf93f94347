"""What a run reports: wandb without account or network, the log, the documented metrics, the model card, the page."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from wandb.proto import wandb_internal_pb2

from vlmtrain.evaluation.scores import value_text
from vlmtrain.interop.export import export
from vlmtrain.reporting.card import wilson
from vlmtrain.runs.fingerprints import fingerprint

from ..conftest import data_overrides, metrics, train

METRICS = {
    *("step", "loss", "grad_norm", "learning_rate", "samples", "tokens", "image_tokens", "target_tokens"),
    *("padding_fraction", "step_seconds", "data_seconds", "samples_per_second", "tokens_per_second"),
    *("peak_memory_bytes", "phase_seconds", "flops"),
}


def tracked(files, folder, *more: str) -> None:
    train(
        *("recipe=llava_1_5", "mini=true", *data_overrides(files), f"run_dir={folder}", "wandb=offline"),
        *("stages.align.max_steps=2", "stages.align.batch_size=4", "stages.instruct.batch_size=4"),
        *("stages.instruct.max_steps=4", "stages.instruct.validate_every=2", "validation.final_samples=4"),
        *("wandb_model=true", "loggers=[tensorboard]"),
        *more,
        env={"WANDB_API_KEY": "", "WANDB_SILENT": "true"},
    )


@pytest.fixture(scope="module")
def run_dir(llava_files, tmp_path_factory):
    """A run by two commands; the second one continues after the first stage."""
    folder = tmp_path_factory.mktemp("runs") / "tracked"
    tracked(llava_files, folder, "stage=align")
    tracked(llava_files, folder)
    return folder


def test_wandb_offline_needs_no_account_and_both_commands_are_one_run_with_one_axis(run_dir):
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    assert (run_dir / "wandb_id.txt").read_text() in files[0].name
    # each stage's last step also has the answers; step 4 also has a validation
    assert [logged(file) for file in files] == [[1, 2, 2], [3, 4, 4, 5, 6, 6]]


def test_tensorboard_has_the_same_values_on_one_axis(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    events = [event for stage in ("align", "instruct") for event in board.Scalars(f"{stage}/loss")]
    losses = [record["loss"] for stage in ("align", "instruct") for record in metrics(run_dir, stage)]
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events] == pytest.approx(losses)
    assert board.Scalars("instruct/validation/loss")[0].step == 4
    assert board.Tags()["tensors"] == ["align/answers/text_summary", "instruct/answers/text_summary"]


def records_of(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: after 7 bytes, blocks of 32 KiB of pieces with checksum, length and type."""
    position, pieces = 7, []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too small for another piece: padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        pieces.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # complete, or the last of several
            yield b"".join(pieces)
            pieces = []


def logged(file: Path) -> list[int]:
    """The total steps in a file of wandb, in order."""
    found = []
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "total_step" in items:
            found.append(int(items["total_step"]))
    return found


def test_wandb_gets_images_with_answers_and_the_model(run_dir):
    """What an offline run has stored for a later sync."""
    folder = sorted(run_dir.glob("wandb/offline-run-*"))[-1]
    (table,) = folder.glob("files/media/table/instruct/answers_*.table.json")
    table = json.loads(table.read_text())
    answers = json.loads((run_dir / "instruct" / "samples.json").read_text())
    assert [row[1] for row in table["data"]] == [answer["question"] for answer in answers]
    pictures = [picture for row in table["data"] for picture in row[0]]
    assert len(pictures) == sum(len(answer["pictures"]) for answer in answers)
    artifact = (run_dir / "wandb_id.txt").read_text() + "-instruct"
    assert artifact.encode() in next(folder.glob("*.wandb")).read_bytes()


# the model card


def test_every_stage_has_a_model_card(run_dir, llava_files, tmp_path):
    summary = json.loads((run_dir / "instruct" / "summary.json").read_text())
    card = (run_dir / "instruct" / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "vlmtrain" and front["license"] == "unknown"
    for part, facts in summary["parts"].items():
        assert re.search(rf"\| {part} \| .* \| {facts['parameters']:,} \|", card)
    assert "| align | language_modelling | connector (0.001) | vision, llm | 2 x 4 |" in card
    assert "| instruct | language_modelling | llm (0.001), connector (0.001) | vision | 4 x 4 |" in card
    assert f"| instruct | instruct: instruct.json | 16 | {known_by(llava_files['instruct'])[:16]} |" in card
    scores = summary["validation"]
    low, high = wilson(scores["exact_match"], scores["questions"])
    assert f"{scores['exact_match']:.1%} ({low:.1%} to {high:.1%})" in card and f"{scores['loss']:.4f}" in card
    for name in (name for name in scores if f"blind_{name}" in scores):
        blind = value_text(name, scores[f"blind_{name}"])
        assert re.search(rf"\| instruct \| {name.replace('_', ' ')} \| .* \| {re.escape(blind)} \|", card), name
    assert "| instruct |" not in (run_dir / "align" / "model" / "README.md").read_text()
    done = export(run_dir / "instruct" / "model", tmp_path / "out", "vlmtrain")
    exported = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(exported.split("---")[1])["library_name"] == "transformers"
    assert done.model_class in exported and "4 x 4" in exported and "import vlmtrain" in exported
    assert exported.count("\n# ") == 1 and exported.count("## License") == 1


def known_by(path: Path) -> str:
    return fingerprint(path)["sha256"]


def test_fingerprints_depend_on_the_files(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("a", "b"):
        (tmp_path / "shards" / name).write_bytes(name.encode() * 3_000_000)
    found = {known_by(tmp_path / "shards"), known_by(tmp_path / "shards" / "a")}
    (tmp_path / "shards" / "b").rename(tmp_path / "shards" / "c")
    found.add(known_by(tmp_path / "shards"))
    (tmp_path / "shards" / "c").write_bytes(b"b" * 2_999_999 + b"a")
    found.add(known_by(tmp_path / "shards"))
    assert len(found) == 4


@pytest.mark.parametrize("share, count, low, high", [(0.8, 10, 0.4902, 0.9433), (0, 20, 0, 0.1611), (1, 20, 0.8389, 1)])
def test_intervals_are_wilson_intervals(share, count, low, high):
    """Against published tables (Newcombe, 1998, and R's binom.wilson)."""
    assert wilson(share, count) == pytest.approx((low, high), abs=1e-4)


def test_metrics_have_the_documented_keys(run_dir):
    records = metrics(run_dir, "instruct")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert set(record) == METRICS
        assert set(record["learning_rate"]) == {"connector", "llm"}
        assert 0 <= record["padding_fraction"] < 1 and record["image_tokens"] < record["tokens"]


def test_the_summary_has_hashes_of_frozen_parts_and_scores(run_dir):
    summary = json.loads((run_dir / "align" / "summary.json").read_text())
    for part, facts in summary["parts"].items():
        assert (facts["sha256_before"] == facts["sha256_after"]) == (part != "connector")
    assert {"loss", "exact_match", "blind_exact_match", "questions"} <= set(summary["validation"])


def test_the_page_is_self_contained(run_dir):
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == 8 and "data:image/jpeg;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert "frozen" in page and "What color is this?" in page


def test_the_log_has_sparse_lines(run_dir):
    log = (run_dir / "train.log").read_text()
    assert "stage align: 2 steps" in log and "frozen" in log and "step 4/4" in log
