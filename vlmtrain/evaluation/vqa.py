"""VQA accuracy: an answer is scored by the number of annotators who gave it, after the official normalization.

Antol et al., 2015; the normalization is that of the official evaluation code (GT-Vision-Lab/VQA), quirks included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH = 3
"""Number of other annotators who must have given an answer for it to count fully."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Contractions by their spelling with one apostrophe missing."""
    known = {"somebody'd": "somebodyd"}  # as in the official table
    for whole in _CONTRACTED.split():
        known |= {whole[:i] + whole[i + 1 :]: whole for i, letter in enumerate(whole) if letter == "'"}
    # I'm, I've and I'd've are left out: the official table has them in upper case, but is looked up in lower case
    return known


_CONTRACTIONS = _contractions()


def normalise(text: str) -> str:
    """An answer in lower case, without punctuation and articles, and with digits for number words."""
    whole, glued = text, bool(_NUMBER_COMMA.search(text))
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside_space or glued else " ")
    words = _PERIOD.sub("", text).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean of ``min(1, matching answers of the others / 3)`` over the annotators, each left out in turn.

    If all annotators agree, nothing is normalized, as in the official code.
    """
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalise, (prediction, *answers))
    same = sum(answer == prediction for answer in answers)
    left_out = [min(1.0, (same - (answer == prediction)) / ENOUGH) for answer in answers]
    return sum(left_out) / len(left_out)
