"""Chat: the same answer for every way to ask, in pieces, in turns, from standard input, on a page."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.integration.browser import CHROMIUM, Browser
from tests.integration.model_parity import Case, build
from vlmtrain.cli import main
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.rendering import Renderer
from vlmtrain.evaluation import web
from vlmtrain.evaluation.chat import Chat, Pieces
from vlmtrain.model import VLMWrapper

NEW = 12


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
    ids, seen, new = batch.input_ids, batch.is_image, []
    while len(new) < NEW:
        with torch.no_grad():
            token = int(model(ids, batch.images, seen)[0, -1].argmax())
        if token in processor.renderer.stop_ids:
            break
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        seen = None if seen is None else torch.cat([seen, torch.tensor([[False]])], 1)
    return processor.renderer.decode(torch.tensor(new, dtype=torch.long))


def test_turns_and_pictures_add_up(home):
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


def test_a_picture_comes_from_a_file_or_from_standard_input(home, monkeypatch, capsys):
    expected = greedy(home, ["<image>\nWhat is this?"], ["one.png"]) + "\n"
    asked = [str(home / "model"), "--prompt", "What is this?"]
    assert talk(monkeypatch, capsys, [*asked, "--image", str(home / "one.png")]) == (0, expected, "")
    data = (home / "one.png").read_bytes()
    assert talk(monkeypatch, capsys, [*asked, "--image", "-"], data) == (0, expected, "")
    as_json = talk(monkeypatch, capsys, [*asked, "--image", "-", "--json"], data)[1]
    assert json.loads(as_json) == {"prompt": "What is this?", "answer": expected[:-1]}
    assert "no --image" in talk(monkeypatch, capsys, asked)[2]


def test_several_turns_and_a_further_picture(home, monkeypatch, capsys):
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
def test_what_cannot_be_shown_is_said(home, monkeypatch, capsys, line, given, words):
    status, out, err = talk(monkeypatch, capsys, [str(home / "model"), *line], given)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1


# the page


@pytest.fixture
def server(home):
    running = web.build_server(Chat(*parts(home)), 0, NEW)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def post(url: str, body: object, **headers: str) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_page_answers_as_the_command_does(home, server):
    one, other = (base64.b64encode((home / name).read_bytes()).decode() for name in ("one.png", "other.png"))
    first = greedy(home, ["<image>\nWhat is this?"], ["one.png"])
    assert post(f"{server}/say", {"pictures": [one], "turns": [], "words": "What is this?"}) == (200, first)
    turns = [{"role": "user", "text": "<image>\nWhat is this?"}, {"role": "assistant", "text": first}]
    second = greedy(home, ["<image>\nWhat is this?", first, "<image>\nAnd this?"], ["one.png", "other.png"])
    assert post(f"{server}/say", {"pictures": [one, other], "turns": turns, "words": "And this?"}) == (200, second)


def test_mistakes_on_the_page_are_answered_in_one_line(server):
    asked = {"pictures": [], "turns": [], "words": "What?"}
    for body, headers, status, words in (
        (b"{", {}, 400, "Expecting property name"),
        ([], {}, 400, "expected an object"),
        ({**asked, "pictures": ["?"]}, {}, 400, "expected a list of files in base64"),
        ({**asked, "pictures": ["YWJj"]}, {}, 400, "image picture 1 is not an image: it starts with b'abc'"),
        ({**asked, "words": " "}, {}, 400, "words: expected a question"),
        ({**asked, "words": "<image>"}, {}, 400, "1 <image> marks in the user's turns, but 0 images"),
        ({**asked, "turns": [{"role": "user", "text": "<image>"}]}, {}, 400, "more pictures than there are"),
        ({**asked, "turns": [1]}, {}, 400, "expected pictures, turns of role and text"),
        (asked, {"Content-Type": "text/plain"}, 400, "expected JSON"),
        (asked, {"Host": "example.org:80"}, 404, "questions go to /say"),
    ):
        got, said = post(f"{server}/say", body, **headers)
        assert got == status and words in said and "\n" not in said, said


def test_a_port_that_is_taken_is_named(home, server):
    port = int(server.rpartition(":")[2])
    with pytest.raises(ValueError, match=f"--port {port} cannot be used"):
        web.build_server(Chat(*parts(home)), port, NEW)


def test_a_bad_picture_is_named(home):
    (home / "broken.png").write_bytes((home / "one.png").read_bytes()[:300])
    with pytest.raises(BadSample, match=r"image .*broken\.png cannot be decoded"):
        Chat(*parts(home), [home / "broken.png"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_answers(home, server, tmp_path):
    """Two images and three questions, one of them invalid, on the page itself."""
    browser = Browser(tmp_path)
    try:
        browser.open(server)
        for name in ("one.png", "other.png"):
            data = base64.b64encode((home / name).read_bytes()).decode()
            letters = f"Uint8Array.from(atob('{data}'), letter => letter.charCodeAt(0))"
            browser.run(f"add([new File([{letters}], '{name}', {{type: 'image/png'}})])")
            browser.run("ask('What is this?')")
        browser.run("ask('And <image>?')")
        browser.run("id('words').value = 'Sure?'; id('form').requestSubmit()")
        browser.run("new Promise(done => setInterval(() => id('ask').disabled || done(), 50))")
        said = browser.run("[...document.querySelectorAll('.assistant, .problem')].map(turn => turn.textContent)")
        pictures = browser.run(
            "[...document.querySelectorAll('.user')].map(turn => turn.querySelectorAll('img').length)"
        )
        talk, expected = [], []
        for words in ("<image>\nWhat is this?", "<image>\nWhat is this?", "Sure?"):
            talk.append(words)
            names = ["one.png", "other.png"][: str(talk).count("<image>")]
            expected.append(greedy(home, talk, names))
            talk.append(expected[-1])
        assert [said[0], said[1], said[3]] == expected and pictures == [1, 1, 0, 0]
        assert "3 <image> marks in the user's turns, but 2 images" in said[2]
    finally:
        browser.close()
