"""Chat gives the same answer in every way: in pieces, over several turns, from standard input, and on the page."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.integration.model_parity import Case, build
from tests.media import draw_frames
from vlmtrain.cli import main
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.rendering import Renderer
from vlmtrain.data.video import VideoFolder
from vlmtrain.data.video_plan import VideoPlan
from vlmtrain.evaluation import web
from vlmtrain.evaluation.chat import Chat, Pieces
from vlmtrain.model import VLMWrapper

NEW = 12


@pytest.fixture(autouse=True)
def environment():
    """Undo what gradio sets for its process, which runs of later tests would otherwise see."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model folder and two images."""
    folder = tmp_path_factory.mktemp("chat")
    build(Case(), folder / "model")
    for number, name in enumerate(("one.png", "other.png")):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(number)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    return folder


def parts(home: Path) -> tuple[VLMWrapper, Processor]:
    return VLMWrapper.from_pretrained(home / "model"), Processor.from_pretrained(home / "model")


def greedy(home: Path, turns: list[str], pictures: list[str]) -> str:
    """The answer to a whole conversation, token by token without a cache."""
    model, processor = parts(home)
    said = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    prompt = Conversation("x", said, tuple(ImageOnDisk(home / name) for name in pictures))
    batch = processor.collate([processor.prompt(prompt)])
    new = []
    while len(new) < NEW:
        with torch.no_grad():
            token = int(model(batch)[0, -1].argmax())
        if token in processor.renderer.stop_ids:
            break
        new.append(token)
        ids, index = F.pad(batch.input_ids, (0, 1), value=token), F.pad(batch.visual.index, (0, 1), value=-1)
        batch = batch._replace(input_ids=ids, visual=batch.visual._replace(index=index))
    return processor.renderer.decode(torch.tensor(new, dtype=torch.long))


def test_turns_and_images_accumulate(home):
    chat = Chat(*parts(home), [home / "one.png"])
    first = chat.say("What is this?", NEW)
    assert first == greedy(home, ["<image>\nWhat is this?"], ["one.png"])
    second = chat.say("Sure?", NEW)
    talk = ["<image>\nWhat is this?", first, "Sure?"]
    assert second == greedy(home, talk, ["one.png"])
    chat.show(home / "other.png")
    talk += [second, "<image>\nAnd this?"]
    assert chat.say("And this?", NEW) == greedy(home, talk, ["one.png", "other.png"])
    assert Chat(*parts(home)).say("Hello", NEW) == greedy(home, ["Hello"], [])


def test_pieces_make_up_the_answer(home):
    for words in ("What is this?", "Which is red?", "How many?"):
        pieces = []
        answer = Chat(*parts(home), [home / "one.png"]).say(words, NEW, pieces.append)
        assert "".join(pieces) == answer and len(pieces) > 1


def test_half_a_character_waits_for_the_rest(tokenizer):
    pieces = []
    stream = Pieces(Renderer(tokenizer, "chat", 100), pieces.append)
    stream.put(torch.zeros(1, 0, dtype=torch.long))
    for token in tokenizer("a é…", add_special_tokens=False).input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["a", " é", "…"]


# videos


@pytest.fixture(scope="module")
def moving(home) -> Path:
    """A model folder whose model is shown up to four frames of a video, one per second."""
    shutil.copytree(home / "model", home / "moving")
    processor = Processor.from_pretrained(home / "model")
    geometry = processor.geometry
    plan = VideoPlan(frames=4, fit="squash", tokens=geometry.tokens, grid=geometry.grid)
    processor.geometry = replace(geometry, video=plan)
    processor.save_pretrained(home / "moving")
    draw_frames(home / "frames", 8)
    return home


@pytest.mark.parametrize(
    "fps, frames",
    [
        (["--frames-fps", "1"], (0, 2, 4, 7)),
        ([], (0, 2, 4, 6)),
        (["--frames-fps", "4"], (0, 4)),
    ],
)
def test_a_video_is_shown_as_its_frames_in_the_order_of_the_line(moving, monkeypatch, capsys, fps, frames):
    """A frame per second, or evenly spaced ones if these are more than four."""
    shown = ["--video", str(moving / "frames"), "--image", str(moving / "one.png")]
    line = [str(moving / "moving"), "--prompt", "What?", *shown, *fps]
    images = [*(f"frames/{number}.png" for number in frames), "one.png"]
    expected = greedy(moving, [f"{'<image>' * len(frames)}\n<image>\nWhat?"], images)
    assert talk(monkeypatch, capsys, line) == (0, expected + "\n", "")


def test_a_video_in_a_chat(moving, monkeypatch, capsys):
    (moving / "broken").mkdir(exist_ok=True)
    (moving / "broken" / "0.png").write_bytes(b"words")
    lines = f"/video {moving / 'none.mp4'}\n/video\n/video {moving / 'broken'}\n/video {moving / 'frames'}\nWhat?\n\n"
    status, out, _ = talk(monkeypatch, capsys, [str(moving / "moving")], lines.encode())
    for said in ("none.mp4 does not exist", "/video: expected a file name", "0.png is not an image"):
        assert said in out
    video = VideoFolder(".", 2, outside=True).read(str(moving / "frames"), "", "x")
    chat = Chat(VLMWrapper.from_pretrained(moving / "moving"), Processor.from_pretrained(moving / "moving"), [video])
    assert status == 0 and chat.say("What?", NEW) in out


@pytest.mark.parametrize(
    "model, line, said",
    [
        ("moving", ["--video", "none.mp4"], "video none.mp4 does not exist"),
        ("moving", ["--video", "words.mp4"], "video words.mp4 cannot be decoded"),
        ("moving", ["--video", "empty"], "the folder of frames 'empty' has no images"),
        ("moving", ["--video", "https://example.org/a.mp4"], "is a URL; videos are not downloaded"),
        ("moving", ["--video", "frames", "--frames-fps", "0"], "--frames-fps 0.0: expected a positive number"),
        ("model", ["--video", "frames"], "the model has no settings for videos"),
        ("moving", ["--web", "--video", "frames"], "--web takes images and questions on its page"),
    ],
)
def test_a_video_that_cannot_be_shown_is_named(moving, monkeypatch, capsys, model, line, said):
    monkeypatch.chdir(moving)
    (moving / "empty").mkdir(exist_ok=True)
    (moving / "words.mp4").write_text("words")
    asked = [] if "--web" in line else ["--prompt", "What?"]
    status, out, err = talk(monkeypatch, capsys, [str(moving / model), *line, *asked])
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


# the command


def talk(monkeypatch, capsys, line: list[str], given: bytes = b"") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    status = 0
    try:
        main(["chat", *line, "--max-new-tokens", str(NEW)])
    except SystemExit as done:
        status = done.code
    out, err = capsys.readouterr()
    return status, out, err


def test_an_image_comes_from_a_file_or_from_standard_input(home, monkeypatch, capsys):
    expected = greedy(home, ["<image>\nWhat is this?"], ["one.png"]) + "\n"
    asked = [str(home / "model"), "--prompt", "What is this?"]
    assert talk(monkeypatch, capsys, [*asked, "--image", str(home / "one.png")]) == (0, expected, "")
    data = (home / "one.png").read_bytes()
    assert talk(monkeypatch, capsys, [*asked, "--image", "-"], data) == (0, expected, "")
    as_json = talk(monkeypatch, capsys, [*asked, "--image", "-", "--json"], data)[1]
    assert json.loads(as_json) == {"prompt": "What is this?", "answer": expected[:-1]}
    assert "no --image" in talk(monkeypatch, capsys, asked)[2]


def test_several_turns_and_a_further_image(home, monkeypatch, capsys):
    lines = f"What is this?\n/image {home / 'none.png'}\n/image\n/image {home / 'other.png'}\nAnd this?\n\n"
    line = [str(home / "model"), "--image", str(home / "one.png")]
    status, out, _ = talk(monkeypatch, capsys, line, lines.encode())
    first = greedy(home, ["<image>\nWhat is this?"], ["one.png"])
    second = greedy(home, ["<image>\nWhat is this?", first, "<image>\nAnd this?"], ["one.png", "other.png"])
    assert status == 0 and first in out and second in out
    assert f"image {home / 'none.png'} does not exist" in out and "/image: expected a file name" in out


@pytest.mark.parametrize(
    "line, given, words",
    [
        (["--image", "none.png", "--prompt", "What?"], b"", "image none.png does not exist"),
        (
            ["--image", "-", "--prompt", "What?"],
            b"words",
            "image standard input is not an image: it starts with b'words'",
        ),
        (["--image", "-", "--prompt", "What?"], b"", "image standard input is not an image: it is empty"),
        (["--image", "-"], b"x", "--image - reads one image from standard input (< FILE) and needs --prompt"),
        (["--image", "-", "--image", "-", "--prompt", "What?"], b"x", "--image - reads one image"),
        (["--web", "--port", "70000"], b"", "--port 70000: expected 0 (any free port) to 65535"),
        (["--web", "--port", "-1"], b"", "--port -1: expected 0"),
        (["--web", "--prompt", "What?"], b"", "--web takes images and questions on its page"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(home, monkeypatch, capsys, line, given, words):
    status, out, err = talk(monkeypatch, capsys, [str(home / "model"), *line], given)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1


# the page


def client(home: Path):
    """The page, and a client of gradio that reads it."""
    from gradio_client import Client

    page = web.build_page(Chat(*parts(home)), NEW)
    _, url, _ = page.launch(server_name=web.HOST, prevent_thread_lock=True, ssr_mode=False, quiet=True)
    return page, Client(url, verbose=False)


def ask(reader, words: str, *files: Path) -> list[str]:
    """The answer as it grows."""
    from gradio_client import handle_file

    job = reader.submit({"text": words, "files": [handle_file(str(file)) for file in files]}, api_name="/answer")
    job.result(timeout=120)
    return job.outputs()


def test_the_page_answers_like_the_command(home):
    page, reader = client(home)
    broken = home / "broken.png"
    broken.write_bytes(b"words")
    try:
        grown = ask(reader, "What is this?", home / "one.png")
        first = grown[-1]
        assert first == greedy(home, ["<image>\nWhat is this?"], ["one.png"])
        assert len(grown) > 1 and all(first.startswith(said) for said in grown)
        for words, files, said in (
            ("And <image>?", (), "2 <image> marks in the user's turns, but 1 image"),
            ("And this?", (broken,), r"broken\.png is not an image"),
            (" ", (), "expected a question"),
            ("word " * 4000, (), "the conversation has .* tokens, but the model's max_length is"),
            ("word " * 200_000, (), "characters: too many for max_length"),
        ):
            with pytest.raises(Exception, match=said) as refused:
                ask(reader, words, *files)
            assert "\n" not in str(refused.value)
        second = greedy(home, ["<image>\nWhat is this?", first, "<image>\nAnd this?"], ["one.png", "other.png"])
        assert ask(reader, "And this?", home / "other.png")[-1] == second
    finally:
        page.close()


def test_a_port_that_is_taken_is_named(home):
    with socket.create_server((web.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} cannot be used"):
            web.serve(Chat(*parts(home)), port, NEW)


def test_without_gradio_the_page_says_what_to_install(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[web\]'"):
        web.build_page(Chat(*parts(home)), NEW)


def test_a_bad_image_is_named(home):
    (home / "broken.png").write_bytes((home / "one.png").read_bytes()[:300])
    with pytest.raises(BadSample, match=r"image .*broken\.png cannot be decoded"):
        Chat(*parts(home), [home / "broken.png"])
