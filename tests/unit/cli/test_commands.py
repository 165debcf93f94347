"""The ``vlmtrain`` command."""

from __future__ import annotations

import sys

import pytest
import yaml

from vlmtrain.cli import COMMANDS, main


def test_train_is_a_command_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vlmtrain"])
    main(["train", "recipe=quickstart", "seed=3", "--cfg", "job"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["name"] == "quickstart" and shown["seed"] == 3


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {name}" in shown for name in ("train", *COMMANDS))
