"""Runs of `vlmtrain` in forks of a process that has imported what they import.

A run in a fresh interpreter spends most of a short test on imports. Here one server per test process imports them once,
and forks a child for each run. The child gets the arguments, environment, folder and files of a fresh process, and
runs what is registered to run at exit. Programs that would behave differently in a fork run in a fresh interpreter:
see `Program.of` and `usable`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).parent.parent
IMPORTS = (
    *("torch", "transformers", "deepspeed", "peft", "hydra", "PIL.Image", "safetensors.torch"),
    *("deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "multiprocessing.popen_fork"),
    *("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
    *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Ppm", "Png")),
    *("hydra._internal.core_plugins.basic_launcher", "hydra._internal.core_plugins.basic_sweeper"),
    "vlmtrain.training.run",
    *(f"vlmtrain.cli.{name}" for name in ("ablate", "chat", "check", "evaluate", "export", "features")),
    *(f"vlmtrain.cli.{name}" for name in ("import_model", "plan", "report", "reproduce", "tokens")),
)
# read where they are used; any other variable may have been read while the server imported
READ_LATE = {"PYTEST_CURRENT_TEST", "WANDB_API_KEY", "WANDB_SILENT"}
READ_LATE |= {"TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"}  # set by torch and DeepSpeed themselves
READ_LATE |= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
GRACE_SECONDS = 30  # as torchrun gives the ranks next to a failed one


@dataclass
class Program:
    """What a fork runs: a module, or a script if `script`, with arguments; in ranks where there are several."""

    name: str
    arguments: list[str]
    script: bool = False
    ranks: int = 1

    @classmethod
    def of(cls, command: Sequence[str]) -> Program | None:
        """The program that a command line starts, if a fork can run it: training, or one of the commands."""
        if tuple(command[:2]) == (sys.executable, "-m") and command[2] in ("vlmtrain.train", "vlmtrain.cli"):
            return cls(command[2], list(command[3:]))
        return None

    @property
    def command(self) -> list[str]:
        """The same in fresh interpreters."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        return [*launcher, *([] if self.script else ["-m"]), self.name, *self.arguments]


def run(program: Program, environment: dict[str, str], cwd: Path | str | None, timeout: float):
    """Run a program in forks, in the way and with the result of `subprocess.run`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        code = _server().run(program, environment, cwd or os.getcwd(), (stdout, stderr), timeout)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode(errors="replace").replace("\r\n", "\n"))
    if code is None:
        raise subprocess.TimeoutExpired(program.command, timeout, *said)
    return subprocess.CompletedProcess(program.command, code, *said)


def usable(environment: dict[str, str]) -> bool:
    """Whether a fork would see what a fresh interpreter would see in this environment."""
    if not sys.platform.startswith("linux"):
        return False
    import torch

    if torch.cuda.is_available():  # it does not survive a fork
        return False
    began = _server().environment
    return not {name for name in {*began, *environment} if began.get(name) != environment.get(name)} - READ_LATE


class Server:
    """The tests' side of a server process."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    def run(
        self,
        program: Program,
        environment: dict[str, str],
        cwd: Path | str,
        outputs: tuple[IO, IO],
        timeout: float,
    ) -> int | None:
        """The exit status, negative for a signal; None for a program that was killed at its time limit."""
        request = json.dumps({"program": asdict(program), "environment": environment, "cwd": str(cwd)})
        replies, theirs = socket.socketpair()
        with replies, tempfile.TemporaryFile() as file:
            file.write(request.encode())
            file.seek(0)
            with theirs:
                fds = [file.fileno(), *(output.fileno() for output in outputs), theirs.fileno()]
                socket.send_fds(self._requests, [b"run"], fds)
            with replies.makefile() as lines:
                launcher = lines.readline()
                assert launcher, f"the fork server ended with {self._process.wait()}"
                replies.settimeout(timeout)
                try:
                    code = lines.readline()
                except TimeoutError:
                    os.kill(int(launcher), signal.SIGKILL)  # its programs exit with it
                    return None
        assert code, "a launcher of the fork server died"
        return int(code)


@functools.cache
def _server() -> Server:
    return Server()


# the server's side


def serve(requests: socket.socket) -> NoReturn:
    """Fork a launcher for each request, until the tests end."""
    for name in IMPORTS:
        importlib.import_module(name)
    parse_once()
    parse_all()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: a fork would have one of them"
    gc.collect()
    gc.freeze()  # otherwise the first collection in each child would copy every page
    while True:
        word, fds, _, _ = socket.recv_fds(requests, 16, 4)
        if not word:
            os._exit(0)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not os.fork():
            requests.close()
            launch(*fds)
        for fd in fds:
            os.close(fd)


def launch(request: int, stdout: int, stderr: int, replies: int) -> NoReturn:
    """Fork a program's ranks, and report how they ended."""
    with open(request) as file:
        given = json.load(file)
    program = Program(**given["program"])
    say = functools.partial(os.write, replies)
    say(f"{os.getpid()}\n".encode())
    launcher, running = os.getpid(), set()
    with reserved_port() as port:
        for rank in range(program.ranks):
            child = os.fork()
            if not child:
                os.close(replies)
                die_with(launcher)
                variables = torchrun_variables(rank, program.ranks, port) if program.ranks > 1 else {}
                become(program, {**given["environment"], **variables}, given["cwd"], stdout, stderr)
            running.add(child)
        code = watch(running)
    say(f"{1 if code and program.ranks > 1 else code}\n".encode())
    os._exit(0)


class reserved_port:
    """A port that no other process gets, and on which the first rank may listen.

    It is bound but not listening, with SO_REUSEADDR, so it is unavailable only to processes that ask for any port.
    """

    def __enter__(self) -> int:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("", 0))
        return self._socket.getsockname()[1]

    def __exit__(self, *error) -> None:
        self._socket.close()


def torchrun_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of one node; the first rank, not the launcher, keeps the store."""
    values = {
        **{"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, "GROUP_RANK": 0, "ROLE_NAME": "default"},
        **{"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "ROLE_WORLD_SIZE": size, "GROUP_WORLD_SIZE": 1},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": False},
        **{"TORCHELASTIC_RUN_ID": "fork", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0},
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    }
    return {name: str(value) for name, value in values.items()}


def watch(running: set[int]) -> int:
    """Wait for processes; once one fails, end the others. Returns the first failure's status, or 0."""
    code, deadline = 0, float("inf")
    while running:
        child, status = os.waitpid(-1, 0 if not code else os.WNOHANG)
        if child:
            running.discard(child)
            if not code and (code := os.waitstatus_to_exitcode(status)):
                signal_all(running, signal.SIGTERM)
                deadline = time.monotonic() + GRACE_SECONDS
            continue
        if time.monotonic() > deadline:
            signal_all(running, signal.SIGKILL)
        time.sleep(0.01)
    return code


def signal_all(processes: set[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def become(program: Program, environment: dict[str, str], cwd: str, stdout: int, stderr: int) -> NoReturn:
    """Run a program as a fresh interpreter would, from its arguments to its exit."""
    for given, number in ((stdout, 1), (stderr, 2)):
        os.dup2(given, number)
        os.close(given)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0] = str(Path(program.name).parent) if program.script else os.getcwd()
    importlib.invalidate_caches()
    sys.argv = [program.name, *program.arguments]
    sys.orig_argv = program.command
    code = 0
    try:
        if program.script:
            runpy.run_path(program.name, run_name="__main__")
        else:
            sys.modules.pop(program.name, None)  # the server's imports may have loaded it under its own name
            runpy.run_module(program.name, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads, as an interpreter does before its exit functions
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # without the interpreter's shutdown, which would tear down all modules of the server


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as in the tests
    from tests.parsed_once import parse_all, parse_once
    from vlmtrain.distributed.processes import die_with

    die_with(os.getppid())
    serve(socket.socket(fileno=int(sys.argv[1])))
