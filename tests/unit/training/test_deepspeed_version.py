"""A DeepSpeed whose private attributes are unknown is refused, with what to install."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlmtrain.training.engine import joining
from vlmtrain.training.engine.joining import KNOWN_DEEPSPEED, check_version

from ...conftest import ROOT


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9", "0.19.10+cu130"])
def test_known_versions_pass(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "1.0"])
def test_other_versions_are_refused(version):
    with pytest.raises(
        ValueError, match=rf"DeepSpeed {version} is installed: expected at least 0\.19\.8 and below 0\.20"
    ):
        check_version(version)


def test_the_package_requires_the_same_versions():
    (required,) = re.findall(r'"deepspeed>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert required == KNOWN_DEEPSPEED


def test_the_check_lists_the_private_attributes():
    read = "".join(file.read_text() for file in Path(joining.__file__).parent.glob("*.py") if file.stem != "joining")
    private = r"\b(?:ds_|_hp_|_dp_)\w+|\b(?:sub_group|fp32_partitioned)\w+"
    assert set(re.findall(private, read)) == set(re.findall(private, check_version.__doc__))
