"""A folder that is being replaced is always complete, whenever the process dies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KILLED = """
import os, shutil, sys
from pathlib import Path
import vlmtrain.files as paths

left = int(sys.argv[3])
def dies(function):
    def call(*arguments, **options):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return function(*arguments, **options)
    return call

Path.rename, shutil.rmtree, paths.sync = dies(Path.rename), dies(shutil.rmtree), dies(paths.sync)
paths.replace_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("calls", range(7))
def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one(calls, tmp_path):
    from vlmtrain.files import replace_folder, restore_folder

    partial, target = tmp_path / "best.partial", tmp_path / "best"
    for folder, words in ((partial, "new"), (target, "old")):
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(words)
    done = subprocess.run([sys.executable, "-c", KILLED, str(partial), str(target), str(calls)], env=dict(os.environ))
    assert done.returncode in (0, 9)
    restore_folder(target)
    found = {file.name: file.read_text() for file in target.iterdir()}
    assert found in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
    if done.returncode == 0:
        assert found["a"] == "new" and not (tmp_path / "best.old").exists()
    again = tmp_path / "again"
    again.mkdir()
    (again / "a").write_text("newest")
    replace_folder(again, target)
    assert [file.read_text() for file in target.iterdir()] == ["newest"] and len(list(tmp_path.glob("best*"))) <= 2
