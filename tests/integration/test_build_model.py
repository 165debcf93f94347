"""`build_model` compared with a run's parts, and the notebook that documents it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from vlmtrain import build_model, read_record
from vlmtrain.connectors import CONNECTORS
from vlmtrain.connectors.mlp import MLP
from vlmtrain.data import BadSample
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_parts, build_tokenizer

from ..conftest import ROOT, gpt, human

TINY = {"vision": "tiny", "connector": "mlp", "llm": "tiny"}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def records(tmp_path) -> list[dict]:
    """Conversations of different lengths, with one, two and no images."""
    for color in ("red", "blue"):
        Image.new("RGB", (60, 40), color).save(tmp_path / f"{color}.png")
    two = [human("<image>\nWhat?"), gpt("red"), human("<image>\nand this?"), gpt("a blue square")]
    return [
        {"image": "red.png", "conversations": [human("<image>\nWhat color is this?"), gpt("red")]},
        {"image": ["red.png", "blue.png"], "conversations": two},
        {"conversations": [human("What is above the circle?"), gpt("a green ring")]},
    ]


def test_it_is_also_part_of_the_model_package():
    from vlmtrain.model import build_model as found

    assert found is build_model


def test_the_weights_are_those_of_a_run_with_the_same_seed():
    run = compose(["recipe=quickstart", "stages.instruct.fresh=[vision,connector,llm]", "seed=3"])
    parts = build_parts(run, run.stages["instruct"], None, build_tokenizer(run))
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    model, processor = build_model(**TINY, seed=3)
    assert torch.rand(1) == drawn
    assert all(same(getattr(model, part), parts[part]) for part in parts) and not model.training
    assert processor.max_length == model.llm.config.max_position_embeddings == 512
    assert not same(build_model(**TINY)[0].connector, parts["connector"])


def test_options_are_those_of_the_command_line():
    vision, llm = {"image_size": 96}, {"config": {"num_hidden_layers": 1}}
    text = {"read": "instruction", "max_length": 20}
    qformer = {"num_queries": 5, "hidden_size": 64, "depth": 2, "num_heads": 4}
    model, processor = build_model(
        vision={"tiny": vision},
        connector={"qformer": qformer},
        llm={"tiny": llm},
        precision="bf16",
        image_fit="tiles",
        image_tiles=[[1, 2]],
        template="vicuna_v1",
        max_length=200,
        connector_text=text,
    )
    geometry = processor.geometry
    assert (geometry.size, geometry.fit, geometry.tile_grids, geometry.tokens) == ((96, 96), "tiles", ((1, 2),), 5)
    assert (processor.max_length, processor.renderer.template, processor.reader.max_length) == (200, "vicuna_v1", 20)
    assert (model.llm.config.num_hidden_layers, model.llm.config.hidden_size) == (1, 128)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_published_weights_are_loaded(tmp_path, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    published = LlamaForCausalLM(config)
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = build_model("tiny", "linear", {"hf": {"path": str(tmp_path)}})
    assert same(model.llm, published) and processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert processor.max_length == 2048


def test_an_own_connector_is_a_choice(monkeypatch):
    class Own(MLP):
        pass

    monkeypatch.setitem(CONNECTORS, "own_connector", Own)
    model, _ = build_model("tiny", {"own_connector": {"depth": 3}}, "tiny")
    assert type(model.connector) is Own and model.connector.config["depth"] == 3


def test_a_script_that_uses_hydra_can_call_it(tmp_path):
    (tmp_path / "own.yaml").write_text("lr: 1.0")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        with pytest.raises(ValueError, match="unknown connector"):
            build_model(**TINY | {"connector": "none"})
        build_model(**TINY)
        assert hydra_compose("own") == {"lr": 1.0}
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"connector": "mpl"}, r"unknown connector 'mpl'\. Did you mean 'mlp'\?"),
        ({"vision": "hf"}, r"set vision\.path: its choice leaves it open"),
        ({"llm": {"hf": {}}}, r"set llm\.path: its choice leaves it open"),
        ({"vision": {"path": "x"}}, r"vision=\{'path': 'x'\}: expected a choice, or \{choice: \{key: value\}\}"),
        ({"llm": None}, "llm=None: expected a choice"),
        ({"connector": {"mlp": {}, "linear": {}}}, "expected a choice"),
        ({"vision": {"tiny": {"image_sise": 96}}}, r"vision\.image_sise, which does not exist.*'vision\.image_size'"),
        ({"vision": {"tiny": {"image_size": 1.5}}}, r"vision\.image_size=1\.5: expected null, pixels, or"),
        ({"connector": {"mlp": {"depth": 0}}}, r"connector\.depth=0: expected an integer of at least 1"),
        ({"seed": -1}, "seed=-1: expected an integer from 0"),
        ({"precision": "fp16"}, "precision=fp16: expected one of fp32, bf16"),
        ({"max_lenght": 9}, "unknown key 'max_lenght'. Did you mean 'max_length'"),
        ({"batch_size": 9}, "unknown key 'batch_size'"),
        ({"max_length": 600}, r"build_model\.max_length=600 is longer than the 512 positions of the language model"),
    ],
)
def test_errors_name_the_key(changed, message):
    with pytest.raises(ValueError, match=message):
        build_model(**TINY | changed)


# The batch and its loss


def test_records_of_llava_and_openai_are_the_same(records, tmp_path):
    image, text = (
        {"type": "image", "image": str(tmp_path / "red.png")},
        {"type": "text", "text": "\nWhat color is this?"},
    )
    messages = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": "red"}]
    other = read_record({"messages": messages})
    assert other == read_record(records[0], tmp_path)
    assert other.images[0].load().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadSample, match=r"the record \(id 1\): expected 'conversations'"):
        read_record({"id": 1})


def test_a_loss_of_ones_own_is_that_of_the_library(records, tmp_path):
    model, processor = build_model(**TINY)
    batch = processor.collate([processor(read_record(record, tmp_path)) for record in records])
    for ids, targets in zip(batch.input_ids, batch.targets):
        places = (targets != -100).nonzero()[:, 0]
        assert len(places) and torch.equal(targets[places], ids[places + 1])
    model.requires_grad_(False).connector.requires_grad_(True)
    logits = model(batch)
    own = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    own.backward()
    gradients = [parameter.grad.clone() for parameter in model.connector.parameters()]
    model.zero_grad()
    library = OBJECTIVES["language_modelling"]()(model, batch, None) / batch.weights.sum()
    library.backward()
    torch.testing.assert_close(own, library)
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.connector.parameters()])


# The notebook


def test_the_notebook_runs_and_its_loss_falls(capsys):
    notebook = json.loads((ROOT / "docs" / "python.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    scope, start = {"__name__": "__main__"}, time.monotonic()
    for number, cell in enumerate(cells):
        exec(compile(cell, f"<cell {number}>", "exec"), scope)
    assert time.monotonic() - start < 60
    untrained, batch = build_model(**TINY)[0], scope["batch"]
    with torch.no_grad():
        logits = untrained(batch)
    before = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert before > 4 and scope["loss"] < 0.5 and scope["answer"] == "blue"
    assert all(same(getattr(untrained, part), getattr(scope["model"], part)) for part in ("vision", "llm"))
    shown = capsys.readouterr().out
    assert "after '<|assistant|>' comes 'red'\nafter 'red' comes '<|end|>'" in shown
    assert "8 tokens per image of (96, 96) pixels" in shown and shown.endswith("\nblue\n")


def test_the_notebooks_loop_is_ten_lines_and_two_imports():
    cells = json.loads((ROOT / "docs" / "python.ipynb").read_text())["cells"]
    loop = next("".join(cell["source"]) for cell in cells if "optimizer.step()" in "".join(cell["source"]))
    lines = [line for line in loop.splitlines() if line]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(imports) == 2 and len(lines) - len(imports) <= 10
