"""A local web page for conversations with a model, served by the standard library.

GET /      the page
POST /say  {"pictures": [base64, ...], "turns": [{"role", "text"}, ...], "words": "..."} -> the answer, as it is made

The page keeps the conversation; each question brings all of it. A mistake is answered with status 400 and one line.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..data.images import ImageInMemory
from ..data.records import IMAGE_MARK, Turn
from .chat import Chat

HOST = "127.0.0.1"  # everyone who can reach the page can use the model
MAX_BYTES = 64 * 2**20
POLICY = "default-src 'self' 'unsafe-inline'; img-src data:"
PAGE = Path(__file__).with_name("page.html")


def serve(chat: Chat, port: int, max_new_tokens: int) -> None:
    """Serve the page until interrupted. Raises ValueError if the port is in use."""
    server = build_server(chat, port, max_new_tokens)
    print(f"http://{HOST}:{server.server_port}/ (Ctrl-C ends)", flush=True)
    with server:
        server.serve_forever()


def build_server(chat: Chat, port: int, max_new_tokens: int) -> ThreadingHTTPServer:
    """A server that has not started; port 0 means any free port. Raises ValueError if the port is in use."""
    lock = threading.Lock()  # one answer at a time

    class Handler(_Handler):
        def answer(self, asked: dict) -> None:
            with lock:
                pictures = _pictures(asked)
                turns = _turns(asked, len(pictures))
                if chat.processor.renderer.template == "plain":  # which supports a single exchange
                    pictures, turns = pictures[_marks(turns) :] or pictures[-1:], ()
                one = Chat(chat.model, chat.processor, pictures)
                one.turns = turns
                one.say(asked["words"], max_new_tokens, on_text=self.send)

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ValueError(f"--port {port} cannot be used: {error.strerror}") from None


def _pictures(asked: dict) -> list[ImageInMemory]:
    try:
        found = [base64.b64decode(data, validate=True) for data in asked["pictures"]]
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("pictures: expected a list of files in base64") from None
    return [ImageInMemory(data, f"picture {number}") for number, data in enumerate(found, 1)]


def _turns(asked: dict, pictures: int) -> tuple[Turn, ...]:
    """The previous turns. Their marks stand for the first images; the other images belong to the question."""
    try:
        turns = tuple(Turn(turn["role"], turn["text"]) for turn in asked["turns"])
        asks = [asked["words"], *(turn.text for turn in turns)]
    except (KeyError, TypeError):
        raise ValueError("expected pictures, turns of role and text, and words") from None
    if not all(isinstance(text, str) for text in asks) or not asked["words"].strip():
        raise ValueError("words: expected a question")
    if _marks(turns) > pictures:
        raise ValueError(f"the words before show more pictures than there are ({pictures})")
    return turns


def _marks(turns: tuple[Turn, ...]) -> int:
    return sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")


class _Handler(BaseHTTPRequestHandler):
    def answer(self, asked: dict) -> None:
        """Stream the answer to a question. Raises ValueError if the question is invalid."""
        raise NotImplementedError

    def do_GET(self) -> None:
        if self.path not in ("/", "/index.html"):
            self.refuse(404, "there is one page only: /")
            return
        self.begin(200, "text/html")
        self.wfile.write(PAGE.read_bytes())

    def do_POST(self) -> None:
        self.begun = False
        host = self.headers.get("Host", "").rpartition(":")[0]
        size = self.headers.get("Content-Length", "")
        is_ours = host in (HOST, "localhost")  # pages of other sites must not send requests
        if self.path != "/say" or not is_ours:
            self.refuse(404, "questions go to /say")
        elif self.headers.get_content_type() != "application/json" or not size.isdigit() or int(size) > MAX_BYTES:
            self.refuse(400, f"expected JSON of at most {MAX_BYTES:,} bytes")
        else:
            self.reply(self.rfile.read(int(size)))

    def reply(self, body: bytes) -> None:
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise ValueError("expected an object")
            self.answer(asked)
            self.send("")
        except (BrokenPipeError, ConnectionResetError):  # the client disconnected
            pass
        except (ValueError, KeyError) as error:
            if not self.begun:
                self.refuse(400, str(error))

    def send(self, text: str) -> None:
        if not self.begun:
            self.begin(200, "text/plain")
        self.wfile.write(text.encode())
        self.wfile.flush()

    def refuse(self, status: int, words: str) -> None:
        self.begin(status, "text/plain")
        self.wfile.write(words.encode())

    def begin(self, status: int, kind: str) -> None:
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        """Log nothing: the terminal belongs to the user."""
