"""Imported BLIP-2 and InstructBLIP have the logits, the processors' prompts and the greedy answers of the source."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import data_overrides, train
from tests.integration.model_parity import BLIP_SOURCES, check, import_all, job, measure, run_outside
from tests.integration.published_models import build_blip
from vlmtrain.data.processor import Processor
from vlmtrain.interop.export import export
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, dict]:
    return import_all(BLIP_SOURCES, tmp_path_factory.mktemp("imports"))


@pytest.mark.parametrize("name", BLIP_SOURCES)
def test_an_imported_model_answers_like_its_source(name, imported):
    done, parity = imported[name]["import"], imported[name]["parity"]
    assert done.largest_relative_difference <= 1e-5
    assert (done.template, done.image_fit, done.connector) == ("blip", "squash", "qformer")
    assert parity.model_class == BLIP_SOURCES[name].kind
    check(parity, 1e-5)


@pytest.mark.parametrize("name", ["blip2, an end of its own", "instructblip, llama", "instructblip, flan_t5"])
def test_an_imported_model_exports_to_the_same_class(name, imported, tmp_path):
    home, talks = imported[name]["home"], BLIP_SOURCES[name].talks
    again = export(home / "model", tmp_path / "out")
    assert again.model_class == BLIP_SOURCES[name].kind and again.largest_relative_difference <= 1e-5
    pictures = home.parent / "pictures"
    (found,) = run_outside(tmp_path, [job(tmp_path / "out", talks, pictures)])
    check(measure(found, home / "model", talks, pictures), 1e-5)


def test_an_imported_model_continues_training(tmp_path, llava_files):
    build_blip(tmp_path / "hf", "instructblip", llm="llama")
    import_model(tmp_path / "hf", tmp_path / "model")
    line = [f"init_from={tmp_path / 'model'}", "recipe=instructblip", "stage=instruct", "mini=true", "engine=zero0"]
    small = ["max_steps=2", "batch_size=4", "max_length=400", "template=blip", "connector_text.max_length=48"]
    done = train(
        *(*line, *data_overrides(llava_files), *(f"stages.instruct.{each}" for each in small)),
        *("data.validation=null", "on_bad_sample=skip", "stages.instruct.fresh=[]", "bad_sample_limit.share=1"),
        f"run_dir={tmp_path / 'run'}",
    )
    trained = VLMWrapper.from_pretrained(tmp_path / "run" / "instruct" / "model")
    assert trained.connector.reads_text and trained.vision.width == 16, done.stderr


def test_its_connector_is_used_whatever_the_recipe_names(tmp_path, llava_files):
    build_blip(tmp_path / "hf", "instructblip", llm="llama")
    line = [f"init_from={tmp_path / 'hf'}", "recipe=llava_1_5", "stage=instruct", "mini=true", "engine=zero0"]
    small = ["max_steps=1", "batch_size=4", "max_length=400", "template=blip"]
    done = train(
        *(*line, *data_overrides(llava_files), *(f"stages.instruct.{each}" for each in small)),
        *("data.validation=null", "on_bad_sample=skip", "bad_sample_limit.share=1", f"run_dir={tmp_path / 'run'}"),
    )
    assert "connector=mlp (qformer is used)" in done.stdout + done.stderr
    assert "| connector | `qformer`" in (tmp_path / "run" / "instruct" / "model" / "README.md").read_text()
    assert Processor.from_pretrained(tmp_path / "run" / "instruct" / "model").reader.reads == "instruction"
    again = train(*line, f"run_dir={tmp_path / 'run2'}", "connector=mlp", check=False)
    assert again.returncode == 2 and "connector=mlp, but init_from=" in again.stderr


def test_bad_folders_are_named(tmp_path):
    def refused(words: str, change=lambda folder: None, kind: str = "blip-2", **options) -> None:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        build_blip(tmp_path / "hf", kind, **options)
        change(tmp_path / "hf")
        with pytest.raises(ValueError, match=words) as error:
            import_model(tmp_path / "hf", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    def cut(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state = {**state, "language_projection.weight": torch.zeros(32, 9)}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def untie(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        table = next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))
        state["language_model.lm_head.weight"] = table + 1
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def other(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["model_type"] = "umt5"
        (folder / "config.json").write_text(json.dumps(config))

    refused(
        r"text_config\.model_type=umt5, expected a decoder-only model \(OPT, Llama\) or one of t5", other, llm="flan_t5"
    )
    refused(r"qformer_config\.hidden_act=relu, expected gelu", hidden_act="relu")
    refused(r"does not fit Blip2ForConditionalGeneration: .*language_projection\.weight", cut)
    refused(r"model\.safetensors: .*lm_head\.weight differs from the embeddings", untie, llm="llama, tied")
    lost = re.escape("qformer_tokenizer has no tokenizer")
    refused(lost, lambda folder: shutil.rmtree(folder / "qformer_tokenizer"), kind="instructblip")
    small = r"qformer_tokenizer has \d+ tokens, expected at most qformer_config.vocab_size=50"
    refused(small, kind="instructblip", vocab_size=50)
