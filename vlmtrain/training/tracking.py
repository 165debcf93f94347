"""Experiment tracking: metrics, validation images and models."""

from __future__ import annotations

import base64
import json
import secrets
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import replace_text


class WandB:
    """Logs metrics to Weights & Biases, if enabled. ``offline`` needs neither an account nor a network.

    steps_before: number of steps of the finished stages.
    """

    def __init__(self, mode: str, project: str, folder: Path, config: dict):
        self.run, self.steps_before = None, 0
        if mode == "disabled":
            return
        import wandb

        record = folder / "wandb_id.txt"
        run_id = record.read_text().strip() if record.exists() else ""
        if not run_id:  # chosen and saved before wandb.init, so that a killed run does not become two runs
            run_id = secrets.token_hex(4)
            replace_text(record, run_id)
        self.run = wandb.init(
            project=project, name=folder.name, dir=folder, mode=mode, config=config, id=run_id, resume="allow"
        )
        # a resumed run logs some steps again, so the axis is the step count and not the number of log calls
        self.run.define_metric("*", step_metric="total_step")

    def log(self, stage: str, record: dict[str, Any]) -> None:
        """Log a record. Its ``step`` counts within the stage."""
        if self.run is None:
            return
        rates = {f"{stage}/learning_rate/{part}": lr for part, lr in record.get("learning_rate", {}).items()}
        values = {f"{stage}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        self.run.log({"total_step": self.steps_before + record["step"], **values, **rates})

    def finish_stage(self, stage: str, folder: Path, with_model: bool) -> None:
        """Log a table of the stage's images, questions and answers, and, if `with_model`, its model as an artifact."""
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
