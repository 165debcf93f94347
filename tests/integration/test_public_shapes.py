"""`vlmtrain check` on small remakes of public data sets, with the keys and columns that these have."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
from PIL import Image

from vlmtrain.cli import main

from ..conftest import gpt, human
from ..unit.data.test_webdataset import write


def encoded(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(out, "PNG")
    return out.getvalue()


def parquet(file: Path, columns: dict[str, list], **features: object) -> dict:
    data = datasets.Dataset.from_dict(columns)
    data.cast(datasets.Features(data.features | features)).to_parquet(file)
    return {"format": "hf", "path": str(file)}


def lines(file: Path, *records: dict) -> str:
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


def sources(home: Path) -> dict[str, object]:
    """By data set: where its remake is, as a source of a split."""
    red, blue, image, images = encoded("red"), encoded("blue"), datasets.Image(), datasets.List(datasets.Image())
    (home / "a.png").write_bytes(red)
    talk = [human("<image>\nWhat?"), gpt("Red.")]
    items = [{"type": "image", "index": 0, "text": None}, {"type": "text", "index": None, "text": "What?"}]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": [{**items[1], "text": "Red."}]}]
    openai = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    ten = [[{"answer": word, "answer_id": i} for i, word in enumerate(["red"] * 7 + ["blue"] * 3)]]
    caption = {"url": "https://example.org/0.png", "key": 0}
    internvl = {"id": 0, "image": "a.png", "width": 20, "height": 20, "conversations": talk}
    return {
        "llava_instruct": lines(home / "llava.jsonl", {"id": "1", "image": "a.png", "conversations": talk}),
        "llava_onevision": parquet(
            home / "ov.parquet",
            {"id": ["1"], "image": [red], "conversations": [talk], "data_source": ["x"]},
            image=image,
        ),
        "internvl": lines(home / "internvl.jsonl", internvl),
        "llama_factory": lines(home / "factory.jsonl", {"messages": openai, "images": ["a.png"]}),
        "vsft": parquet(home / "vsft.parquet", {"messages": [messages], "images": [[red]]}, images=images),
        "the_cauldron": parquet(
            home / "cauldron.parquet",
            {"images": [[red, blue]], "texts": [[{"user": "What?", "assistant": "Red.", "source": "x"}]]},
            images=images,
        ),
        "vqa_v2": parquet(
            home / "vqa.parquet",
            {"image": [red], "question": ["What?"], "answers": ten, "question_id": [7], "answer_type": ["other"]},
            image=image,
        ),
        "science_qa": parquet(
            home / "science.parquet",
            {"image": [red], "question": ["What?"], "choices": [["blue", "red"]], "answer": [1], "hint": [""]},
            image=image,
        ),
        "chart_qa": parquet(
            home / "chart.parquet",
            {"image": [red], "query": ["How much?"], "label": [["14"]], "human_or_machine": [0]},
            image=image,
        ),
        "flickr30k": parquet(
            home / "flickr.parquet",
            {"image": [red], "caption": [["Red.", "A red one."]], "filename": ["1.jpg"], "img_id": ["0"]},
            image=image,
        ),
        "cc3m": {
            "format": "webdataset",
            "path": str(write(home / "cc3m.tar", [("0.png", red), ("0.txt", "Red."), ("0.json", caption)])),
        },
    }


def as_override(source: str | dict) -> str:
    """A source in Hydra's grammar."""
    if isinstance(source, str):
        return f"'{source}'"
    return "{" + ", ".join(f"{key}: '{value}'" for key, value in source.items()) + "}"


def test_check_reads_records_in_the_forms_of_public_data_sets(tmp_path, capsys):
    found = sources(tmp_path)
    split = ", ".join(f"{name}: {as_override(source)}" for name, source in found.items())
    line = ["recipe=llava_1_5", "mini=true", "data=llava_json", f"data.images={tmp_path}", "data.validation=null"]
    main(["check", *line, "stage=instruct", f"data.instruct={{{split}}}", "--json", "--workers", "0"])
    reports = json.loads(capsys.readouterr().out)["instruct"]["sources"]
    assert {name for name, report in reports.items() if report["problems"]} == set()
    assert {name: report["samples"] for name, report in reports.items()} == {
        name: 2 if name == "flickr30k" else 1 for name in found
    }
    assert {name: report["images"] for name, report in reports.items()} == {
        name: {"the_cauldron": 2, "flickr30k": 2}.get(name, 1) for name in found
    }
    assert reports["vqa_v2"]["unused"] == {"question_id": 1, "answer_type": 1}
    assert reports["flickr30k"]["unused"] == {"filename": 2, "img_id": 2}
    assert reports["internvl"]["unused"] == {"width": 1, "height": 1}
