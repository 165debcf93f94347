"""Several encoders in one model: equal to each alone, joined by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.media import draw_frames
from tests.stages import make_stage
from vlmtrain.connectors.base import PackedFeatures, VisionFeatures
from vlmtrain.data.images import ImageInMemory, ImageOnDisk
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.video import FrameSequence
from vlmtrain.model import VLMWrapper
from vlmtrain.model.llm import build_random_llm
from vlmtrain.model.parts import make_connector
from vlmtrain.model.vision import build_vision
from vlmtrain.objectives.language_modelling import LanguageModelling
from vlmtrain.training.processing import build_geometry
from vlmtrain.training.trainable import freeze, trained_groups

LLM = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def keys(width: int, side: int, layers: int = 2, **more) -> dict:
    tower = {"image_size": side, "patch_size": 8, "width": width, "layers": layers, "head_width": 8}
    return {
        "provider": "open_clip",
        "model_config": {"embed_dim": 8, "vision_cfg": tower, "text_cfg": {"width": 8, "heads": 1, "layers": 1}},
        "layer": -1,
        **more,
    }


TOWERS = {"wide": keys(24, 32), "fine": keys(16, 48, layers=3, layer=-2)}
CHANNELS = {"join": "channels", "grid": "fine"}


def build(encoders: dict | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_vision("several", encoders=encoders or TOWERS, **options).eval()


def shown(vision: nn.Module, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [encoder.image_size for encoder in vision.encoders.values()]
    return [torch.randn(count, 3, *size, generator=generator, requires_grad=True) for size in sizes]


def resized(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of ``(B, h, w, C)`` with centers of cells at half integers, cell by cell."""
    _, height, width, _ = patches.shape
    rows = []
    for y in range(grid[0]):
        row = []
        for x in range(grid[1]):
            down = min(max((y + 0.5) * height / grid[0] - 0.5, 0), height - 1)
            along = min(max((x + 0.5) * width / grid[1] - 0.5, 0), width - 1)
            (top, left), (a, b) = (int(down), int(along)), (down - int(down), along - int(along))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = (1 - b) * patches[:, top, left] + b * patches[:, top, right]
            lower = (1 - b) * patches[:, bottom, left] + b * patches[:, bottom, right]
            row.append((1 - a) * upper + a * lower)
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def test_channels_are_each_encoder_alone_on_one_grid():
    vision = build(**CHANNELS)
    images = shown(vision)
    found = vision.encode_all(images)
    assert found.prefix is None and vision.width == 40 and vision.grid == (6, 6)
    alone = [encoder(own).patches for encoder, own in zip(vision.encoders.values(), images)]
    expected = torch.cat([resized(alone[0], (6, 6)), alone[1]], -1)
    torch.testing.assert_close(found.patches, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(found.patches.shape)
    for own, other in zip(
        torch.autograd.grad((found.patches * weights).sum(), images),
        torch.autograd.grad((expected * weights).sum(), images),
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_encoders_is_that_of_the_features():
    vision = build(**CHANNELS)
    swapped = build(dict(reversed(TOWERS.items())), **CHANNELS)
    for name, encoder in swapped.encoders.items():
        encoder.load_state_dict(vision.encoders[name].state_dict())
    images = shown(vision)
    wide, fine = vision.encode_all(images).patches.split([24, 16], -1)
    assert torch.equal(swapped.encode_all(images[::-1]).patches, torch.cat([fine, wide], -1))


def test_a_connector_for_each_makes_its_tokens_in_turn():
    vision, llm = build(join="tokens"), nn.Module()
    llm.get_input_embeddings = lambda: nn.Embedding(1, 12)
    connector = make_connector("mlp", vision, llm, {})
    images = shown(vision)
    found = connector(vision.encode_all(images))
    alone = [own(encoder(given)) for own, encoder, given in zip(connector.connectors, vision.encoders.values(), images)]
    assert torch.equal(found, torch.cat(alone, 1)) and connector.num_tokens(*vision.grid) == found.shape[1] == 16 + 36


def test_separate_features_reach_a_connector_of_several():
    vision, llm = build(join="separate"), nn.Module()
    llm.get_input_embeddings = lambda: nn.Embedding(1, 12)
    small = {"hidden_dim": 16, "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16}
    connector = make_connector("meq_former", vision, llm, small).eval()
    images = shown(vision)
    alone = tuple(encoder(given) for encoder, given in zip(vision.encoders.values(), images))
    assert connector.in_dim == (24, 16)
    assert torch.equal(connector(vision.encode_all(images)), connector(alone))


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, r"vision.join=channels needs one grid, but the grids are 4x4 \(wide\), 6x6 \(fine\): set vision.grid"),
        ({"grid": "other"}, r"vision.grid=other: expected \[HEIGHT, WIDTH\] or one of wide, fine"),
        ({"join": "tokens", "grid": "other"}, r"vision.grid=other: expected \[HEIGHT, WIDTH\] or one of wide, fine"),
        ({"join": "rows"}, "vision.join=rows: expected one of channels, tokens, separate"),
        ({"encoders": {"wide": TOWERS["wide"]}}, "expected at least two encoders"),
        ({"encoders": {"a": keys(24, 32), "blocks": keys(24, 32)}}, "vision.encoders.blocks: .* cannot have this name"),
        *(
            ({"encoders": {"a": keys(24, 32), name: keys(24, 32)}}, f"vision.encoders.{name}: .* cannot have this name")
            for name in (1, "a b", "class", "grid", "width", "levels", "forward", "training")
        ),
        ({"encoders": {"a": keys(24, 32), "b": keys(24, 32, layer=7)}}, "vision.encoders.b.layer=7 is out of"),
        (
            {"encoders": {"a": keys(24, 32, image_fit="pad"), "b": keys(24, 32, image_fit="crop")}},
            r"image_fit differs \(a: pad, b: crop; null is the stage's\)",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        build(**{"encoders": TOWERS, **options})


def test_a_model_folder_keeps_the_encoders_and_their_order(tmp_path):
    encoders = {**TOWERS, "fine": {**TOWERS["fine"], "image_mean": (0.1, 0.2, 0.3)}}
    vision = build(dict(reversed(encoders.items())), **CHANNELS)
    VLMWrapper(vision, None, None).save_pretrained(tmp_path)
    loaded = VLMWrapper.from_pretrained(tmp_path).vision
    images = shown(vision)
    assert list(loaded.encoders) == ["fine", "wide"] and loaded.encoders["fine"].image_mean == (0.1, 0.2, 0.3)
    assert torch.equal(loaded.encode_all(images).patches, vision.encode_all(images).patches)


class Counted(ImageInMemory):
    """An image that counts how often it is decoded."""

    decoded = 0

    def load(self):
        Counted.decoded += 1
        return super().load()


def image(width: int, height: int, seed: int = 0) -> Counted:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file := BytesIO(), "PNG")
    return Counted(file.getvalue(), "x")


def talk(*images: Counted) -> Conversation:
    return Conversation("x", (Turn("user", "<image>\n" * len(images) + "What?"), Turn("assistant", "red")), images)


def processor_of(vision: nn.Module, tokenizer, llm: nn.Module, **stage) -> tuple[Processor, nn.Module]:
    settings = make_stage(parts=("vision", "connector", "llm"), **stage)
    connector = make_connector("mlp", vision, llm, {}, newline=settings.newline)
    geometry = build_geometry(settings, {"vision": vision, "connector": connector}, LanguageModelling())
    return Processor(tokenizer, geometry, "chat", max_length=400), connector


@pytest.mark.parametrize(
    "stage",
    [
        {"image_fit": "pad"},
        {"image_fit": "tiles", "image_tiles": ((1, 2), (2, 1)), "image_tile_style": "internvl"},
    ],
)
def test_every_encoder_is_shown_what_it_is_shown_alone(tokenizer, stage):
    llm = build_random_llm(LLM, tokenizer)
    encoders = {"wide": keys(24, 32, image_mean=(0.9, 0.1, 0.1)), "fine": TOWERS["fine"]}
    vision = build(encoders, **CHANNELS)
    processor, _ = processor_of(vision, tokenizer, llm, **stage)
    Counted.decoded = 0
    sample = processor(talk(image(50, 30)))
    assert Counted.decoded == 1
    for number, encoder in enumerate(vision.encoders.values()):
        alone = replace(
            processor.geometry, size=encoder.image_size, mean=encoder.image_mean, std=encoder.image_std, others=()
        )
        one = Processor(tokenizer, alone, "chat", max_length=400)
        for own, other in zip(sample.pixels[number], one(talk(image(50, 30))).pixels[0], strict=True):
            assert torch.equal(own, other)


@pytest.mark.parametrize("own, expected", [(("crop", None), ("crop", "pad")), ((None, "crop"), ("pad", "crop"))])
def test_an_encoder_without_an_image_fit_has_that_of_the_stage(tokenizer, own, expected):
    encoders = {name: {**TOWERS[name], "image_fit": fit} for name, fit in zip(TOWERS, own)}
    processor, _ = processor_of(build(encoders, join="tokens"), tokenizer, build_random_llm(LLM, tokenizer))
    (item,) = processor.plan(talk(image(50, 30))).items
    assert item.fits == expected


def read_by_each(vision: nn.Module, frames: list[ImageOnDisk]) -> list[Tensor]:
    """The patches of each encoder alone, of images that are resized to its size and normalized as its own."""
    found = []
    for encoder in vision.encoders.values():
        mean, std = torch.tensor(encoder.image_mean), torch.tensor(encoder.image_std)
        size = encoder.image_size[::-1]
        resized = [torch.from_numpy(np.array(frame.load().resize(size, Image.Resampling.BICUBIC))) for frame in frames]
        pixels = (torch.stack(resized) / 255 - mean) / std
        found.append(encoder(pixels.permute(0, 3, 1, 2).contiguous()).patches)
    return found


LOOKS = {"wide": keys(24, 32, image_mean=(0.9, 0.1, 0.1)), "fine": keys(16, 48, layers=3, image_std=(0.2, 0.5, 0.4))}


@pytest.mark.parametrize("pool", ["none", "average", "features"])
@pytest.mark.parametrize("chunk", [None, 2])
@torch.no_grad()
def test_the_channels_of_a_video_are_those_of_each_encoder_alone(tokenizer, tmp_path, pool, chunk):
    llm, vision = build_random_llm(LLM, tokenizer), build(LOOKS, **CHANNELS)
    options = {"pool": pool, "stride": 1 if pool == "none" else 2}
    tokens, frames, connector = tokens_of_video(vision, tokenizer, llm, draw_frames(tmp_path / "v", 5), chunk, options)
    wide, fine = read_by_each(vision, frames)
    patches = torch.cat([resized(wide, (6, 6)), fine], -1)

    def means(canvas: Tensor) -> Tensor:
        return canvas.unflatten(2, (3, 2)).unflatten(1, (3, 2)).mean((2, 4))

    if pool == "features":
        patches = means(patches)
    expected = connector.connector if pool != "none" else connector
    expected = expected(VisionFeatures(patches, None, ()))
    if pool == "average":
        expected = means(expected.unflatten(1, (6, 6))).flatten(1, 2)
    torch.testing.assert_close(tokens, expected.flatten(0, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_tokens_of_a_video_are_those_of_each_encoder_frame_by_frame(tokenizer, tmp_path):
    llm, vision = build_random_llm(LLM, tokenizer), build(LOOKS, join="tokens")
    folder, options = draw_frames(tmp_path / "v", 5), {"newline": "frame"}
    tokens, frames, joined = tokens_of_video(vision, tokenizer, llm, folder, None, options)
    wide, fine = (
        own(VisionFeatures(patches, None, ()))
        for own, patches in zip(joined.connector.connectors, read_by_each(vision, frames), strict=True)
    )
    expected = [torch.cat([wide[number], fine[number], joined.newline[None]]) for number in range(3)]
    torch.testing.assert_close(tokens, torch.cat(expected), rtol=1e-4, atol=1e-5)


def tokens_of_video(vision, tokenizer, llm, folder: Path, chunk: int | None, options: dict):
    """The visual tokens of a video of five frames, those of them that are shown, and the connector."""
    frames = [ImageOnDisk(folder / f"{number}.png") for number in range(5)]
    video = {**asdict(make_stage().video), "sampling": "uniform", "fps": None, "frames": 3, **options}
    processor, connector = processor_of(vision, tokenizer, llm, image_fit="squash", video=video)
    processor.encoder_batch_size = chunk
    for encoder in vision.encoders.values():
        encoder.batch_size = chunk
    turns = Turn("user", "<video>\nWhat?"), Turn("assistant", "red")
    sample = processor(Conversation("x", turns, (FrameSequence(tuple(frames), 2.0),)))
    batch = processor.collate([sample]).to(torch.device("cpu"))
    model = VLMWrapper(vision, connector, llm).eval()
    found = model.connect(model.encode(batch.visual), batch.visual).tokens
    assert int(batch.visual.mask.sum()) == len(found)
    return found, [frames[number] for number in (0, 2, 4)], connector


def test_native_images_have_one_grid_in_all_encoders(tokenizer):
    llm = build_random_llm(LLM, tokenizer)
    fine = keys(16, 48)
    fine["model_config"]["vision_cfg"]["patch_size"] = 12
    vision = build({"wide": keys(24, 32), "fine": fine})
    processor, connector = processor_of(vision, tokenizer, llm, image_fit="native", image_pixels=(256, 4096))
    model = VLMWrapper(vision, connector, llm).eval()
    talks = [talk(image(40, 16, 1)), talk(image(24, 24, 2), image(16, 48, 3))]
    batch = processor.collate([processor(each) for each in talks]).to(torch.device("cpu"))
    features = model.encode(batch.visual)
    assert isinstance(features, PackedFeatures) and features.grids == ((2, 5), (3, 3), (6, 2))
    assert [tuple(pixels.shape[1:]) for pixels in batch.visual.pixels[1]] == [(24, 60), (36, 36), (72, 24)]
    together = model(batch)
    for row, each in enumerate(talks):  # as each conversation alone
        alone = processor.collate([processor(each)]).to(torch.device("cpu"))
        length = int(alone.lengths[0])
        torch.testing.assert_close(together[row, :length], model(alone)[0, :length], rtol=1e-4, atol=1e-5)


def test_native_images_are_refused_where_grids_cannot_follow(tokenizer):
    llm = build_random_llm(LLM, tokenizer)
    for options in ({"grid": "wide"}, {"join": "tokens"}):
        with pytest.raises(ValueError, match="gives every image a grid of its own"):
            vision = build({"wide": keys(24, 32), "fine": keys(16, 32)}, **options)
            processor_of(vision, tokenizer, llm, image_fit="native", image_pixels=(256, 4096))


def test_encoders_train_by_their_own_patterns():
    vision = build(**CHANNELS)
    groups = trained_groups(
        make_stage(
            parts=("vision",),
            train={},
            groups=({"match": "vision.fine.blocks[1:]", "lr": 1e-4, "layer_decay": 0.5},),
        ),
        {"vision": vision},
    )
    names = {name for group in groups for name in group.names}
    assert names and all(name.startswith("fine.visual.transformer.resblocks.") for name in names)
    assert {int(name.split(".")[4]) for name in names} == {1, 2} and {g.scale for g in groups} == {0.5, 0.25}
    freeze({"vision": vision}, groups, checkpointing=False)
    assert vision.encoders["fine"].training and not vision.encoders["wide"].training
    for match in ("vision.blocks[1:]", "vision.other.blocks[1:]", "vision"):
        decay = {"layer_decay": 0.5} if match == "vision" else {}
        with pytest.raises(ValueError, match=r"name one of the encoders \(wide, fine\)"):
            entry = {"match": match, "lr": 1e-4, **decay}
            trained_groups(make_stage(parts=("vision",), train={}, groups=(entry,)), {"vision": vision})


def test_an_encoder_starts_from_the_weights_in_a_model_folder(tmp_path):
    torch.manual_seed(3)
    trained = build_vision(**TOWERS["wide"])
    VLMWrapper(trained, None, None).save_pretrained(tmp_path)
    file = tmp_path / "vision" / "model.safetensors"
    vision = build({"wide": {**TOWERS["wide"], "pretrained": str(file)}, "fine": TOWERS["fine"]}, **CHANNELS)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, vision.encoders["wide"].state_dict()[name])
    with pytest.raises(ValueError, match=r"vision.encoders.fine: .*model.safetensors"):
        build({"wide": TOWERS["wide"], "fine": {**TOWERS["fine"], "pretrained": str(file)}}, **CHANNELS)
    with pytest.raises(ValueError, match=r"vision.pretrained=openai: with vision.model_config, expected a file"):
        build_vision(**TOWERS["wide"], pretrained="openai")
