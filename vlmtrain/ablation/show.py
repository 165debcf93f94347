"""The tables of an ablation, for the terminal and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence

from ..evaluation.scores import base_name, value_text
from ..reporting.tables import markdown_table, text_table
from .definition import Ablation
from .page import write_page
from .results import FEW_SEEDS, Entry

Table = list[tuple[str, ...]]
NONE = "-"
"""Shown where an entry lacks a score or category that others have, as an axis may change the data."""


def write_results(ablation: Ablation, entries: Sequence[Entry]) -> None:
    """Write ``ablation.md``, ``.csv``, ``.html`` and ``results.json`` into the ablation's folder."""
    folder = ablation.folder
    (folder / "ablation.md").write_text(markdown(ablation, entries))
    rows = [_flat(as_json(entry)) for entry in entries]
    with open(folder / "ablation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.json").write_text(json.dumps([as_json(entry) for entry in entries], indent=2) + "\n")
    write_page(ablation, tables(ablation, entries), note(ablation, entries), entries)


def as_json(entry: Entry) -> dict:
    """The numbers of an entry, by name."""
    facts = {key: value for key, value in vars(entry).items() if key not in ("measured", "questions")}
    verdict = {"runs_differ_from_the_best": entry.runs_differ, "told_apart_from_the_best": entry.is_told_apart}
    return {**facts, **verdict, "seeds": len(entry.measured)}


def _flat(facts: dict) -> dict:
    """Numbers by column. Mappings become columns like ``steps.instruct``, interval ends become ``interval.low``."""
    found = {}
    for key, value in facts.items():
        if key in ("interval", "loss_interval"):
            value = dict(zip(("low", "high"), value))
        if key == "by_category":
            value = {kind: score for kind, (score, *_) in value.items()}
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def tables(ablation: Ablation, entries: Sequence[Entry]) -> dict[str, Table]:
    """Tables by title: the main table, the scores of each category, and the other scores."""
    found = {"": main_table(ablation, entries)}
    kinds = sorted({kind for entry in entries for kind in entry.by_category})
    if kinds:
        rows = [(entry.label, *(_of_category(ablation, entry, kind) for kind in kinds)) for entry in entries]
        found[f"{_words(ablation.metric)} by category (blind)"] = [("", *kinds), *rows]
    is_few_shot = ablation.metric != base_name(ablation.metric)  # its table then has the score without demonstrations
    shown = ("loss", "perplexity", ablation.metric, *(() if is_few_shot else ("exact_match",)))
    names = dict.fromkeys(name for entry in entries for name in entry.scores)
    others = [name for name in names if name not in shown and not name.startswith("blind_") and name != "loss_at_start"]
    if others:
        rows = [(entry.label, *(_with_blind(entry, name) for name in others)) for entry in entries]
        found["Other scores (blind)"] = [("", *map(_words, others)), *rows]
    return found


def _with_blind(entry: Entry, name: str) -> str:
    if name not in entry.scores:
        return NONE
    return "{} ({})".format(*(value_text(name, entry.scores[key]) for key in (name, f"blind_{name}")))


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _of_category(ablation: Ablation, entry: Entry, kind: str) -> str:
    if kind not in entry.by_category:
        return NONE
    score, interval, blind = entry.by_category[kind]
    shown = (value_text(ablation.metric, value) for value in (score, (interval[1] - interval[0]) / 2, blind))
    return "{} ± {} ({})".format(*shown)


def for_terminal(ablation: Ablation, entries: Sequence[Entry]) -> str:
    shown = [
        f"{title}\n{text_table(table)}" if title else text_table(table)
        for title, table in tables(ablation, entries).items()
    ]
    return "\n\n".join([*shown, note(ablation, entries)])


def markdown(ablation: Ablation, entries: Sequence[Entry]) -> str:
    parts = []
    for title, table in tables(ablation, entries).items():
        parts += [f"{title}\n"] if title else []
        parts.append(markdown_table(table, numbers=True))
    return "\n".join([*parts, note(ablation, entries), ""])


def note(ablation: Ablation, entries: Sequence[Entry]) -> str:
    """A note on what was held equal and on the limits of the table."""
    seeds = len(ablation.seeds)
    plural = "s" if seeds > 1 else ""
    first = ablation.choices[0].label
    counts = {entry.samples for entry in entries}
    equal = {
        "steps": "steps and samples" if len(counts) < 2 else "steps (samples differ, see the table)",
        "samples": f"samples (as many as {first} uses)",
        "flops": f"planned training FLOPs of each stage (as many as {first} uses, so steps differ)",
        "wall": f"seconds of training, estimated from short runs (as many as {first} takes, so steps differ)",
    }[ablation.budget]
    axes = [key for key, _ in ablation.choices[0].axes]
    apart = f", except for what {', '.join(axes)} changes" if axes else ""
    told = [
        f"Equal for all{apart}: {equal}; the order of samples; all initial weights except the connector's; and the "
        "questions.",
        f"{seeds} seed{plural}. Intervals (95 %) and p-values come from a bootstrap over seeds and conversations, with "
        "the same conversations for all seeds. p-values are paired, against the best, and corrected for choosing the "
        "best among all pairs (max-statistic)"
        + (", and at least those of Tukey's range test over seeds." if seeds >= FEW_SEEDS else "."),
    ]
    if ablation.sweep:
        keys = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in ablation.sweep)
        told.append(
            f"Each choice uses its own best {keys}: that of the lowest validation loss after at most "
            f"{ablation.sweep_steps} steps per stage with seed {ablation.seeds[0]}."
        )
    absent = [choice.label for choice in ablation.choices if choice.label not in {entry.label for entry in entries}]
    if absent:
        told.append(f"Left out because a job failed: {'; '.join(absent)}.")
    fewer = [
        f"{entry.label} ({count:,} conversations with {_words(name)})"
        for entry in entries
        for name, count in entry.fewer_shots.items()
        if count
    ]
    if fewer:
        told.append(f"max_length left no room for some demonstrations: {'; '.join(fewer)}.")
    blind = [entry.label for entry in entries if entry.blind >= entry.score]
    if blind:
        told.append(
            f"At least as good without the image: {'; '.join(blind)}. Such a score does not show that the model uses "
            "the image."
        )
    at_once = f"{ablation.jobs} job{'s' if ablation.jobs > 1 else ''} at once"
    told.append(
        f"samples/s is measured in the last stage, with {at_once} and any other load on the machine; for the first job "
        "that needs them, it includes computing the frozen encoder's features. It is not a benchmark."
    )
    if seeds < FEW_SEEDS:
        told.append(
            f"With {seeds} seed{plural}, the variation between runs of the same connector cannot be estimated: "
            '"runs differ" holds for these runs only, small differences may be chance, and intervals are too narrow.'
        )
    return " ".join(told)


def main_table(ablation: Ablation, entries: Sequence[Entry]) -> Table:
    swept = [key for key, _ in ablation.sweep]
    by_steps = len({tuple(entry.steps.items()) for entry in entries}) > 1
    by_samples = len({entry.samples for entry in entries}) > 1
    head = (
        *("connector", _words(ablation.metric), "95 % interval", "blind", "loss", "tokens", "parameters"),
        *(("steps",) if by_steps else ()),
        *(("samples",) if by_samples else ()),
        *("samples/s", "train FLOPs", "peak memory"),
        *(f"chosen {key.removeprefix('stages.').replace('.train.', '.')}" for key in swept),
        "against the best",
    )
    rows = [
        (
            entry.label,
            value_text(ablation.metric, entry.score),
            " to ".join(value_text(ablation.metric, end) for end in entry.interval),
            value_text(ablation.metric, entry.blind),
            f"{entry.loss:.3f} ± {(entry.loss_interval[1] - entry.loss_interval[0]) / 2:.3f}",
            f"{entry.tokens:,}",
            f"{entry.parameters:,}",
            *((" + ".join(f"{steps:,}" for steps in entry.steps.values()),) if by_steps else ()),
            *((f"{entry.samples:,}",) if by_samples else ()),
            f"{entry.samples_per_second:.1f}",
            "not available" if entry.train_flops is None else f"{entry.train_flops:.2e}",
            f"{entry.peak_memory_bytes / 2**30:.2f} GiB",
            *(entry.chosen.get(key, "") for key in swept),
            _verdict(entry, entries[0]),
        )
        for entry in entries
    ]
    return [head, *rows]


def _verdict(entry: Entry, best: Entry) -> str:
    if entry.p_value is None:
        return "the best" if entry is best else "other questions"
    said = "differs" if entry.is_told_apart else "runs differ" if entry.runs_differ else "cannot tell"
    least = "p < 0.001" if entry.p_value < 0.001 else f"p = {entry.p_value:.3f}"
    return f"{least}, {said}"
