"""Published models with videos, imported and exported: prompts, pixels, logits and answers equal transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.video_utils import VideoMetadata

from tests.integration.native_models import PATCH, build_native
from tests.integration.published_models import ITEMS, build_llava
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageOnDisk
from vlmtrain.data.records import is_video
from vlmtrain.data.video import FrameSequence
from vlmtrain.data.video_plan import VideoPlan
from vlmtrain.frames import Joining
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.interop.importing import import_model
from vlmtrain.interop.native_parity import pixel_rows
from vlmtrain.model import VLMWrapper
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.runs.folder import RunFolder
from vlmtrain.settings import Run, compose
from vlmtrain.training.assembly import build_skeleton, build_tokenizer
from vlmtrain.training.init_from import adopt_videos, take_in, with_init_from
from vlmtrain.training.processing import build_processor

OV = "llava_onevision"
FAMILIES = [OV, "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
QWENS = FAMILIES[1:]
SIZES = {OV: (32, 32)} | dict.fromkeys(QWENS, (24, 32))  # at which frames are not resized: transformers has no Pillow
FRAME = "<|vision_start|><|video_pad|><|vision_end|>"


class Pair(NamedTuple):
    """A model folder and its processor beside the published model that it was imported from."""

    family: str
    home: Path
    model: VLMWrapper
    processor: Processor
    theirs: nn.Module
    prepare: ProcessorMixin


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Image.Image]:
    generator = np.random.default_rng(0)
    sizes = {"wide": (30, 60), "large": (90, 130), "tall": (55, 21)}
    return {
        name: Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for name, size in sizes.items()
    }


def build(family: str, folder: Path) -> None:
    if family == OV:
        build_llava(folder, OV, "siglip", "qwen2")
    else:
        build_native(folder, family, tied=family == "qwen2_5_vl")


def hf_processor(folder: Path) -> ProcessorMixin:
    prepare = AutoProcessor.from_pretrained(folder)
    prepare.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return prepare


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Pair:
    home = tmp_path_factory.mktemp(request.param)
    build(request.param, home / "hf")
    assert import_model(home / "hf", home / "model").largest_relative_difference <= 1e-5
    theirs = AutoModelForImageTextToText.from_pretrained(home / "hf").eval()
    model, processor = VLMWrapper.from_pretrained(home / "model").eval(), Processor.from_pretrained(home / "model")
    return Pair(request.param, home, model, processor, theirs, hf_processor(home / "hf"))


def video(folder: Path, count: int, rate: float, size: tuple[int, int]) -> FrameSequence:
    """Frames that brighten, with noise."""
    generator, files = np.random.default_rng(count), []
    for number in range(count):
        noise = generator.integers(0, 100, (*size, 3)) + 150 * number // count
        files.append(ImageOnDisk(folder / f"{number}.png"))
        Image.fromarray(noise.astype(np.uint8)).save(files[-1].path)
    return FrameSequence(tuple(files), rate)


def media_of(pair: Pair, names: tuple[str, ...], pictures: dict, folder: Path, size=None) -> list:
    """The images and videos of a case; a video is written as "frames@rate"."""
    media = []
    for number, name in enumerate(names):
        (folder / str(number)).mkdir()
        if "@" in name:
            count, rate = name.split("@")
            media.append(video(folder / str(number), int(count), float(rate), size or SIZES[pair.family]))
        else:
            pictures[name].save(folder / f"{number}.png")
            media.append(ImageOnDisk(folder / f"{number}.png"))
    return media


def ours(pair: Pair, media: list, processor: Processor | None = None):
    mark = "<image>\n" if pair.family == OV else "<image>"
    question = Turn("user", mark * len(media) + "What is this?")
    processor = processor or pair.processor
    return processor.collate([processor.prompt(Conversation("asked", (question,), tuple(media)))])


def given(pair: Pair, media: list, sampled: bool = True, prepare: ProcessorMixin | None = None):
    """What transformers' processor makes of all frames, whose sampling is its own if it has any."""
    prepare = prepare or pair.prepare
    kinds = ["video" if is_video(medium) else "image" for medium in media]
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "What is this?"}]
    text = prepare.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [medium.load() for medium in media if not is_video(medium)]
    options: dict = {"images": [images]} if images else {}
    for clip in filter(is_video, media):
        frames = np.stack([np.asarray(image.load()) for image in clip.images])
        told = VideoMetadata(len(frames), clip.fps, frames_indices=list(range(len(frames))))
        if pair.family == OV:  # LLaVA-OneVision's published code: a frame per second
            frames, sampled = frames[:: max(1, round(clip.fps))], False
        if len(frames) == 1:  # which transformers' samplers refuse
            sampled = False
            if pair.family == "qwen3_vl":  # and so does its resizing
                frames, told.frames_indices = frames.repeat(2, 0), [0, 0]
        if pair.family == "qwen3_vl":
            # transformers 5.23 keeps the template's tokens around all frames, unlike Qwen3-VL's published code
            text = text.replace(FRAME, "<|video_pad|>")
        options |= {"videos": [frames], "video_metadata": [told], "do_sample_frames": sampled}
        options |= {"fps": 2} if sampled else {}
    return prepare(text=[text], **options, return_tensors="pt")


def expected_ids(pair: Pair, batch, media: list) -> torch.Tensor:
    config = pair.theirs.config
    ids = [config.video_token_id if is_video(medium) else config.image_token_id for medium in media]
    index = batch.visual.index[0]
    of_placement = torch.tensor([*(ids[each.medium] for each in batch.visual.placements), 0])
    return torch.where(index < 0, batch.input_ids[0], of_placement[index])


def gray_levels(pair: Pair, batch, inputs) -> float:
    """The largest difference of the pixels of frames and images, of 255 levels."""
    worst, std = 0.0, torch.tensor(pair.processor.geometry.std)
    shown = list(zip(batch.visual.items, batch.visual.normalized().pixels[0]))
    for key, is_clip in (("pixel_values", False), ("pixel_values_videos", True)):
        own = [pixels for item, pixels in shown if (item.kind == "clip") == is_clip]
        if not own:
            continue
        found = inputs[key]
        if pair.family == OV:
            found, own = found.flatten(0, 1)[:, None], torch.stack(own)[:, None]
            found = torch.stack([view for view in found if view.abs().sum() > 0])  # padding to equal numbers of views
        else:
            rows = []
            for pixels in own:
                each = [pixel_rows(frame, PATCH, 2) for frame in pixels.view(-1, *pixels.shape[-3:])]
                rows.append(torch.stack(each * (2 // len(each)), dim=1))
            own = torch.cat(rows)
            found = found.view(len(own), 3, 2, PATCH, PATCH).transpose(1, 2)
        assert found.shape == own.shape
        worst = max(worst, float(((found - own).abs() * std[:, None, None]).max()) * 255)
    return worst


CASES = {
    "an image": ("large",),
    "images": ("wide", "large"),
    "text": (),
    "a video": ("8@4",),
    "one frame": ("1@4",),
    "three frames": ("3@3",),
    "a video beside an image": ("large", "8@4"),
    "a video beside images": ("tall", "wide", "8@4"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_prompts_pixels_logits_and_answers(pair, case, pictures, tmp_path):
    media = media_of(pair, CASES[case], pictures, tmp_path)
    batch, inputs = ours(pair, media), given(pair, media)
    assert inputs["input_ids"][0].equal(expected_ids(pair, batch, media))
    assert not media or gray_levels(pair, batch, inputs) <= 0.01
    assert relative_difference(pair.model(batch), pair.theirs(**inputs).logits) <= 1e-5
    config = pair.theirs.config
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [config.image_token_id, config.video_token_id]
    found = pair.theirs.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert pair.model.generate(batch, **options)[0].equal(found)


@torch.no_grad()
def test_frames_and_their_order_matter(pair, pictures, tmp_path):
    (clip,) = media_of(pair, ("8@4",), pictures, tmp_path)
    changed = FrameSequence(clip.images[::-1], clip.fps)
    first, second = (pair.model(ours(pair, [each]))[0, -1] for each in (clip, changed))
    assert relative_difference(first, second) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 5])
def test_an_odd_number_of_frames_that_the_caller_chose(pair, count, pictures, tmp_path):
    """The last one is repeated; transformers is given the frames without sampling them."""
    geometry = pair.processor.geometry
    chosen = replace(geometry.video, sampling="uniform", fps=None, frames=count)
    processor = Processor.from_pretrained(pair.home / "model")
    processor.geometry = replace(geometry, video=chosen)
    (clip,) = media_of(pair, (f"{count}@1",) if pair.family == OV else (f"{count}@8",), pictures, tmp_path)
    batch, inputs = ours(pair, [clip], processor), given(pair, [clip], sampled=False)
    assert inputs["input_ids"][0].equal(expected_ids(pair, batch, [clip]))
    assert gray_levels(pair, batch, inputs) <= 0.01
    assert relative_difference(pair.model(batch), pair.theirs(**inputs).logits) <= 1e-5


def test_frames_of_other_sizes_are_resized_alike(pair, pictures, tmp_path):
    """To the same size, and up to rounding: transformers resizes videos with torchvision, in two steps."""
    for number, size in enumerate(((50, 70), (40, 12), (12, 18))):
        (tmp_path / str(number)).mkdir()
        media = media_of(pair, ("8@4",), pictures, tmp_path / str(number), size)
        assert gray_levels(pair, ours(pair, media), given(pair, media)) <= 2.01, size


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_text_after_a_long_video_continues_after_its_last_frame(family, pictures, tmp_path):
    """As in Qwen2-VL's paper and published code. transformers 5.23 continues after its largest side instead.

    So only the logits up to the end of the video are equal.
    """
    build(family, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval(), hf_processor(tmp_path / "hf")
    model, processor = VLMWrapper.from_pretrained(tmp_path / "model"), Processor.from_pretrained(tmp_path / "model")
    pair = Pair(family, tmp_path, model.eval(), processor, *loaded)
    media = media_of(pair, ("40@4",), pictures, tmp_path)  # 10 s: 20 frames, 10 pairs
    batch, inputs = ours(pair, media), given(pair, media)
    index, times = batch.visual.index[0], batch.positions[0, 0]
    last = int((index >= 0).nonzero()[-1])
    step = 1 if family == "qwen2_vl" else 2  # positions per pair of frames, which is one second
    start = int(times[index >= 0][0])
    assert times[index >= 0].unique().tolist() == [start + step * number for number in range(10)]
    assert int(times[last + 1]) == start + 9 * step + 1
    found, expected = pair.model(batch)[0], pair.theirs(**inputs).logits[0]
    assert relative_difference(found[: last + 1], expected[: last + 1]) <= 1e-5


@torch.no_grad()
def test_an_export_has_the_settings_and_answers_alike(pair, pictures, tmp_path):
    """Also after training with other ones; an import of the export has them again."""
    processor, model = Processor.from_pretrained(pair.home / "model"), pair.model
    plan = replace(processor.geometry.video, frames=6)
    if pair.family != OV:
        limits = "pixels_total" if pair.family == "qwen3_vl" else "pixels"
        plan = replace(plan, fps=3.0, **{limits: (640 * PATCH, 2000 * PATCH)})
    if pair.family == "qwen2_5_vl":
        plan = replace(plan, positions_per_second=1)
    processor.geometry = replace(processor.geometry, video=plan)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    done = export(tmp_path / "trained", tmp_path / "out")
    assert done.model_class == type(pair.theirs).__name__ and done.largest_relative_difference <= 1e-5
    import_model(tmp_path / "out", tmp_path / "again")
    again = Processor.from_pretrained(tmp_path / "again").geometry.video
    assert again == (replace(plan, frames=32) if pair.family == OV else plan)

    prepare, theirs = hf_processor(tmp_path / "out"), AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    media = media_of(pair, ("large", "8@4"), pictures, tmp_path)
    kinds = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is this?"}]
    text = prepare.apply_chat_template([{"role": "user", "content": kinds}], add_generation_prompt=True)
    assert FRAME not in text or pair.family != "qwen3_vl"
    told = VideoMetadata(8, 4.0, frames_indices=list(range(8)))
    frames = np.stack([np.asarray(image.load()) for image in media[1].images])
    frames = frames[::4] if pair.family == OV else frames
    inputs = prepare(
        text=[text], images=[[media[0].load()]], videos=[frames], video_metadata=[told], return_tensors="pt"
    )
    batch = ours(pair, media, processor)
    expected, found = model(batch), theirs.eval()(**inputs).logits
    assert inputs["input_ids"].shape == batch.input_ids.shape
    if pair.family == OV or gray_levels(pair, batch, inputs) <= 0.01:
        assert relative_difference(found[..., : expected.shape[-1]], expected) <= 1e-5


def test_other_settings_are_exported_with_a_remark(pair, tmp_path):
    processor = Processor.from_pretrained(pair.home / "model")
    plan = replace(processor.geometry.video, sampling="uniform", joining=Joining())
    processor.geometry = replace(processor.geometry, video=plan)
    pair.model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    done = export(tmp_path / "trained", tmp_path / "out")
    assert done.model_class == type(pair.theirs).__name__
    words = "unlike training" if pair.family == OV else "unlike training, which has video.sampling=uniform"
    assert done.remarks[-1].startswith("videos: ") and words in done.remarks[-1]


def from_model(pair: Pair, *more: str, recipe: str = "llava_1_5", stage: str = "instruct") -> Run:
    """A run that starts from an imported model and shows images as it does."""
    geometry, key = pair.processor.geometry, f"stages.{stage}"
    pixels = [f"{key}.image_pixels={list(geometry.image_pixels)}"] if geometry.fit == "native" else []
    line = [f"recipe={recipe}", "mini=true", f"stage={stage}", f"init_from={pair.home / 'model'}"]
    return compose([*line, f"{key}.image_fit={geometry.fit}", *pixels, *more])


def shown_by(run: Run) -> VideoPlan:
    """How a run shows videos, in the commands that do not train."""
    run, stage = with_init_from(run), run.stage
    tokenizer = build_tokenizer(run)
    parts = build_skeleton(run, run.stages[stage], tokenizer)
    objective = OBJECTIVES[run.stages[stage].objective]
    return build_processor(run, run.stages[stage], parts, objective, tokenizer).geometry.video


def test_a_run_shows_videos_as_the_model_that_it_starts_from(pair, tmp_path):
    run = from_model(pair, "stages.instruct.max_length=500")
    assert shown_by(run) == pair.processor.geometry.video
    adopted, (said,) = adopt_videos(run, [])
    assert said in take_in(run, RunFolder(tmp_path))[1]
    assert said.startswith(f"init_from={pair.home / 'model'} overrides stages.instruct.video.")
    different = "video.pool=none (bilinear is used)" if pair.family == OV else f"sampling=interval ({pair.family[:4]}"
    assert different in said
    assert adopt_videos(adopted, [])[1] == []


def test_keys_of_videos_in_the_command_are_kept(pair):
    plan = pair.processor.geometry.video
    run = from_model(pair, "stages.instruct.max_length=500", "stages.instruct.video.frames=7")
    assert shown_by(run) == replace(plan, frames=7) != plan
    if pair.family == OV:
        alone = [f"stages.instruct.video.{key}" for key in ("pool=none", "stride=1", "newline=none")]
        found = shown_by(from_model(pair, *alone))
        assert found.joining == Joining() and replace(found, joining=plan.joining) == plan


def test_other_settings_of_videos_than_the_models_are_reported(pair):
    if pair.family == OV:
        run = from_model(pair, "stages.video.fresh=[]", recipe="llava_video", stage="video")
        expected = "stages.video.video.newline=row (video)"
    else:
        run = from_model(pair, "stages.instruct.image_fit=pad", "stages.instruct.image_pixels=null")
        expected = f"stages.instruct.video.sampling=interval ({pair.processor.geometry.video.sampling})"
    kept, (said,) = adopt_videos(run, [])
    assert kept.stages == run.stages and "was trained with other settings of videos than " in said and expected in said
    assert adopt_videos(run, [run.stage])[1] == []


def test_a_template_that_treats_images_apart_is_told(tmp_path, caplog):
    """As the published one of LLaVA-OneVision: no newline before an image, and one before every text."""
    apart = (
        ITEMS.replace("'Q: '", "'Q:'").replace("<image>\n", " <image>").replace("item['text']", "'\n' + item['text']")
    )
    build_llava(tmp_path / "hf", OV, "siglip", "qwen2", template=apart)
    import_model(tmp_path / "hf", tmp_path / "model")
    assert r"its processor makes the prompt 'Q: <image>\nWhat is this?" in caplog.text
    caplog.clear()
    build_llava(tmp_path / "plain", OV, "siglip", "qwen2")
    import_model(tmp_path / "plain", tmp_path / "other")
    assert "makes the prompt" not in caplog.text


@pytest.mark.parametrize(
    ("family", "file", "change", "message"),
    [
        ("qwen2_vl", "video_processor", {"min_frames": 8}, r"processor_config\.json: min_frames=8, expected 4"),
        ("qwen3_vl", "video_processor", {"cap_pixels_per_frame": True}, "cap_pixels_per_frame=True, expected False"),
        ("qwen3_vl", "video_processor", {"resample": 2}, "resample=2, expected 3"),
        ("qwen2_vl", "video_processor", {"image_mean": [0.0, 0.0, 0.0]}, "makes other pixels of the probe's video, by"),
        ("qwen2_vl", "video_processor", {"merge_size": 1}, "makes [0-9]+ video tokens of the probe's videos, not"),
        (OV, "video_processor", {"do_sample_frames": True}, "do_sample_frames=true, expected false"),
        (OV, "video_processor", {"size": {"height": 24, "width": 24}}, "images of 1 x 24 x 24 pixels, expected 1 x 32"),
        (OV, "video_processor", {"image_mean": [0.0, 0.0, 0.0]}, "pixels differ from video.fit=squash"),
        (OV, "config", {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio=anyres, expected anyres_max_N"),
    ],
)
def test_what_cannot_be_imported_is_refused(family, file, change, message, tmp_path):
    build(family, tmp_path / "hf")
    path = tmp_path / "hf" / ("config.json" if file == "config" else "processor_config.json")
    told = json.loads(path.read_text())
    (told if file == "config" else told[file]).update(change)
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
