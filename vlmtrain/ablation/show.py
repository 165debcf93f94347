"""An ablation's table: for the terminal, and as Markdown, CSV, JSON and one self-contained page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from html import escape

from ..charts import Series, line_chart, scatter_chart, smooth
from ..report import STYLE
from .jobs import Ablation
from .results import FEW_SEEDS, Entry

HEAD = ("connector", "exact match", "95 % interval", "blind", "loss", "tokens", "parameters", "samples/s",
        "train FLOPs", "peak memory", "against the best")  # fmt: skip
SHOWN = 12


def write_results(ablation: Ablation, entries: Sequence[Entry]) -> None:
    """Write ``ablation.md``, ``.csv``, ``.json`` and ``.html`` into the ablation's folder."""
    folder = ablation.folder
    (folder / "ablation.md").write_text(markdown(ablation, entries))
    with open(folder / "ablation.csv", "w", newline="") as file:
        csv.writer(file).writerows([HEAD, *map(_row, entries)])
    (folder / "results.json").write_text(json.dumps([as_json(entry) for entry in entries], indent=2) + "\n")
    (folder / "ablation.html").write_text(_page(ablation, entries), encoding="utf-8")


def as_json(entry: Entry) -> dict:
    """An entry's numbers."""
    left_out = ("exact", "conversation")
    facts = {key: value for key, value in vars(entry).items() if key not in left_out}
    return {**facts, "told_apart_from_the_best": entry.is_told_apart, "seeds": len(entry.exact)}


def table(entries: Sequence[Entry]) -> str:
    """For a terminal."""
    rows = [HEAD, *map(_row, entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def markdown(ablation: Ablation, entries: Sequence[Entry]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", f"|---|{'--:|' * (len(HEAD) - 1)}"]
    lines += [f"| {' | '.join(_row(entry))} |" for entry in entries]
    return "\n".join([*lines, "", note(ablation, entries), ""])


def note(ablation: Ablation, entries: Sequence[Entry]) -> str:
    """What was held equal, and how far the table can be trusted."""
    seeds = len(ablation.seeds)
    plural = "s" if seeds > 1 else ""
    questions = sum(map(len, entries[0].exact))
    text = (
        "Equal for all: steps and samples, their order, all first weights but the connector's, and the questions. "
        f"{seeds} seed{plural}, {questions:,} questions; intervals and p-values by a bootstrap over seeds and "
        "conversations; p-values are paired, and corrected for the number of comparisons (Holm)."
    )
    if seeds < FEW_SEEDS:
        text += (
            f" With {seeds} seed{plural}, how much a connector differs from itself in another run "
            "cannot be told: small differences may be that."
        )
    return text


def _row(entry: Entry) -> tuple[str, ...]:
    if entry.p_value is None:
        against = "the best"
    else:
        against = f"p = {entry.p_value:.3f}" + (", differs" if entry.is_told_apart else ", cannot tell")
    flops = "not known" if entry.train_flops is None else f"{entry.train_flops:.2e}"
    return (
        entry.label,
        f"{entry.score:.1%}",
        f"{entry.interval[0]:.1%} to {entry.interval[1]:.1%}",
        f"{entry.blind:.1%}",
        f"{entry.loss:.4f}",
        f"{entry.tokens:,}",
        f"{entry.parameters:,}",
        f"{entry.samples_per_second:.1f}",
        flops,
        f"{entry.peak_memory_bytes / 2**30:.2f} GiB",
        against,
    )


def _page(ablation: Ablation, entries: Sequence[Entry]) -> str:
    head = "".join(f"<th{' class=number' * (i > 0)}>{escape(name)}</th>" for i, name in enumerate(HEAD))
    rows = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' * (i > 0)}>{escape(cell)}</td>" for i, cell in enumerate(_row(e)))
        + "</tr>"
        for e in entries
    )
    charts = scatter_chart("exact match by visual tokens", [(e.label, e.tokens, e.score) for e in entries], "tokens")
    if all(entry.train_flops for entry in entries):
        points = [(entry.label, entry.train_flops, entry.score) for entry in entries]
        charts += scatter_chart("exact match by training FLOPs", points, "FLOPs", front=True)
    charts += _losses(ablation)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(ablation.folder.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{escape(ablation.folder.name)}</h1><p class=quiet>{escape(' '.join(ablation.line))}</p>"
        f"<table><tr>{head}</tr>{rows}</table><p class=quiet>{escape(note(ablation, entries))}</p>"
        f'<div class="charts">{charts}</div>{_side_by_side(ablation)}</html>\n'
    )


def _losses(ablation: Ablation) -> str:
    """Loss curves of the first seed, by stage."""
    settings = ablation.settings(ablation.choices[0])
    charts = ""
    for stage in (name for name, config in settings.stages.items() if "connector" in config.parts):
        series = []
        for number, choice in enumerate(ablation.choices):
            file = ablation.job(choice, ablation.seeds[0]) / stage / "metrics.jsonl"
            records = [json.loads(line) for line in file.read_text().splitlines()]
            records = [record for record in records if record["loss"] is not None]
            losses = smooth([record["loss"] for record in records], 0.95)
            series.append(Series(choice.label, [record["step"] for record in records], losses, color=number))
        charts += line_chart(f"{stage}: loss", series, legend_below=True)
    return charts


def _side_by_side(ablation: Ablation) -> str:
    """A few pictures, with what each connector answered."""
    last = list(ablation.settings(ablation.choices[0]).stages)[-1]
    samples = {
        choice.label: json.loads((ablation.job(choice, ablation.seeds[0]) / last / "samples.json").read_text())
        for choice in ablation.choices
    }
    first = next(iter(samples.values()))
    cards = []
    for i, sample in enumerate(first[:SHOWN]):
        pictures = "".join(f'<img src="{uri}" alt="">' for uri in sample["pictures"])
        answers = ""
        for label, own in samples.items():
            verdict = "right" if own[i]["exact"] else "wrong"
            answers += f'<dd class="{verdict}">{escape(label)}: {escape(own[i]["prediction"])}</dd>'
        question = (
            f"<dt>{escape(sample['question'] or 'caption')}</dt><dd class=quiet>{escape(sample['reference'])}</dd>"
        )
        cards.append(f'<div class="card">{pictures}<dl>{question}{answers}</dl></div>')
    return f"<h2>Side by side</h2><div class=cards>{''.join(cards)}</div>" if cards else ""
