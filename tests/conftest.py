"""Shared fixtures: tiny parts, tiny data, and runs in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
from PIL import Image

from . import fork_server
from .fork_server import Program
from .parsed_once import parse_once

ROOT = fork_server.ROOT
TIMEOUT = 600  # seconds

parse_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes long; run with --slow"))
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def tokenizer():
    from vlmtrain.data.shapes import VOCABULARY
    from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

    return build_tiny_tokenizer(VOCABULARY)


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


@pytest.fixture(scope="session")
def llava_files(tmp_path_factory) -> dict[str, Path]:
    """A small LLaVA data set: images, captions, and conversations with none, one and two images."""
    folder = tmp_path_factory.mktemp("llava")
    colors = {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 90, 230), "yellow": (240, 190, 20)}
    for name, color in colors.items():
        Image.new("RGB", (60, 40), color).save(folder / f"{name}.png")
    align, instruct, names = [], [], list(colors)
    for i in range(24):
        name, other = names[i % 4], names[(i + 1 + i // 4) % 4]
        align.append({"id": i, "image": f"{name}.png", "conversations": [human("<image>\nDescribe"), gpt(name)]})
        question = [human("<image>\nWhat color is this?"), gpt(name)]
        if i % 3 == 1:
            instruct.append({"id": i, "conversations": [human(f"What is number {i}?"), gpt(f"a {name} circle")]})
        elif i % 3 == 2:
            talk = [*question, human("<image>\nand this?"), gpt(f"{other}, left of {name}")]
            instruct.append({"id": i, "image": [f"{name}.png", f"{other}.png"], "conversations": talk})
        else:
            instruct.append({"id": i, "image": f"{name}.png", "conversations": question})
    for file, records in (("align", align), ("instruct", instruct), ("validation", instruct[:6])):
        (folder / f"{file}.json").write_text(json.dumps(records))
    return {"images": folder, **{name: folder / f"{name}.json" for name in ("align", "instruct", "validation")}}


def data_overrides(files: dict[str, Path]) -> list[str]:
    return ["data=llava_json", *(f"data.{key}={path}" for key, path in files.items())]


def run(*command: str, check: bool = True, fresh: bool = False, **options) -> subprocess.CompletedProcess:
    """Run a command as a user would; if it fails, the error contains its output.

    Training and the commands of `vlmtrain` run in a fork if that is equivalent; `fresh` selects a new interpreter.
    """
    return _run(Program.of(command), command, check, fresh, **options)


def train(*overrides: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """`python -m vlmtrain.train`, in ranks as under torchrun for several; options as for `run`."""
    return run_program(Program("vlmtrain.train", list(overrides), ranks=ranks), **options)


def run_script(script: Path, *arguments: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """A script of the tests, in ranks as under torchrun for several; options as for `run`."""
    return run_program(Program(str(script), list(arguments), script=True, ranks=ranks), **options)


def run_program(program: Program, check: bool = True, fresh: bool = False, **options) -> subprocess.CompletedProcess:
    return _run(program, program.command, check, fresh, **options)


def _run(program: Program | None, command: Sequence[str], check: bool, fresh: bool, **options):
    environment = {**os.environ, **options.pop("env", {})}
    if program and not fresh and not options.keys() - {"cwd"} and fork_server.usable(environment):
        done = fork_server.run(program, environment, options.get("cwd"), TIMEOUT)
    else:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, **options)
    if check and done.returncode:
        raise AssertionError(f"{command}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def metrics(run_dir: Path, stage: str, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / stage / file).read_text().splitlines()]
