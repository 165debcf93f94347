"""Molmo2, imported and exported: prompts, pixels, logits and answers equal transformers', before and after training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, Molmo2Processor
from transformers.video_utils import VideoMetadata

from tests.integration.imported_pairs import Pair, draw_noise
from tests.integration.model_parity import MOLMO2_CASE, MOLMO2_CASES, build, check, export_all
from tests.integration.molmo2_models import IN_PLACE, PATCH, build_molmo2
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.records import is_video
from vlmtrain.data.video import FrameSequence
from vlmtrain.evaluation.generation import generate
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.interop.importing import Import, import_model
from vlmtrain.interop.molmo2 import pixel_patches
from vlmtrain.model import VLMWrapper

SIZES = {"wide": (70, 30), "tall": (21, 55), "large": (130, 90), "long": (200, 24)}  # width, height


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = draw_noise(folder, SIZES)
    for number in range(9):  # frames that brighten
        frame = generator.integers(0, 100, (44, 60, 3)) + 15 * number
        Image.fromarray(frame.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    home = tmp_path_factory.mktemp("molmo2")
    build_molmo2(home / "hf")
    return loaded(home, import_model(home / "hf", home / "model"))


def loaded(home: Path, done: Import, source: str = "hf") -> Pair:
    theirs = AutoModelForImageTextToText.from_pretrained(home / source).eval()
    model, processor = VLMWrapper.from_pretrained(home / "model").eval(), Processor.from_pretrained(home / "model")
    return Pair(home, done, model, processor, theirs, AutoProcessor.from_pretrained(home / source))


def media_of(files: Path, names: tuple[str, ...]) -> tuple:
    """The images and videos of a case; a video is written as "frames@rate"."""
    media = []
    for name in names:
        count, _, rate = name.partition("@")
        frames = [ImageOnDisk(files / f"{number}.png") for number in range(int(count))] if rate else []
        media.append(FrameSequence(tuple(frames), float(rate)) if rate else ImageOnDisk(files / f"{name}.png"))
    return tuple(media)


def ours(processor: Processor, media: tuple, mark: str = "<image>\n"):
    question = Turn("user", mark * len(media) + "What is this?")
    return processor.collate([processor.prompt(Conversation("asked", (question,), media))])


def given(prepare: Molmo2Processor, media: tuple, shown: list[int] | None = None) -> BatchFeature:
    """What transformers' processor makes of images, or of the frames `shown`; by default, those that it chooses."""
    kinds = ["video" if is_video(medium) else "image" for medium in media]
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "What is this?"}]
    text = prepare.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    options: dict = {"images": [[medium.load() for medium in media]]} if "image" in kinds else {}
    for video in media if "video" in kinds else ():
        frames = np.stack([np.asarray(image.load()) for image in video.images])
        told = VideoMetadata(total_num_frames=len(frames), fps=video.fps, frames_indices=shown)
        frames = frames if shown is None else frames[shown]
        options = {"videos": [frames], "video_metadata": [told], "do_sample_frames": shown is None}
    return prepare(text=[text], **options, return_tensors="pt")


def check_inputs(pair: Pair, batch, inputs: BatchFeature) -> None:
    """The same ids, except those of the tokens of images; who sees whom; and pixels equal up to rounding."""
    ids, is_text = inputs["input_ids"][0], ~batch.visual.mask[0]
    patch, column = pair.prepare.tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_col>"])
    assert ids.shape == is_text.shape and ids[is_text].equal(batch.input_ids[0][is_text])
    assert set(ids[~is_text].tolist()) <= {patch, column} and not torch.isin(ids[is_text], ids[~is_text]).any()
    assert inputs["mm_token_type_ids"][0].equal(batch.bidirectional[0] + 1)
    key = next((key for key in inputs if key.startswith("pixel_values")), None)
    assert (key is None) == (not batch.visual.items)
    if key:
        pixels = pixel_patches(batch.visual.normalized().pixels[0].flatten(0, -4), PATCH)
        assert inputs[key].shape == pixels.shape
        assert float(((inputs[key] - pixels).abs()).max()) * 255 <= 1e-3


# with the frames that are shown: two per second and the last one
CASES = {
    "an image": (("wide",), None),
    "an image of the most crops": (("large",), None),
    "images": (("tall", "long", "wide"), None),
    "text": ((), None),
    "a video": (("9@4",), [0, 2, 4, 6, 8, 8]),
    "one frame": (("1@4",), [0, 0]),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_prompts_pixels_logits_and_answers(pair, case, files):
    names, shown = CASES[case]
    media = media_of(files, names)
    batch, inputs = ours(pair.processor, media), given(pair.prepare, media, shown)
    check_inputs(pair, batch, inputs)
    expected = pair.theirs(**inputs).logits
    assert relative_difference(pair.model(batch)[..., : expected.shape[-1]], expected) <= 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = pair.theirs.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert pair.model.generate(batch, **options)[0].equal(found)


@torch.no_grad()
def test_pixels_and_who_sees_whom_matter(pair, files):
    """And with the sampling of transformers' processor, the frames are those that it chooses."""
    media = media_of(files, ("large",))
    batch = ours(pair.processor, media)
    expected, pixels = pair.model(batch), batch.visual.pixels[0]
    for changed in (
        batch._replace(bidirectional=None),
        batch._replace(visual=batch.visual._replace(pixels=(pixels.flip(3),))),
    ):
        assert relative_difference(pair.model(changed)[0, -1], expected[0, -1]) > 1e-3
    processor, (video,) = Processor.from_pretrained(pair.home / "model"), media_of(files, ("9@4",))
    processor.geometry = replace(processor.geometry, video=replace(processor.geometry.video, last=False))
    check_inputs(pair, ours(processor, (video,)), given(pair.prepare, (video,)))


@torch.no_grad()
def test_answers_never_have_the_tokens_without_logits(pair, files):
    """Their rows of the head are zero, so they would win against tokens whose logits are negative."""
    model, kept = VLMWrapper.from_pretrained(pair.home / "model"), pair.theirs.vocab_size
    head = model.llm.lm_head.weight
    assert not head[kept:].any() and len(head) > len(pair.processor.tokenizer) > kept
    head[kept::2] += 100 * head[0]
    head[kept + 1 :: 2] -= 100 * head[0]
    batch = ours(pair.processor, media_of(files, ("wide",)))
    assert int(model(batch)[0, -1].argmax()) >= kept
    assert int(generate(model, pair.processor, batch, max_new_tokens=8).max()) < kept


def test_what_was_imported_is_told(pair):
    assert pair.done.image_fit == "tiles" and pair.done.template == "chat"
    assert pair.done.largest_relative_difference <= 1e-5
    assert "| source's class | Molmo2ForConditionalGeneration |" in (pair.home / "model" / "README.md").read_text()
    assert pair.model.vision.levels == [2, 4] and pair.processor.renderer.places_images


def test_a_template_with_images_in_the_text(files, tmp_path):
    """Its prompts begin with the token that the processor puts before them."""
    build_molmo2(tmp_path / "hf", IN_PLACE, use_frame_special_tokens=False)
    pair = loaded(tmp_path, import_model(tmp_path / "hf", tmp_path / "model"))
    for names, shown in (CASES["an image"], CASES["text"], CASES["a video"]):
        media = media_of(files, names)
        check_inputs(pair, ours(pair.processor, media, "<image>"), given(pair.prepare, media, shown))


def test_prompts_that_cannot_be_reproduced_are_told(tmp_path, caplog):
    odd = IN_PLACE.replace("{{ item['text'] }}", "{{ ' ' + item['text'] }}")
    build_molmo2(tmp_path / "hf", odd)
    assert import_model(tmp_path / "hf", tmp_path / "model").largest_relative_difference <= 1e-5
    assert "its processor makes other prompts than training: from token" in caplog.text


def published_as_on_the_hub(folder: Path) -> None:
    """Rewrite a folder's files to the older layout of the published ones, whose encoder has blocks without weights."""
    config = json.loads((folder / "config.json").read_text())
    vision, adapter, text = (config[f"{part}_config"] for part in ("vision", "adapter", "text"))
    config["vit_config"] = config.pop("vision_config")
    for new, old in (("image_size", "image_default_input_size"), ("patch_size", "image_patch_size")):
        vision[old] = vision.pop(new)
    vision |= {"image_num_pos": vision.pop("num_position_embeddings"), "num_hidden_layers": 6}
    adapter["vit_layers"] = [layer - 6 for layer in adapter.pop("vision_feature_layer")]
    text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "rope_scaling_layers": None}
    (folder / "config.json").write_text(json.dumps(config))
    told = json.loads((folder / "processor_config.json").read_text())
    images, videos = told.pop("image_processor"), told.pop("video_processor")
    for settings in (images, videos):
        for key in ("do_rescale", "do_normalize", "do_resize", "rescale_factor"):
            settings.pop(key, None)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    (folder / "processor_config.json").write_text(json.dumps(told))


def test_a_folder_in_the_layout_of_the_hub(pair, tmp_path):
    build_molmo2(tmp_path / "hf")
    published_as_on_the_hub(tmp_path / "hf")
    assert import_model(tmp_path / "hf", tmp_path / "model").largest_relative_difference <= 1e-5
    model, processor = VLMWrapper.from_pretrained(tmp_path / "model"), Processor.from_pretrained(tmp_path / "model")
    assert model.vision.levels == [2, 4] and processor.geometry == pair.processor.geometry
    assert all(one.equal(other) for one, other in zip(model.parameters(), pair.model.parameters(), strict=True))


def test_an_import_trains_and_exports_to_its_own_class(pair, files, tmp_path):
    """Also with other crops and frames; an import of the export has them and the same weights again."""
    model, processor = VLMWrapper.from_pretrained(pair.home / "model"), Processor.from_pretrained(pair.home / "model")
    geometry = processor.geometry
    grids = tuple(grid for grid in geometry.tile_grids if grid[0] * grid[1] <= 2)
    plan = replace(geometry.video, fps=1, frames=7, frame_tokens=("<im_start>", "<im_end>"))
    processor.geometry = replace(geometry, tile_grids=grids, video=plan)
    processor = Processor(processor.tokenizer, processor.geometry, "chat", 1024, attention="images")
    batch = ours(processor, media_of(files, ("wide", "tall")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    nn.functional.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch.input_ids[:, 1:]).backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "Molmo2ForConditionalGeneration" and done.largest_relative_difference <= 1e-5
    assert done.remarks[0].startswith("videos: transformers chooses other frames than video.sampling=seconds with the")
    trained = loaded(tmp_path, None, "out")
    for names, shown in ((("large", "wide"), None), (("9@4",), [0, 4, 8, 8]), ((), None)):
        media = media_of(files, names)
        batch, inputs = ours(processor, media), given(trained.prepare, media, shown)
        check_inputs(trained, batch, inputs)
        with torch.no_grad():
            expected = trained.theirs(**inputs).logits
            assert relative_difference(model(batch), expected) <= 1e-5

    import_model(tmp_path / "out", tmp_path / "again")
    again = VLMWrapper.from_pretrained(tmp_path / "again")
    state, table = model.state_dict(), "llm.model.embed_tokens.weight"
    unused = processor.tokenizer.convert_tokens_to_ids(
        ["<im_patch>", "<im_col>"]
    )  # the connector has what stands there
    for name, tensor in again.state_dict().items():
        differing = (tensor != state[name]).flatten(1).any(1) if tensor.dim() > 1 else tensor != state[name]
        assert set(differing.nonzero().flatten().tolist()) <= (set(unused) if name == table else set()), name
    again = Processor.from_pretrained(tmp_path / "again")
    assert again.geometry == processor.geometry and again.renderer.sample_texts == processor.renderer.sample_texts


def test_models_trained_here_without_the_class_s_tokens_are_exported(tmp_path):
    """With images in the text, a template without a first token, and encoders of transformers and open_clip."""
    for name, found in export_all(MOLMO2_CASES, tmp_path).items():
        check(found["parity"], 1e-4)
        assert (found["parity"].model_class, found["parity"].module) == (MOLMO2_CASES[name].becomes, "transformers")
        theirs = AutoProcessor.from_pretrained(found["home"] / "out")
        assert theirs.tokenizer.bos_token == "<|im_start|>"
        assert (
            not {"<im_patch>", "<im_col>"}
            & Processor.from_pretrained(found["home"] / "model").tokenizer.get_vocab().keys()
        )


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            {"llm": "qwen2"},
            {},
            "requires the language model's model_type=qwen3, got qwen2",
        ),
        ({"vision": "clip"}, {}, "requires SigLIP's architecture, got CLIPVisionModel"),
        ({"options": {"head": "linear", "num_heads": 2}}, {}, r"connector\.head=linear: .* requires swiglu"),
        ({"connector": "mlp", "options": {}}, {}, "requires connector=attentional_pool, got mlp"),
        ({}, {"tile_grids": ((1, 1), (2, 2))}, "image_tiles: .* requires all grids of at most N crops"),
        ({}, {"frame": ("<im_start>", "<im_end>")}, r"llm\.image_frame=\['<im_start>', '<im_end>'\]"),
    ],
)
def test_models_that_the_class_does_not_support_are_refused(case, change, message, tmp_path):
    build(MOLMO2_CASE._replace(**case), tmp_path / "model")
    processor = Processor.from_pretrained(tmp_path / "model")
    processor.geometry = replace(processor.geometry, **change)
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_causal_models_and_other_frames(tmp_path):
    build(MOLMO2_CASE, tmp_path / "model")
    processor = Processor.from_pretrained(tmp_path / "model")
    processor.attention = "causal"
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"Molmo2\w+ requires fusion\.attention=images, got causal"):
        export(tmp_path / "model", tmp_path / "out", "molmo2")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"qk_norm_type": "olmo"}, r"config\.json: text_config\.qk_norm_type=olmo, expected qwen3"),
        ("text", {"norm_after": True}, r"config\.json: text_config\.norm_after=True, expected False"),
        (
            "text",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"text_config\.rope_parameters\.rope_type=linear, expected default",
        ),
        ("adapter", {"hidden_act": "gelu"}, r"adapter_config\.hidden_act=gelu, expected silu"),
        (
            "adapter",
            {"vision_feature_layer": [1, 3]},
            r"vision_feature_layer=\[1, 3\], expected the deepest layer first",
        ),
        ("ids", {"image_patch_id": 7}, r"config\.json: image_patch_id=7, expected 2"),
        ("vision", {"head_dim": 4}, r"vision_config\.head_dim=4, expected 8"),
        ("images", {"overlap_margins": [1, 2]}, r"overlap_margins=\[1, 2\], expected \[1, 1\]"),
        ("images", {"resample": 3}, "resample=3, expected 2"),
        ("images", {"pooling_size": [2, 3]}, r"pooling_size=\[2, 3\], expected \[2, 2\]"),
        ("images", {"size": {"height": 48, "width": 48}}, "size=48 x 48, expected 40 x 40 as for the encoder"),
        ("images", {"image_mean": [0.1, 0.2, 0.3], "do_normalize": False}, "makes other pixel_values, by"),
        ("videos", {"image_mean": [0.1, 0.2, 0.3]}, "makes other pixel_values_videos, by"),
        ("told", {"use_single_crop_col_tokens": True}, "use_single_crop_col_tokens=True, expected False"),
        ("told", {"video_use_col_tokens": True}, "video_use_col_tokens=True, expected False"),
        ("told", {"image_use_col_tokens": False}, "image_use_col_tokens=False, expected True"),
        ("told", {"use_single_crop_start_token": False}, "use_single_crop_start_token=False, expected True"),
    ],
)
def test_what_cannot_be_imported_is_refused(part, change, message, tmp_path):
    build_molmo2(tmp_path / "hf", **(change if part == "told" else {part: change}))
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_image_fit_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match=r"--image-fit squash: .* is a Molmo2, which supports only tiles"):
        import_model(pair.home / "hf", tmp_path / "model", image_fit="squash")
