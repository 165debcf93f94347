"""The state of code and files in a run's record."""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest

from vlmtrain.runs import fingerprints
from vlmtrain.runs import provenance as module
from vlmtrain.runs.fingerprints import fingerprint
from vlmtrain.runs.provenance import differences, git_state
from vlmtrain.settings import compose


def git(folder, *words):
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout


def test_git_state_has_the_commit_and_whether_the_code_differs_from_it(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    assert git_state(package) is None
    git(tmp_path, "init", "-q")
    assert git_state(package) is None, "a package inside a checkout, but not part of it"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = git_state(package)
    assert clean == {"commit": git(tmp_path, "rev-parse", "HEAD").strip(), "changes": None}
    (package / "a.py").write_text("x = 2\n")
    changed = git_state(package)
    assert changed["commit"] == clean["commit"] and changed["changes"]
    (package / "a.py").write_text("x = 3\n")
    assert git_state(package)["changes"] != changed["changes"]


def test_a_small_file_is_identified_by_its_bytes_and_a_large_one_by_size_and_time(tmp_path, monkeypatch):
    file = tmp_path / "data.json"
    file.write_text("[1]")
    first = fingerprint(file)
    assert first["bytes"] == 3 and first["sha256"] == hashlib.sha256(b"[1]").hexdigest()
    os.utime(file, (1, 1))
    assert not differences({"files": {"x": first}}, {"files": {"x": fingerprint(file)}}), "a copy is the same"
    file.write_text("[2]")
    (line,) = differences({"files": {"x": first}}, {"files": {"x": fingerprint(file)}})
    assert line.startswith("files.x: ")
    monkeypatch.setattr(fingerprints, "HASHED_WHOLE", 2)
    large = fingerprint(file)
    os.utime(file, (5, 5))
    assert "sha256" not in large and differences({"files": {"x": large}}, {"files": {"x": fingerprint(file)}})


def test_a_folder_is_identified_by_names_and_sizes(tmp_path):
    for name in ("b/2.png", "a/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"123")
    first = fingerprint(tmp_path)
    assert (first["files"], first["bytes"]) == (2, 6)
    (tmp_path / "a/1.png").rename(tmp_path / "a/3.png")
    assert fingerprint(tmp_path)["sha256"] != first["sha256"]


def test_links_are_not_followed_and_files_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    folder.mkdir()
    outside.write_bytes(b"1")
    (folder / "a.png").write_bytes(b"123")
    (folder / "link").symlink_to(outside)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    first = fingerprint(folder)
    assert first["files"] == 3 and "unreadable" not in first
    outside.write_bytes(b"22")
    assert fingerprint(folder)["sha256"] == first["sha256"]
    (folder / "link").unlink()
    (folder / "link").symlink_to(tmp_path / "outsidE")
    assert fingerprint(folder)["sha256"] != first["sha256"]

    def refused(file, size):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(fingerprints, "_ends", refused)  # the tests may run as root, who can read every file
    assert fingerprint(folder)["unreadable"] == 1


def test_a_large_file_and_the_files_of_a_folder_are_identified_by_their_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "HASHED_WHOLE", 2)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 3_000_000)
    found = [fingerprint(tmp_path), fingerprint(tmp_path / "b")]
    (tmp_path / "b").write_bytes(b"b" * 2_999_999 + b"a")
    again = [fingerprint(tmp_path), fingerprint(tmp_path / "b")]
    assert found[0]["sha256"] != again[0]["sha256"] and found[1]["ends_sha256"] != again[1]["ends_sha256"]
    monkeypatch.setattr(fingerprints, "FEW_FILES", 1)
    many = fingerprint(tmp_path)
    (tmp_path / "b").write_bytes(b"c" * 3_000_000)
    assert fingerprint(tmp_path)["sha256"] == many["sha256"], "only names and sizes are used for many files"


def test_files_that_the_settings_read_are_found_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "off", "align.json", "llm", "images"):
        (tmp_path / name).mkdir()
    line = ["recipe=llava_1_5", "mini=true", "data=llava_json", "data.align={a: align.json}", "data.images=images"]
    settings = compose([*line, "llm=hf", "llm.path=llm", "data.instruct=nothing.json"])
    assert sorted(map(str, module._read_paths(settings))) == ["align.json", "images", "llm"]


@pytest.mark.parametrize("key", ["versions", "machine"])
def test_what_else_differs_is_named(key):
    assert differences({key: {"a": 1, "b": 2}}, {key: {"a": 1, "b": 3}}) == [f"{key}.b: 2 -> 3"]
