"""What a command loads at its start: libraries that take seconds to load are loaded only where they are used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vlmtrain.distributed.world import prepare_process

from ..conftest import run

LOADED = "import sys; print('loaded', *sorted({name.partition('.')[0] for name in sys.modules}))"
TRAINING = ("recipe=quickstart", "stage=text", "stages.text.max_steps=1", "data.text.size=32", "data.validation.size=2")


def loaded(code: str, folder: Path) -> set[str]:
    """Packages that are loaded after some code has run."""
    line = next(line for line in run(sys.executable, "-c", code, cwd=folder).stdout.splitlines()[::-1] if line)
    assert line.startswith("loaded ")
    return set(line.split()[1:])


@pytest.mark.parametrize("words", [["--help"], ["ablate", "--help"], ["plan", "--help"]])
def test_help_loads_no_heavy_library(words, tmp_path):
    code = f"from vlmtrain.cli import main\ntry:\n    main({words})\nexcept SystemExit:\n    pass\n{LOADED}"
    assert not {"torch", "transformers", "deepspeed", "hydra", "numpy", "PIL"} & loaded(code, tmp_path)


def test_the_model_loads_no_compiler(tmp_path):
    found = loaded("import vlmtrain.model, sys; print('loaded', *sys.modules)", tmp_path)
    assert "vlmtrain.model.attention" in found and not {"torch._dynamo", "torch._inductor"} & found


def test_training_loads_only_what_it_uses(tmp_path):
    code = f"import sys\nsys.argv[1:] = {[*TRAINING, 'workers=0']}\nfrom vlmtrain.train import main\nmain()\n{LOADED}"
    found = loaded(code, tmp_path)
    assert "deepspeed" in found
    unused = {"datasets", "open_clip", "wandb", "peft", "bitsandbytes", "lmms_eval", "gradio", "matplotlib"}
    assert not {*unused, "sacrebleu"} & found


def test_every_command_uses_the_matmul_precision_of_training(monkeypatch):
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert prepare_process() and products.allow_tf32
    finally:
        products.allow_tf32 = before
