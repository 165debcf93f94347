"""A local web page for conversations with a model, built with gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from queue import SimpleQueue
from threading import Event

from ..data.images import is_image_value
from ..data.records import IMAGE_MARK
from ..data.video import VideoFolder
from .chat import Chat

HOST = "127.0.0.1"  # everyone who can reach the page can use the model


def serve(chat: Chat, port: int, max_new_tokens: int) -> None:
    """Serve the page until interrupted; port 0 means any free port.

    Raises ValueError if the port cannot be used, or if gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build_page(chat, max_new_tokens)
    try:
        page.launch(server_name=HOST, server_port=port or None, share=False, ssr_mode=False)
    except OSError:
        raise ValueError(f"--port {port} cannot be used: it is in use or needs privileges") from None


def build_page(chat: Chat, max_new_tokens: int):
    """The page, a `gradio.ChatInterface` that has not started. Raises ValueError if gradio is not installed."""
    try:
        import gradio
    except ModuleNotFoundError:
        raise ValueError("--web needs gradio: pip install -e '.[web]'") from None
    worker, videos = ThreadPoolExecutor(1), VideoFolder(".", outside=True)  # one answer at a time

    def answer(message: dict, history: Sequence[dict], conversation: dict) -> Iterator[str]:
        """The answer as it grows. history: may be shorter than `conversation`, after an undo or a retry."""
        one = Chat(chat.model, chat.processor)
        one.turns = conversation.get("turns", ())[: 2 * sum(turn["role"] == "assistant" for turn in history)]
        shown = sum(turn.text.count(IMAGE_MARK) for turn in one.turns if turn.role == "user")
        if chat.processor.renderer.shows_captions:  # supports a single exchange, about the latest image or video
            shown = 0 if message["files"] else 1
        one.media = conversation.get("media", ())[:shown]
        pieces, left = SimpleQueue(), Event()

        def on_text(piece: str) -> None:
            if left.is_set():
                raise ValueError("the reader left")
            pieces.put(piece)

        try:
            if not message["text"].strip():
                raise ValueError("expected a question")
            for file in message["files"]:
                one.show(file if is_image_value(file) else videos.read(file, file, "chat"))
            answered = worker.submit(one.say, message["text"], max_new_tokens, on_text)
            answered.add_done_callback(lambda _: pieces.put(None))
            yield from accumulate(iter(pieces.get, None))
            answered.result()
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        finally:
            left.set()
        conversation.update(turns=one.turns, media=one.media)

    box = gradio.MultimodalTextbox(file_types=["image", "video"], file_count="multiple", placeholder="Ask")
    state = {"additional_inputs": [gradio.State({})], "additional_inputs_accordion": gradio.Accordion(visible=False)}
    options = {"multimodal": True, "title": "vlmtrain chat", "analytics_enabled": False}
    return gradio.ChatInterface(answer, textbox=box, **state, **options)
