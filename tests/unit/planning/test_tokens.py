"""Visual tokens by the arithmetic of the papers."""

from __future__ import annotations

import json

import pytest

from vlmtrain.cli import main
from vlmtrain.planning import video_tokens, visual_tokens


@pytest.mark.parametrize(
    "size, tiles, thumbnail, connector, tokens",
    [
        (336, 1, False, "linear", 576),
        (672, 1, False, "mlp", 2304),
        (336, 4, True, "mlp", 2880),
        (336, 1, False, "qformer", 32),
        (336, 4, True, "pixel_shuffle", 720),
    ],
)
def test_counts(size, tiles, thumbnail, connector, tokens):
    found = visual_tokens((size, size), 14, connector, tiles=tiles, thumbnail=thumbnail, context=4096)
    assert found.tokens == tokens and found.context_share == tokens / 4096


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="not a multiple of --patch-size 14"):
        visual_tokens((340, 336), 14)
    with pytest.raises(ValueError, match="factor"):
        visual_tokens((350, 350), 14, "pixel_shuffle")
    with pytest.raises(ValueError, match="--image-size 10x4000: one side is more than 200 times the other"):
        visual_tokens((10, 4000), 14, image_pixels=(3136, 12_845_056))


BILINEAR = {"pool": "bilinear", "stride": 2}
PUBLISHED = {
    # seconds, options, connector, frames, tokens
    "LLaVA-OneVision": (20, {**BILINEAR, "sampling": "interval", "newline": "video"}, "mlp", 20, 20 * 196 + 1),
    "LLaVA-OneVision, long": (60, {**BILINEAR, "sampling": "interval", "newline": "video"}, "mlp", 32, 32 * 196 + 1),
    "LLaVA-Video": (60, {**BILINEAR, "sampling": "uniform", "frames": 64, "newline": "row"}, "mlp", 64, 13_440),
    "Molmo2": (
        10,
        {"pool": "window", "stride": 3, "sampling": "seconds", "fps": 2, "frames": 128, "last": True},
        "attentional_pool",
        21,
        21 * 81,
    ),
    "NeXT-Video": (9, {"pool": "features", "stride": 2, "sampling": "uniform"}, "mlp", 32, 32 * 13**2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_videos(name):
    seconds, options, connector, frames, tokens = PUBLISHED[name]
    found = video_tokens(seconds, (378, 378), 14, connector, context=32768, **options)
    assert (found.frames, found.tokens, found.context_share) == (frames, tokens, tokens / 32768)


def test_pairs_of_frames():
    """Qwen2-VL at 2 frames per second: a pair of 392 pixels has 14 x 14 tokens."""
    options = {"sampling": "qwen2_vl", "fps": 2, "frames": 768, "frames_per_item": 2, "image_pixels": (3136, 602_112)}
    found = video_tokens(30, (392, 392), 14, "qwen2_vl_merger", **options)
    assert (found.frames, found.tokens_per_frame, found.tokens) == (60, 98, 30 * 196)


def test_the_command_counts_for_every_rule_and_length(capsys):
    line = ["tokens", "--image-size", "336", "--patch-size", "14", "--connector", "mlp", "avgpool,window=2"]
    main([*line, "--video", "4", "100", "--frames", "8", "--last", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len({(each["connector"], each["sampling"], each["seconds"]) for each in found}) == 2 * 5 * 2
    frames = {each["sampling"]: each["frames"] for each in found if each["seconds"] == 4 and each["connector"] == "mlp"}
    assert frames == {"interval": 5, "uniform": 8, "seconds": 5, "qwen2_vl": 4, "qwen3_vl": 4}
    assert {each["tokens"] / each["frames"] for each in found} == {576, 144}
    main([*line, "--video", "4", "--sampling", "uniform"])
    assert capsys.readouterr().out.split("\n")[1].split() == ["mlp", "uniform", "4", "32", "576", "18,432", "450.0%"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--fps", "2"], "--fps needs --video"),
        (["--video", "0"], "--video=0.0: expected a positive number"),
        (["--video", "4", "--tiles", "4"], "--video: frames are not split into tiles"),
        (["--video", "4", "--stride", "2"], "video.pool=none with video.stride=2"),
        (["--video", "4", "--sampling", "odd"], "video.sampling=odd: expected one of interval"),
        (["--video", "4", "--sampling", "uniform", "--last"], "video.last=true needs video.sampling=interval"),
        (["--video", "4", "--frames-per-item", "0"], "--frames-per-item 0: must be positive"),
        (["--video", "4", "--pool", "window", "--stride", "3"], "video.pool=window needs a connector with windows"),
    ],
)
def test_options_of_videos_that_do_not_fit(more, said, capsys):
    with pytest.raises(SystemExit):
        main(["tokens", "--image-size", "336", "--patch-size", "14", *more])
    assert said in capsys.readouterr().err
