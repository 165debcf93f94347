"""Experiment tracking: metrics, answers about validation images, and models, with the trackers' own libraries."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import first_line
from ..files import replace_text
from ..settings import Run

COLUMNS = ("question", "reference", "prediction", "blind_prediction", "exact")
"""Columns of the table of answers, beside the images."""


class Tracker:
    """Logs to one service. A run that is resumed continues in the service's run of the same run folder."""

    def __init__(self, run: Run, folder: Path):
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers at a step, counted over all stages."""
        raise NotImplementedError

    def log_answers(self, step: int, stage: str, samples: list[dict]) -> None:
        """Log the images, questions and answers in a stage's samples.json."""
        raise NotImplementedError

    def log_model(self, stage: str, model: Path) -> None:
        """Upload a stage's model folder, if the tracker stores models."""

    def close(self) -> None:
        raise NotImplementedError


class WandB(Tracker):
    """Weights & Biases. ``wandb=offline`` needs neither an account nor a network."""

    def __init__(self, run: Run, folder: Path):
        import wandb

        mode = "online" if run.wandb == "disabled" else run.wandb
        # chosen and saved before wandb.init, so that a killed run does not become two runs
        name = _remembered(folder / "wandb_id.txt", lambda: secrets.token_hex(4))
        options = {"project": run.wandb_project, "name": folder.name, "dir": folder, "mode": mode}
        self.run = wandb.init(**options, config=dict(run.composed), id=name, resume="allow")
        # a resumed run logs some steps again, so the axis is the step count and not the number of log calls
        self.run.define_metric("*", step_metric="total_step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"total_step": step, **values})

    def log_answers(self, step: int, stage: str, samples: list[dict]) -> None:
        import wandb

        rows = [
            [[wandb.Image(_image(uri)) for uri in sample["pictures"]], *(sample[key] for key in COLUMNS)]
            for sample in samples
        ]
        self.run.log({f"{stage}/answers": wandb.Table(columns=["pictures", *COLUMNS], data=rows)})

    def log_model(self, stage: str, model: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.run.id}-{stage}", type="model")
        artifact.add_dir(str(model))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()


class TensorBoard(Tracker):
    """TensorBoard files in the run folder's ``tensorboard``."""

    def __init__(self, run: Run, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def log_answers(self, step: int, stage: str, samples: list[dict]) -> None:
        head = " | ".join(COLUMNS)
        rows = (" | ".join(str(sample[key]).replace("|", "\\|") for key in COLUMNS) for sample in samples)
        table = "\n".join([head, " | ".join("---" for _ in COLUMNS), *rows])
        self.writer.add_text(f"{stage}/answers", table, step)

    def close(self) -> None:
        self.writer.close()


class MLflow(Tracker):
    """MLflow, at ``MLFLOW_TRACKING_URI``, in the experiment `wandb_project`."""

    def __init__(self, run: Run, folder: Path):
        import mlflow

        self.client = mlflow.MlflowClient()
        found = self.client.get_experiment_by_name(run.wandb_project)
        experiment = found.experiment_id if found else self.client.create_experiment(run.wandb_project)

        def new() -> str:
            return self.client.create_run(experiment, run_name=folder.name).info.run_id

        self.run_id = _remembered(folder / "mlflow_id.txt", new)
        self.client.log_dict(self.run_id, dict(run.composed), "config.yaml")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = 0  # steps are the axis; equal timestamps let a repeated step replace its first value
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_answers(self, step: int, stage: str, samples: list[dict]) -> None:
        rows = [{key: sample[key] for key in COLUMNS} for sample in samples]
        self.client.log_dict(self.run_id, {"answers": rows}, f"{stage}/answers.json")

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandB, "tensorboard": TensorBoard, "mlflow": MLflow}
"""By name in ``loggers``."""


class Trackers:
    """All trackers of a run, on the main rank; none on the others. steps_before: of the finished stages.

    Raises ValueError if the library of a tracker is not installed, or if a tracker cannot start.
    """

    def __init__(self, run: Run, folder: Path, is_main: bool):
        names = dict.fromkeys([*(["wandb"] if run.wandb != "disabled" else []), *run.loggers])
        self.steps_before = 0
        self.trackers: list[Tracker] = []
        for name in names if is_main else ():
            try:
                self.trackers.append(TRACKERS[name](run, folder))
            except ImportError as error:
                raise ValueError(f"loggers={list(run.loggers)}: {error}; pip install '.[trackers]'") from None
            except Exception as error:  # the library, its service and the network can raise any exception
                hint = ": run wandb login, or set wandb=offline" if name == "wandb" else ""
                raise ValueError(f"{name} cannot start{hint}: {first_line(error)}") from None

    def log(self, stage: str, record: Mapping[str, Any]) -> None:
        """Log a record. Its ``step`` counts within the stage."""
        values = {f"{stage}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
        for key, named in record.items():
            if isinstance(named, Mapping):
                values |= {f"{stage}/{key}/{name}": value for name, value in named.items()}
        for tracker in self.trackers:
            tracker.log(self.steps_before + record["step"], values)

    def finish_stage(self, stage: str, folder: Path, with_model: bool) -> None:
        """Log the answers of a finished stage, and, if `with_model`, its model folder."""
        samples = json.loads((folder / "samples.json").read_text()) if self.trackers else []
        for tracker in self.trackers:
            if samples:
                steps = json.loads((folder / "summary.json").read_text())["steps"]
                tracker.log_answers(self.steps_before + steps, stage, samples)
            if with_model:
                tracker.log_model(stage, folder / "model")

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _remembered(file: Path, new) -> str:
    """The identifier in a file of the run folder, or a new one, which is written there."""
    known = file.read_text().strip() if file.exists() else ""
    if not known:
        known = new()
        replace_text(file, known)
    return known


def _image(uri: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))
