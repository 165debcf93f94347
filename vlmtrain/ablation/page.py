"""``ablation.html``: a self-contained page with the tables, charts and side-by-side answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from ..files import read_json
from ..reporting.charts import Series, line_chart, scatter_chart, smooth
from ..reporting.report import STYLE
from ..reporting.tables import html_table
from ..runs.records import read_records
from .definition import Ablation, Choice
from .results import Entry

SHOWN = 12
SMOOTHED = 0.95
_FRONT = "Filled and joined by a line: the Pareto front, where no choice of equal or lower cost scores higher."

_STYLE = """
body { max-width: 1280px; } table { font-size: 13px; } .wide { overflow-x: auto; }
"""


def write_page(
    ablation: Ablation, tables: Mapping[str, list[tuple[str, ...]]], note: str, entries: Sequence[Entry]
) -> None:
    choices = [choice for choice in ablation.choices if choice.label in {entry.label for entry in entries}]
    alike = {entry.label for entry in entries if entry.questions == entries[0].questions}
    main, *others = tables.items()
    shown = "".join(f"<h2>{escape(title.capitalize())}</h2>{_table(table)}" for title, table in others)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(ablation.folder.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{_STYLE}</style>'
        f"<h1>{escape(ablation.folder.name)}</h1><p class=quiet>{escape(' '.join(ablation.line))}</p>"
        f"{_table(main[1])}<p class=quiet>{escape(note)}</p>{shown}"
        f"<h2>Score by cost</h2><p class=quiet>{_FRONT}</p>"
        f'<div class="charts">{_scores(ablation, entries)}</div>'
        f'<h2>Training loss</h2><div class="charts">{_losses(ablation, choices)}</div>'
        f"{_side_by_side(ablation, [choice for choice in choices if choice.label in alike])}</html>\n"
    )
    (ablation.folder / "ablation.html").write_text(page, encoding="utf-8")


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return f'<div class="wide">{html_table(rows)}</div>'


def _scores(ablation: Ablation, entries: Sequence[Entry]) -> str:
    """Charts of score against cost, with the Pareto front marked."""
    metric = ablation.metric.replace("_", " ")
    costs = {
        "visual tokens": [entry.tokens for entry in entries],
        "training FLOPs": [entry.train_flops for entry in entries],
        "parameters of connector and fusion": [entry.parameters for entry in entries],
    }
    return "".join(
        scatter_chart(f"{metric} by {cost}", [(e.label, x, e.score) for e, x in zip(entries, values)], cost)
        for cost, values in costs.items()
        if None not in values
    )


def _losses(ablation: Ablation, choices: Sequence[Choice]) -> str:
    """Loss curves by stage: the mean over seeds, and the band between their minimum and maximum."""
    settings = ablation.settings(choices[0])
    charts = ""
    for stage in (stage.name for stage in settings.wanted if "connector" in stage.parts):
        series = []
        for number, choice in enumerate(choices):
            files = [ablation.job(choice, seed) / stage / "metrics.jsonl" for seed in ablation.seeds]
            records = [read_records(file) for file in files]
            length = min(map(len, records))  # with packed rows, an epoch's steps vary a little with the seed
            curves = np.array([smooth([record["loss"] for record in seed[:length]], SMOOTHED) for seed in records])
            steps = [record["step"] for record in records[0][:length]]
            band = (curves.min(0).tolist(), curves.max(0).tolist()) if len(curves) > 1 else None
            series.append(Series(choice.label, steps, curves.mean(0).tolist(), color=number, band=band))
        seeds = f", mean and range of {len(ablation.seeds)} seeds" if len(ablation.seeds) > 1 else ""
        charts += line_chart(f"{stage}: loss{seeds}", series, legend_below=True)
    return charts


def _side_by_side(ablation: Ablation, choices: Sequence[Choice]) -> str:
    """A few images with each choice's answer for the first seed: every image's first question before any second."""
    samples = {}
    for choice in choices:
        last = ablation.job(choice, ablation.seeds[0]) / ablation.settings(choice).wanted[-1].name
        samples[choice.label] = read_json(last / "samples.json")
    first = next(iter(samples.values()))
    shown = sorted(range(len(first)), key=lambda i: first[i]["turn"])[:SHOWN]
    cards = []
    for i in sorted(shown):
        sample = first[i]
        pictures = "".join(f'<img src="{uri}" alt="">' for uri in sample["pictures"])
        answers = ""
        for label, own in samples.items():
            verdict = "right" if own[i]["exact"] else "wrong"
            answers += f'<dd class="{verdict}">{escape(label)}: {escape(own[i]["prediction"] or "(nothing)")}</dd>'
        kind = f"{sample['category']}: " if sample["category"] else ""
        question = (
            f"<dt>{escape(kind + (sample['question'] or 'caption'))}</dt>"
            f"<dd class=quiet>{escape(sample['reference'])}</dd>"
        )
        cards.append(f'<div class="card">{pictures}<dl>{question}{answers}</dl></div>')
    title = f"Side by side, seed {ablation.seeds[0]}"
    return f"<h2>{title}</h2><div class=cards>{''.join(cards)}</div>" if cards else ""
