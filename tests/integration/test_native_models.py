"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and HunyuanOCR, imported: equal to transformers before and after training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from tests.conftest import gpt, human, metrics, train
from tests.integration.imported_pairs import Pair, draw_noise
from tests.integration.model_parity import (
    JOINED,
    check,
    draw_pictures,
    job,
    measure,
    options_of,
    run_outside,
)
from tests.integration.native_models import CLASSES, PATCH, build_native
from vlmtrain.batch import Batch
from vlmtrain.cli import main
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.interop.importing import import_model
from vlmtrain.interop.native_parity import pixel_rows
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments

FAMILIES = list(CLASSES)
SIZES = {"wide": (60, 30), "tall": (21, 55), "square": (33, 33), "small": (5, 4), "large": (200, 120)}  # width, height


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_noise(folder, SIZES)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Pair:
    home = tmp_path_factory.mktemp(request.param)
    build_native(home / "hf", request.param, tied=request.param == "qwen2_5_vl")
    done = import_model(home / "hf", home / "model")
    theirs = AutoModelForImageTextToText.from_pretrained(home / "hf").eval()
    model, processor = VLMWrapper.from_pretrained(home / "model").eval(), Processor.from_pretrained(home / "model")
    return Pair(home, done, model, processor, theirs, hf_processor(home / "hf"))


def hf_processor(folder: Path) -> ProcessorMixin:
    prepare = AutoProcessor.from_pretrained(folder)
    prepare.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return prepare


def asked(files: Path, *names: str) -> Conversation:
    question = Turn("user", "<image>" * len(names) + "What is this?")
    return Conversation("asked", (question,), tuple(ImageOnDisk(files / f"{name}.png") for name in names))


def messages(*names: str) -> list[dict]:
    content = [{"type": "image"} for _ in names] + [{"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": content}]


def inputs(prepare: ProcessorMixin, files: Path, *names: str):
    text = prepare.apply_chat_template(messages(*names), add_generation_prompt=True, tokenize=False)
    images = [Image.open(files / f"{name}.png") for name in names]
    return prepare(text=[text], images=images or None, return_tensors="pt")


def batch_of(pair: Pair, files: Path, *rows: tuple[str, ...], packed: bool = False) -> Batch:
    samples = [pair.processor.prompt(asked(files, *names)) for names in rows]
    return pair.processor.pack(samples) if packed else pair.processor.collate(samples)


ROWS = (("wide", "tall"), ("large",), ())


def test_logits_and_gradients_of_images(pair, files):
    """Two images of different sizes, one, and none in one batch; transformers sees each row alone."""
    batch = batch_of(pair, files, *ROWS).to(torch.device("cpu"))
    shown = tuple(image.requires_grad_() for image in batch.visual.pixels[0])
    logits = pair.model(batch._replace(visual=batch.visual._replace(pixels=(shown,))))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    merge, images, number = pair.model.vision.multiple, iter(shown), 0
    sum((row * own)[: int(n)].sum() for row, own, n in zip(logits, weights, batch.lengths)).backward()
    for row, names in enumerate(ROWS):
        given, length = inputs(pair.prepare, files, *names), int(batch.lengths[row])
        if names:
            given["pixel_values"].requires_grad_()
        expected = pair.theirs(**given).logits[0]
        assert relative_difference(logits[row, :length], expected) <= 1e-5
        (expected * weights[row, :length]).sum().backward()
        if names:
            ours = torch.cat([pixel_rows(next(images).grad, PATCH, merge).flatten(2) for _ in names])
            theirs = given["pixel_values"].grad.view(len(ours), 3, -1, PATCH * PATCH).sum(2)
            assert relative_difference(ours, theirs) <= 1e-5
            number += len(names)
    assert number == 3


def test_packed_rows_equal_padded_ones(pair, files):
    padded = batch_of(pair, files, *ROWS)
    expected = [row[: int(length)] for row, length in zip(pair.model(padded), padded.lengths)]
    model = VLMWrapper.from_pretrained(pair.home / "model").eval()
    attend_in_segments(model.llm)
    found = model(batch_of(pair, files, *ROWS, packed=True))[0]
    assert relative_difference(found, torch.cat(expected)) <= 1e-5
    other = model(batch_of(pair, files, ROWS[0], ("square",), packed=True))[0]
    first = len(expected[0])
    assert other[:first].equal(model(batch_of(pair, files, ROWS[0], ("tall",), packed=True))[0][:first])


@torch.no_grad()
def test_greedy_answers_of_32_tokens(pair, files):
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [pair.theirs.config.image_token_id]
    rows = [*((name,) for name in SIZES), ("wide", "square", "tall"), ()]
    expected = []
    for names in rows:
        given = inputs(pair.prepare, files, *names)
        expected.append(pair.theirs.generate(**given, **options)[0, given["input_ids"].shape[1] :])
        assert pair.model.generate(batch_of(pair, files, names), **options)[0].equal(expected[-1]), names
    together = pair.model.generate(batch_of(pair, files, *rows), **options)
    assert all(one.equal(other) for one, other in zip(together, expected, strict=True))
    assert len({tuple(each.tolist()) for each in expected}) >= len(rows) - 1


def test_counts_from_headers_equal_those_of_the_processor(pair):
    """Up to an aspect ratio of MAX pixels to one square of patches, beyond which transformers exceeds MAX."""
    generator, processor = random.Random(0), pair.processor
    sizes = [tuple(round(5 * 60 ** generator.random()) for _ in range(2)) for _ in range(400)]
    sizes = [size for size in sizes if max(size) < 16 * min(size)][:200]
    assert len(sizes) == 200
    for height, width in sizes:
        given = pair.prepare.image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
        _, rows, columns = given["image_grid_thw"][0].tolist()
        (item,), (placement,) = processor.geometry.plan([(height, width)])
        assert item.grids[0] == (rows, columns), (height, width)
        expected = given["image_grid_thw"].prod() // 4
        if pair.theirs.config.model_type == "hunyuan_vl":
            expected = rows // 2 * (columns // 2 + 1) + 2
        assert placement.slots == expected


def test_what_was_imported_is_told(pair):
    assert pair.done.image_fit == "native" and pair.done.template == "chat"
    assert pair.done.largest_relative_difference <= 1e-5
    card = (pair.home / "model" / "README.md").read_text()
    assert f"| source's class | {type(pair.theirs).__name__} |" in card
    geometry = pair.processor.geometry
    assert geometry.image_pixels == (16 * PATCH**2, 64 * PATCH**2) and all(geometry.frame)


def check_export(family: str, home: Path, model: Path) -> None:
    """An export has the source's tensors under the source's names; the encoder's are equal, the others changed."""
    done = export(model, home / "out")
    assert done.model_class == CLASSES[family][1].__name__
    before, after = (load_file(home / which / "model.safetensors") for which in ("hf", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name][: len(before[name])])}
    assert not any("blocks" in name or "vit.layers" in name for name in changed)
    for part in ("layers.0.self_attn", "merger" if family != "hunyuan_vl" else "perceive", "embed_tokens"):
        assert any(part in name for name in changed)


def test_an_import_trains_and_exports_to_its_own_class(tmp_path):
    """All families in one process of transformers that cannot import vlmtrain."""
    images, jobs = draw_pictures(tmp_path / "images"), []
    for family in FAMILIES:
        home = tmp_path / family
        build_native(home / "hf", family, tied=family == "qwen2_5_vl")
        import_model(home / "hf", home / "model")
        model, processor = VLMWrapper.from_pretrained(home / "model"), Processor.from_pretrained(home / "model")
        model.vision.requires_grad_(False)
        batch = processor.collate(
            [processor.prompt(asked(images, *names)) for names in (("wide", "tall"), ("large",), ())]
        )
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        nn.functional.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch.input_ids[:, 1:]).backward()
        optimizer.step()
        model.save_pretrained(home / "trained")
        processor.save_pretrained(home / "trained")
        check_export(family, home, home / "trained")
        jobs.append(job(home / "out", JOINED, images, **options_of(CLASSES[family][1].__name__)))
    for family, found in zip(FAMILIES, run_outside(tmp_path, jobs)):
        check(measure(found, tmp_path / family / "trained", JOINED, images), 2e-5)
        assert found["module"] == "transformers"


def test_a_run_starts_from_a_published_model(files, tmp_path, capsys):
    talk = [human("<image>What is this?"), gpt("noise")]
    records = [{"image": f"{name}.png", "conversations": talk} for name in ("wide", "tall")]
    records.append({"conversations": [human("hello"), gpt("noise")]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    build_native(tmp_path / "hf", "qwen3_vl")
    data = ["data=llava_json", f"data.images={files}", f"data.instruct={tmp_path / 'data.json'}"]
    limits = f"stages.instruct.image_pixels=[{16 * PATCH**2},{64 * PATCH**2}]"
    fit = ["stages.instruct.image_fit=native", limits, "stages.instruct.template=chat", "data.validation=null"]
    steps = ["max_steps=1", "batch_size=3", "max_length=400", "schedule.name=constant"]
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", *data, *fit, f"init_from={tmp_path / 'hf'}"]
    train(*line, *(f"stages.instruct.{step}" for step in steps), "run_dir=run", cwd=tmp_path)
    check_export("qwen3_vl", tmp_path, tmp_path / "run" / "instruct" / "model")

    # the recipe's own encoder and connector, which would make other counts, are not used
    line[-1] = f"init_from={tmp_path / 'run' / 'imported'}"
    main(["check", *line, *(f"stages.instruct.{step}" for step in steps), "--json"])
    (report,) = json.loads(capsys.readouterr().out)["instruct"]["sources"].values()
    assert report["image_tokens"] == metrics(tmp_path / "run", "instruct")[0]["image_tokens"] > 0


def test_other_tokens_around_images_are_exported(tmp_path):
    """HunyuanOCR's processor reads the tokens from the tokenizer, which names those of the source."""
    build_native(tmp_path / "hf", "hunyuan_vl")
    import_model(tmp_path / "hf", tmp_path / "model")
    processor = Processor.from_pretrained(tmp_path / "model")
    processor.geometry = replace(processor.geometry, frame=("<user>", "<end>"))
    VLMWrapper.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "framed")
    processor.save_pretrained(tmp_path / "framed")
    done = export(tmp_path / "framed", tmp_path / "out")
    assert done.model_class == "HunYuanVLForConditionalGeneration"


def published_as_on_the_hub(folder: Path, family: str) -> None:
    """Rewrite a folder's files to the older layout of the published ones."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    name = "xdrope" if family == "hunyuan_vl" else "mrope"
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {**rope, "type": name, f"{name}_section": rope.pop("mrope_section")}
    text["rope_scaling"] = {key: value for key, value in text["rope_scaling"].items() if key not in ("rope_type",)}
    text["rope_scaling"].pop("mrope_section" if name == "xdrope" else "", None)
    config["vision_config"].pop("model_type")
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    limits = images.pop("size")
    images |= {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


@pytest.mark.parametrize("family", ["qwen2_vl", "hunyuan_vl"])
def test_folders_in_the_layout_of_the_hub(family, tmp_path):
    build_native(tmp_path / "hf", family)
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    published_as_on_the_hub(tmp_path / "hf", family)
    assert import_model(tmp_path / "hf", tmp_path / "model").largest_relative_difference <= 1e-5
    export(tmp_path / "model", tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == again.keys() and all(
        again[name][: len(each)].equal(each) for name, each in expected.items()
    )


PREPARED = ("resample", "merge_size", "patch_size", "do_resize")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_fit": "squash"}, "--image-fit squash: .* is a qwen2_vl, which supports only native"),
        (
            {"resample": 2},
            "Qwen2VLForConditionalGeneration's processor makes other pixels of the probe's images, by [0-9]+ of 255",
        ),
        ({"merge_size": 1}, "Qwen2VLForConditionalGeneration's processor makes 64 image tokens .*, not 16"),
        ({"patch_size": 8}, "Qwen2VLForConditionalGeneration's processor makes [0-9]+ image tokens .*, not"),
        ({"do_resize": False}, "Qwen2VLForConditionalGeneration's processor cannot prepare a question about images"),
        ({"frame": 99999}, r"config\.json: vision_start_token_id=99999 is not the id of a token of the tokenizer"),
        ({"template": "chatml"}, "Qwen2VLForConditionalGeneration's processor makes other prompts"),
        ({"drop": "visual.blocks.1.attn.proj.bias"}, r"missing keys: model\.visual\.blocks\.1\.attn\.proj\.bias"),
        ({"section": [3, 5]}, r"mrope_section=\[3, 5\], expected 3 numbers, one for each row of positions"),
        ({"section": [2, 3, 4]}, r"mrope_section=\[2, 3, 4\], .* which sum to half of the width of a head, 8"),
    ],
)
def test_what_cannot_be_imported_is_refused(change, message, tmp_path):
    folder = tmp_path / "hf"
    build_native(folder, "qwen2_vl")
    options = {key: change[key] for key in ("image_fit", "template") if key in change}
    file = folder / "processor_config.json"
    images = json.loads(file.read_text())
    images["image_processor"] |= {key: change[key] for key in PREPARED if key in change}
    file.write_text(json.dumps(images))
    if "drop" in change:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(change["drop"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if "section" in change:
        config["text_config"]["rope_parameters"]["mrope_section"] = change["section"]
    if "frame" in change:
        config["vision_start_token_id"] = change["frame"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_model(folder, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
