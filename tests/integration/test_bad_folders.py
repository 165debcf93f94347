"""Invalid folders: the error is one line that names the file or tensor, and what was expected."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import data_overrides, train
from tests.integration.model_parity import Case, build
from tests.integration.published_models import build_llava
from tests.integration.tiny_parts import LLMS
from vlmtrain.cli import main
from vlmtrain.data.processor import Processor
from vlmtrain.model import VLMWrapper
from vlmtrain.model.folder import read_manifest
from vlmtrain.model.llm import build_llm
from vlmtrain.model.parts import state_hash


def refused(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(list(line))
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1, said
    return said


@pytest.fixture
def model(tmp_path) -> Path:
    build(Case(), tmp_path / "model")
    return tmp_path / "model"


def test_a_model_without_a_language_model_cannot_answer(model, capsys):
    manifest = json.loads((model / "vlmtrain.json").read_text())
    for part in ("connector", "llm"):
        del manifest["parts"][part]
    (model / "vlmtrain.json").write_text(json.dumps(manifest))
    for line in (["chat", str(model), "--prompt", "What?"], ["evaluate", str(model)]):
        assert f"{model} has no language model, only vision: expected the model of a stage" in refused(capsys, *line)


def test_a_metric_without_its_data_is_refused_before_weights_are_read(model, capsys):
    (model / "llm" / "model.safetensors").unlink()
    words = "validation.metrics names vqa_accuracy, which needs 'answers', but conversation 0"
    assert words in refused(capsys, "evaluate", str(model), "data=probes", "validation.metrics=[vqa_accuracy]")


def test_a_folder_of_the_wrong_class(tmp_path, model, capsys):
    build_llava(tmp_path / "hf")
    hint = f"{tmp_path / 'hf'} is a Hugging Face folder: convert it with 'vlmtrain import {tmp_path / 'hf'} OUT_DIR'"
    for line in (["chat"], ["evaluate"], ["export", str(tmp_path / "out")]):
        assert hint in refused(capsys, line[0], str(tmp_path / "hf"), *line[1:])
    for line in (["chat"], ["evaluate"], ["export", str(tmp_path / "out")]):
        assert "nothing is not a model folder: no such directory" in refused(
            capsys, line[0], str(tmp_path / "nothing"), *line[1:]
        )
    shutil.copytree(model, tmp_path / "run" / "instruct" / "model")
    for line in (["chat"], ["evaluate"], ["export", str(tmp_path / "out")]):
        hint = f"run is a run folder, not a model folder. Did you mean {tmp_path / 'run' / 'instruct' / 'model'}?"
        assert hint in refused(capsys, line[0], str(tmp_path / "run"), *line[1:])
    words = "llm/config.json: model_type is llama, expected llava or llava_next or llava_onevision or blip-2"
    assert words in refused(capsys, "import", str(model / "llm"), str(tmp_path / "out"))
    (tmp_path / "mm_projector.bin").write_text("words")
    said = refused(capsys, "import", str(tmp_path / "mm_projector.bin"), str(tmp_path / "out"))
    assert "mm_projector.bin is not a tensor file: Weights only load failed" in said and "weights_only" not in said
    assert not (tmp_path / "out").exists()


def test_a_missing_tokenizer(model, capsys):
    (model / "processor" / "tokenizer.json").unlink()
    said = refused(capsys, "chat", str(model), "--prompt", "What?")
    assert f"{model / 'processor' / 'tokenizer.json'} is missing: the model folder has no tokenizer" in said
    shutil.rmtree(model / "processor")
    assert "processor/processor.json is missing" in refused(capsys, "chat", str(model), "--prompt", "What?")


def test_a_connector_of_the_wrong_width(model, tokenizer, tmp_path):
    """One whose file has another shape, and one that fits its file but not the language model in the folder."""
    file = model / "connector" / "model.safetensors"
    state = load_file(file)
    narrow = {**state, "layers.2.weight": state["layers.2.weight"][:20], "layers.2.bias": state["layers.2.bias"][:20]}
    save_file(narrow, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"connector/model\.safetensors does not fit MLP: wrong shape: layers\.2"):
        VLMWrapper.from_pretrained(model)
    config = json.loads((model / "connector" / "config.json").read_text())
    (model / "connector" / "config.json").write_text(json.dumps({**config, "out_dim": 20, "hidden_dim": 32}))
    with pytest.raises(ValueError, match=r"connector/config\.json is not the file that .* lists: its hash differs"):
        VLMWrapper.from_pretrained(model)


def test_an_untied_head_where_a_tied_one_is_expected(tmp_path, tokenizer):
    llm = AutoModelForCausalLM.from_config(LLMS["llama, tied"](vocab_size=len(tokenizer)))
    llm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    table = state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(build_llm(str(tmp_path)).lm_head.weight, table)  # once more: nothing is lost
    save_file({**state, "lm_head.weight": table + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight differs from the embeddings, .* ties"):
        build_llm(str(tmp_path))


# a published model as the start of a run


def test_init_from_imports_published_models(tmp_path, llava_files):
    build_llava(tmp_path / "hf")
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", f"init_from={tmp_path / 'hf'}", "data.validation=null"]
    line += [*data_overrides(llava_files)[:-1], f"run_dir={tmp_path / 'run'}", "engine=zero0"]
    line += [f"stages.instruct.{each}" for each in ("batch_size=4", "max_length=400", "train.llm=null")]
    train(*line, "stages.instruct.max_steps=1", ranks=2)
    parts = [
        read_manifest(folder) for folder in (tmp_path / "run" / "imported", tmp_path / "run" / "instruct" / "model")
    ]
    same = {part: parts[0][part]["sha256"] == parts[1][part]["sha256"] for part in parts[0]}
    assert same == {"vision": True, "connector": False, "llm": True}
    assert Processor.from_pretrained(tmp_path / "run" / "instruct" / "model").geometry.size == (32, 32)
    assert "is finished" in train(*line, "stages.instruct.max_steps=1").stdout  # the same command again


def test_init_from_names_what_it_cannot_import(tmp_path, model):
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", f"run_dir={tmp_path / 'run'}"]
    for given, words in (
        (model / "llm", "llm/config.json: model_type is llama, expected llava or"),
        (tmp_path / "none", "none is not a model folder: no such directory"),
        (model / "vlmtrain.json", "vlmtrain.json is not a tensor file"),
    ):
        done = train(*line, f"init_from={given}", check=False)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


# broken files


def changed(part: str, **values: object) -> Callable[[Path], None]:
    """Change keys of a JSON file."""
    return lambda model: (model / part).write_text(json.dumps({**json.loads((model / part).read_text()), **values}))


def written(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda model: (model / file).write_bytes(content.encode() if isinstance(content, str) else content)


def piped(file: str) -> Callable[[Path], None]:
    """Replace a file with a pipe that nothing writes to."""
    return lambda model: ((model / file).unlink(), os.mkfifo(model / file))


DEEP = "[" * 100_000
JSON_FILES = (
    *("vlmtrain.json", "connector/config.json", "llm/config.json", "vision/config.json"),
    "processor/processor.json",
)
BROKEN = {
    **{f"deep {file}": (file, written(file, DEEP)) for file in JSON_FILES},
    **{f"list {file}": (file.partition("/")[0], written(file, "[]")) for file in JSON_FILES},
    **{f"latin {file}": (file.partition("/")[0], written(file, b"\xff\xfe")) for file in JSON_FILES},
    **{
        f"pipe {file}": (f"{file} is not a regular file", piped(file))
        for file in (*JSON_FILES, "llm/model.safetensors")
    },
    "an option that the connector does not have": ("connector/config.json", changed("connector/config.json", foo=1)),
    "a key that the processor does not have": ("processor/processor.json", changed("processor/processor.json", foo=1)),
    "a length that is text": ("processor.json .*max_length=x", changed("processor/processor.json", max_length="x")),
    "files that are a list": ("'files' must map", changed("vlmtrain.json", files=[1])),
    "an empty tokenizer": ("processor/tokenizer.json is not a tokenizer", written("processor/tokenizer.json", "{}")),
    "a width that is text": ("llm/config.json", changed("llm/config.json", hidden_size="x")),
    "no heads": ("llm/config.json", changed("llm/config.json", num_attention_heads=0)),
    "a huge width": ("llm: .*memory", changed("llm/config.json", hidden_size=10**12)),
    "a huge vocabulary": ("llm: .*memory", changed("llm/config.json", vocab_size=10**12)),
    "a billion layers": (
        "llm/config.json: num_hidden_layers=1000000000",
        changed("llm/config.json", num_hidden_layers=10**9),
    ),
    "a dtype that does not exist": ("llm/config.json", changed("llm/config.json", dtype="evil")),
    "a kind that does not exist": ("llm", changed("llm/config.json", model_type="evil")),
}


@pytest.mark.parametrize("said, change", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_in_one_line_and_at_once(said, change, model):
    if said != "'files' must map":  # otherwise the hashes in the manifest would reveal the change
        changed("vlmtrain.json", files={})(model)
    change(model)
    with pytest.raises(ValueError, match=said) as error:
        VLMWrapper.from_pretrained(model)
        Processor.from_pretrained(model)
    assert "\n" not in str(error.value) and str(model) in str(error.value)


def test_weights_that_are_not_finite_are_refused(model):
    file = model / "connector" / "model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    save_file({**state, name: state[name] * float("nan")}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"connector are not those that .* lists: their hash differs"):
        VLMWrapper.from_pretrained(model)
    manifest = json.loads((model / "vlmtrain.json").read_text())
    manifest["parts"]["connector"]["sha256"] = state_hash(load_file(file))
    (model / "vlmtrain.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"model/connector: {re.escape(name)} has values that are not finite"):
        VLMWrapper.from_pretrained(model)
