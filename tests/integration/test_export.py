"""Exported models without vlmtrain have the same tokens, logits and answers, one by one and in batches."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from tests.conftest import run
from tests.integration.model_parity import (
    LLAVA_CASES,
    ONE,
    OWN_CASES,
    READING,
    Case,
    build,
    check,
    difference,
    draw_pictures,
    export_all,
    job,
    measure,
    run_outside,
    typed,
)
from vlmtrain.cli import main
from vlmtrain.data.connector_text import TextReader
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation
from vlmtrain.interop.export import export
from vlmtrain.model import VLMWrapper


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("home") / "pictures")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, dict]:
    return export_all(LLAVA_CASES, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, dict]:
    return export_all(OWN_CASES, tmp_path_factory.mktemp("own"), "own")


@pytest.mark.parametrize("name", LLAVA_CASES)
def test_transformers_alone_gives_the_same_results(name, exported):
    parity = exported[name]["parity"]
    assert (parity.model_class, parity.module) == (LLAVA_CASES[name].becomes, "transformers")
    check(parity, 1e-4)


@pytest.mark.parametrize("name", OWN_CASES)
def test_all_other_models_load_once_vlmtrain_is_imported(name, own):
    assert own[name]["parity"].model_class == OWN_CASES[name].becomes
    check(own[name]["parity"], 1e-4)


def test_the_faster_scaling_differs_only_by_rounding(exported, pictures):
    """Not on images of the encoder's size, which are not scaled."""
    folder, talks = exported["clip"]["home"], LLAVA_CASES["clip"].talks
    (found,) = run_outside(folder, [job(folder / "out", talks, pictures, backend=None)])
    parity = measure(found, folder / "model", talks, pictures)
    assert parity.prompts and parity.pixels <= 1.01 and parity.logits <= 0.02


# what does not fit


@pytest.mark.parametrize(
    "case, words",
    [
        (Case(vision="registers"), "5 prefix tokens"),
        (Case(llm="gemma2"), "LlavaForConditionalGeneration gives different logits from Gemma2ForCausalLM"),
        (
            Case(connector="avgpool", options={"window": 2}),
            "connector=avgpool: LLaVA's classes support only linear and mlp",
        ),
        (Case(options={"depth": 3}), "connector.depth=3"),
        (Case(options={"hidden_dim": 50}), "connector.hidden_dim=50"),
        (Case(vision="no pre-norm"), "CLIPVisionModel does not support these parts: pre_layrnorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llava_cannot_hold_is_refused_with_what_works(case, words, tmp_path):
    build(case, tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        export(tmp_path / "model", tmp_path / "out", "llava")
    assert "--format vlmtrain supports all models" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_named(tmp_path, capsys):
    build(Case(), tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, words in (
        (["export", str(tmp_path / "model"), str(tmp_path / "full")], "full already exists"),
        (["export", "none", str(tmp_path / "full" / "file" / "out")], "full/file is not a writable folder"),
        (["import", "none", str(tmp_path / "full" / "file" / "out")], "full/file is not a writable folder"),
        (["export", str(tmp_path / "none"), str(tmp_path / "out")], "none is not a model folder"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    build(Case(fit="pad"), tmp_path / "model")
    main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "hf", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["model_class"] == "LlavaForConditionalGeneration" and said["largest_relative_difference"] < 1e-4
    main(["export", str(tmp_path / "model"), str(tmp_path / "again")])
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out


def test_a_connector_that_reads_gets_its_instructions(tmp_path, tokenizer, pictures):
    case = Case(connector="qformer", options={**READING, "text_vocab": 400})
    build(case, tmp_path / "model")
    processor = Processor.from_pretrained(tmp_path / "model")
    processor.reader = TextReader(tokenizer, "instruction", 16)
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and "connector.vision_norm=false" in done.remarks[0]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    turns, files = ONE[0], [pictures / name for name in ONE[1]]
    shown = [Image.open(file) for file in files]
    text = theirs.apply_chat_template([typed(turn) for turn in turns], add_generation_prompt=True, tokenize=False)
    batch = processor.collate([processor.prompt(Conversation("one", turns, tuple(map(ImageOnDisk, files))))])
    with torch.no_grad():
        found = [model(**theirs(shown, text, instructions=[words])).logits for words in ("What is this?", "Who?")]
        expected = VLMWrapper.from_pretrained(tmp_path / "model")(batch)
    assert difference(found[0], expected) <= 1e-4 < difference(found[1], expected)
    with pytest.raises(ValueError, match="pass instructions"):
        theirs(shown, text)
    with pytest.raises(ValueError, match="1 <image> tokens in the text, but 2 images"):
        theirs(shown * 2, text)


def test_the_own_class_supports_the_options_of_generate(tmp_path, pictures):
    case = Case(connector="avgpool", options={"window": 2})
    build(case, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "vlmtrain")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    theirs = AutoProcessor.from_pretrained(tmp_path / "out")
    turns, files = ONE[0], [pictures / name for name in ONE[1]]
    text = theirs.apply_chat_template([typed(turn) for turn in turns], add_generation_prompt=True, tokenize=False)
    inputs = theirs([Image.open(file) for file in files], text)
    plain = model.generate(**inputs, max_new_tokens=4)
    found = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert found.sequences.equal(plain) and len(found.scores) == plain.shape[1] - inputs["input_ids"].shape[1]
    settings = GenerationConfig(max_new_tokens=4, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
    assert model.generate(**inputs, generation_config=settings)[0, : plain.shape[1]].equal(plain[0])
    # the exported settings hold: an end of turn there ends the answer
    model.generation_config.eos_token_id = int(plain[0, inputs["input_ids"].shape[1]])
    assert model.generate(**inputs, max_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.fixture(scope="module")
def own_class(tmp_path_factory) -> tuple:
    """A model of vlmtrain's class, and its processor."""
    folder = tmp_path_factory.mktemp("own_class")
    build(Case(connector="avgpool", options={"window": 2}), folder / "model")
    export(folder / "model", folder / "out", "vlmtrain")
    model = AutoModelForImageTextToText.from_pretrained(folder / "out")
    return model.eval(), AutoProcessor.from_pretrained(folder / "out")


def test_the_own_class_ignores_image_positions_in_the_loss(own_class, pictures):
    """Labels that equal the ids, as in transformers' collators: image tokens are not predicted."""
    model, theirs = own_class
    inputs = theirs(Image.open(pictures / "wide.png"), f"{IMAGE_MARK}what is this", return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        done = model(**inputs, labels=ids)
    targets = ids[0, 1:]
    words = targets != theirs.image_token_id
    assert 0 < words.sum() < len(words)
    expected = nn.functional.cross_entropy(done.logits[0, :-1][words], targets[words])
    torch.testing.assert_close(done.loss, expected)


def test_the_own_processor_accepts_files(own_class, pictures):
    _, theirs = own_class
    file, text = pictures / "large.png", f"{IMAGE_MARK}what is this"
    expected = theirs(Image.open(file), text)["pixel_values"]
    for given in (file, str(file), [[str(file)]]):
        assert theirs(given, text)["pixel_values"].equal(expected)
    content = [{"type": "image", "path": str(file)}, {"type": "text", "text": "what is this"}]
    talk = [{"role": "user", "content": content}]
    rendered = theirs.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    assert rendered["pixel_values"].equal(expected)
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        theirs("none.png", text)
    with pytest.raises(ValueError, match="accepts images, not videos"):
        theirs(text=text, videos=[[Image.open(file)]])
    with pytest.raises(ValueError, match="images: got a Tensor, expected PIL images or paths") as error:
        theirs(torch.zeros(3, 8, 8), text)
    assert "\n" not in str(error.value)


def test_importing_vlmtrain_loads_nothing():
    run(sys.executable, "-c", "import vlmtrain, sys; assert not {'torch', 'transformers'} & set(sys.modules)")
