"""The finished conversations of an evaluation that may be interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ..data.actions import Binning
from ..data.records import Grading
from ..data.regions import Place
from ..files import replace_text
from .generation import Likelihood
from .reading import Told
from .scores import Answer


class Unfinished:
    """Finished conversations in a file, which an interrupted evaluation reads when it is repeated.

    identity: plain values that decide the answers. A file with another identity is discarded. The first line of the
    file is the identity, and each further line is one conversation. found: the finished conversations by number of
    demonstrations and index, with a `Told` for each view.
    """

    def __init__(self, file: Path, identity: Mapping):
        self.file, self.found = file, {}
        head = json.dumps(identity, sort_keys=True)
        with suppress(OSError):
            first, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            if first == head:
                with suppress(ValueError, KeyError, TypeError):  # lines after a damaged one are not used
                    for line in lines[:-1]:  # what follows the last line feed was interrupted
                        self.found |= _read(line)
        replace_text(file, "".join(f"{line}\n" for line in (head, *(_line(*item) for item in self.found.items()))))

    def add(self, told: Mapping[tuple[int, int], list[Told]]) -> None:
        """Keep further conversations."""
        with open(self.file, "a", encoding="utf-8") as out:
            out.write("".join(f"{_line(*item)}\n" for item in told.items()))

    def remove(self) -> None:
        """Delete the file, when the evaluation is complete."""
        self.file.unlink(missing_ok=True)


def _line(key: tuple[int, int], told: list[Told]) -> str:
    shots, index = key
    views = [{**each._asdict(), "answers": list(map(asdict, each.answers))} for each in told]
    return json.dumps({"shots": shots, "conversation": index, "views": views})


def _read(line: str) -> dict[tuple[int, int], list[Told]]:
    entry = json.loads(line)
    views = [
        Told(view["loss"], view["weight"], tuple(map(_answer, view["answers"])), tuple(view["demonstrations"]))
        for view in entry["views"]
    ]
    return {(entry["shots"], entry["conversation"]): views}


def _answer(values: dict) -> Answer:
    grading = {key: tuple(value) if isinstance(value, list) else value for key, value in values["grading"].items()}
    grading["places"] = tuple(map(Place.of, grading["places"]))
    grading["actions"] = grading["actions"] and Binning.of(grading["actions"])
    likelihoods = tuple(Likelihood(*each) for each in values["likelihoods"])
    return Answer(**{**values, "grading": Grading(**grading), "likelihoods": likelihoods})
