"""Train a recipe:

python -m vlmtrain.train recipe=quickstart
torchrun --standalone --nproc_per_node 8 -m vlmtrain.train recipe=llava_1_5 data.images=... [key=value ...]
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator

import hydra
from omegaconf import DictConfig

from .distributed.processes import die_with_launcher, launched_rank
from .settings import Run, read_run
from .settings.composition import read_line
from .settings.finishing import finish
from .settings.locations import CONFIGS


@contextlib.contextmanager
def users_errors() -> Iterator[None]:
    """Report a user error as a single line without a traceback, from one rank only, and exit with status 2."""
    try:
        yield
    except ValueError as error:
        from .data.records import BadSample, StreamError

        if launched_rank() == 0 or isinstance(error, BadSample | StreamError):
            sys.stderr.write(f"vlmtrain: error: {error}\n")
        raise SystemExit(2) from None
    except Exception as error:
        # safetensors raises a separate error type if a file cannot be written
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and type(error).__name__ != "SafetensorError":
            raise
        sys.stderr.write(f"vlmtrain: error: {error}; run the same command to resume from the last checkpoint\n")
        raise SystemExit(2) from None


def train(run: Run) -> None:
    """Train a run, as one of the ranks started by torchrun or as a single process.

    The process group is not destroyed.
    """
    from .distributed.world import OUTSIDE_STEPS, Stopped
    from .training.engine.joining import join_world

    # longer than the limit of the run's watch, which should report first: it includes what each rank was doing
    world = join_world(OUTSIDE_STEPS * run.collective_timeout + 60)
    from .training.run import train_run  # its imports read settings made by join_world

    try:
        train_run(run, world)
    except Stopped as stopped:
        if world.is_main:
            print(stopped)


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
def _run(config: DictConfig) -> None:
    with users_errors():
        train(read_run(finish(config)))


def main() -> None:
    """Entry point of ``python -m vlmtrain.train``."""
    die_with_launcher()
    with users_errors():
        sys.argv[1:], shown = read_line(sys.argv[1:])
    if shown is not None:
        print(shown, end="")
        return
    try:
        _run()
    finally:  # the jobs of --multirun share a process group: DeepSpeed keeps the groups of the first job
        from .distributed.world import leave_world

        leave_world()


if __name__ == "__main__":
    main()
