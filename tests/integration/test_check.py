"""`vlmtrain check` finds every planted defect and counts the data; training with its clean list skips nothing."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmtrain.cli import main
from vlmtrain.data.shapes import VOCABULARY
from vlmtrain.distributed.world import World
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer
from vlmtrain.settings import compose
from vlmtrain.training.run import train_run

from ..conftest import data_overrides, gpt, human, train

PICTURE_TOKENS = 16  # 48 pixels in patches of 12
MINI = ("recipe=llava_1_5", "mini=true")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG that declares a large size but has hardly any data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ask(image: object, *more: dict, words: str = "<image>\nWhat color is this?") -> dict:
    return {"image": image, "conversations": [human(words), gpt("red"), *more]}


def talk(*turns: object) -> dict:
    return {"conversations": list(turns)}


DEFECTS: dict[str, tuple[dict | bytes, str]] = {
    "missing image": (ask("gone.png"), "gone.png does not exist"),
    "truncated PNG": (ask("cut.png"), "cut.png cannot be decoded"),
    "truncated JPEG": (ask("cut.jpg"), "cut.jpg cannot be decoded: image file is truncated"),
    "empty file": (ask("empty.png"), "empty.png is not an image: it is empty"),
    "text for an image": (ask("words.png"), "words.png is not an image: it starts with b'just words"),
    "a program for an image": (ask("drawing.eps"), "drawing.eps is not an image: it starts with b'%!PS"),
    "folder for an image": (ask("folder"), "folder cannot be read"),
    "absurd size": (ask("huge.png"), "huge.png cannot be used: it has 12000x12000 pixels: too many"),
    "decompression bomb": (ask("bomb.png"), "bomb.png cannot be decoded: Image size (3600000000 pixels) exceeds"),
    "a line for an image": (ask("line.png"), "line.png cannot be used: it has 900x2 pixels"),
    "path that climbs": (ask("../outside.png"), "'../outside.png' leads out of data.images"),
    "absolute path": (ask("/etc/hostname"), "'/etc/hostname' leads out of data.images"),
    "link that leads out": (ask("link.png"), "'link.png' leads out of data.images"),
    "path that is none": (ask({"path": 5}), "of 'image' must be bytes, base64 or a path, got 5"),
    "more marks": (ask("red.png", words="<image><image> What?"), "2 <image> marks in the user's turns, but 1 images"),
    "fewer marks": (ask(["red.png"] * 3), "1 <image> marks in the user's turns, but 3 images"),
    "empty answer": (talk(human("What?"), gpt(" \n")), "an answer is empty"),
    "unknown speaker": (talk({"from": "robot", "value": "What?"}, gpt("red")), "'from' must be one of human, "),
    "no question": (talk(gpt("red")), "turns must alternate"),
    "no answer": (talk(human("What?")), "turns must alternate"),
    "two questions": (talk(human("What?"), human("And?"), gpt("red")), "turns must alternate"),
    "late system turn": (talk(human("a"), {"from": "system", "value": "b"}, gpt("c")), "turns must alternate"),
    "no object": (b'"What? red"', "expected an object, got str"),
    "no conversations": ({}, "or 'dialogues', or 'question' and 'answer', or 'caption'; got 'id'"),
    "empty conversations": (talk(), "'conversations' must be a non-empty list, got []"),
    "text for conversations": ({"conversations": "What?"}, "'conversations' is a string, but not JSON"),
    "number for text": (talk(human("What?"), {"from": "gpt", "value": 7}), "'value' must be a string, got 7"),
    "too long": (talk(human("What?"), gpt("red " * 300)), "tokens (0 of images) exceed max_length=256"),
    "half a character": (talk(human("What?"), gpt("\ud800")), "half of a character"),
    "broken line": (b'{"id": "x", "conversations": [', "is not valid JSON"),
    "no UTF-8": (b'{"id": "\xff"}', "is not valid UTF-8: invalid start byte at byte 8"),
}
GOOD = 40


def make_pictures(folder: Path) -> None:
    folder.mkdir()
    for name, color in {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 90, 230)}.items():
        Image.new("RGB", (60, 40), color).save(folder / f"{name}.png")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "whole.jpg")
    for suffix in ("png", "jpg"):
        (folder / f"cut.{suffix}").write_bytes((folder / f"whole.{suffix}").read_bytes()[:1000])
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("just words\n" * 9)
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (folder / "folder").mkdir()
    (folder / "huge.png").write_bytes(png_claiming(12000, 12000))
    (folder / "bomb.png").write_bytes(png_claiming(60000, 60000))
    Image.new("RGB", (900, 2)).save(folder / "line.png")
    Image.new("RGB", (60, 40)).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to("../outside.png")


def good_record(number: int) -> dict:
    """Records with zero, one and two images, and one and two exchanges, all different."""
    colors = ("red", "green", "blue")
    name, other = colors[number % 3], colors[(number + 1) % 3]
    question = [human("<image>\nWhat color is this?"), gpt(f"{name}, and number {number}")]
    if number % 4 == 0:
        return talk(human(f"What is {number}?"), gpt(f"a {name} circle"), human("And now?"), gpt("nothing."))
    if number % 4 == 1:
        again = [human("<image> and <image>?"), gpt(other)]
        return {"image": [f"{n}.png" for n in (name, other, name)], "conversations": [*question, *again]}
    return {"image": f"{name}.png", "conversations": question}


def as_line(record: dict) -> bytes:
    return json.dumps(record).encode()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Valid captions, and conversations with one defect of each kind among valid ones."""
    folder = tmp_path_factory.mktemp("check")
    make_pictures(folder / "images")
    captions = [
        {"id": i, "image": "red.png", "conversations": [human("<image>\nDescribe"), gpt(f"picture {i}")]}
        for i in range(12)
    ]
    (folder / "align.json").write_text(json.dumps(captions))
    good = [{"id": f"good-{i}", **good_record(i)} for i in range(GOOD)]
    lines, expected = [as_line(record) for record in good[:20]], {}
    for defect, (planted, words) in DEFECTS.items():
        expected[len(lines)] = (defect, words)
        lines.append(as_line({"id": f"bad {len(lines)}", **planted}) if isinstance(planted, dict) else planted)
    lines += [as_line(record) for record in [good[7], *good[20:]]]
    (folder / "instruct.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "validation.json").write_text(json.dumps(good[:4]))
    files = {"images": folder / "images", "align": folder / "align.json", "instruct": folder / "instruct.jsonl"}
    return {"files": files, "expected": expected, "good": [*good, good[7]], "captions": captions, "lines": lines}


def check(*line: object, code: int, capsys) -> str:
    """The output of the command, or its error, in this process; it must exit with `code`."""
    capsys.readouterr()
    words = ["check", *MINI, "--workers", "0", *map(str, line)]
    if code == 0:
        main(words)
    else:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


@pytest.fixture
def checked(data, capsys) -> dict:
    return json.loads(check(*data_overrides(data["files"]), "--json", code=1, capsys=capsys))


def test_every_defect_is_listed_with_its_file_its_number_and_its_id(data, checked):
    report = checked["instruct"]["sources"]["instruct"]
    assert report["bad_records"] == list(data["expected"])
    assert report["problems"] == checked["instruct"]["problems"]
    for number, (defect, words), problem in zip(data["expected"], data["expected"].values(), report["problems"]):
        assert words in problem, defect
        assert "\n" not in problem
        planted = DEFECTS[defect][0]
        name = f"instruct.jsonl record {number}" + (f" (id bad {number}): " if isinstance(planted, dict) else "")
        assert problem.startswith(name), defect
        if defect in ("broken line", "no UTF-8"):
            assert f"(line {number + 1})" in problem
    assert checked["align"]["problems"] == []


def counted(records: list[dict], template: str) -> dict[str, int]:
    """The expected report, counted with only the tokenizer and its own chat template."""
    tokenizer = build_tiny_tokenizer(VOCABULARY)
    totals = dict.fromkeys(("samples", "images", "text_only", "answers", "tokens", "image_tokens", "target_tokens"), 0)
    for record in records:
        turns = [
            {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"].strip()}
            for turn in record["conversations"]
        ]
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        if template == "plain":
            text = "<image>" + answers[0] + "\n"
        else:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        pictures = text.count("<image>")
        words = sum(len(tokenizer(piece).input_ids) for piece in text.split("<image>"))
        totals["samples"] += 1
        totals["images"] += pictures
        totals["text_only"] += pictures == 0
        totals["answers"] += len(answers)
        totals["tokens"] += words + pictures * PICTURE_TOKENS
        totals["image_tokens"] += pictures * PICTURE_TOKENS
        totals["target_tokens"] += sum(len(tokenizer(answer).input_ids) + 1 for answer in answers)
    return totals


def test_totals_are_those_of_the_good_records(data, checked):
    for stage, records, template in (("instruct", data["good"], "chat"), ("align", data["captions"], "plain")):
        (report,) = checked[stage]["sources"].values()
        expected = counted(records, template)
        assert {key: report[key] for key in expected} == expected
        assert report["records"] == len(records) + len(report["problems"])
    assert checked["instruct"]["sources"]["instruct"]["duplicates"] == 1
    assert checked["align"]["sources"]["align"]["duplicates"] == 0


def test_the_histogram_agrees_with_the_lengths(data, checked):
    report = checked["instruct"]["sources"]["instruct"]
    lengths = [counted([record], "chat")["tokens"] for record in data["good"]]
    assert (report["length"]["shortest"], report["length"]["longest"]) == (min(lengths), max(lengths))
    assert report["length"]["median"] == sorted(lengths)[len(lengths) // 2]
    for low, high, count in report["length_histogram"]:
        assert count == sum(low <= length <= high for length in lengths)
    pictures = [PICTURE_TOKENS * counted([r], "chat")["images"] for r in data["good"] if "image" in r]
    assert report["image_tokens_each"] == {
        "shortest": 16,
        "median": sorted(pictures)[len(pictures) // 2],
        "longest": 48,
    }
    assert sum(count for *_, count in report["image_tokens_histogram"]) == len(pictures)


def table_numbers(text: str, stage: str) -> dict[str, list[int]]:
    """The numbers of a stage's table, by the row's name."""
    part = text[text.index(f"stage {stage} ") :]
    rows = ("records", "samples", "images", "answers", "tokens", "problems")
    found = {}
    for row in rows:
        line = re.search(rf"^ +{row}  +(.*)$", part, re.MULTILINE).group(1)
        found[row] = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line)]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_table_agrees_with_the_json(data, checked, workers, capsys):
    text = check(*data_overrides(data["files"]), "--workers", workers, code=1, capsys=capsys)
    for stage in ("align", "instruct"):
        (report,) = checked[stage]["sources"].values()
        assert table_numbers(text, stage) == {
            "records": [report["records"]],
            "samples": [report["samples"], report["text_only"], report["duplicates"]],
            "images": [report["images"]],
            "answers": [report["answers"]],
            "tokens": [report["tokens"], report["image_tokens"], report["target_tokens"]],
            "problems": [len(report["problems"])],
        }
        assert f"stage {stage} (data.{stage}): about {checked[stage]['steps']:,} steps" in text
    problems = checked["instruct"]["problems"]
    assert all(f"    {problem}\n" in text for problem in problems[:20])
    assert f"and {len(problems) - 20} more: --json lists all" in text


def test_samples_are_shown_with_what_is_trained_on_marked(data, capsys):
    text = check(*data_overrides(data["files"]), code=1, capsys=capsys)
    align, instruct = (part.split("  ---\n") for part in text.split("stage instruct "))
    assert align[1] == "  [image: 16 tokens]«picture 0\n  »".rstrip("\n") + "\n"
    assert len(align) == len(instruct) == 4
    assert instruct[1].strip() == (
        "<|user|>What is 0?<|assistant|>«a red circle<|end|>»<|user|>And now?<|assistant|>«nothing.<|end|>»"
    )
    second = (
        "<|user|>[image: 16 tokens]\n  What color is this?<|assistant|>«green, and number 1<|end|>»"
        "<|user|>[image: 16 tokens] and [image: 16 tokens]?<|assistant|>«blue<|end|>»"
    )
    assert instruct[2].strip() == second


def test_valid_data_exits_with_success(data, capsys):
    files = {**data["files"], "instruct": data["files"]["images"].parent / "validation.json"}
    assert "problems  0" in check(*data_overrides(files), code=0, capsys=capsys)


# validation


def test_what_validation_reads_is_checked_as_validation_reads_it(data, tmp_path, capsys):
    records = [good_record(number) for number in range(5)] + [DEFECTS["missing image"][0], DEFECTS["no answer"][0]]
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    files = {**data["files"], "instruct": data["files"]["align"], "validation": tmp_path / "held_out.json"}
    found = json.loads(check(*data_overrides(files), "--json", code=1, capsys=capsys))
    first_exchanges = [{**record, "conversations": record["conversations"][:2]} for record in records[:5]]
    for stage in ("align", "instruct"):
        assert found[stage]["problems"] == []
        held_out = found[stage]["validation"]
        assert [problem.split(":")[0] for problem in held_out["problems"]] == [
            "held_out.json record 5",
            "held_out.json record 6",
        ]
        report = held_out["sources"]["validation"]
        assert report["samples"] == 5
        assert report["answers"] == counted(records[:5] if stage == "instruct" else first_exchanges, "chat")["answers"]
    text = check(*data_overrides(files), code=1, capsys=capsys)
    assert text.count("  validation (data.validation)\n") == 2


# several sources


def test_a_mixture_is_reported_by_source(data, tmp_path, capsys):
    talks, more = tmp_path / "talks.json", tmp_path / "more.json"
    talks.write_text(json.dumps([good_record(number) for number in range(8)]))
    more.write_text(json.dumps([*(good_record(number) for number in (5, 20, 21)), DEFECTS["missing image"][0]]))
    line = [*data_overrides(data["files"])[:-1], f"data.instruct={{talks:{talks},more:{{path:{more},samples:30}}}}"]
    found = json.loads(check(*line, "--json", "--clean-list", tmp_path / "clean.json", code=1, capsys=capsys))
    sources = found["instruct"]["sources"]
    for name, numbers in (("talks", range(8)), ("more", (5, 20, 21))):
        expected = counted([good_record(number) for number in numbers], "chat")
        assert {key: sources[name][key] for key in expected} == expected
    assert (sources["talks"]["problems"], sources["talks"]["records"]) == ([], 8)
    assert (sources["more"]["bad_records"], sources["more"]["records"]) == ([3], 4)
    assert sources["more"]["problems"] == found["instruct"]["problems"]
    assert found["instruct"]["problems"][0].startswith("more.json record 3: ")
    assert (sources["talks"]["duplicates"], sources["more"]["duplicates"]) == (0, 1)
    clean = json.loads((tmp_path / "clean.json").read_text())["instruct"]
    assert clean == {"talks": {"records": 8, "bad": []}, "more": {"records": 4, "bad": [3]}}
    text = check(*line, code=1, capsys=capsys)
    assert re.search(r"^  talks\n.*^  more\n", text, re.MULTILINE | re.DOTALL)


# the clean list


def test_training_with_a_clean_list_skips_nothing(data, tmp_path, capsys):
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps([good_record(0), DEFECTS["missing image"][0], good_record(1)]))
    clean = tmp_path / "clean.json"
    line = data_overrides({**data["files"], "validation": held_out})
    check(*line, "--clean-list", clean, code=1, capsys=capsys)
    run_dir = tmp_path / "run"
    few = [f"stages.{stage}.{key}" for stage in ("align", "instruct") for key in ("max_steps=2", "batch_size=24")]
    line = [*MINI, *line, *few, "on_bad_sample=raise", f"run_dir={run_dir}", "workers=0"]
    refused = train(*line, check=False)
    assert refused.returncode == 2 and "held_out.json record 1: image" in refused.stderr
    train(*line, f"data.clean_list={clean}")
    for stage in ("align", "instruct"):
        summary = json.loads((run_dir / stage / "summary.json").read_text())
        assert (summary["steps"], summary["skipped_samples"]) == (2, 0)
    # two steps are an epoch, so that every record was read
    samples = [json.loads(row)["samples"] for row in (run_dir / "instruct/metrics.jsonl").read_text().splitlines()]
    assert samples == [24, len(data["good"]) - 24]


def test_a_clean_list_of_other_records_is_refused(data, tmp_path, capsys):
    longer = tmp_path / "instruct.jsonl"
    longer.write_bytes(b"\n".join([*data["lines"], data["lines"][0]]))
    clean = tmp_path / "clean.json"
    check(*data_overrides(data["files"]), "--clean-list", clean, code=1, capsys=capsys)
    line = [*data_overrides({**data["files"], "instruct": longer}), f"data.clean_list={clean}"]
    count = len(data["lines"])
    with pytest.raises(
        ValueError, match=f"was written for {count} records of data.instruct .* there are {count + 1}: run"
    ):
        train_run(compose([*MINI, *line, f"run_dir={tmp_path / 'run'}"]), World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("content", ["", "[]", '{"instruct": {"instruct": {"records": 3}}}', '{"instruct": [3]}'])
def test_a_file_that_is_not_a_clean_list_is_refused(data, tmp_path, content, capsys):
    clean = tmp_path / "clean.json"
    clean.write_text(content)
    error = check(*data_overrides(data["files"]), f"data.clean_list={clean}", "stage=instruct", code=2, capsys=capsys)
    assert re.fullmatch(f"vlmtrain: error: data.clean_list={clean} .*vlmtrain check.*\n", error)
