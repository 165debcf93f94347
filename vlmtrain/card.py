"""Model cards: the README.md of a model folder, written from what the run's files say, and of an export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import OmegaConf

from . import __version__
from .fingerprints import shown
from .paths import replace_text
from .run_files import read_config, read_summary
from .training.handover import FIXED

Z95 = 1.959964  # of a normal distribution, two-sided 95 %
OPEN = "to be filled in"


def write_card(run_dir: Path, stage: str, model: Path) -> Path:
    """Write README.md into the model folder of a finished stage; the licence is left to the user."""
    config = read_config(run_dir)
    held = model / "connector" / "config.json"
    if held.exists():  # with init_from, not always what the settings name
        config["connector"] = {key: value for key, value in json.loads(held.read_text()).items() if key not in FIXED}
    names = list(config["stages"])
    summaries = {name: read_summary(run_dir / name) for name in names[: names.index(stage) + 1]}
    done = {name: summary for name, summary in summaries.items() if summary}
    parts = {part: _part_name(config, part) for part in ("vision", "connector", "llm")}
    bases = [config[part][key] for part, key in (("vision", "path"), ("llm", "path")) if config[part].get(key)]
    text = "\n".join(
        [
            _front("vlmtrain", bases, config["connector"]["name"]),
            f"# {config['name']}, stage {stage}\n",
            "A vision-language model: image encoder, connector and language model, joined by token concatenation. "
            "Written from the files of its run; what they do not know is left open.\n",
            _table(("part", "what it is", "parameters"), _part_rows(parts, done[stage])),
            "## Training\n",
            _table(
                ("stage", "objective", "trained (learning rate)", "frozen", "steps x batch"), _stage_rows(config, done)
            ),
            _started(config),
            "## Data\n",
            _table(("stage", "source", "samples drawn", "fingerprint"), _data_rows(config, done)),
            "The beginning of a SHA-256: of a file, of both ends of a large one, or of names and sizes in a folder "
            "(and the ends of its files, up to 10,000). As the run's config.yaml has it.\n",
            "## Scores\n",
            _table(("stage", "questions", "exact match (95 %)", "without the picture", "loss"), _score_rows(done)),
            "On `data.validation` of the run, greedy answers. Wilson intervals.\n",
            "## Use\n",
            "```python\nfrom vlmtrain.data import Processor\nfrom vlmtrain.evaluation import Chat\n"
            "from vlmtrain.model import VLMWrapper\n\n"
            "chat = Chat(VLMWrapper.from_pretrained(FOLDER), Processor.from_pretrained(FOLDER), images=[FILE])\n"
            "print(chat.say(WORDS))\n```\n",
            "## Licence and limits\n",
            f"Licence: {OPEN}; the terms of the parts and of the data hold too. Intended use: {OPEN}. Known limits: "
            f"{OPEN}.\n",
        ]
    )
    card = model / "README.md"
    replace_text(card, text)
    return card


def write_export_card(source: Path, out: Path, model_class: str, difference: float, remarks: tuple[str, ...]) -> None:
    """Write README.md into an export: how it is loaded and what it does otherwise, and then the source's own card."""
    card = source / "README.md"
    _, _, body = card.read_text().partition("\n---\n") if card.exists() else ("", "", "")
    front = _front("transformers", _listed(card, "base_model"), None)
    needs = "import vlmtrain\n" if model_class.startswith("VLMTrain") else ""
    lines = [
        front,
        f"# {model_class}\n",
        f"Exported by vlmtrain {__version__}; its logits are within {difference:.1g} of the source's, relative to the "
        "largest.\n",
        f"```python\n{needs}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        "model = AutoModelForImageTextToText.from_pretrained(FOLDER)\n"
        "processor = AutoProcessor.from_pretrained(FOLDER)\n```\n",
        *(f"- {remark}" for remark in remarks),
        "",
        body.strip().partition("## Use")[0].replace("\n## ", "\n### ").replace("# ", "## ", 1) if body else "",
        f"## Licence and limits\n\nLicence: {OPEN}. Intended use: {OPEN}. Known limits: {OPEN}.\n",
    ]
    (out / "README.md").write_text("\n".join(lines))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` (Wilson, 1927)."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * (share * (1 - share) / count + Z95**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _front(library: str, bases: list[str], connector: str | None) -> str:
    tags = ["vision-language-model", *([f"connector-{connector}"] if connector else [])]
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text", f"license: unknown  # {OPEN}"]
    lines += [f"tags: [{', '.join(tags)}]"]
    lines += ["base_model:", *(f"- {json.dumps(base)}" for base in bases)] if bases else []
    return "\n".join([*lines, "---", ""])


def _listed(card: Path, key: str) -> list[str]:
    front = card.read_text().partition("---\n")[2].partition("\n---\n")[0] if card.exists() else ""
    return OmegaConf.to_container(OmegaConf.create(front or "{}")).get(key, [])


def _part_name(config: Mapping, part: str) -> str:
    options = config[part]
    if part == "connector":
        given = ", ".join(f"{key}={value}" for key, value in options.items() if key != "name")
        return f"`{options['name']}`" + (f" ({given})" if given else "")
    name = options.get("path") or options.get("name") or "a small one, from random weights"
    pretrained = options.get("pretrained")
    return f"{options['provider']}: {name}" + (f", {pretrained}" if pretrained else "")


def _part_rows(parts: Mapping[str, str], summary: Mapping) -> Iterator[tuple]:
    for part, what in parts.items():
        if part in summary["parts"]:
            yield part, what, f"{summary['parts'][part]['parameters']:,}"


def _stage_rows(config: Mapping, done: Mapping[str, Mapping]) -> Iterator[tuple]:
    for name, summary in done.items():
        stage, parts = config["stages"][name], summary["parts"]
        trained = [f"{part} ({_rate(facts)})" for part, facts in parts.items() if facts["trained"]]
        frozen = [part for part, facts in parts.items() if not facts["trained"]]
        steps = f"{summary['steps']:,} x {stage['batch_size']:,}"
        yield name, stage["objective"], ", ".join(trained), ", ".join(frozen) or "none", steps


def _rate(facts: Mapping) -> str:
    rate = facts["learning_rate"]
    return f"{rate:g}" if isinstance(rate, int | float) else json.dumps(rate)


def _started(config: Mapping) -> str:
    return f"The run started from the model folder `{config['init_from']}`.\n" if config.get("init_from") else ""


def _data_rows(config: Mapping, done: Mapping[str, Mapping]) -> Iterator[tuple]:
    for name, summary in done.items():
        split = config["data"].get(config["stages"][name]["data"])
        for source, drawn in summary["data"].items():
            entry = split.get(source, split) if isinstance(split, Mapping) else split
            path = entry.get("path") if isinstance(entry, Mapping) else entry
            record = config.get("files", {}).get(str(Path(path))) if isinstance(path, str) else None
            if record:
                yield name, f"{source}: {Path(path).name}", f"{drawn['samples']:,}", shown(record)
            else:
                yield name, f"{source}: {path or config['data']['format']}", f"{drawn['samples']:,}", "none: not a file"


def _score_rows(done: Mapping[str, Mapping]) -> Iterator[tuple]:
    for name, summary in done.items():
        scores = summary["validation"]
        if scores and scores.get("questions"):
            low, high = wilson(scores["exact_match"], scores["questions"])
            exact = f"{scores['exact_match']:.1%} ({low:.1%} to {high:.1%})"
            yield name, f"{scores['questions']:,}", exact, f"{scores['blind_exact_match']:.1%}", f"{scores['loss']:.4f}"


def _table(head: tuple[str, ...], rows: Iterator[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    if len(lines) == 2:
        return "None.\n"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
