"""Records of every form: what is read, and what is refused because it would change training."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from vlmtrain.data.images import ImageFolder
from vlmtrain.data.record_reader import RecordReader
from vlmtrain.data.records import BadSample, Conversation, check_conversation, is_video
from vlmtrain.data.rendering import Renderer
from vlmtrain.data.video import VideoFolder
from vlmtrain.visual import NO_MEDIA

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
QUESTION, ANSWER = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
PICTURED = {"image": "red.png", "conversations": [{"from": "human", "value": "<image>\nq"}, ANSWER]}


def encoded(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 24), COLORS[color]).save(out, "PNG")
    return out.getvalue()


def in_base64(color: str) -> str:
    return base64.b64encode(encoded(color)).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    home = tmp_path_factory.mktemp("images")
    for color in COLORS:
        (home / f"{color}.png").write_bytes(encoded(color))
    return ImageFolder(home)


def colors(conversation: Conversation) -> list[str]:
    named = {value: name for name, value in COLORS.items()}
    return [named[image.load().getpixel((0, 0))] for image in conversation.images]


def texts(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.turns]


def chat(*contents: object) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


FORMS = {
    "OpenAI, images beside": ({"messages": chat("<image>q", "a"), "images": ["red.png"]}, ["<image>q", "a"], ["red"]),
    "typed items": (
        {"messages": chat([words("1: "), {"type": "image"}, words(" 2: "), {"type": "image"}], "a"),
         "images": ["red.png", "blue.png"]},
        ["1: <image> 2: <image>", "a"], ["red", "blue"],
    ),
    "items with an index": (
        {"messages": chat([{"type": "image", "index": 1}, {"type": "image", "index": 0, "text": None}], [words("a")]),
         "images": ["red.png", "blue.png"]},
        ["<image><image>", "a"], ["blue", "red"],
    ),
    "items with paths": (
        {"messages": chat([{"type": "image", "image": "blue.png"}, words("q")], "a")}, ["<image>q", "a"], ["blue"],
    ),
    "items with a data URL": (
        {"messages": chat([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64('red')}"}}],
                          "a")},
        ["<image>", "a"], ["red"],
    ),
    "prompt and completion as texts": ({"prompt": "q", "completion": "a"}, ["q", "a"], []),
    "prompt and completion as messages": (
        {"prompt": chat("q"), "completion": [{"role": "assistant", "content": "a"}]}, ["q", "a"], [],
    ),
    "prompt as messages": ({"prompt": chat("q", "a", "r"), "completion": "b"}, ["q", "a", "r", "b"], []),
    "query and label": ({"query": "q", "label": 3, "image": "red.png"}, ["<image>\nq", "3"], ["red"]),
    "the most frequent of several answers": (
        {"question": "q", "answers": ["x", "a", "a"], "image": "red.png"}, ["<image>\nq", "a"], ["red"],
    ),
    "conversations as JSON text": ({"conversations": json.dumps([QUESTION, ANSWER])}, ["q", "a"], []),
    "one caption in a list": ({"captions": ["a"], "image": "red.png"}, ["<image>", "a"], ["red"]),
    "a system text": ({"system": "s", "conversations": [QUESTION, ANSWER]}, ["s", "q", "a"], []),
    "base64": ({**PICTURED, "image": in_base64("blue")}, ["<image>\nq", "a"], ["blue"]),
    "bytes": ({**PICTURED, "image": {"bytes": encoded("blue"), "path": None}}, ["<image>\nq", "a"], ["blue"]),
}  # fmt: skip


@pytest.mark.parametrize("record, said, seen", FORMS.values(), ids=FORMS)
def test_every_form_is_read(folder, record, said, seen):
    conversation = RecordReader(folder).read(record, "r")
    assert texts(conversation) == said and colors(conversation) == seen
    assert conversation.unused == ()
    check_conversation(conversation)


VIDEO = ["blue.png", "red.png"]  # a list of frames
VIDEOS = {
    "LLaVA-Video-178K": ({"video": VIDEO, "conversations": [human("<image>\nq"), ANSWER]}, ["<image>\nq", "a"], "v"),
    "its own mark": ({"video": VIDEO, "conversations": [human("<video>\nq"), ANSWER]}, ["<image>\nq", "a"], "v"),
    "beside an image": (
        {"image": "red.png", "video": VIDEO, "conversations": [human("<video> then <image>"), ANSWER]},
        ["<image> then <image>", "a"], "vi",
    ),
    "several": ({"videos": [VIDEO, VIDEO], "messages": chat("<video><video>q", "a")}, ["<image><image>q", "a"], "vv"),
    "without turns": ({"video": VIDEO, "question": "q", "answer": "a"}, ["<image>\nq", "a"], "v"),
    "a caption": ({"video": VIDEO, "caption": "a"}, ["<image>", "a"], "v"),
    "a typed item": (
        {"messages": chat([{"type": "video", "video": VIDEO}, words("q")], "a")}, ["<image>q", "a"], "v",
    ),
    "typed items and a column": (
        {"video": VIDEO, "image": "red.png", "messages": chat([{"type": "image"}, {"type": "video"}, words("q")], "a")},
        ["<image><image>q", "a"], "iv",
    ),
    "the word alone": ({"conversations": [human("a <video> tag"), ANSWER]}, ["a <video> tag", "a"], ""),
}  # fmt: skip


@pytest.mark.parametrize("record, said, kinds", VIDEOS.values(), ids=VIDEOS)
def test_videos_are_read(folder, record, said, kinds):
    reader = RecordReader(folder, VideoFolder(folder.folder))
    conversation = reader.read(record, "r")
    assert texts(conversation) == said and conversation.unused == ()
    assert "".join("v" if is_video(medium) else "i" for medium in conversation.media) == kinds
    for medium in filter(is_video, conversation.media):
        assert medium.probe().times.tolist() == [0.0, 0.5]
    check_conversation(conversation)


def test_clips_are_read(folder):
    reader = RecordReader(folder, VideoFolder(folder.folder, fps=1))
    record = {
        "videos": [VIDEO, VIDEO],
        "video_start": [0, 1],
        "video_end": [1, 2],
        "messages": chat("<video><video>q", "a"),
    }
    first, second = (next(video.frames([0])).getpixel((0, 0)) for video in reader.read(record, "r").media)
    assert (first, second) == (COLORS["blue"], COLORS["red"])
    with pytest.raises(BadSample, match="'video_start' has 1 times for 2 videos"):
        reader.read({**record, "video_start": [0]}, "r")
    one = {"video": VIDEO, "video_start": 1, "messages": chat("<video>q", "a")}
    assert len(reader.read(one, "r").media[0].probe().times) == 1


@pytest.mark.parametrize("more", [{}, {"video": ""}, {"video_path": "a.mp4"}, {"image": "red.png"}])
@pytest.mark.parametrize("text", ["<video>\nq", "q <video>"])
def test_a_mark_of_a_video_without_one_is_bad(folder, text, more):
    with pytest.raises(BadSample, match="has the mark <video>, but the record has no video"):
        RecordReader(folder).read({**more, "messages": chat(text, "a")}, "r")


@pytest.mark.parametrize("text", ["q", "<video><video>q", "<image><video>q"])
def test_marks_of_videos_must_match(folder, text):
    reader = RecordReader(folder, VideoFolder(folder.folder))
    with pytest.raises(BadSample, match="<image> marks in the user's turns, but 0 images and 1 videos"):
        check_conversation(reader.read({"video": VIDEO, "messages": chat(text, "a")}, "r"))


REFUSED = {
    "audio": ({**PICTURED, "audio": ["a.wav"]}, "'audio' is not supported; data.ignore=.audio. trains without it"),
    "a video that nothing reads": ({**PICTURED, "my_video": "a.mp4"}, "'my_video' is not supported"),
    "the start of no video": ({**PICTURED, "video_start": 1}, "the start or end of a video, but no video"),
    "tools": ({**PICTURED, "tools": "[{}]"}, "'tools' is not supported"),
    "another image column": ({**PICTURED, "mask": {"bytes": b"x", "path": None}}, "'mask' contains an image"),
    "images beside an image": ({**PICTURED, "images": ["blue.png"]}, "'images' contains an image that nothing reads"),
    "a path of another name": (
        {"img": "red.png", "conversations": [QUESTION, ANSWER]}, "'img' contains an image .*data.columns.image=img",
    ),
    "a path under any name": ({"file": "red.png", "conversations": [QUESTION, ANSWER]}, "'file' contains an image"),
    "a weight of the record": ({**PICTURED, "loss": 0.5}, "'loss' is not supported"),
    "a weight of 0": ({**PICTURED, "weight": 0}, "'weight' is not supported"),
    "a record not to train on": ({**PICTURED, "train": False}, "'train' is not supported"),
    "a turn's scale of 0": ({"conversations": [QUESTION, {**ANSWER, "loss_scale": 0.0}]}, "'loss_scale' is not"),
    "an image of the assistant": (
        {"messages": chat("q", [{"type": "image", "path": "red.png"}, {"type": "text", "text": "a"}])},
        "only the user's turns can have images",
    ),
    "a question beside a caption": ({"image": "red.png", "question": "q", "text": "t"}, "'text' and 'question' it is"),
    "an answer beside a caption": ({"image": "red.png", "text": "q", "label": "a"}, "'text' and 'label' it is neither"),
    "an instruction": ({"image": "red.png", "caption": "c", "instruction": "i"}, "'instruction' is not supported"),
    "reasoning": ({"messages": [chat("q")[0], {**chat("q", "a")[1], "reasoning": "r"}]}, "'reasoning' is not"),
    "an answer beyond all floats": ({"question": "q", "answer": 10**400}, "the answer must be a string, got 1000"),
    "a weight beyond floats": ({"conversations": [QUESTION, {**ANSWER, "weight": 10**400}]}, "'weight' of at least"),
    "an answer of nan": ({"question": "q", "answer": float("nan")}, "the answer must be a string, got nan"),
    "a call of a tool": ({"messages": [*chat("q", "a"), {**chat("q")[0], "tool_calls": [1]}]}, "'tool_calls' is not"),
    "two system texts": (
        {"system": "s", "messages": [{"role": "system", "content": "t"}, *chat("q", "a")]}, "'system' and a system",
    ),
    "several captions": ({"captions": ["a", "b"], "image": "red.png"}, "data=hf trains on each of several captions"),
    "a URL": ({**PICTURED, "image": "https://example.org/a.png"}, "is a URL; images are not downloaded"),
    "an index that leads nowhere": (
        {"messages": chat([{"type": "image", "index": 1}], "a"), "images": ["red.png"]}, "indices .1., but there are 1",
    ),
    "a weight of a question": ({"conversations": [{**QUESTION, "weight": 1}, ANSWER]}, "only the assistant's turns"),
    "a negative weight": ({"conversations": [QUESTION, {**ANSWER, "weight": -1}]}, "'weight' of at least 0"),
    "two weights": ({"conversations": [QUESTION, {**ANSWER, "weight": 1, "loss": 0}]}, "must have one 'weight'"),
    "a data URL without base64": ({**PICTURED, "image": "data:image/png,abc"}, "data URL without base64"),
    "text that is not base64": ({**PICTURED, "image": "/9j/" + "?" * 90}, "is not valid base64"),
}  # fmt: skip


@pytest.mark.parametrize("record, message", REFUSED.values(), ids=REFUSED)
def test_what_would_change_training_is_refused(folder, record, message):
    with pytest.raises(BadSample, match=f"^r: .*{message}"):
        RecordReader(folder).read(record, "r")


def test_a_class_beside_a_caption_is_not_an_answer(folder):
    conversation = RecordReader(folder).read({"caption": "a", "label": 3, "image": "red.png"}, "r")
    assert texts(conversation) == ["<image>", "a"] and conversation.unused == ("label",)


def test_other_keys_are_listed_as_unused_and_ignored_keys_are_not(folder):
    talk = [{**QUESTION, "language": "en"}, ANSWER]
    record = {"conversations": talk, "source": "x", "video": "a.mp4", "width": 5, "image_id": 7}
    conversation = RecordReader(folder, ignored=["video"]).read(record, "r")
    assert sorted(conversation.unused) == ["conversations[].language", "image_id", "source", "width"]


@pytest.mark.parametrize(
    "given, weights", [({"weight": 0}, [0, 1]), ({"weight": 0.5}, [0.5, 1]), ({"loss": False}, [0, 1]), ({}, [1, 1])]
)
def test_the_weight_of_a_turn_is_the_loss_weight_of_its_tokens(folder, tokenizer, given, weights):
    talk = [QUESTION, {**ANSWER, **given}, QUESTION, ANSWER]
    rendered = Renderer(tokenizer, "chat", 100).render(
        RecordReader(folder).read({"conversations": talk}, "r"), NO_MEDIA
    )
    for (start, end), weight in zip(rendered.answers, weights):
        assert set(rendered.weights[start - 1 : end - 1].tolist()) == {weight}
        assert (rendered.targets[start - 1 : end - 1] >= 0).all() == (weight > 0)


REPAIRED = {
    "a first answer": ("aqa", ["q", "a"]),
    "a last question": ("qaq", ["q", "a"]),
    "two questions": ("qqa", ["q\nq", "a"]),
    "two answers": ("qaa", ["q", "a\na"]),
    "nothing to repair": ("qaqa", ["q", "a", "q", "a"]),
}


@pytest.mark.parametrize("turns, expected", REPAIRED.values(), ids=REPAIRED)
def test_turns_are_repaired_if_that_is_wanted(folder, turns, expected):
    record = {"conversations": [{"q": QUESTION, "a": ANSWER}[turn] for turn in turns]}
    conversation = RecordReader(folder, repair=True).read(record, "r")
    assert texts(conversation) == expected
    assert conversation.repaired == (len(turns) != 4)
    untouched = RecordReader(folder).read(record, "r")
    assert len(untouched.turns) == len(turns) and not untouched.repaired


def test_the_images_of_a_dropped_question_are_dropped_too(folder):
    talk = [{"from": "human", "value": "<image>"}, ANSWER, {"from": "human", "value": "<image>"}]
    record = {"conversations": talk, "image": ["blue.png", "red.png"]}
    conversation = RecordReader(folder, repair=True).read(record, "r")
    assert colors(conversation) == ["blue"] and texts(conversation) == ["<image>", "a"]
