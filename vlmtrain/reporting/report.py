"""``report.html``: a self-contained page about a run, generated from the files in its folder."""

from __future__ import annotations

import math
import re
import statistics
from html import escape
from pathlib import Path

from ..errors import first_line
from ..evaluation.scores import benchmark_rows, score_rows
from ..files import make_folder, read_json, replace_text
from ..runs.records import read_config, read_records, read_summary
from .charts import Series, line_chart, smooth
from .tables import html_table

MAX_CARDS = 24
IMAGE = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]*")
"""Images that a page shows: a run folder may come from somebody else."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fbfbf9; margin: 0 auto; max-width: 1080px;
       padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 20px; margin: 40px 0 8px; } p { margin: 6px 0; }
.quiet { color: #5b636d; } code { font-size: 13px; }
.big { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.big div { background: #fff; border: 1px solid #e3e3de; border-radius: 8px; padding: 10px 16px; }
.big b { display: block; font-size: 22px; }
table { border-collapse: collapse; margin: 10px 0; display: block; overflow-x: auto; max-width: 100%; }
th, td { padding: 4px 14px 4px 0; text-align: left; }
th { font-weight: 600; border-bottom: 1px solid #d6d6d0; } td.number, th.number { text-align: right; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 12px; }
svg { background: #fff; border: 1px solid #e3e3de; border-radius: 8px; width: 100%; }
svg .title { font-size: 13px; font-weight: 600; fill: #1b1f24; } svg .tick { font-size: 11px; fill: #5b636d; }
svg .grid { stroke: #ecece7; } svg .leader { stroke: #9aa1a9; stroke-width: 0.8; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px; }
.card { background: #fff; border: 1px solid #e3e3de; border-radius: 8px; padding: 10px 12px; }
.card img { max-width: 100%; max-height: 144px; display: block; margin: 0 auto 8px; border-radius: 4px; }
.card, p { overflow-wrap: anywhere; }
.card dl { margin: 0; font-size: 13px; } .card dt { font-weight: 600; margin-top: 6px; } .card dd { margin: 0; }
.right { color: #00694b; } .right::before { content: "\\2713  "; }
.wrong { color: #b04400; } .wrong::before { content: "\\2717  "; }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` to a run folder and return its path. Raises ValueError if a file is broken, naming it."""
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    make_folder(run_dir, str(run_dir))
    stages = [name for name in config["stages"] if (run_dir / name / "metrics.jsonl").exists()]
    body = [_head(config, run_dir), _figures(run_dir, stages)]
    for name in stages:
        try:
            body.append(_stage(run_dir / name, name))
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"{run_dir / name} has files that are not those of a stage: {first_line(error)}") from None
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(run_dir.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style>{''.join(body)}</html>\n"
    )
    target = run_dir / "report.html"
    replace_text(target, page)
    return target


def _head(config: dict, run_dir: Path) -> str:
    """The run's name, folder and settings, and its provenance: commit, hardware, command and versions."""
    git, machine, versions = (config.get(key) or {} for key in ("git", "machine", "versions"))
    commit = f"commit {git['commit'][:12]}{' with changes' if git.get('changes') else ''}" if git else "no git commit"
    hardware = f"{machine.get('processes', 1)} x {machine.get('device', 'unknown device')}"
    facts = (run_dir, f"seed {config['seed']}", config["precision"], hardware, commit)
    quiet = [" \u00b7 ".join(map(str, facts)), ", ".join(f"{name} {version}" for name, version in versions.items())]
    lines = "".join(f'<p class="quiet"><small>{escape(line)}</small></p>' for line in quiet)
    command = f"<p><code>{escape(str(machine['command']))}</code></p>" if "command" in machine else ""
    title = f"{config['name']} \u00b7 connector {config['connector']['name']}"
    return f"<h1>{escape(title)}</h1>{command}{lines}"


def _figures(run_dir: Path, stages: list[str]) -> str:
    """The scores of the last stage, as large figures."""
    summaries = {name: read_summary(run_dir / name) or {} for name in stages}
    scored = [name for name in stages if summaries[name].get("validation")]
    if not scored:
        return ""
    scores = summaries[scored[-1]]["validation"]
    seconds = sum(summary.get("seconds", 0) for summary in summaries.values())
    boxes = (
        (f"{scores['exact_match']:.1%}", f"exact match, {scores['questions']} held-out questions"),
        (f"{scores['blind_exact_match']:.1%}", "the same with a blank image"),
        (f"{scores['loss']:.3f}", f"validation loss after {scored[-1]}"),
        (f"{seconds / 60:.1f} min", "of training steps"),
    )
    return '<div class="big">' + "".join(f"<div><b>{big}</b>{escape(small)}</div>" for big, small in boxes) + "</div>"


def _stage(folder: Path, name: str) -> str:
    records = [record for record in read_records(folder / "metrics.jsonl") if record["loss"] is not None]
    summary = read_summary(folder)
    parts = [f"<h2>{escape(name)}</h2>"]
    if summary is None:
        parts.append(f'<p class="quiet">not finished: {len(records)} steps so far</p>')
    else:
        samples = folder / "samples.json"
        parts += [_facts(summary), _speed(records), _cards(read_json(samples) if samples.exists() else [])]
        if summary["validation"]:
            parts.append(html_table(score_rows(summary["validation"])))
        if summary.get("lmms_eval"):
            parts.append(html_table(benchmark_rows(summary["lmms_eval"])))
    parts.append(f'<div class="charts">{_charts(folder, records)}</div>')
    if summary is not None:
        parts.append(_parts_table(summary))
    return "".join(parts)


def _facts(summary: dict) -> str:
    ranks = summary["world_size"]
    text = f"{summary['steps']} steps in {summary['seconds']:.0f} s on {ranks} process{'es' if ranks > 1 else ''}"
    if summary["skipped_samples"]:
        text += f"; {summary['skipped_samples']} bad samples skipped"
    scores = summary["validation"]
    if scores:
        text += (
            f"; validation loss {scores['loss_at_start']:.3f} \u2192 {scores['loss']:.3f}; exact match "
            f"{scores['exact_match']:.1%} of {scores['questions']} answers, blind {scores['blind_exact_match']:.1%}"
        )
    return f"<p>{escape(text)}</p>"


def _speed(records: list[dict]) -> str:
    """Where the time of the steps went, and the FLOPs."""
    phases: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.get("phase_seconds", {}).items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    total = sum(record.get("step_seconds", 0.0) for record in records)
    if not phases or not total:
        return ""
    facts = [", ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in phases.items())]
    flops = [record["flops"] for record in records if record.get("flops")]
    facts += [f"{sum(flops):.3g} FLOPs"] if flops else []
    rates = [record["mfu"] for record in records if record.get("mfu")]
    facts += [f"MFU {statistics.median(rates):.1%}"] if rates else []
    return f'<p class="quiet">time: {escape("; ".join(facts))}</p>'


def _charts(folder: Path, records: list[dict]) -> str:
    if not records:
        return ""
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    loss = [
        Series("", steps, losses, faint=True),
        Series("training, smoothed (faint: each step)", steps, smooth(losses)),
    ]
    found = read_records(folder / "validation.jsonl")
    if found:
        points = [r["step"] for r in found], [r["loss"] for r in found]
        loss.append(Series("validation", *points, color=1, dots=True))
    sources = sorted({name for record in records for name in record.get("loss_by_source", {})})
    by_source = []
    for number, name in enumerate(sources):
        points = [(r["step"], r["loss_by_source"][name]) for r in records if name in r.get("loss_by_source", {})]
        by_source.append(Series(name, [x for x, _ in points], smooth([y for _, y in points]), color=number))
    parts = list(records[0]["learning_rate"])
    rates = [Series(part, steps, [r["learning_rate"][part] for r in records], color=i) for i, part in enumerate(parts)]
    speed = [r["samples_per_second"] for r in records]
    return (
        line_chart("loss", loss)
        + (line_chart("loss by source, smoothed", by_source) if by_source else "")
        + line_chart("gradient norm", [Series("", steps, [r["grad_norm"] or math.nan for r in records], color=3)])
        + line_chart("learning rate", rates)
        + line_chart("samples per second", [Series("smoothed", steps, smooth(speed), color=2)])
    )


def _parts_table(summary: dict) -> str:
    rows = [("part", "parameters", "learning rate", "weights before", "weights after")]
    for part, facts in summary["parts"].items():
        rates = facts["learning_rate"]
        labelled = rates.items() if isinstance(rates, dict) else [("", rates)]
        rate = ", ".join(f"{label} {lr:g}".strip() for label, lr in labelled) if facts["trained"] else "frozen"
        before, after = (facts[key][:10] for key in ("sha256_before", "sha256_after"))
        rows.append(
            (part, f"{facts['parameters']:,}", rate, before, after if before != after else f"{after} unchanged")
        )
    return html_table(rows)


def _cards(samples: list[dict]) -> str:
    """One card per image, with the questions about it."""
    by_conversation: dict[int, list[dict]] = {}
    for sample in samples:
        by_conversation.setdefault(sample["conversation"], []).append(sample)
    cards = []
    for answers in list(by_conversation.values())[:MAX_CARDS]:
        images = "".join(f'<img src="{uri}" alt="">' for uri in answers[0]["pictures"] if IMAGE.fullmatch(uri))
        lines = []
        for answer in answers:
            verdict = "right" if answer["exact"] else "wrong"
            reference = "" if answer["exact"] else f'<dd class="quiet">reference: {escape(answer["reference"])}</dd>'
            lines.append(
                f"<dt>{escape(answer['question'] or 'caption')}</dt>"
                f'<dd class="{verdict}">{escape(answer["prediction"] or "(nothing)")}</dd>{reference}'
                f'<dd class="quiet">blind: {escape(answer["blind_prediction"] or "(nothing)")}</dd>'
            )
            for name in (name for name in answer if re.fullmatch(r"prediction_\d+_shots", name)):
                said = f"{name.removeprefix('prediction_').replace('_', ' ')}: {answer[name] or '(nothing)'}"
                lines.append(f'<dd class="quiet">{escape(said)}</dd>')
        cards.append(f'<div class="card">{images}<dl>{"".join(lines)}</dl></div>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""
