"""Model cards: the README.md of a model folder, generated from the files of the run, and that of an export."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import OmegaConf
from safetensors import safe_open

from .. import __version__
from ..evaluation.scores import base_name, value_text
from ..files import replace_text
from ..model.fusion import FACTS
from ..model.parts import FIXED, PARTS
from ..runs.fingerprints import short_hash
from ..runs.records import read_config, read_summary
from .tables import markdown_table, markdown_text

Z95 = 1.959964  # of a normal distribution, two-sided 95 %
OPEN = "to be filled in"
# scores that are the fraction of the questions answered correctly
SHARES = ("exact_match", "choice_accuracy", "choice_accuracy_normalised", "yes_no_accuracy")

_COUNTED = ("running_mean", "running_var", "num_batches_tracked")
_USE = (
    "## Use\n\n```python\nfrom vlmtrain.data import Processor\nfrom vlmtrain.evaluation import Chat\n"
    "from vlmtrain.model import VLMWrapper\n\n"
    "chat = Chat(VLMWrapper.from_pretrained(FOLDER), Processor.from_pretrained(FOLDER), images=[FILE])\n"
    "print(chat.say(WORDS))\n```\n"
)


def write_card(run_dir: Path, stage: str, model: Path) -> Path:
    """Write README.md to the model folder of a finished stage; the license is left to the user."""
    config = read_config(run_dir)
    held = model / "connector" / "config.json"
    if held.exists():  # with init_from, it may differ from the settings
        config["connector"] = {key: value for key, value in json.loads(held.read_text()).items() if key not in FIXED}
    names = list(config["stages"])
    summaries = {name: read_summary(run_dir / name) for name in names[: names.index(stage) + 1]}
    done = {name: summary for name, summary in summaries.items() if summary}
    start = config.get("init_from")  # the parts then come from that folder, regardless of the settings
    chosen = [*(config["vision"].get("encoders") or {"": config["vision"]}).values(), config["llm"]]
    bases = [start] if start else [options["path"] for options in chosen if options.get("path")]
    text = "\n".join(
        [
            _front("vlmtrain", bases, config["connector"]["name"]),
            f"# {markdown_text(config['name'])}, stage {markdown_text(stage)}\n",
            "A vision-language model: image encoder, connector and language model. "
            "Generated from the files of its run; fields that these files do not cover are left blank.\n",
            _table(("part", "what it is", "parameters"), _part_rows(config, model)),
            *(_adapters(folder, config["stages"][stage]) for folder in sorted(model.glob("adapters/*"))),
            "## Training\n",
            _table(
                ("stage", "objective", "trained (learning rate)", "frozen", "steps x batch"), _stage_rows(config, done)
            ),
            f"The run started from the model folder `{markdown_text(start)}`.\n" if start else "",
            "## Data\n",
            _table(("stage", "source", "samples drawn", "fingerprint"), _data_rows(config, done)),
            "The fingerprint is the beginning of a SHA-256: of a file, of both ends of a large file, or of the names "
            "and sizes in a folder (and the ends of its files, up to 10,000), as in the run's config.yaml.\n",
            "## Scores\n",
            _table(("stage", "score", "questions", "value (95 %)", "without the image"), score_rows(run_dir, done)),
            "On the run's `data.validation`, with greedy decoding. Intervals of proportions are Wilson intervals.\n",
            _USE,
            "## License and limits\n",
            f"License: {OPEN}; the terms of the parts and of the data also apply. Intended use: {OPEN}. Known limits: "
            f"{OPEN}.\n",
        ]
    )
    card = model / "README.md"
    replace_text(card, text)
    return card


def write_import_card(folder: Path, facts: Mapping, classes: Mapping[str, str]) -> None:
    """Write README.md to a model folder that was converted from a published model.

    facts: the fields of `vlmtrain.interop.importing.Import`. classes: the source's classes, by part.
    """
    difference = facts["largest_relative_difference"]
    same = "not compared: the source is a single projector"
    same = same if difference is None else f"within {difference:.1g} of the source's, relative to the largest"
    rows = [*((f"source's {part}", name) for part, name in classes.items()), ("connector", f"`{facts['connector']}`")]
    rows += [("template", facts["template"]), ("image_fit", facts["image_fit"]), ("logits", same)]
    parts = [
        (part, _held_name(folder / part), f"{_size(folder / part):,}") for part in PARTS if (folder / part).exists()
    ]
    lines = [
        _front("vlmtrain", [facts["source"]], facts["connector"]),
        f"# Imported from {markdown_text(facts['source'])}\n",
        f"A published model, converted to a model folder by vlmtrain {__version__}.\n",
        _table(("", "what it is"), rows),
        _table(("part", "what it is", "parameters"), parts),
        _USE,
        f"## License and limits\n\nLicense: {OPEN}; the source's terms apply. Intended use and limits: {OPEN}.\n",
    ]
    (folder / "README.md").write_text("\n".join(lines))


def write_export_card(source: Path, out: Path, model_class: str, difference: float, remarks: tuple[str, ...]) -> None:
    """Write README.md to an export: how to load it, how it deviates from the source, and the source's own card."""
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
        f"## License and limits\n\nLicense: {OPEN}. Intended use: {OPEN}. Known limits: {OPEN}.\n",
    ]
    (out / "README.md").write_text("\n".join(lines))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion of `count` (Wilson, 1927)."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * (share * (1 - share) / count + Z95**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _front(library: str, bases: list[str], connector: str | None) -> str:
    tags = ["vision-language-model", *([json.dumps(f"connector-{connector}")] if connector else [])]
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text", f"license: unknown  # {OPEN}"]
    lines += [f"tags: [{', '.join(tags)}]"]
    lines += ["base_model:", *(f"- {json.dumps(base)}" for base in bases)] if bases else []
    return "\n".join([*lines, "---", ""])


def _listed(card: Path, key: str) -> list[str]:
    front = card.read_text().partition("---\n")[2].partition("\n---\n")[0] if card.exists() else ""
    return OmegaConf.to_container(OmegaConf.create(front or "{}")).get(key, [])


def _part_rows(config: Mapping, model: Path) -> Iterator[tuple]:
    for part in PARTS:
        if (model / part).is_dir():
            held = config.get("init_from") or part in ("connector", "fusion")
            what = _held_name(model / part) if held else _chosen_name(config[part])
            yield part, what, f"{_size(model / part):,}"


def _chosen_name(options: Mapping) -> str:
    """Name of an encoder or language model in the settings."""
    if options["provider"] not in ("open_clip", "hf", "tiny"):
        return f"`{options['provider']}`"
    name = options.get("path") or options.get("name") or "a small model with random weights"
    pretrained = options.get("pretrained")
    return f"{options['provider']}: {name}" + (f", {pretrained}" if pretrained else "")


_TOWER_KEYS = (("depth", "num_hidden_layers"), ("embed_dim", "hidden_size"))


def _held_name(folder: Path) -> str:
    """Description of the part in a folder: a connector, a transformers class, or an open_clip tower."""
    config = json.loads((folder / "config.json").read_text())
    if folder.name in ("connector", "fusion"):
        given = ", ".join(f"{key}={value}" for key, value in config.items() if key not in ("name", *FACTS, *FIXED))
        return f"`{config['name']}`" + (f" ({given})" if given else "")
    if "encoders" in config:
        encoders = ", ".join(f"{name}: {_tower_name(tower)}" for name, tower in config["encoders"].items())
        return f"`{config['provider']}`, join={config['join']} ({encoders})"
    return _tower_name(config)


def _tower_name(config: dict) -> str:
    """Description of a vision encoder or of a transformers class, given its configuration."""
    if tower := config.get("model_config", {}).get("vision_cfg"):
        name = "open_clip: " + tower.get("timm_model_name", "ViT")
        layers, width = tower.get("layers"), tower.get("width")
    elif "options" in config:
        return f"`{config['provider']}`"
    elif "encoder" in config:  # of native resolution; the configurations call depth and width differently
        tower = config["encoder"]
        layers, width = (next(tower[key] for key in keys if key in tower) for keys in _TOWER_KEYS)
        name = f"`{config['provider']}`"
    else:
        name = ", ".join(config.get("architectures") or [config["model_type"]])
        layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    return f"{name}, {layers} layers of {width}" if layers and width else name


def _size(folder: Path) -> int:
    """Number of parameters in a folder, without the counters of batch norms."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            shapes = (opened.get_slice(name).get_shape() for name in names if not name.endswith(_COUNTED))
            total += sum(map(math.prod, shapes))
    return total


def _adapters(folder: Path, stage: Mapping) -> str:
    told = json.loads((folder / "adapter_config.json").read_text())
    targets, bits = ", ".join(told["target_modules"]), stage["lora"][folder.name].get("quantize")
    under = f" The base weights are the initial weights of the stage after quantization to {bits}." if bits else ""
    return (
        f"Adapters of {folder.name}: rank {told['r']}, alpha {told['lora_alpha']}, on {targets}; {_size(folder):,} "
        f"parameters, merged into the weights, and also stored separately in `adapters/{folder.name}`.{under}\n"
    )


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


def _data_rows(config: Mapping, done: Mapping[str, Mapping]) -> Iterator[tuple]:
    for name, summary in done.items():
        split = config["data"].get(config["stages"][name]["data"])
        for source, drawn in summary["data"].items():
            entry = split.get(source, split) if isinstance(split, Mapping) else split
            path = entry.get("path") if isinstance(entry, Mapping) else entry
            record = config.get("files", {}).get(str(Path(path))) if isinstance(path, str) else None
            if record:
                yield name, f"{source}: {Path(path).name}", f"{drawn['samples']:,}", short_hash(record)
            else:
                yield name, f"{source}: {path or config['data']['format']}", f"{drawn['samples']:,}", "none: not a file"


def score_rows(run_dir: Path, done: Mapping[str, Mapping]) -> Iterator[tuple]:
    """One row per score of each finished stage, with its interval and the value for blank images."""
    for stage, summary in done.items():
        scores = summary["validation"] or {}
        judged = _judged(run_dir / stage / "answers.json")
        for name in (name for name in scores if f"blind_{name}" in scores):
            count, seeing, blind = judged.get(name), scores[name], scores[f"blind_{name}"]
            questions, shown = f"{count or scores['questions']:,}", _with_interval(name, seeing, count)
            yield stage, name.replace("_", " "), questions, shown, value_text(name, blind)
        for kind, values in scores.get("by_category", {}).items():
            for name in (name for name in values if base_name(name) == "exact_match" and f"blind_{name}" in values):
                exact = _with_interval(name, values[name], values["questions"])
                blind = value_text(name, values[f"blind_{name}"])
                yield stage, f"{name.replace('_', ' ')} of {kind}", f"{values['questions']:,}", exact, blind


def _judged(file: Path) -> dict[str, int]:
    """Number of questions per score, for scores that judge each question separately."""
    answers = json.loads(file.read_text()) if file.exists() else []
    return Counter(name for answer in answers for name in answer["scores"])


def _with_interval(name: str, value: float, count: int | None) -> str:
    if not count or base_name(name) not in SHARES:
        return value_text(name, value)
    low, high = wilson(value, count)
    return f"{value_text(name, value)} ({low:.1%} to {high:.1%})"


def _table(head: tuple[str, ...], rows: Iterator[tuple]) -> str:
    lines = [head, *rows]
    return markdown_table(lines) if len(lines) > 1 else "None.\n"
