"""Files with one JSON object per step: metrics.jsonl and others."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..files import replace_text


class Metrics:
    """Appends to such a file, on the main rank only. Non-finite numbers are written as null."""

    def __init__(self, file: Path, first_step: int):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            # steps after the checkpoint are trained again
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= first_step]
            replace_text(file, "".join(line + "\n" for line in kept))
        self._file = open(file, "a", buffering=1)  # noqa: SIM115 - open as long as the stage

    def write(self, record: dict[str, Any]) -> None:
        finite = {key: _finite(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line truncated by a crash
