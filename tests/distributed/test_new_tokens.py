"""Tokens that a run adds: one ID each, and trainable while all other embeddings remain unchanged."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

from vlmtrain.model.parts import load_part, module_state

from ..conftest import data_overrides, gpt, human, metrics, run, train

WORDS = "['<box>','</box>']"


@pytest.fixture(scope="module")
def boxes(llava_files, tmp_path_factory) -> dict:
    """Questions whose answers contain new tokens."""
    folder = tmp_path_factory.mktemp("boxes")
    colors = ("red", "green", "blue", "yellow")
    records = [
        {"id": i, "image": f"{colors[i % 4]}.png", "conversations": [human("<image>\nwhere"), gpt("<box>one</box>")]}
        for i in range(12)
    ]
    (folder / "boxes.json").write_text(json.dumps(records))
    return {**llava_files, "instruct": folder / "boxes.json", "validation": folder / "boxes.json"}


def line(files, run_dir, *more: str) -> list[str]:
    return [
        "recipe=llava_1_5",
        "mini=true",
        *data_overrides(files),
        f"run_dir={run_dir}",
        "workers=0",
        "validation.samples=2",
        "validation.final_samples=2",
        f"llm.new_tokens={WORDS}",
        "stages.align.max_steps=2",
        "stages.align.batch_size=4",
        "stages.instruct.max_steps=6",
        "stages.instruct.batch_size=4",
        "stages.instruct.optimizer.weight_decay=0.1",
        *more,
    ]


@pytest.mark.parametrize(
    "engine, ranks, tied",
    [("zero0", 1, True), ("zero3", 2, False), pytest.param("zero2", 2, True, marks=pytest.mark.slow)],
)
def test_only_new_tokens_train(engine, ranks, tied, boxes, tmp_path):
    more = [
        "stages.instruct.train.llm=null",
        "stages.instruct.groups=[{match: llm.new_tokens, lr: 1e-2}, {match: 'llm.*norm*', lr: 1e-3}]",
        f"llm.config.tie_word_embeddings={str(tied).lower()}",
        f"engine={engine}",
        *(["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []),
    ]
    train(*line(boxes, tmp_path, *more), ranks=ranks)
    before, after = (module_state(load_part("llm", tmp_path / s / "model")) for s in ("align", "instruct"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "instruct" / "model" / "processor")
    ids = tokenizer("<box>one</box>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<box>" and tokenizer.convert_ids_to_tokens(ids)[-1] == "</box>"
    new = torch.zeros(len(tokenizer), dtype=torch.bool)
    new[[ids[0], ids[-1]]] = True
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name, tensor in after.items():
        if name in tables:
            assert torch.equal(tensor[~new], before[name][~new]) and not torch.equal(tensor[new], before[name][new])
        else:
            assert torch.equal(tensor, before[name]) != ("norm" in name), name
    part = json.loads((tmp_path / "instruct" / "summary.json").read_text())["parts"]["llm"]
    norms = sum(tensor.numel() for name, tensor in after.items() if "norm" in name)
    assert part["trainable_parameters"] == len(tables) * 2 * 128 + norms
    assert metrics(tmp_path, "instruct")[-1]["learning_rate"].keys() == {"connector", "llm.new_tokens", "llm.*norm*"}


def test_invalid_new_tokens_are_an_error(boxes, tmp_path):
    wrong = "stages.instruct.groups=[{match: llm.new_tokens, lr: 1e-2}]"
    for more, said in (
        (["llm.new_tokens=[]", wrong], "stages.instruct.groups[0].match=llm.new_tokens, but llm.new_tokens is empty"),
        (["llm.new_tokens=['']"], "llm.new_tokens=['']: expected a list of non-empty strings"),
    ):
        done = run(sys.executable, "-m", "vlmtrain.train", *line(boxes, tmp_path, *more), check=False)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr[-2000:]
