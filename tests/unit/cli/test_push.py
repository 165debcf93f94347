"""``vlmtrain push``, against a stub of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.model_parity import Case, build
from vlmtrain.cli import main


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """The calls that reach the Hub."""
    calls: list[tuple] = []

    def create(repo: str, private: bool, exist_ok: bool) -> str:
        calls.append(("create", repo, private))
        return f"https://hub/{repo}"

    def upload(repo_id: str, folder_path: Path, commit_message: str) -> None:
        calls.append(("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())))

    stub = SimpleNamespace(create_repo=create, upload_folder=upload)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stub)
    return calls


def test_a_model_folder_is_uploaded_to_a_private_repository(tmp_path, hub, capsys):
    build(Case(), tmp_path / "model")
    main(["push", str(tmp_path / "model"), "me/mine", "--json"])
    assert json.loads(capsys.readouterr().out) == {"repo": "me/mine", "url": "https://hub/me/mine"}
    assert hub[0] == ("create", "me/mine", True)
    assert hub[1][:2] == ("upload", "me/mine") and "vlmtrain.json" in hub[1][2]
    main(["push", str(tmp_path / "model" / "llm"), "me/llm", "--public"])
    assert hub[2] == ("create", "me/llm", False)


def test_another_folder_is_refused_before_anything_is_sent(tmp_path, hub, capsys):
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path), "me/mine"])
    assert hub == [] and "vlmtrain.json is missing" in capsys.readouterr().err


def test_a_name_that_the_hub_refuses_is_named(tmp_path, capsys):
    """The real library, offline."""
    build(Case(), tmp_path / "model")
    for name in ("a/b/c", "me/mine"):
        with pytest.raises(SystemExit):
            main(["push", str(tmp_path / "model"), name])
        said = capsys.readouterr().err
        assert said.startswith(f"vlmtrain: error: cannot upload to {name}: ") and said.count("\n") == 1
