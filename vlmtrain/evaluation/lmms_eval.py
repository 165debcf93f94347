"""Run lmms-eval tasks after a stage, on the model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.processor import Processor
from ..distributed.world import World
from ..errors import nearest
from ..model import VLMWrapper


def check_tasks(tasks: Sequence[str], is_sharded: bool) -> None:
    """Raise ValueError if tasks cannot be run because the weights are sharded over the ranks (ZeRO-3)."""
    if tasks and is_sharded:
        raise ValueError(
            "validation.lmms_eval: ranks evaluate different questions, which zero3 on several processes does not "
            "support; train with zero2, or run lmms-eval on the model folder"
        )


class Benchmarks:
    """Tasks by their names in lmms-eval, or custom tasks by their YAML files.

    limit: number of questions per task, from its start; None: all. Every rank makes the same calls and takes its share.
    Raises ValueError, before anything is downloaded, if lmms-eval is not installed or a task does not exist.
    """

    def __init__(self, tasks: Sequence[str], batch_size: int, limit: int | None):
        try:
            from lmms_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                f"validation.lmms_eval needs lmms-eval ({error}): pip install 'vlmtrain[lmms-eval]', "
                "then pip install --no-deps lmms-eval"
            ) from None
        self.batch_size, self.limit = batch_size, limit
        files = [Path(task) for task in tasks if task.endswith(".yaml")]
        for file in files:
            if not file.is_file():
                raise ValueError(f"validation.lmms_eval: {file} is not a file")
        self.manager = TaskManager("ERROR", include_path=[str(file.parent) for file in files] or None)
        self.tasks = [_task_of(Path(task)) if task.endswith(".yaml") else task for task in tasks]
        for task in self.tasks:
            if task not in self.manager.all_tasks:
                raise ValueError(
                    f"validation.lmms_eval: lmms-eval has no task '{task}'.{nearest(task, self.manager.all_tasks)} "
                    "`python -m lmms_eval --tasks list` lists them; give a custom task as its YAML file"
                )

    def load(self) -> None:
        """Load the tasks' data, downloading it if necessary. Raises ValueError if that fails."""
        from lmms_eval.tasks import get_task_dict

        for task in self.tasks:
            try:
                get_task_dict([task], self.manager)
            except Exception as error:  # a task's code may raise anything
                raise ValueError(f"validation.lmms_eval: the data of {task} cannot be loaded: {error}") from error

    def scores(self, model: VLMWrapper, processor: Processor, world: World) -> dict[str, dict[str, float]]:
        """The metrics of each task, by name, on every rank."""
        from lmms_eval.evaluator import simple_evaluate
        from loguru import logger

        from ..interop.lmms import Model

        logger.disable("lmms_eval")
        try:
            done = simple_evaluate(
                model=Model.of(model, processor, self.batch_size),
                tasks=self.tasks,
                task_manager=self.manager,
                batch_size=self.batch_size,
                limit=self.limit,
                log_samples=False,
                bootstrap_iters=0,
                distributed_executor_backend="torchrun",
            )
        finally:
            logger.enable("lmms_eval")
        found = {task: _metrics(values) for task, values in done["results"].items()} if world.is_main else None
        return world.from_main(found)


def _task_of(file: Path) -> str:
    from lmms_eval.utils import load_yaml_config

    name = load_yaml_config(str(file), mode="simple").get("task")
    if not isinstance(name, str):
        raise ValueError(f"validation.lmms_eval: {file} has no 'task' key with the name of the task")
    return name


def _metrics(values: dict) -> dict[str, float]:
    """Numeric metrics only, without the suffix of the filter "none", and without bootstrap errors."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "_stderr" not in name and name != "samples"
    }
