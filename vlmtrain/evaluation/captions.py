"""CIDEr-D and BLEU-4 of captions, as COCO's caption evaluation computes them, without its Java tokenizer.

Words are split as the Penn Treebank does in plain sentences: lower case, no punctuation, "n't" and "'s" apart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
"""Width of the Gaussian penalty for captions of another length, in words."""

Words = Sequence[str]
_CLITIC = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(r"n't|'\w+|\w+(?:[-./,]\w+)*")


def caption_words(text: str) -> list[str]:
    return _WORD.findall(_CLITIC.sub(r" \1", text.lower()))


def _grams(words: Words, order: int) -> Counter:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def cider(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each prediction against its references (Vedantam et al., 2015), from 0 to 10.

    N-gram weights (IDF) are computed from these references. Scores of few images are unreliable; the score of a single
    image is 0.
    """
    seen = [
        Counter(gram for own in references for gram in set().union(*(_grams(words, order) for words in own)))
        for order in ORDERS
    ]
    everything = math.log(max(1, len(references)))

    def weighted(words: Words, order: int) -> dict[tuple, float]:
        frequency = seen[order - 1]
        return {g: n * (everything - math.log(max(1, frequency[g]))) for g, n in _grams(words, order).items()}

    scores = []
    for said, own in zip(predictions, references):
        total = 0.0
        for true in own:
            # lengths are counted in pairs of words, as in COCO's code
            apart = max(0, len(said) - 1) - max(0, len(true) - 1)
            alike = sum(_alike(weighted(said, order), weighted(true, order)) for order in ORDERS) / len(ORDERS)
            total += alike * math.exp(-(apart**2) / (2 * SIGMA**2))
        scores.append(10 * total / len(own))
    return scores


def _alike(said: dict[tuple, float], true: dict[tuple, float]) -> float:
    """Cosine of two weighted bags of n-grams, with each n-gram's weight clipped to its weight in the reference."""
    shared = sum(min(weight, true[gram]) * true[gram] for gram, weight in said.items() if gram in true)
    norm = math.sqrt(sum(w * w for w in said.values())) * math.sqrt(sum(w * w for w in true.values()))
    return shared / norm if norm else 0.0


def bleu4(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """BLEU-4 of all predictions together (Papineni et al., 2002), not smoothed, from 0 to 1.

    The brevity penalty uses the reference of closest length, and the shorter one in case of a tie.
    """
    from sacrebleu import corpus_bleu

    columns = zip_longest(*([" ".join(true) for true in own] for own in references))  # None where there are fewer
    said = [" ".join(words) for words in predictions]
    return corpus_bleu(said, list(columns), tokenize="none", smooth_method="none").score / 100
