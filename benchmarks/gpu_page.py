"""The Markdown page of `gpu.py`, from what it writes as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

PHASES = ("data", "vision", "forward", "backward", "optimizer")
ROW = re.compile(
    r"(?P<model>\S+) (?P<workload>align|instruct) (?P<side>padded|packed|trainer)(?P<compiled> compiled)?$"
)
NOTES = """\
MFU counts the arithmetic that the update needs, without padding and recomputation, and relates it to the peak of the
device. Ratios are to the `Trainer` with the same weights, samples and micro-batches. Packed rows hold other samples
than padded ones in a step, so their first losses are not compared with the `Trainer`'s. Compilation happens in the
steps before the timed ones."""


def page(found: Mapping) -> str:
    """found: `about` the run, and what became of its `pieces`."""
    about, pieces = found["about"], found["pieces"]
    peak = f"{about['tflops']:.3g} TFLOP/s peak in bf16" if about["tflops"] else "peak unknown"
    title = "One GPU" if not about["tiny"] else "One GPU: a trial with tiny shapes, whose numbers mean nothing"
    lines = [f"# {title}", "", f"{about['device']}, {peak}, torch {about['torch']}, bf16.", ""]
    lines += ["## Speed", "", *_speed(pieces), "", NOTES, ""]
    lines += ["## Seconds per step by phase", "", *_phases(pieces), ""]
    for name, piece in pieces.items():
        if name.endswith(": profile"):
            lines += [f"## {name}", "", *_profile(piece), ""]
        if name == "speedrun stage 1":
            lines += ["## Stage 1 of the speedrun", "", _stage_1(piece, about["device"]), ""]
    lines += ["## Pieces", "", *_pieces(pieces)]
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]


def _rows(pieces: Mapping) -> Iterator[tuple[str, re.Match, Mapping]]:
    for name, piece in pieces.items():
        if match := ROW.match(name):
            yield name, match, piece


def _speed(pieces: Mapping) -> list[str]:
    def cells() -> Iterator[list[str]]:
        for name, match, piece in _rows(pieces):
            values = piece["values"]
            if not values:
                yield [name, *["-"] * 7, piece["status"]]
                continue
            base = pieces[f"{match['model']} {match['workload']} trainer"]["values"]
            ratio = f"{values['samples_per_second'] / base['samples_per_second']:.2f}" if base else "-"
            agreement = pieces[f"{match['model']} {match['workload']}: first losses agree"]
            void = agreement["status"] == "failed" and match["side"] != "trainer"
            yield [
                name,
                f"{values['samples_per_second']:.2f}",
                "void" if void else ratio,
                f"{values['mfu']:.1%}" if values["mfu"] is not None else "-",
                f"{values['tflops']:.3g}" if values["tflops"] is not None else "-",
                f"{values['peak'] / 2**30:.2f} GiB",
                f"{values['waited']:.1%}" if "waited" in values else "-",
                f"{values['padding']:.1%}" if "padding" in values else "-",
                f"{values['first']:.4f}",
            ]

    heads = ["", "samples/s", "ratio", "MFU", "TFLOP/s", "peak memory", "data wait", "padding", "first loss"]
    return _table(heads, cells())


def _phases(pieces: Mapping) -> list[str]:
    def cells() -> Iterator[list[str]]:
        for name, _, piece in _rows(pieces):
            if "phases" in piece["values"]:
                step, phases = piece["values"]["step_seconds"], piece["values"]["phases"]
                known = [phases.get(phase, 0.0) for phase in PHASES]
                yield [name, *(f"{seconds:.4f}" for seconds in (step, *known, max(0.0, step - sum(known))))]

    return _table(["", "step", *PHASES, "rest"], cells())


def _profile(piece: Mapping) -> list[str]:
    values = piece["values"]
    if not values:
        return [f"{piece['status']}: {piece['problem']}"]
    step, ideal, target = values["step_seconds"], values["seconds_at_peak"], values["target"]
    lines = []
    if ideal:
        gap = f"MFU {target:.0%} needs {ideal / target:.4f} s, {max(0.0, step - ideal / target):.4f} s less."
        lines = [f"A step takes {step:.4f} s: MFU {ideal / step:.1%}. {gap} The peak would need {ideal:.4f} s.", ""]
    shares = [
        [name, f"{seconds:.4f}", f"{seconds / step:.1%}"]
        for name, seconds in values["ranked"].items()
        if seconds > step / 1000
    ]
    lines += [*_table(["where the time goes", "s per step", "of the step"], shares), ""]
    phases = ", ".join(f"{name} {values['phases'].get(name, 0.0) / step:.1%}" for name in PHASES)
    lines += [f"By phase: {phases}.", ""]
    top = [
        [
            f"`{each['name'][:90].replace('|', '/')}`",
            f"{each['seconds']:.4f}",
            f"{each['seconds'] / step:.1%}",
            f"{each['calls']:.0f}",
        ]
        for each in values["top"]
    ]
    return [*lines, *_table(["kernel or operator", "s per step", "of the step", "calls"], top)]


def _stage_1(piece: Mapping, device: str) -> str:
    values = piece["values"]
    if not values:
        return f"{piece['status']}: {piece['problem']}"
    mfu = f" (MFU {values['mfu']:.1%})" if values["mfu"] is not None else ""
    return (
        f"`recipe=speedrun stage=align` with random weights and generated images trains "
        f"{values['samples_per_second']:.1f} samples/s{mfu}, so its {values['samples']:,} samples take "
        f"{values['hours']:.2f} hours on one {device}. Published: {values['published_hours']} hours, by one version of "
        "its README on one H100, by another on eight (`recipes/speedrun.yaml`). Decoding larger images from a disk is "
        "not included."
    )


def _pieces(pieces: Mapping) -> list[str]:
    def cells() -> Iterator[list[str]]:
        for name, piece in pieces.items():
            said = piece["problem"] or piece["values"].get("summary", "")
            said = " ".join(said.split()).replace("|", "/")
            said = said if len(said) <= 500 else f"{said[:150]} ... {said[-350:]}"
            yield [name, piece["status"], f"{piece['seconds']:.0f}", said]

    return _table(["piece", "status", "seconds", ""], cells())
