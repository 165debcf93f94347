"""LLaVA's format: what is read from good files, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmtrain.data.llava import LlavaJson
from vlmtrain.data.records import BadSample, Turn
from vlmtrain.data.sources import first_problems

TALK = [{"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name, color in (("red.png", (255, 0, 0)), ("deep/blue.png", (0, 0, 255))):
        Image.new("RGB", (4, 4), color).save(folder / name)
    return folder


def read(folder: Path, records: object, images: Path | None = None, name: str = "data.json") -> LlavaJson:
    text = records if isinstance(records, str) else json.dumps(records)
    (folder / name).write_text(text, encoding="utf-8")
    return LlavaJson(folder / name, images)


def marked(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_json_gives_turns_and_pictures_in_order(tmp_path, images):
    records = [
        {"id": "a", "image": "red.png", "conversations": marked("<image>\nColor?", "red", "Sure?", "yes")},
        {"id": 7, "conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
        {"image": ["deep/blue.png", "red.png"], "conversations": marked("see <image> and <image>", "blue, red")},
    ]
    one, two, three = read(tmp_path, records, images)
    assert one.turns == (
        Turn("user", "<image>\nColor?"),
        Turn("assistant", "red"),
        Turn("user", "Sure?"),
        Turn("assistant", "yes"),
    )
    assert one.id == "data.json record 0 (id a)" and two.id == "data.json record 1 (id 7)"
    assert three.id == "data.json record 2"
    assert [turn.role for turn in two.turns] == ["system", "user", "assistant"] and two.images == ()
    assert [picture.load().getpixel((0, 0)) for picture in three.images] == [(0, 0, 255), (255, 0, 0)]
    assert [picture.load().getpixel((0, 0)) for picture in one.images] == [(255, 0, 0)]


def test_jsonl_gives_the_same_as_json(tmp_path, images):
    records = [
        {"id": i, "image": "red.png", "conversations": marked("<image>", f"line\u2028end\x85é{i}")} for i in range(3)
    ]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    from_lines = read(tmp_path, lines, images, "data.jsonl")
    from_json = read(tmp_path, records, images)
    assert [c.turns for c in from_lines] == [c.turns for c in from_json]
    assert [c.images for c in from_lines] == [c.images for c in from_json]
    windows = read(tmp_path, lines.replace("\n", "\r\n"), images, "windows.jsonl")
    assert [c.turns for c in windows] == [c.turns for c in from_json]


def test_text_only_data_need_no_folder(tmp_path):
    (conversation,) = read(tmp_path, [{"id": 1, "conversations": TALK}])
    assert conversation.images == () and conversation.turns[1] == Turn("assistant", "red")
    assert read(tmp_path, [{"image": None, "conversations": TALK}])[0].images == ()


def test_chat_role_names_are_taken_too(tmp_path):
    talk = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    assert read(tmp_path, [{"conversations": talk}])[0].turns == (Turn("user", "q"), Turn("assistant", "a"))


BROKEN = {
    "not an object": ("text", "expected an object, got str"),
    "null": (None, "expected an object, got NoneType"),
    "no conversations": ({"id": "x"}, "'conversations' must be a list that is not empty, got None"),
    "empty conversations": ({"id": "x", "conversations": []}, "'conversations' must be a list that is not empty"),
    "conversations of another type": ({"id": "x", "conversations": "hi"}, "must be a list that is not empty, got 'hi'"),
    "a turn that is text": ({"id": "x", "conversations": ["hi"]}, "a turn must be an object"),
    "a turn without value": ({"id": "x", "conversations": [{"from": "human"}]}, "a turn must be an object"),
    "a value of another type": ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, "a turn must be"),
    "a turn without role": ({"id": "x", "conversations": [{"value": "q"}]}, "'from' must be one of human, .*got None"),
    "an unknown role": ({"id": "x", "conversations": [{"from": "bot", "value": "q"}]}, "'from' must be .*got 'bot'"),
    "a role of another type": ({"id": "x", "conversations": [{"from": ["human"], "value": "q"}]}, "'from' must be"),
    "a picture of another type": ({"id": "x", "image": 5, "conversations": TALK}, "'image' must be a path"),
    "an empty picture name": ({"id": "x", "image": "", "conversations": TALK}, "'image' must be a path"),
    "pictures of another type": ({"id": "x", "image": ["red.png", 5], "conversations": TALK}, "'image' must be a path"),
    "an absolute path": ({"id": "x", "image": "/etc/passwd", "conversations": TALK}, "leads out of"),
    "a path upwards": ({"id": "x", "image": "../data.json", "conversations": TALK}, "leads out of"),
    "a path that turns back": (
        {"id": "x", "image": "deep/../../a", "conversations": TALK},
        "leads out of",
    ),
}


@pytest.mark.parametrize("record, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_and_leaves_the_others_alone(tmp_path, images, record, message):
    good = {"id": "good", "image": "red.png", "conversations": marked("<image>", "red")}
    source = read(tmp_path, [good, record, good], images)
    assert len(source) == 3
    assert source[0].turns == source[2].turns
    name = r"data\.json record 1 \(id x\)" if isinstance(record, dict) else r"data\.json record 1"
    with pytest.raises(BadSample, match=f"^{name}: .*{message}"):
        source[1]
    assert len(first_problems(source, limit=5)) == 1


def test_a_picture_without_a_folder_is_a_bad_sample(tmp_path):
    source = read(tmp_path, [{"id": "x", "image": "red.png", "conversations": marked("<image>", "red")}])
    with pytest.raises(BadSample, match=r"record 0 \(id x\): the record has a picture, but data\.images is not set"):
        source[0]


def test_problems_are_found_before_training(tmp_path, images):
    (images / "short.png").write_bytes((images / "red.png").read_bytes()[:40])
    pictures = ["red.png", "missing.png", "short.png", "red.png", "half\0.png"]
    talks = [marked("<image>", "a")] * 3 + [marked("no mark", "a")] + [marked("<image>", "a")]
    records = [{"id": i, "image": p, "conversations": t} for i, (p, t) in enumerate(zip(pictures, talks))]
    problems = first_problems(read(tmp_path, records, images), limit=10)
    wanted = ("missing.png does not exist", "short.png", "(id 3): 0 <image>", "half")
    assert [part in text for part, text in zip(wanted, problems)] == [True] * 4
    assert len(problems) == 4
    assert first_problems(read(tmp_path, records, images)) == problems[:1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("data.json", "", "data.json is empty: no records"),
        ("data.json", " \n", "data.json is empty: no records"),
        ("data.json", "[]", "data.json is empty: no records"),
        ("data.json", '[{"id": 1}', "data.json is not valid JSON"),
        ("data.json", '{"id": 1}', "data.json must hold a list of records, got dict"),
        ("data.json", "null", "data.json must hold a list of records, got NoneType"),
        ("data.jsonl", "\n\n", "data.jsonl is empty: no records"),
        ("data.jsonl", '{"id": 1}\n\n{"id": 2', "data.jsonl line 3 is not valid JSON"),
    ],
)
def test_a_broken_file_is_an_error_at_once(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text, None, name)
    assert not isinstance(error.value, BadSample)
    assert str(tmp_path) in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        LlavaJson(tmp_path / "absent.json", None)
    with pytest.raises(ValueError, match="cannot be read"):
        LlavaJson(tmp_path, None)
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json cannot be read"):
        LlavaJson(tmp_path / "latin.json", None)


def test_a_missing_image_folder_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"data\.images=.*nowhere is not a folder"):
        read(tmp_path, [{"conversations": TALK}], tmp_path / "nowhere")
