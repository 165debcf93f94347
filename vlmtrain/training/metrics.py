"""What a run says of itself: a progress bar or sparse lines, metrics.jsonl, wandb."""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import secrets
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..paths import replace_text

logger = logging.getLogger("vlmtrain")


def set_up_logging(file: Path | None) -> None:
    """Send log lines to the terminal, and to `file` if given; silence other libraries' chatter."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if file else logging.ERROR)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(terminal)
    if file:
        to_file = logging.FileHandler(file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(to_file)


class Metrics:
    """A file of one object a step, as metrics.jsonl, written by the main rank. What is not finite becomes null."""

    def __init__(self, file: Path, first_step: int):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            # steps behind the checkpoint will be trained again
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= first_step]
            replace_text(file, "".join(line + "\n" for line in kept))
        self._file = open(file, "a", buffering=1)  # noqa: SIM115 - open as long as the stage

    def write(self, record: dict[str, Any]) -> None:
        finite = {key: _finite(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Have what was written on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a crash


class Progress:
    """One bar on a terminal; elsewhere a line every `seconds`."""

    def __init__(self, stage: str, total: int, first: int, seconds: float = 15.0):
        self.stage, self.total, self.seconds = stage, total, seconds
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=first, desc=stage, unit="step", disable=not self.is_terminal, leave=True)
        self._next_line = time.monotonic()

    def update(self, step: int, loss: float, tokens_per_second: float, step_seconds: float) -> None:
        text = f"loss {loss:.4f}  {_short(tokens_per_second)} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if not self.is_terminal and (time.monotonic() >= self._next_line or step == self.total):
            left = _clock((self.total - step) * step_seconds)
            logger.info(f"{self.stage}  step {step}/{self.total}  {text}  {left} left")
            self._next_line = time.monotonic() + self.seconds

    def close(self) -> None:
        self.bar.close()


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class WandB:
    """Metrics to Weights & Biases, if asked for; ``offline`` needs neither account nor network.

    steps_before: those of the stages that are finished.
    """

    def __init__(self, mode: str, project: str, folder: Path, config: dict):
        self.run, self.steps_before = None, 0
        if mode == "disabled":
            return
        if mode not in ("offline", "online"):
            raise ValueError(f"wandb={mode}: expected disabled, offline or online")
        import wandb

        record = folder / "wandb_id.txt"
        run_id = record.read_text().strip() if record.exists() else ""
        if not run_id:  # chosen and kept before wandb knows it: a kill between must not make two runs of one
            run_id = secrets.token_hex(4)
            replace_text(record, run_id)
        self.run = wandb.init(
            project=project, name=folder.name, dir=folder, mode=mode, config=config, id=run_id, resume="allow"
        )
        # a resumed run tells of some steps again: its axis is what we count, not how often it has logged
        self.run.define_metric("*", step_metric="total_step")

    def log(self, stage: str, record: dict[str, Any]) -> None:
        """A record with its ``step`` within the stage."""
        if self.run is None:
            return
        rates = {f"{stage}/learning_rate/{part}": lr for part, lr in record.get("learning_rate", {}).items()}
        values = {f"{stage}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        self.run.log({"total_step": self.steps_before + record["step"], **values, **rates})

    def finish_stage(self, stage: str, folder: Path, with_model: bool) -> None:
        """The stage's pictures with questions and answers as a table; its model folder as an artifact, if asked."""
        if self.run is None:
            return
        import wandb

        shown = json.loads((folder / "samples.json").read_text())
        columns = ("pictures", "question", "reference", "prediction", "blind_prediction", "exact")
        rows = [
            [[wandb.Image(_picture(uri)) for uri in sample["pictures"]], *(sample[key] for key in columns[1:])]
            for sample in shown
        ]
        if rows:
            self.run.log({f"{stage}/answers": wandb.Table(columns=list(columns), data=rows)})
        if with_model:
            artifact = wandb.Artifact(f"{self.run.id}-{stage}", type="model")
            artifact.add_dir(str(folder / "model"))
            self.run.log_artifact(artifact)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _picture(uri: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))
