"""Imported models have the source's logits, greedy answers, template and image processing; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from tests.conftest import train
from tests.integration.model_parity import LLAVA_SOURCES, check, draw_pictures, import_all
from tests.integration.published_models import (
    BICUBIC,
    ITEMS,
    SQUARE,
    build_llava,
    build_parts,
    build_shuffling,
    shuffling_difference,
)
from tests.integration.tiny_parts import SIDE
from vlmtrain.cli import main
from vlmtrain.data.images import show_items
from vlmtrain.data.processor import Processor
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper
from vlmtrain.model.parts import load_part
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import compose
from vlmtrain.training.init_from import take_in as imported_for
from vlmtrain.visual import normalized

ENDLESS = ITEMS.replace("Q: ", "USER: ").replace("A:", "ASSISTANT:").replace("eos_token", "' '")


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, dict]:
    return import_all(LLAVA_SOURCES, tmp_path_factory.mktemp("imports"))


@pytest.mark.parametrize("name", LLAVA_SOURCES)
def test_an_imported_model_answers_like_its_source(name, imported):
    check(imported[name]["parity"], 1e-4)
    done = imported[name]["import"]
    assert done.template == "chat" and done.connector == ("linear" if "one layer" in name else "mlp")
    card = (imported[name]["home"] / "model" / "README.md").read_text()
    assert f"# Imported from {done.source}" in card and f"| image_fit | {done.image_fit} |" in card
    if "projector" in name:
        assert done.largest_relative_difference is None and done.image_fit == "crop"
        return
    assert done.largest_relative_difference <= 1e-4
    fits = {"next": "tiles", "onevision": "tiles", "siglip": "squash", "padded": "pad"}
    assert done.image_fit == next((fit for word, fit in fits.items() if word in name), "crop")
    assert f"| source's class | {imported[name]['parity'].model_class} |" in card
    assert "of the source's, relative to the largest |" in card
    assert f"| llm | {LLAVA_SOURCES[name].llm.partition(',')[0].capitalize()}ForCausalLM, " in card


def test_a_template_that_ends_no_answer_becomes_vicunas(tmp_path, caplog):
    build_llava(tmp_path / "hf", template=ENDLESS, fit="pad")
    done = import_model(tmp_path / "hf", tmp_path / "model")
    assert (done.template, done.image_fit) == ("vicuna_v1", "pad")
    assert "vicuna_v1" in caplog.text
    build_llava(tmp_path / "other", template=ENDLESS.replace("USER: ", "Human: "))
    with pytest.raises(ValueError, match=r"end-of-turn token.*--template"):
        import_model(tmp_path / "other", tmp_path / "none")
    assert import_model(tmp_path / "other", tmp_path / "named", template="bare").template == "bare"


def test_images_are_preprocessed_as_by_the_source(tmp_path):
    pictures = sorted(draw_pictures(tmp_path / "pictures").iterdir())
    build_llava(tmp_path / "hf", vision="siglip", llm="qwen2", fit="squash")
    said = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    said.pop("image_processor")
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(said))

    def told(**settings) -> Path:
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({**BICUBIC, **settings}))
        return tmp_path / "hf"

    # as SigLIP's is written: it has no do_center_crop, and never crops
    told(image_processor_type="SiglipImageProcessor", size=SQUARE)
    assert import_model(tmp_path / "hf", tmp_path / "model").image_fit == "squash"
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil").image_processor
    geometry = Processor.from_pretrained(tmp_path / "model").geometry
    for file in pictures:
        expected = theirs(images=[Image.open(file)], return_tensors="pt")["pixel_values"][0]
        items = geometry.plan([None]).items
        found = normalized(*show_items(Image.open(file), items, geometry.mean), geometry.mean, geometry.std)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    clip = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": SQUARE}
    edge = {"size": {"shortest_edge": SIDE}}
    for words, settings in (
        (r"size=.*'shortest_edge': 44.*pixels differ from image_fit=crop", {"size": {"shortest_edge": 44}}),
        (r"size=.*'shortest_edge': 33.*pixels differ from image_fit=crop", {"size": {"shortest_edge": 33}}),
        (r"resample=2, expected 3", {**edge, "resample": 2}),
        (r"do_rescale=False.*pixels differ", {**edge, "do_rescale": False}),
        (r"images of 1 x 24 x 24 pixels, expected 1 x 32 x 32", {**edge, "crop_size": {"height": 24, "width": 24}}),
    ):
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: .*" + words) as error:
            import_model(told(**{**clip, **settings}), tmp_path / "none")
        assert "--image-fit" in str(error.value) and "\n" not in str(error.value)
    told(**clip, size={"shortest_edge": 44})
    assert import_model(tmp_path / "hf", tmp_path / "named", image_fit="crop").image_fit == "crop"


# single projectors


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder with an encoder, a language model and the projector that connects them."""
    build_parts(tmp_path)
    return tmp_path


def take_in(home: Path, *options: str) -> int:
    """Exit status of the command; --template, since a bare Vicuna has none."""
    file, out = str(home / "llava" / "mm_projector.bin"), str(home / "model")
    try:
        main(["import", file, out, "--llm", str(home / "vicuna"), "--template", "vicuna_v1", *options])
    except SystemExit as done:
        return done.code
    return 0


def test_a_projector_is_imported_with_its_image_preprocessing(published, capsys):
    config = published / "llava" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_aspect_ratio": "pad"}))
    assert take_in(published) == 0
    assert "image_fit=pad" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["internvl", "nanovlm"])
def test_projectors_of_internvl_and_nanovlm_give_the_published_tokens(kind, tmp_path, caplog):
    told = build_shuffling(tmp_path, kind)
    assert import_model(out=tmp_path / "model", **told).connector == "pixel_shuffle"
    assert ("train further" in caplog.text) == (kind == "nanovlm")
    assert shuffling_difference(tmp_path, told, kind) <= 1e-5
    state = load_file(told["source"])
    first = "MP.proj.weight" if kind == "nanovlm" else "mlp1.0.weight"
    save_file({**state, first: torch.randn(32, 40) if kind == "nanovlm" else torch.randn(40)}, told["source"])
    with pytest.raises(ValueError, match=rf"{first} takes 40 channels, expected 4 .* times the 16 of .*clip"):
        import_model(out=tmp_path / "none", **told)


def test_an_imported_model_continues_training(published, llava_files, tmp_path):
    assert take_in(published) == 0
    line = [f"init_from={published / 'model'}", "recipe=llava_1_5", "stage=instruct", "mini=true", "data=llava_json"]
    line += [f"data.{key}={path}" for key, path in llava_files.items()]
    small = [
        "stages.instruct.max_steps=2",
        "stages.instruct.batch_size=4",
        "stages.instruct.max_length=400",
        "stages.instruct.template=vicuna_v1",
    ]
    done = train(*line, *small, "data.validation=null", f"run_dir={tmp_path / 'run'}", "engine=zero0")
    trained = VLMWrapper.from_pretrained(tmp_path / "run" / "instruct" / "model")
    card = (tmp_path / "run" / "instruct" / "model" / "README.md").read_text()
    assert "| vision | CLIPVisionModel, 3 layers of 16 |" in card and "| llm | LlamaForCausalLM, " in card
    assert f"base_model:\n- {json.dumps(str(published / 'model'))}\n" in card
    assert type(trained.llm).__name__ == "LlamaForCausalLM" and trained.vision.width == 16, done.stderr


def test_another_source_replaces_an_earlier_import(published, tmp_path):
    file = published / "llava" / "mm_projector.bin"
    line = ["recipe=llava_1_5", "stage=instruct", "llm=hf", f"llm.path={published / 'vicuna'}"]
    line += ["llm.chat_template=vicuna_v1", f"init_from={file}", f"run_dir={tmp_path / 'run'}"]
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()

    def bias() -> torch.Tensor:
        settings, _ = imported_for(compose(line), folder)
        return load_part("connector", Path(settings.init_from)).state_dict()["layers.0.bias"]

    state = torch.load(file, weights_only=True)
    first = bias()
    kept = (folder.root / "imported" / "vlmtrain.json").stat().st_mtime_ns
    assert first.equal(bias()) and (folder.root / "imported" / "vlmtrain.json").stat().st_mtime_ns == kept
    torch.save({name: tensor + 1 for name, tensor in state.items()}, file)
    torch.testing.assert_close(bias(), first + 1, rtol=1e-2, atol=1e-2)


# bad input


def test_bad_projectors_are_named(published, capsys):
    file = published / "llava" / "mm_projector.bin"
    state = torch.load(file, weights_only=True)
    wide = {**state, "model.mm_projector.0.weight": torch.zeros(32, 24)}
    deep = {**state, "model.mm_projector.2.weight": torch.zeros(40, 32), "model.mm_projector.2.bias": torch.zeros(40)}
    lacking = {name: tensor for name, tensor in state.items() if name != "model.mm_projector.2.bias"}
    for bad, words in (
        (wide, r"mm_projector\.bin: model\.mm_projector\.0\.weight takes 24 channels, expected 16 of .*clip"),
        (deep, r"mm_projector\.bin: model\.mm_projector\.2\.weight makes 40 channels, expected 32 of .*vicuna"),
        (lacking, r"mm_projector\.bin: .*missing: model\.mm_projector\.2\.bias"),
        ({"other": torch.zeros(2)}, r"mm_projector\.bin has no tensor mm_projector.*connector\.load_published"),
    ):
        torch.save(bad, file)
        assert take_in(published) == 2
        said = capsys.readouterr().err
        assert re.search(words, said) and said.count("\n") == 1, said
    file.write_bytes(b"not a pickle")
    assert take_in(published) == 2 and "is not a tensor file" in capsys.readouterr().err
    torch.save(state, file)
    config = json.loads((published / "llava" / "config.json").read_text())
    for key, value in (
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("image_aspect_ratio", "anyres"),
    ):
        (published / "llava" / "config.json").write_text(json.dumps({**config, key: value}))
        assert take_in(published) == 2 and f"config.json: {key}={value}, expected" in capsys.readouterr().err
    assert not (published / "model").exists()


def test_bad_folders_are_named(tmp_path, published):
    def refused(words: str, change=lambda folder: None, **options) -> None:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        build_llava(tmp_path / "hf", **options)
        change(tmp_path / "hf")
        with pytest.raises(ValueError, match=words) as error:
            import_model(tmp_path / "hf", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    def untie(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        table = next(tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight"))
        save_file({**state, "lm_head.weight": table + 1}, folder / "model.safetensors", metadata={"format": "pt"})

    def cut(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        name = next(name for name in state if name.endswith("linear_1.weight"))
        save_file({**state, name: torch.zeros(32, 9)}, folder / "model.safetensors", metadata={"format": "pt"})

    def forget(*names: str):
        return lambda folder: [(folder / name).unlink() for name in names]

    refused(r"model\.safetensors: lm_head\.weight differs from the embeddings", untie, llm="llama, tied")
    refused(r"does not fit LlavaForConditionalGeneration: .*linear_1\.weight", cut)
    refused(r"has no tokenizer", forget("tokenizer.json", "tokenizer_config.json"))
    refused(r"preprocessor_config\.json is missing", forget("processor_config.json"))
    refused(r"has no chat template: choose one with --template", forget("chat_template.jinja"))
    refused(r"vision_feature_layer=\[-2, -1\] combines several layers", vision_feature_layer=[-2, -1])
    refused(r"select_strategy=full drops 0 tokens, expected 1", vision_feature_select_strategy="full")
    build_llava(tmp_path / "next", kind="llava_next")
    with pytest.raises(ValueError, match=r"--image-fit pad: .*supports only tiles"):
        import_model(tmp_path / "next", tmp_path / "out", image_fit="pad")
    with pytest.raises(ValueError, match="model_type is llama, expected llava or llava_next"):
        import_model(published / "vicuna", tmp_path / "out")
    with pytest.raises(ValueError, match="is a Hugging Face folder: convert it with 'vlmtrain import"):
        VLMWrapper.from_pretrained(tmp_path / "hf")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    """The hub is a stub, which returns the local copy."""
    build_llava(tmp_path / "copy")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path / "copy")
    )
    monkeypatch.chdir(tmp_path)
    import_model(Path("llava-hf/llava-1.5-7b-hf"), Path("out"))
    assert asked == ["llava-hf/llava-1.5-7b-hf"] and (tmp_path / "out" / "vlmtrain.json").exists()


def test_a_hub_id_that_cannot_be_downloaded_is_named(tmp_path):
    words = "nobody/nothing is neither a folder nor a Hub ID that can be downloaded"
    with pytest.raises(ValueError, match=words) as refused:  # the tests are offline
        import_model(Path("nobody/nothing"), tmp_path / "out")
    assert "\n" not in str(refused.value)
