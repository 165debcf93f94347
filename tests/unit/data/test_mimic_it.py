"""MIMIC-IT: instructions after their examples, images in each of its forms, and Otter's template by hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from vlmtrain.data.indexed_json import JsonObject
from vlmtrain.data.mimic_it import MimicIT
from vlmtrain.data.records import BadSample
from vlmtrain.data.rendering import Renderer
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

from ...media import slots


def entry(number: int, images: list[str], *related: str, **changed) -> dict:
    own = {"instruction": f"q{number}", "answer": f"a{number}", "image_ids": images, "rel_ins_ids": list(related)}
    return {key: value for key, value in {**own, **changed}.items() if value is not ...}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mimic")
    images = {}
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (4 + number, 4, 3), np.uint8)
        noise[0, 0] = 255, 90 * number, 7
        Image.fromarray(noise).save(folder / f"i{number}.png")
        images[f"i{number}"] = base64.urlsafe_b64encode((folder / f"i{number}.png").read_bytes()).decode()
    assert any("_" in text or "-" in text for text in images.values())
    # JSON may escape slashes and have white space anywhere
    (folder / "images.json").write_text(json.dumps({"é": "", **images}, indent=2, ensure_ascii=False))
    rows = [{"id": name, "base64": text} for name, text in images.items()]
    Dataset.from_list(rows).to_parquet(folder / "images.parquet")
    data = {
        "x": entry(0, ["i0"], "y", "z"),
        "y": entry(1, ["i1", "i2"]),
        "z": entry(2, ["i1", "i2"]),
        "text": entry(3, ..., rel_ins_ids=...),
    }
    (folder / "instructions.json").write_text(json.dumps({"meta": {}, "data": data}))
    (folder / "related.json").write_text(json.dumps({"z": ["x"], "y": []}))
    return folder


def sizes(conversation) -> list[tuple[int, int]]:
    return [medium.size() for medium in conversation.media]


@pytest.mark.parametrize("images", ["images.json", "images.parquet", ""])
def test_an_instruction_follows_its_examples(folder, images):
    """The second example shows the images of the first, which are not repeated."""
    source = MimicIT(folder / "instructions.json", folder / images, None, None)
    asked = [turn.text for turn in source[0].turns]
    assert asked == ["<image><image>q1", "a1", "q2", "a2", "<image>q0", "a0"]
    assert sizes(source[0]) == [(5, 4), (6, 4), (4, 4)] and source[0].media[0].load().getpixel((0, 0)) == (255, 90, 7)
    assert [turn.text for turn in source[3].turns] == ["q3", "a3"] and len(source) == 4
    source[0].media[0].check()


def test_related_instructions_of_a_file_and_their_number(folder):
    source = MimicIT(folder / "instructions.json", folder, folder / "related.json", None)
    assert [turn.text for turn in source[0].turns] == ["<image>q0", "a0", "<image><image>q2", "a2"] and len(source) == 2
    for examples, count in ((0, 2), (1, 4), (5, 6)):
        assert len(MimicIT(folder / "instructions.json", folder, None, examples)[0].turns) == count


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": 3}, "'answer' of the instruction 'x' must be a string, got 3"),
        ({"rel_ins_ids": ["w"]}, "the data has no instruction 'w'"),
        ({"rel_ins_ids": "y"}, "'rel_ins_ids' of the instruction 'x' must be a list, got 'y'"),
        ({"image_ids": [5]}, r"'image_ids' of the instruction 'x' must be strings, got \[5\]"),
        ({"image_ids": ["i9"]}, "data.images has no image 'i9'"),
    ],
)
def test_broken_instructions_are_named(folder, tmp_path, change, message):
    (tmp_path / "one.json").write_text(json.dumps({"data": {"x": entry(0, ["i0"], **change)}}))
    source = MimicIT(tmp_path / "one.json", folder / "images.json", None, None)
    with pytest.raises(BadSample, match=rf"one.json instruction 0 \(id x\): {message}"):
        source[0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must be a JSON object that maps image IDs to base64 strings"),
        ('{"a": 5}', "record 0, byte 6: expected a string, got '5'"),
        ('{"a": "b"', "expected ',' or '}' after the previous record, got the end of the file"),
        ('{"a" "b"}', "expected ':' after a name"),
    ],
)
def test_broken_files_of_images_are_refused(tmp_path, text, message):
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        JsonObject(tmp_path / "images.json")


def test_strings_of_an_object_at_the_edges_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmtrain.data.indexed_json.CHUNK", 7)
    values = {f"näme {number}": 'a"\\' * number for number in range(20)}
    file = tmp_path / "object.json"
    file.write_text(json.dumps(values, ensure_ascii=False))
    found = JsonObject(file).spans
    data = file.read_bytes()
    assert {name: json.loads(data[start : start + length]) for name, (start, length) in found.items()} == values


def test_the_targets_of_otters_template(folder):
    names = ["<image>", "<|endofchunk|>", "<answer>"]
    tokenizer = build_tiny_tokenizer(("User", "GPT"))
    tokenizer.add_tokens(names)
    conversation = MimicIT(folder / "instructions.json", folder, None, None)[0]
    rendered = Renderer(tokenizer, "otter", 100).render(conversation, slots(1, 1, 1))
    shown = [
        f"<{place}>" if place >= 0 else tokenizer.decode([token])
        for token, place in zip(rendered.input_ids.tolist(), rendered.index.tolist())
    ]
    asked = [f"User: q{number} GPT:<answer> a{number}<|endofchunk|>" for number in (1, 2, 0)]
    assert "".join(shown) == f"<0><1>{asked[0]}{asked[1]}<2>{asked[2]}"
    trained = "".join(shown[place + 1] for place in rendered.weights.nonzero()[:, 0].tolist())
    assert trained == "".join(f" a{number}<|endofchunk|>" for number in (1, 2, 0))
