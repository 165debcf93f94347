"""Published models taken in: the source's logits and greedy answers, its template and pictures; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from tests.conftest import train
from tests.integration.test_export import HF_VISION, LLMS, SIDE, byte_tokenizer, difference, stir, typed
from vlmtrain.cli import main
from vlmtrain.data.images import ImageOnDisk, to_tensor
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import IMAGE_MARK, Conversation, Turn
from vlmtrain.interop.importing import import_model
from vlmtrain.model import VLMWrapper
from vlmtrain.model.parts import load_part
from vlmtrain.settings import compose
from vlmtrain.training.run import take_in as imported
from vlmtrain.training.run_folder import RunFolder

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
LOOK = {"image_mean": MEAN, "image_std": STD, "resample": 3}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
PROCESSORS = {
    "crop": lambda: CLIPImageProcessorPil(**LOOK, size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "squash": lambda: CLIPImageProcessorPil(**LOOK, size=SQUARE, do_center_crop=False),
    "pad": lambda: LlavaImageProcessorPil(**LOOK, size=SQUARE, do_center_crop=False, do_pad=True),
    "tiles": lambda: LlavaNextImageProcessorPil(
        **LOOK, size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    ),
}
# as the published ones are written: pictures first, then words, from items alone
ITEMS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' }}{% else %}{{ 'A: ' }}{% endif %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
ENDLESS = ITEMS.replace("Q: ", "USER: ").replace("A:", "ASSISTANT:").replace("eos_token", "' '")


def build(
    folder: Path, kind: str = "llava", vision: str = "clip", llm: str = "llama", fit: str = "crop", **options
) -> nn.Module:
    """Write a random LLaVA as Hugging Face would."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("always")
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    template = options.pop("template", ITEMS)
    config = LLMS[llm](vocab_size=len(tokenizer) + 3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    strategy = "full" if vision == "siglip" else "default"
    model_class, config_class, processor_class = {
        "llava": (LlavaForConditionalGeneration, LlavaConfig, LlavaProcessor),
        "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig, LlavaNextProcessor),
    }[kind]
    more = {"image_grid_pinpoints": PINPOINTS} if kind == "llava_next" else {}
    given = {
        "vision_config": HF_VISION[vision]().config,
        "text_config": config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        "image_seq_length": 16,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    model = stir(model_class(config_class(**{**given, **more, **options})))
    model.save_pretrained(folder)
    processor_class(
        PROCESSORS["tiles" if kind == "llava_next" else fit](),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=template,
    ).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, size in (("wide.png", (40, 64, 3)), ("square.png", (32, 32, 3))):
        pixels = torch.randint(0, 256, size, generator=generator).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    return [folder / "wide.png", folder / "square.png"]


SOURCES = {
    "clip, llama": {},
    "siglip, qwen2": {"vision": "siglip", "llm": "qwen2", "fit": "squash"},
    "dinov2, tied": {"vision": "dinov2", "llm": "llama, tied", "vision_feature_layer": -1},
    "phi3, relu": {"llm": "phi3", "projector_hidden_act": "relu", "vision_feature_layer": 1},
    "no bias": {"multimodal_projector_bias": False},
    "one layer": {"projector_hidden_act": "linear"},
    "next": {"kind": "llava_next"},
    "next, siglip, qwen2": {"kind": "llava_next", "vision": "siglip", "llm": "qwen2"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_taken_in_says_what_the_source_says(name, tmp_path, pictures):
    source = build(tmp_path / "hf", **SOURCES[name])
    done = import_model(tmp_path / "hf", tmp_path / "model")
    assert done.largest_relative_difference <= 1e-4 and done.template == "chat"
    assert done.image_fit == ("tiles" if "next" in name else SOURCES[name].get("fit", "crop"))
    assert done.connector == ("linear" if name == "one layer" else "mlp")
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"# Imported from {tmp_path / 'hf'}" in card and f"| source's class | {type(source).__name__} |" in card
    assert f"| image_fit | {done.image_fit} |" in card and "of the source's, relative to the largest |" in card
    assert f"| llm | {type(source.model.language_model).__name__.removesuffix('Model')}ForCausalLM, " in card
    model, processor = VLMWrapper.from_pretrained(tmp_path / "model"), Processor.from_pretrained(tmp_path / "model")
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    talk = (Turn("user", f"{IMAGE_MARK}\n{IMAGE_MARK}\nWhich?"), Turn("assistant", "The 2nd"), Turn("user", "Sure?"))
    batch = processor.collate([processor.prompt(Conversation("asked", talk, tuple(map(ImageOnDisk, pictures))))])
    text = theirs.apply_chat_template([typed(turn) for turn in talk], add_generation_prompt=True, tokenize=False)
    inputs = theirs(images=[Image.open(file) for file in pictures], text=text, return_tensors="pt")
    shown = inputs["input_ids"][0] != source.config.image_token_id
    assert inputs["input_ids"][0][shown].equal(batch.input_ids[0][~batch.is_image[0]])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": processor.renderer.stop_ids}
    with torch.no_grad():
        expected = source(**inputs).logits
        assert difference(model(batch.input_ids, batch.images, batch.is_image, tiles=batch.tiles), expected) <= 1e-4
        ids = model.generate(batch.input_ids, batch.images, batch.is_image, batch.lengths, batch.tiles, **greedy)
        assert ids.equal(source.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :])


def test_a_template_that_ends_no_answer_becomes_vicunas(tmp_path, caplog):
    build(tmp_path / "hf", template=ENDLESS, fit="pad")
    done = import_model(tmp_path / "hf", tmp_path / "model")
    assert (done.template, done.image_fit) == ("vicuna_v1", "pad")
    assert "vicuna_v1" in caplog.text
    build(tmp_path / "other", template=ENDLESS.replace("USER: ", "Human: "))
    with pytest.raises(ValueError, match=r"end-of-turn token.*--template"):
        import_model(tmp_path / "other", tmp_path / "none")
    assert import_model(tmp_path / "other", tmp_path / "named", template="bare").template == "bare"


def test_pictures_reach_the_encoder_as_the_source_prepares_them(tmp_path, pictures):
    build(tmp_path / "hf", vision="siglip", llm="qwen2", fit="squash")
    said = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    said.pop("image_processor")
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(said))

    def told(**settings) -> Path:
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({**LOOK, **settings}))
        return tmp_path / "hf"

    # as SigLIP's is written: it has no do_center_crop, and never crops
    told(image_processor_type="SiglipImageProcessor", size=SQUARE)
    assert import_model(tmp_path / "hf", tmp_path / "model").image_fit == "squash"
    theirs = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil").image_processor
    geometry = Processor.from_pretrained(tmp_path / "model").geometry
    for file in pictures:
        expected = theirs(images=[Image.open(file)], return_tensors="pt")["pixel_values"][0]
        found = to_tensor(geometry.views(Image.open(file), None)[0], geometry.mean, geometry.std)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    clip = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": SQUARE}
    edge = {"size": {"shortest_edge": SIDE}}
    for words, settings in (
        (r"size=.*'shortest_edge': 44.*pixels differ from image_fit=crop", {"size": {"shortest_edge": 44}}),
        (r"resample=2, expected 3", {**edge, "resample": 2}),
        (r"do_rescale=False.*pixels differ", {**edge, "do_rescale": False}),
        (r"pictures of 1 x 24 x 24 pixels, expected 1 x 32 x 32", {**edge, "crop_size": {"height": 24, "width": 24}}),
    ):
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: .*" + words) as error:
            import_model(told(**{**clip, **settings}), tmp_path / "none")
        assert "--image-fit" in str(error.value) and "\n" not in str(error.value)
    told(**clip, size={"shortest_edge": 44})
    assert import_model(tmp_path / "hf", tmp_path / "named", image_fit="crop").image_fit == "crop"


# LLaVA's own projector


@pytest.fixture
def published(tmp_path) -> Path:
    """A folder with an encoder, a language model and a projector between them."""
    torch.manual_seed(0)
    encoder = stir(HF_VISION["clip"]())
    encoder.save_pretrained(tmp_path / "clip")
    PROCESSORS["crop"]().save_pretrained(tmp_path / "clip")
    tokenizer = byte_tokenizer("first")
    llm = stir(AutoModelForCausalLM.from_config(LLMS["llama"](vocab_size=len(tokenizer))))
    llm.save_pretrained(tmp_path / "vicuna")
    tokenizer.save_pretrained(tmp_path / "vicuna")
    (tmp_path / "llava").mkdir()
    weights = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    state = {f"model.mm_projector.{name}": torch.randn(shape).half() for name, shape in weights.items()}
    torch.save(state, tmp_path / "llava" / "mm_projector.bin")
    said = {"mm_vision_tower": str(tmp_path / "clip"), "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(said))
    return tmp_path


def take_in(home: Path, *options: str) -> int:
    """Exit status of the command; --template, since a bare Vicuna has none."""
    file, out = str(home / "llava" / "mm_projector.bin"), str(home / "model")
    try:
        main(["import", file, out, "--llm", str(home / "vicuna"), "--template", "vicuna_v1", *options])
    except SystemExit as done:
        return done.code
    return 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_projector_joins_what_it_was_trained_with(published, depth, capsys):
    file = published / "llava" / "mm_projector.bin"
    state = torch.load(file, weights_only=True)
    if depth == 1:
        state = {f"model.mm_projector.{each}": state[f"model.mm_projector.0.{each}"] for each in ("weight", "bias")}
        torch.save(state, file)
    assert take_in(published) == 0
    assert "image_fit=pad" in capsys.readouterr().out
    model = VLMWrapper.from_pretrained(published / "model")
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        hidden = HF_VISION["clip"]().from_pretrained(published / "clip")(images, output_hidden_states=True)
        seen = hidden.hidden_states[-2][:, 1:]
        weights = [tensor.float() for tensor in state.values()]
        expected = seen @ weights[0].T + weights[1]
        if depth == 2:
            expected = nn.functional.gelu(expected) @ weights[2].T + weights[3]
        torch.testing.assert_close(model.connector(model.vision(images)), expected, rtol=1e-4, atol=1e-4)
        ids = torch.randint(5, 90, (1, 6))
        llm = AutoModelForCausalLM.from_pretrained(published / "vicuna")
        assert model.llm(ids).logits.equal(llm(ids).logits)


@pytest.mark.parametrize("kind", ["internvl", "nanovlm"])
def test_others_projectors_are_the_connectors_that_they_are(kind, published, caplog):
    """Against the published arithmetic, with squares of patches put together by hand."""
    file, wide = published / "llava" / "mm_projector.safetensors", 4 * 16
    shapes = {"MP.proj.weight": (32, wide)}
    if kind == "internvl":
        shapes = {"0.weight": (wide,), "0.bias": (wide,), "1.weight": (32, wide), "1.bias": (32,)}
        shapes = {f"mlp1.{n}": s for n, s in {**shapes, "3.weight": (32, 32), "3.bias": (32,)}.items()}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(state, file)
    (file.parent / "config.json").unlink()
    parts = {"llm": str(published / "vicuna"), "vision": str(published / "clip"), "template": "vicuna_v1"}
    assert import_model(file, published / "model", **parts).connector == "pixel_shuffle"
    assert ("train on" in caplog.text) == (kind == "nanovlm")
    model = VLMWrapper.from_pretrained(published / "model")
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        hidden = HF_VISION["clip"]().from_pretrained(published / "clip")(images, output_hidden_states=True)
        grid = hidden.hidden_states[-1][:, 1:].unflatten(1, (4, 4))
        tokens = [grid[:, r : r + 2, c : c + 2].flatten(1) for r in (0, 2) for c in (0, 2)]
        expected = torch.stack(tokens, 1)
        if kind == "nanovlm":
            expected = expected @ state["MP.proj.weight"].T
        else:
            expected = nn.functional.layer_norm(expected, (wide,), state["mlp1.0.weight"], state["mlp1.0.bias"])
            expected = nn.functional.gelu(expected @ state["mlp1.1.weight"].T + state["mlp1.1.bias"])
            expected = expected @ state["mlp1.3.weight"].T + state["mlp1.3.bias"]
        torch.testing.assert_close(model.connector(model.vision(images)), expected, rtol=1e-4, atol=1e-4)
    first = next(iter(state))
    save_file({**state, first: torch.randn(32, 40) if kind == "nanovlm" else torch.randn(40)}, file)
    with pytest.raises(ValueError, match=rf"{first} takes 40 channels, expected 4 .* times the 16 of .*clip"):
        import_model(file, published / "none", **parts)


def test_what_was_taken_in_trains_on(published, llava_files, tmp_path):
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


def test_another_source_takes_the_place_of_what_was_imported_before(published, tmp_path):
    file = published / "llava" / "mm_projector.bin"
    line = ["recipe=llava_1_5", "stage=instruct", "llm=hf", f"llm.path={published / 'vicuna'}"]
    line += ["llm.chat_template=vicuna_v1", f"init_from={file}", f"run_dir={tmp_path / 'run'}"]
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()

    def bias() -> torch.Tensor:
        settings, _ = imported(compose(line), folder)
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
    assert take_in(published) == 2 and "is no file of tensors" in capsys.readouterr().err
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
        build(tmp_path / "hf", **options)
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
    refused(r"has no chat template: name one with --template", forget("chat_template.jinja"))
    refused(r"vision_feature_layer=\[-2, -1\] joins several layers", vision_feature_layer=[-2, -1])
    refused(r"select_strategy=full leaves out 0 tokens, the encoder has 1", vision_feature_select_strategy="full")
    build(tmp_path / "next", kind="llava_next")
    with pytest.raises(ValueError, match=r"--image-fit pad: .*takes pictures in tiles alone"):
        import_model(tmp_path / "next", tmp_path / "out", image_fit="pad")
    with pytest.raises(ValueError, match="model_type is llama, expected llava or llava_next"):
        import_model(published / "vicuna", tmp_path / "out")
    with pytest.raises(ValueError, match="is a Hugging Face folder: 'vlmtrain import"):
        VLMWrapper.from_pretrained(tmp_path / "hf")
