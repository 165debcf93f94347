"""``vlmtrain chat``: chat with a model about images and videos."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .common import take_modules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    shown = {"action": "append", "dest": "media", "default": [], "metavar": "FILE"}  # in the order of the command
    parser.add_argument(
        "--image", type=lambda file: ("image", file), **shown, help="may be repeated; - reads standard input"
    )
    parser.add_argument(
        "--video", type=lambda file: ("video", file), **shown, help="or a folder of frames; may be repeated"
    )
    parser.add_argument(
        "--frames-fps", type=float, default=2.0, metavar="RATE", help="frames per second of a folder (default: 2)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this question and exit; without it, chat")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--web", action="store_true", help="chat on a page in this machine's browser")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port of the page (default: 8000)")
    take_modules(parser)


def run(options: argparse.Namespace) -> None:
    import torch

    from ..data.processor import Processor
    from ..evaluation.chat import Chat
    from ..model import VLMWrapper
    from ..model.folder import check_answers

    media = _media(options)
    if options.web and not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: expected 0 (any free port) to {2**16 - 1}")
    check_answers(options.model)
    processor = Processor.from_pretrained(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(VLMWrapper.from_pretrained(options.model).to(device), processor, media)
    if options.web:
        from ..evaluation.web import serve

        serve(chat, options.port, options.max_new_tokens)
        return
    if not media:
        sys.stderr.write("no --image or --video: the model answers from the text alone\n")
    if options.prompt is not None and options.json:
        answer = chat.say(options.prompt, options.max_new_tokens)
        print(json.dumps({"prompt": options.prompt, "answer": answer}, ensure_ascii=False))
        return
    if options.prompt is not None:
        _answer(chat, options.prompt, options.max_new_tokens)
        return
    print("Ask a question. /image FILE and /video FILE add an image or a video; an empty line quits.")
    while words := _ask():
        command, _, file = words.partition(" ")
        try:
            if command in ("/image", "/video") and not file:
                raise ValueError(f"{command}: expected a file name")
            if command in ("/image", "/video"):
                chat.show(_medium(command[1:], file.strip(), options.frames_fps))
            else:
                _answer(chat, words, options.max_new_tokens)
        except ValueError as error:  # the conversation continues without it
            print(error)


def _media(options: argparse.Namespace) -> list:
    """Images and videos of the options. Raises ValueError if standard input is read twice or needed for questions."""
    from ..data.images import ImageInMemory

    if options.web and (options.media or options.prompt is not None):
        raise ValueError("--web takes images and questions on its page: omit --image, --video and --prompt")
    if not 0 < options.frames_fps < float("inf"):
        raise ValueError(f"--frames-fps {options.frames_fps}: expected a positive number")
    count = options.media.count(("image", "-"))
    if count and (count > 1 or options.prompt is None or sys.stdin.isatty()):
        raise ValueError("--image - reads one image from standard input (< FILE) and needs --prompt for the question")
    return [
        ImageInMemory(sys.stdin.buffer.read(), "standard input")
        if (kind, file) == ("image", "-")
        else _medium(kind, file, options.frames_fps)
        for kind, file in options.media
    ]


def _medium(kind: str, file: str, frames_fps: float):
    from ..data.video import VideoFolder

    return file if kind == "image" else VideoFolder(".", frames_fps, outside=True).read(file, file, "chat")


def _answer(chat, words: str, max_new_tokens: int) -> None:
    """Print an answer as it is generated."""
    chat.say(words, max_new_tokens, on_text=lambda piece: print(piece, end="", flush=True))
    print()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
