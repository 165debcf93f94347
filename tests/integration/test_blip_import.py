"""Published BLIP-2 and InstructBLIP taken in: their logits, their processors' prompts, their greedy answers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors
from torch import nn
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    T5Config,
)

from tests.conftest import data_overrides, train
from tests.integration.test_blip_export import BLIP
from tests.integration.test_export import LLMS, SIDE, byte_tokenizer, difference, stir
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation, Turn
from vlmtrain.interop.export import export
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper

QFORMER = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
PICTURES = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": SIDE, "width": SIDE}}


def reading_tokenizer():
    tokenizer = byte_tokenizer("always")
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    frame = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=frame)
    return tokenizer


def build(folder: Path, kind: str, llm: str = "opt", end: int | None = None, **options) -> nn.Module:
    """Write a random BLIP-2 or InstructBLIP as Hugging Face would. end: what answers end with, if not with </s>."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("always")
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "left"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end or 2}
    text = T5Config() if llm == "t5" else LLMS[llm](vocab_size=len(tokenizer) + 3, **ids)
    reads = kind == "instructblip"
    classes = (
        (InstructBlipConfig, InstructBlipVisionConfig, InstructBlipQFormerConfig, InstructBlipForConditionalGeneration)
        if reads
        else (Blip2Config, Blip2VisionConfig, Blip2QFormerConfig, Blip2ForConditionalGeneration)
    )
    words = {"vocab_size": len(reading_tokenizer()) + 1, "max_position_embeddings": 48} if reads else {}
    config = classes[0](
        vision_config=classes[1](**BLIP).to_dict(),
        qformer_config=classes[2](**{**QFORMER, **words, **options}).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    model = stir(classes[3](config))
    model.save_pretrained(folder)
    pictures = BlipImageProcessorPil(**PICTURES)
    if reads:
        InstructBlipProcessor(pictures, tokenizer, reading_tokenizer(), 3).save_pretrained(folder)
    else:
        Blip2Processor(pictures, tokenizer, 3).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "wide.png"
    pixels = torch.randint(0, 256, (40, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(file)
    return file


SOURCES = {
    "blip2, opt": ("blip-2", {}),
    "blip2, an end of its own": ("blip-2", {"end": 40}),
    "blip2, llama tied": ("blip-2", {"llm": "llama, tied", "cross_attention_frequency": 1}),
    "instructblip, llama": ("instructblip", {"llm": "llama"}),
    "instructblip, opt": ("instructblip", {"cross_attention_frequency": 3}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_taken_in_says_what_the_source_says(name, tmp_path, picture):
    kind, options = SOURCES[name]
    source = build(tmp_path / "hf", kind, **options)
    done = import_model(tmp_path / "hf", tmp_path / "model")
    assert done.largest_relative_difference <= 1e-5
    assert (done.template, done.image_fit, done.connector) == ("blip", "squash", "qformer")
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    check_same(tmp_path / "model", source, theirs, picture)
    again = export(tmp_path / "model", tmp_path / "out")  # and out again, as the same class
    assert again.model_class == type(source).__name__ and again.largest_relative_difference <= 1e-5
    reloaded = type(source).from_pretrained(tmp_path / "out").eval()
    check_same(tmp_path / "model", reloaded, AutoProcessor.from_pretrained(tmp_path / "out", backend="pil"), picture)


def check_same(folder: Path, source: nn.Module, theirs, picture: Path) -> None:
    model, processor = VLMWrapper.from_pretrained(folder), Processor.from_pretrained(folder)
    ends = []
    for words in ("What is this?", "Is it red, or a circle?"):
        asked = Conversation("asked", (Turn("user", f"{IMAGE_MARK}\n{words}"),), (ImageOnDisk(picture),))
        batch = processor.collate([processor.prompt(asked)])
        inputs = theirs(images=Image.open(picture), text=words, return_tensors="pt")
        shown = inputs["input_ids"][0] != source.config.image_token_id
        assert inputs["input_ids"][0][shown].equal(batch.input_ids[0][~batch.is_image[0]])
        assert shown.logical_not().equal(batch.is_image[0])
        text = {"text_ids": batch.text_ids, "text_mask": batch.text_mask}
        if batch.text_ids is not None:
            assert inputs["qformer_input_ids"].equal(batch.text_ids)
        greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        ends_at = {"eos_token_id": processor.renderer.stop_ids}
        with torch.no_grad():
            expected = source(**inputs).logits
            found = model(batch.input_ids, batch.images, batch.is_image, **text)
            assert difference(expected, found) <= 1e-5
            ids = model.generate(
                batch.input_ids, batch.images, batch.is_image, batch.lengths, **text, **greedy, **ends_at
            )
            assert ids.equal(source.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :])
        ends.append(expected[0, -1])
    assert not torch.allclose(*ends, rtol=1e-2)


def test_what_was_taken_in_trains_on(tmp_path, llava_files):
    build(tmp_path / "hf", "instructblip", llm="llama")
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
    build(tmp_path / "hf", "instructblip", llm="llama")
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
        build(tmp_path / "hf", kind, **options)
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

    refused(r"text_config\.model_type=t5, expected a model that only decodes", llm="t5")
    refused(r"qformer_config\.hidden_act=relu, expected gelu", hidden_act="relu")
    refused(r"does not fit Blip2ForConditionalGeneration: .*language_projection\.weight", cut)
    refused(r"model\.safetensors: .*lm_head\.weight differs from the embeddings", untie, llm="llama, tied")
    lost = re.escape("qformer_tokenizer has no tokenizer")
    refused(lost, lambda folder: shutil.rmtree(folder / "qformer_tokenizer"), kind="instructblip")
    small = r"qformer_tokenizer has \d+ tokens, expected qformer_config.vocab_size=50"
    refused(small, kind="instructblip", vocab_size=50)
