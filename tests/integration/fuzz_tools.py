"""Tools of the fuzz test: breaking the data, and judging the outcome by plain rules and other readers."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

SIDE = 8
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def picture(seed: int, kind: str = "PNG") -> bytes:
    """An image of noise; no two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


# breaking


DEEP = "<deep>"
"""Placeholder for nested lists, deeper than Python can write them."""
WEIRD: list[Any] = [
    None, True, False, 0, -1, 3.5, 1e308, float("nan"), float("inf"), 10**400, "", " ", "\n\t", "\0", "a\0b",
    "x" * 9000, "<image>", "<image>" * 30, " <image>", "<image", "<IMAGE>", "\ud800", "\udfff tail", "\u202eright",
    "\ufeff", "é…😀", "<|end|>", "a<|end|>b", "<|user|>x<|assistant|>y", "<|pad|>", "{{ messages }}", "{% raw %}",
    "\ue0000\ue001", "%s{0}", [], {}, [[]], [None], ["<image>"], {"from": "gpt"}, {"value": "x"},
    {"bytes": None, "path": None}, DEEP, "human", "gpt", "system", "Human",
]  # fmt: skip
PATHS: list[Any] = [
    "../outside.png", "/etc/hostname", "a\\b.png", "0.png\0", "n" * 5000, "./0.png", "sub/../0.png", "0.png/", ".",
    "text.png", "cut.png", "cut.jpg", "empty.png", "missing.png", "link.png", "pipe.png", ["0.png", "1.jpg"],
    ["0.png", None], ["0.png", ""], "1.jpg", ["2.jpg"], "\udcff.png",
]  # fmt: skip


def as_json(value: Any, rng: random.Random, depth: int) -> bytes:
    """JSON, with `depth` nested lists for each DEEP."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    return text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode("utf-8", "surrogatepass")


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    """The paths of all parts of nested lists and objects."""
    found = [here]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += paths(part, (*here, key))
    return found


def mutated(value: Any, rng: random.Random) -> Any:
    """`value` with one of its parts replaced, deleted, duplicated, renamed, moved or corrupted."""
    path = rng.choice(paths(value))
    if not path:
        return copy.deepcopy(rng.choice(WEIRD)) if rng.random() < 0.3 else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    change = rng.choice(["replace", "replace", "replace", "drop", "spoil", "double", "other"])
    if change == "replace":
        parent[key] = copy.deepcopy(rng.choice(PATHS if key == "image" else WEIRD))
    elif change == "drop":
        del parent[key]
    elif change == "spoil" and isinstance(parent[key], str):
        where = rng.randrange(len(parent[key]) + 1)
        weird = rng.choice([weird for weird in WEIRD if isinstance(weird, str)])
        parent[key] = parent[key][:where] + weird + parent[key][where:]
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif change == "other":
        parent[rng.choice(["Image", "conversation", "role", "content", "from", "value", ""])] = parent.pop(key)
    return value


def broken_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` truncated, or with bytes changed, inserted, removed or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        where = rng.randrange(len(data) + 1)
        change = rng.choice(["cut", "change", "flip", "insert", "remove", "repeat", "zeros"])
        if change == "cut":
            del data[where:]
        elif change in ("change", "flip") and where < len(data):
            data[where] = rng.randrange(256) if change == "change" else data[where] ^ (1 << rng.randrange(8))
        elif change == "insert":
            junk = [b"\0", b"\n", b'"', b"\xff", b"\xc3", b"{", b"]", b",", b"\\", b"\xef\xbb\xbf", rng.randbytes(9)]
            data[where:where] = rng.choice(junk)
        elif change == "remove":
            del data[where : where + rng.choice([1, 4, 512])]
        elif change == "repeat":
            data[where:where] = data[where : where + rng.choice([1, 30, 512])]
        elif change == "zeros":
            data[where : where + 16] = bytes(len(data[where : where + 16]))
    return bytes(data)


# judging

Verdict = tuple[list[str], list[np.ndarray]]
"""The answers in order, and the images' pixels."""


def judged(turns: Sequence[tuple[str, str]] | None, pictures: Sequence[bytes | None] | None) -> Verdict | None:
    """What a record must become; None if it must be refused. An image is its bytes, or None if it has none."""
    if turns is None or pictures is None:
        return None
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        return None
    if any(0xD800 <= ord(character) <= 0xDFFF for _, text in turns for character in text):
        return None
    answers = [text.strip() for role, text in turns if role == "assistant"]
    marks = sum(text.count("<image>") for role, text in turns if role == "user")
    if not all(answers) or marks != len(pictures):
        return None
    pixels = [decoded(data) for data in pictures]
    return None if any(each is None for each in pixels) else (answers, pixels)


def decoded(data: bytes | None) -> np.ndarray | None:
    """Pixels of PNG or JPEG bytes, as Pillow decodes them; None if that fails, or if their shape is absurd."""
    if not isinstance(data, bytes):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
                if max(image.size) > 200 * min(image.size):
                    return None
                return np.asarray(image.convert("RGB"))
        except Exception:
            return None


def llava_turns(messages: object) -> list[tuple[str, str]] | None:
    """Turns of LLaVA's messages; None if they are not valid."""
    if not isinstance(messages, list) or not messages:
        return None
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            return None
        speaker = message.get("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            return None
        turns.append((ROLES[speaker], message["value"]))
    return turns


def in_front(turns: list[tuple[str, str]] | None, pictures: int) -> list[tuple[str, str]] | None:
    """Turns with marks before the first question, if the user gave none."""
    if turns is None or any("<image>" in text for role, text in turns if role == "user"):
        return turns
    first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        return turns
    return [*turns[:first], ("user", "<image>\n" * pictures + turns[first][1]), *turns[first + 1 :]]


def quiet(call: Callable, *arguments: Any, **options: Any) -> Any:
    """What a call returns, or the exception that it raises."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return error
