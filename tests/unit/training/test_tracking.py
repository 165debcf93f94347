"""Trackers, with their own libraries, where these are installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlmtrain.training.tracking import MLflow, TensorBoard, Trackers

TEXTS = {"question": "q | r", "reference": "a", "prediction": "b", "blind_prediction": "c"}
SAMPLE = {"pictures": [], **TEXTS, "exact": False}
RUN = SimpleNamespace(wandb="disabled", loggers=(), wandb_project="project", composed={"seed": 3})


def test_mlflow_continues_the_run_of_the_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")  # not among the development tools: DeepSpeed would import it at every start
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'server'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (1, 2):
        tracker = MLflow(RUN, tmp_path)
        tracker.log(step, {"align/loss": 1 / step})
        tracker.log_answers(step, "align", [SAMPLE])
        tracker.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "align/loss")] == [(1, 1.0), (2, 0.5)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.yaml", "align"}


def test_a_tracker_that_cannot_start_ends_the_run_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = SimpleNamespace(**{**vars(RUN), "wandb": "online"})
    with pytest.raises(ValueError, match=r"^wandb cannot start: run wandb login, or set wandb=offline: "):
        Trackers(run, tmp_path, is_main=True)


def test_tensorboard_escapes_the_table_of_answers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(RUN, tmp_path)
    tracker.log(7, {"align/loss": 0.5})
    tracker.log_answers(7, "align", [SAMPLE])
    tracker.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("align/loss")] == [(7, 0.5)]
    (table,) = board.Tensors("align/answers/text_summary")
    assert b"q \\| r | a | b | c | False" in table.tensor_proto.string_val[0]


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    run = SimpleNamespace(**{**vars(RUN), "loggers": ("mlflow",)})
    with pytest.raises(ValueError, match=r"loggers=\['mlflow'\]: .*pip install '\.\[trackers\]'"):
        Trackers(run, tmp_path, is_main=True)
    assert Trackers(run, tmp_path, is_main=False).trackers == []
