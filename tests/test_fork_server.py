"""A program in a fork has the same environment as in a fresh interpreter, and ends in the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import fork_server
from .conftest import run, run_script, train
from .fork_server import Program

SHOWN = """
import atexit, json, multiprocessing, os, signal, sys, threading, time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)

def of_worker():
    return multiprocessing.current_process().name

def late():
    time.sleep(0.2)
    print("thread ended")

if __name__ == "__main__":
    atexit.register(print, "exit function ran")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(of_worker)
    threading.Thread(target=late).start()
    facts = {
        "arguments": sys.argv,
        "original arguments": sys.orig_argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": sys.path,
        "main": [sys.modules["__main__"].__file__, __file__, __name__],
        "input": sys.stdin.read(),
        "terminal": [file.isatty() for file in (sys.stdin, sys.stdout, sys.stderr)],
        "signals": [signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS],
        "process": multiprocessing.current_process().name,
        "threads": threading.active_count(),
    }
    open("facts.json", "w").write(json.dumps(facts))
    os.write(2, b"said directly\\n")
    print("said")
"""
ENDS = {
    "quietly": "pass",
    "with a status": "raise SystemExit(3)",
    "with words": "raise SystemExit('no such thing')",
    "with None": "raise SystemExit(None)",
    "with an error": "raise ValueError('bad')",
    "with a signal": "import os, signal; print('said', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "at once": "import os; print('lost'); os._exit(4)",
}


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_a_program_has_the_same_environment_as_a_fresh_one(script, tmp_path):
    path = script(SHOWN)
    found = []
    for fresh in (False, True):
        folder = tmp_path / f"fresh {fresh}"
        folder.mkdir()
        done = run_script(path, "one", "two words", cwd=folder, fresh=fresh)
        assert done.stdout == "said\nthread ended\nexit function ran\n" and done.stderr == "said directly\n"
        facts = json.loads((folder / "facts.json").read_text())
        assert facts.pop("folder") == str(folder)
        found.append(facts)
    assert found[0] == found[1]


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_like_a_fresh_one(end, script):
    path = script(ENDS[end])
    forked, fresh = (run_script(path, check=False, fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stdout, forked.args) == (fresh.returncode, fresh.stdout, fresh.args)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_an_error_has_the_same_message():
    command = [sys.executable, "-m", "vlmtrain.train", "recipe=quickstart", "connector=nothing"]
    forked, fresh = (run(*command, check=False, fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert forked.returncode == 2


def test_ranks_know_their_numbers_and_connect(script, tmp_path):
    path = script(
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "number = torch.tensor([1.0 + dist.get_rank()])\n"
        "dist.all_reduce(number)\n"
        "open(f'{os.environ[\"RANK\"]}.txt', 'w').write(f'{number.item()} {\" \".join(os.environ)}')\n"
        "dist.destroy_process_group()\n"
    )
    names = {}
    for fresh in (False, True):
        run_script(path, ranks=2, cwd=tmp_path, fresh=fresh)
        for rank in range(2):
            total, _, names[fresh] = (tmp_path / f"{rank}.txt").read_text().partition(" ")
            assert total == "3.0"
    ours = ("RANK", "LOCAL_", "WORLD_", "ROLE_", "GROUP_", "MASTER_", "TORCHELASTIC_")
    lacking = set(names[True].split()) - set(names[False].split())
    assert not {name for name in lacking if name.startswith(ours)} - {"TORCHELASTIC_ERROR_FILE"}


def test_a_failed_rank_ends_the_others(script):
    began = time.monotonic()
    path = script("import os, sys, time\ntime.sleep(0 if os.environ['RANK'] == '1' else 60)\nsys.exit('rank 1 failed')")
    done = run_script(path, ranks=2, check=False)
    assert done.returncode == 1 and "rank 1 failed" in done.stderr and time.monotonic() - began < 30


def test_a_program_that_takes_too_long_is_killed(script, tmp_path):
    path = script(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    program = Program(str(path), [], script=True)
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server.run(program, dict(os.environ), tmp_path, timeout=1)
    deadline = time.monotonic() + 10
    while Path("/proc", (tmp_path / "pid").read_text()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_variables_that_imports_may_have_read_need_a_fresh_interpreter():
    environment = dict(os.environ)
    began = fork_server._server().environment
    changed = {name for name in {*began, *environment} if began.get(name) != environment.get(name)}
    assert changed <= fork_server.READ_LATE, "an earlier test has changed the environment of its process"
    assert fork_server.usable({**environment, "WANDB_SILENT": "true"})
    assert not fork_server.usable({**environment, "OMP_NUM_THREADS": "7"})
    assert not fork_server.usable({**environment, "HF_HOME": "/elsewhere"})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_has_the_same_losses_in_fresh_interpreters(ranks, tmp_path):
    line = ["recipe=quickstart", "stage=text", "stages.text.max_steps=3", "data.text.size=32", "workers=1"]
    line += ["data.validation.size=2"]
    for fresh in (False, True):
        train(*line, f"run_dir={tmp_path / str(fresh)}", ranks=ranks, fresh=fresh)
    forked, fresh = (tmp_path / name / "text" / "model" / "llm" / "model.safetensors" for name in ("False", "True"))
    assert forked.read_bytes() == fresh.read_bytes()
