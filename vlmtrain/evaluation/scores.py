"""Metrics of answers by name, over all questions and by category.

answers -> value of each answer (exact match, VQA accuracy, choices, CIDEr), and of all answers (yes/no, BLEU-4)

Exact match is always computed, and other metrics if the records have what they need. `validation.metrics` instead
names the metrics that must be computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.boxes import is_box, read_answer
from ..data.records import UNGRADED, Grading
from ..data.regions import ENOUGH_IOU, Coordinates, iou
from ..errors import nearest
from .captions import bleu4, caption_words, cider
from .generation import Likelihood
from .vqa import vqa_accuracy


@dataclass(frozen=True)
class Answer:
    """The answer to one question, located by `conversation` and `turn`. likelihoods: those of its choices."""

    conversation: int
    turn: int
    question: str
    reference: str
    prediction: str
    grading: Grading = UNGRADED
    likelihoods: tuple[Likelihood, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the prediction equals the reference, ignoring white space at the ends."""
        return self.prediction.strip() == self.reference.strip()

    @property
    def captions(self) -> tuple[str, ...]:
        return self.grading.captions or (self.reference,)


class Metric(NamedTuple):
    """A way to score answers.

    needs: what a record must have, for messages. fits: whether an answer can be scored. recognised: whether it is
    scored by default. each: one value per answer, in order, by name. together: one value for all answers, by name.
    """

    needs: str
    fits: Callable[[Answer], bool]
    recognised: Callable[[Answer], bool]
    each: Callable[[Sequence[Answer]], dict[str, list[float]]] = lambda answers: {}
    together: Callable[[Sequence[Answer]], dict[str, float]] = lambda answers: {}


def _exact_match(answers: Sequence[Answer]) -> dict[str, list[float]]:
    return {"exact_match": [float(answer.is_exact) for answer in answers]}


def _vqa_accuracy(answers: Sequence[Answer]) -> dict[str, list[float]]:
    return {"vqa_accuracy": [vqa_accuracy(answer.prediction, answer.grading.answers) for answer in answers]}


def _choice(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Whether the most likely choice is the reference, by total log-probability and by its mean over tokens."""
    plain = [_chosen(answer, [one.total for one in answer.likelihoods]) for answer in answers]
    normalised = [_chosen(answer, [one.mean for one in answer.likelihoods]) for answer in answers]
    return {"choice_accuracy": plain, "choice_accuracy_normalised": normalised}


def _chosen(answer: Answer, values: list[float]) -> float:
    choices = answer.grading.choices
    return float(choices[values.index(max(values))].strip() == answer.reference.strip())


def _cider(answers: Sequence[Answer]) -> dict[str, list[float]]:
    said = [caption_words(answer.prediction) for answer in answers]
    return {"cider": cider(said, [[caption_words(text) for text in answer.captions] for answer in answers])}


def _bleu4(answers: Sequence[Answer]) -> dict[str, float]:
    said = [caption_words(answer.prediction) for answer in answers]
    return {"bleu4": bleu4(said, [[caption_words(text) for text in answer.captions] for answer in answers])}


def says_yes(text: str) -> bool:
    """Parse an answer as POPE does: no if the first sentence contains the word no, No or not, else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def _yes_no_pairs(answers: Sequence[Answer]) -> list[tuple[bool, bool]]:
    """Whether each answer is yes, and whether it should be."""
    return [(says_yes(answer.prediction), answer.reference.strip().lower() == "yes") for answer in answers]


def _yes_no_accuracy(answers: Sequence[Answer]) -> dict[str, list[float]]:
    return {"yes_no_accuracy": [float(said == true) for said, true in _yes_no_pairs(answers)]}


def _yes_no(answers: Sequence[Answer]) -> dict[str, float]:
    """As POPE reports it (Li et al., 2023): `yes` is the positive class."""
    pairs = _yes_no_pairs(answers)
    hits = sum(said and true for said, true in pairs)
    said, true = (sum(column) for column in zip(*pairs))
    precision, recall = hits / max(1, said), hits / max(1, true)
    return {
        "yes_no_precision": precision,
        "yes_no_recall": recall,
        "yes_no_f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "yes_share": said / len(pairs),
    }


def _is_yes_no(answer: Answer) -> bool:
    return answer.reference.strip().lower() in ("yes", "no")


NEAR = 0.05
"""How far from a reference point an answer may be, as a fraction of the image's diagonal."""


def _has_box(answer: Answer) -> bool:
    return len(answer.grading.places) == 1 and is_box(answer.grading.places[0])


def _has_point(answer: Answer) -> bool:
    return len(answer.grading.places) == 1 and not is_box(answer.grading.places[0])


def _regions(answers: Sequence[Answer]) -> list[tuple[Coordinates, Coordinates | None]]:
    """The reference of each answer and the region that it gives, in pixels of the upright image."""
    places = [answer.grading.places[0] for answer in answers]
    return [(place.at, read_answer(answer.prediction, place)) for answer, place in zip(answers, places)]


def _overlaps(answers: Sequence[Answer]) -> list[float]:
    return [0.0 if found is None else iou(true, found) for true, found in _regions(answers)]


def _iou(answers: Sequence[Answer]) -> dict[str, list[float]]:
    unread = [float(found is None) for _, found in _regions(answers)]
    return {"iou": _overlaps(answers), "unparsed_boxes": unread}


def _box_accuracy(answers: Sequence[Answer]) -> dict[str, list[float]]:
    return {"box_accuracy": [float(overlap >= ENOUGH_IOU) for overlap in _overlaps(answers)]}


def _point_accuracy(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Whether the point is in the reference box, or near the reference point."""
    hits = []
    for answer, (true, found) in zip(answers, _regions(answers)):
        near = NEAR * math.hypot(*answer.grading.places[0].frame.own)
        box = true if len(true) == 4 else (true[0] - near, true[1] - near, true[0] + near, true[1] + near)
        hits.append(found is not None and box[0] <= found[0] <= box[2] and box[1] <= found[1] <= box[3])
    unread = [float(found is None) for _, found in _regions(answers)]
    return {"point_accuracy": list(map(float, hits)), "unparsed_points": unread}


def _has_action(answer: Answer) -> bool:
    return answer.grading.actions is not None


def _actions(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """The share of correct tokens, and the mean absolute difference of decoded numbers, in the units of the data.

    A missing token is wrong, and is decoded as the end that is farther from the reference. An additional one is wrong.
    """
    scores = {"action_accuracy": [], "action_l1": [], "unparsed_actions": []}
    for answer in answers:
        binning = answer.grading.actions
        true, found = (binning.numbers(text) for text in (answer.reference, answer.prediction))
        hits = sum(one == other for one, other in zip(true, found))
        scores["action_accuracy"].append(hits / max(len(true), len(found)))
        farther = [0 if 2 * number >= binning.bins - 1 else binning.bins - 1 for number in true[len(found) :]]
        decoded = binning.centers([*found[: len(true)], *farther])
        scores["action_l1"].append(float(abs(decoded - binning.centers(true)).mean()))
        scores["unparsed_actions"].append(float(len(true) != len(found)))
    return scores


METRICS: dict[str, Metric] = {
    "exact_match": Metric("a reference", lambda a: True, lambda a: True, each=_exact_match),
    "vqa_accuracy": Metric(
        "'answers'", lambda a: bool(a.grading.answers), lambda a: bool(a.grading.answers), each=_vqa_accuracy
    ),
    "choice": Metric("'choices'", lambda a: bool(a.grading.choices), lambda a: bool(a.grading.choices), each=_choice),
    "yes_no": Metric("'yes' or 'no' as its reference", _is_yes_no, _is_yes_no, _yes_no_accuracy, _yes_no),
    "cider": Metric("a caption", lambda a: True, lambda a: bool(a.grading.captions), each=_cider),
    "bleu4": Metric("a caption", lambda a: True, lambda a: bool(a.grading.captions), together=_bleu4),
    "iou": Metric("one box in its answer", _has_box, _has_box, each=_iou),
    "box_accuracy": Metric("one box in its answer", _has_box, _has_box, each=_box_accuracy),
    "point_accuracy": Metric("one point in its answer", _has_point, _has_point, each=_point_accuracy),
    "actions": Metric("an action in its answer", _has_action, _has_action, each=_actions),
}


class Grades(NamedTuple):
    """The scores of a set of answers.

    total: values by metric. by_category: the same for the questions of each category, and their number. each: the
    values of every answer, by metric.
    """

    total: dict[str, float]
    by_category: dict[str, dict[str, float]]
    each: list[dict[str, float]]


def grade(answers: Sequence[Answer], names: Sequence[str] | None = None) -> Grades:
    """Score answers by exact match and the metrics `names`; None: by all metrics that the records have the data for.

    Raises ValueError if a named metric cannot score a question.
    """
    if names is not None:
        check_fits(answers, names)
    each: list[dict[str, float]] = [{} for _ in answers]
    together: list[tuple[Metric, set[int]]] = []
    for name in METRICS if names is None else dict.fromkeys(("exact_match", *names)):
        metric = METRICS[name]
        judged = [
            i for i, answer in enumerate(answers) if (metric.recognised if names is None else metric.fits)(answer)
        ]
        for key, values in metric.each([answers[i] for i in judged]).items():
            for i, value in zip(judged, values):
                each[i][key] = value
        together.append((metric, set(judged)))
    everything = range(len(answers))
    kinds: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer.grading.category is not None:
            kinds.setdefault(answer.grading.category, []).append(i)
    by_category = {
        kind: {**_totals(answers, each, together, numbers), "questions": len(numbers)}
        for kind, numbers in sorted(kinds.items())
    }
    return Grades(_totals(answers, each, together, everything), by_category, each)


def check_fits(answers: Iterable[Answer], names: Sequence[str]) -> None:
    """Raise ValueError if a named metric cannot score a question, whatever the prediction."""
    for answer in answers:
        for name in names:
            if not METRICS[name].fits(answer):
                raise ValueError(
                    f"validation.metrics names {name}, which needs {METRICS[name].needs}, but conversation "
                    f"{answer.conversation} of data.validation has none for {answer.question[:60]!r}"
                )


def _totals(
    answers: Sequence[Answer],
    each: Sequence[dict[str, float]],
    together: Sequence[tuple[Metric, set[int]]],
    numbers: Sequence[int],
) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for i in numbers:
        for key, value in each[i].items():
            values.setdefault(key, []).append(value)
    totals = {key: sum(found) / len(found) for key, found in values.items()}
    for metric, judged in together:
        own = [answers[i] for i in numbers if i in judged]
        totals |= metric.together(own) if own else {}
    return totals


def check_metrics(names: Any) -> None:
    """Raise ValueError unless `names` is None or a list of metric names."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence) or not len(names):
        raise ValueError(f"validation.metrics={names}: expected null or a list of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise ValueError(
                f"validation.metrics: unknown metric '{name}'.{nearest(str(name), METRICS)} "
                f"Available: {', '.join(METRICS)}"
            )


FEWER = "fewer_than_"
"""Start of the names of the numbers of conversations with fewer demonstrations than their score says."""

PLAIN = ("loss", "perplexity", "cider", "bleu4", "action_l1")
"""Values that are not fractions of the questions."""


LOWER_IS_BETTER = ("loss", "perplexity", "action_l1", "unparsed_actions")
"""Values of which the lowest is the best; of all others, it is the highest."""


def base_name(name: str) -> str:
    """A name without what says whether images are blanked, and how many demonstrations there are."""
    return re.sub(r"_\d+_shots$", "", name.removeprefix("blind_"))


def value_text(name: str, value: float) -> str:
    """Format a value, with fractions in per cent."""
    return f"{value:.4f}" if base_name(name) in PLAIN else f"{value:.1%}"


def score_rows(scores: dict) -> list[tuple[str, ...]]:
    """Table rows of scores: name, value and value with blanked images; then the exact match of each category.

    Last, the conversations with fewer demonstrations, if there are any.
    """
    rows: list[tuple[str, ...]] = [("", "with image", "blind")]
    for name in (name for name in scores if f"blind_{name}" in scores):
        shown = (value_text(name, scores[key]) for key in (name, f"blind_{name}"))
        rows.append((name.replace("_", " "), *shown))
    for kind, values in scores.get("by_category", {}).items():
        for name in (name for name in values if base_name(name) == "exact_match" and f"blind_{name}" in values):
            shown = (value_text(name, values[key]) for key in (name, f"blind_{name}"))
            rows.append((f"  {name.replace('_', ' ')} of {kind} ({values['questions']})", *shown))
    fewer = [(name, value) for name, value in scores.items() if name.startswith(FEWER) and value]
    return rows + [(f"conversations with {name.replace('_', ' ')}", f"{value:,}", "") for name, value in fewer]


def benchmark_rows(scores: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """Table rows of lmms-eval's tasks and metrics, header first."""
    rows = [(task, name, f"{value:.4g}") for task, values in scores.items() for name, value in values.items()]
    return [("lmms-eval task", "metric", "value"), *rows]
