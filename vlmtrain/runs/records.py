"""Reading the files of a run folder; an incomplete or invalid file raises a one-line error that names it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from ..errors import first_line
from ..files import read_json

CONFIG, SUMMARY = "config.yaml", "summary.json"


def read_config(run_dir: Path) -> dict:
    """Settings and provenance of a run. Raises ValueError if the folder is not a run folder or its record is broken."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = run_dir / CONFIG
    if not file.is_file():
        raise ValueError(f"{run_dir} is not a run folder: {CONFIG} is missing")
    try:
        # a few nested aliases expand to more than any memory holds
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(file.read_text(encoding="utf-8"))):
            raise ValueError("it has YAML aliases")
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ValueError(f"{file} is not the record of a run: {first_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("stages"), dict):
        raise ValueError(f"{file} is not the record of a run: it has no stages")
    return config


def read_summary(stage: Path) -> dict | None:
    """The summary of a finished stage; None if the stage is not finished."""
    file = stage / SUMMARY
    if not file.exists():
        return None
    summary = read_json(file)
    if not isinstance(summary, dict) or not {"steps", "parts", "validation"} <= summary.keys():
        raise ValueError(
            f"{file} is not the summary of a finished stage: restore it, or remove {stage} to train the stage again"
        )
    return summary


def read_records(file: Path) -> list[dict]:
    """The JSON objects of a file with one per line; empty if the file is missing. A truncated last line is ignored."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            if number < len(lines):
                raise ValueError(f"{file}, line {number}: not a JSON object") from None
    return records
