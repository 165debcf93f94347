"""``vlmtrain chat``: chat with a model about an image."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .common import take_modules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be repeated; - reads standard input"
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

    pictures = _pictures(options)
    if options.web and not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: expected 0 (any free port) to {2**16 - 1}")
    check_answers(options.model)
    processor = Processor.from_pretrained(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(VLMWrapper.from_pretrained(options.model).to(device), processor, pictures)
    if options.web:
        from ..evaluation.web import serve

        serve(chat, options.port, options.max_new_tokens)
        return
    if not pictures:
        sys.stderr.write("no --image: the model answers from the text alone\n")
    if options.prompt is not None and options.json:
        answer = chat.say(options.prompt, options.max_new_tokens)
        print(json.dumps({"prompt": options.prompt, "answer": answer}, ensure_ascii=False))
        return
    if options.prompt is not None:
        _answer(chat, options.prompt, options.max_new_tokens)
        return
    print("Ask about the image. /image FILE adds an image; an empty line quits.")
    while words := _ask():
        try:
            if words == "/image":
                raise ValueError("/image: expected a file name")
            if words.startswith("/image "):
                chat.show(words.removeprefix("/image ").strip())
            else:
                _answer(chat, words, options.max_new_tokens)
        except ValueError as error:  # the conversation continues without it
            print(error)


def _pictures(options: argparse.Namespace) -> list:
    """Images of the options. Raises ValueError if standard input is requested twice or is needed for questions."""
    from ..data.images import ImageInMemory

    if options.web and (options.image or options.prompt is not None):
        raise ValueError("--web takes images and questions on its page: omit --image and --prompt")
    count = options.image.count("-")
    if count and (count > 1 or options.prompt is None or sys.stdin.isatty()):
        raise ValueError("--image - reads one image from standard input (< FILE) and needs --prompt for the question")
    return [ImageInMemory(sys.stdin.buffer.read(), "standard input") if i == "-" else i for i in options.image]


def _answer(chat, words: str, max_new_tokens: int) -> None:
    """Print an answer as it is generated."""
    chat.say(words, max_new_tokens, on_text=lambda piece: print(piece, end="", flush=True))
    print()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
