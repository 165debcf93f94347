"""Data with videos: what `vlmtrain check` counts, what the report shows, and that choices see the same frames."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtrain.cli import main
from vlmtrain.data import sources
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Grading, Turn
from vlmtrain.data.rendering import Renderer
from vlmtrain.data.sources import first_look
from vlmtrain.data.video import FrameSequence, VideoFolder
from vlmtrain.evaluation.held_out import HeldOut
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_skeleton, build_tokenizer
from vlmtrain.training.processing import build_processor
from vlmtrain.training.stage_report import shown_samples

from ..conftest import gpt, human
from ..media import draw_frames

TOKENS = 16  # of a frame and of an image: 48 pixels in patches of 12
FRAMES = {"a": 9, "b": 3, "c": 20}  # two per second


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, count in FRAMES.items():
        draw_frames(folder / name, count)
    draw_frames(folder / "odd", 4)
    Image.new("RGB", (30, 20)).save(folder / "odd" / "2.png")
    Image.new("RGB", (48, 48)).save(folder / "one.png")
    return folder


def ask(**media: str) -> dict:
    marks = "".join(f"<{kind}>\n" for kind in media)
    return {**media, "conversations": [human(f"{marks}What color is this?"), gpt("red")]}


def check(home: Path, records: list[dict], *more: str) -> list[str]:
    (home / "data.json").write_text(json.dumps(records))
    files = [f"data.{split}={home / 'data.json'}" for split in ("align", "instruct")]
    line = ["check", "recipe=llava_1_5", "mini=true", "stage=instruct", "data=llava_json", "--workers", "0", *files]
    return [*line, f"data.images={home}", f"data.videos={home}", "stages.instruct.video.frames=4", *more]


def test_check_counts_videos(home, capsys):
    records = [ask(video="a"), ask(video="b"), ask(video="c"), ask(image="one.png"), ask(), ask(video="c"),
               ask(image="one.png", video="b")]  # fmt: skip
    main(check(home, records, "--json"))
    report = json.loads(capsys.readouterr().out)["instruct"]["sources"]["instruct"]
    shown = [4, 2, 4, 4, 2]  # a frame per second: every second one, at most four
    assert report["problems"] == [] and report["duplicates"] == 1
    assert (report["samples"], report["images"], report["videos"], report["text_only"]) == (7, 2, 5, 1)
    assert (report["frames"], report["video_tokens"]) == (sum(shown), sum(shown) * TOKENS)
    assert report["image_tokens"] == 2 * TOKENS
    assert report["video_tokens_each"] == {"shortest": 2 * TOKENS, "median": 4 * TOKENS, "longest": 4 * TOKENS}
    main(check(home, records))
    text = capsys.readouterr().out
    assert "videos    5 (16 frames)\n" in text and "(32 of images, 256 of videos, " in text
    assert "[video: 64 tokens]" in text and "video tokens per sample: shortest 32, median 64, longest 64\n" in text
    main(check(home, records[3:5]))
    assert "video" not in capsys.readouterr().out


def test_check_reports_bad_videos(home, capsys):
    defects = {
        "gone.mp4": "gone.mp4 does not exist",
        "one.png": "one.png cannot be decoded",
        "odd": "2.png is 20x30, but the first one is 48x48",
        "../elsewhere": "leads out of data.videos",
    }
    records = [ask(video="a"), *(ask(video=video) for video in defects)]
    with pytest.raises(SystemExit):
        main(check(home, records, "--json", "stages.instruct.video.frames=32", "stages.instruct.video.fps=2"))
    report = json.loads(capsys.readouterr().out)["instruct"]["sources"]["instruct"]
    assert report["bad_records"] == [1, 2, 3, 4] and report["samples"] == 1
    for problem, said in zip(report["problems"], defects.values(), strict=True):
        assert said in problem and problem.startswith("data.json record")


def test_check_fits_videos_beside_their_texts(home, capsys):
    """A long text leaves room for fewer frames, a longer one for none, and the longest has no room itself."""
    asked = [{**ask(video="c"), "conversations": [human("<video>\n" + "red " * words), gpt("red")]}
             for words in (10, 40, 90, 120)]  # fmt: skip
    with pytest.raises(SystemExit):
        main(check(home, asked, "--json", "stages.instruct.max_length=100"))
    report = json.loads(capsys.readouterr().out)["instruct"]["sources"]["instruct"]
    assert report["bad_records"] == [2, 3] and (report["samples"], report["frames"]) == (2, 4 + 3)
    assert report["video_tokens_each"] == {"shortest": 3 * TOKENS, "median": 3.5 * TOKENS, "longest": 4 * TOKENS}
    assert report["length"]["longest"] - report["length"]["shortest"] == (40 - 10) - TOKENS
    assert 100 - TOKENS < report["length"]["longest"] <= 100
    assert all("with a single frame of each video, it has 1" in each for each in report["problems"])


@pytest.mark.parametrize(
    "setting, said",
    [
        ("video.token_budget=15", "video.token_budget=15 leaves no room for a frame: the video has at least 16 tokens"),
        ("video={newline: frame}", "max_length=17 leaves no room for a frame: the video has at least 17 tokens"),
    ],
)
def test_settings_with_which_no_video_can_be_shown_are_refused(home, setting, said, capsys):
    with pytest.raises(SystemExit):
        main(check(home, [ask(image="one.png")], f"stages.instruct.{setting}", "stages.instruct.max_length=17"))
    assert f"stages.instruct.{said}" in capsys.readouterr().err


def test_videos_are_checked_before_training(home, monkeypatch):
    broken = home / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "0.png").write_bytes(b"words")
    turns = Turn("user", "<video>\nWhat?"), Turn("assistant", "red")
    videos = [VideoFolder(home).read(name, name, "x") for name in ("a", "broken", "gone.mp4")]
    talks = [Conversation(str(number), turns, (video,)) for number, video in enumerate(videos)]
    found = first_look(talks, limit=5).problems
    assert len(found) == 2 and "0.png is not an image" in found[0] and "gone.mp4 does not exist" in found[1]
    monkeypatch.setattr(sources, "VIDEOS_LOOKED_AT", 2)
    assert first_look(talks, limit=5).problems == found[:1]


# the report


@pytest.fixture(scope="module")
def processor() -> Processor:
    run = compose(["recipe=llava_1_5", "mini=true", "stages.instruct.video.fps=2"])
    tokenizer = build_tokenizer(run)
    stage = run.stages["instruct"]
    parts = build_skeleton(run, stage, tokenizer)
    return build_processor(run, stage, parts, OBJECTIVES[stage.objective], tokenizer)


def about(video: FrameSequence, answer: Turn) -> Conversation:
    return Conversation("x", (Turn("user", "<video>\nWhat color is this?"), answer), (video,))


def frames_of(home: Path, name: str) -> FrameSequence:
    return VideoFolder(home).read(name, name, "x")


@pytest.mark.parametrize("name, shown", [("a", (0, 1, 2, 3, 4, 5, 6, 7)), ("b", (0, 1, 2))])
def test_the_report_shows_up_to_eight_frames_that_the_model_saw(home, processor, name, shown):
    """Of nine frames that the model saw, eight: numbers 0, 1, ... 7; four of them in a row."""
    talk = about(frames_of(home, name), Turn("assistant", "red"))
    (sample,) = shown_samples([talk], processor, [{"conversation": 0, "question": "What?"}])
    assert sample["question"] == "What?"
    (uri,) = sample["pictures"]
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(float)
    rows, columns = -(-len(shown) // 4), min(4, len(shown))
    assert strip.shape == (rows * 120, columns * 120, 3)
    for place, number in enumerate(shown):
        top, left = place // 4 * 120, place % 4 * 120
        frame = Image.open(home / name / f"{number}.png").resize((120, 120), Image.Resampling.LANCZOS)
        difference = np.abs(strip[top : top + 120, left : left + 120] - np.asarray(frame)).mean()
        assert difference < 8, number
        other = Image.open(home / name / f"{(number + 1) % FRAMES[name]}.png").resize((120, 120))
        assert np.abs(np.asarray(frame).astype(float) - np.asarray(other)).mean() > 8  # frames differ by more


def test_a_video_that_fits_is_rendered_once(home, processor, monkeypatch):
    rendered, render = [], Renderer._render
    monkeypatch.setattr(Renderer, "_render", lambda self, *given: rendered.append(given) or render(self, *given))
    talk = about(frames_of(home, "a"), Turn("assistant", "red"))
    assert len(processor.render(talk).media.items) == FRAMES["a"] and len(rendered) == 1


# evaluation


def test_choices_and_prompts_see_the_frames_of_their_conversation(home, processor):
    """A long choice leaves room for fewer frames, of which the conversation then has no more either."""
    graded = Turn("assistant", "red", Grading(choices=("red", "blue " * 30)))
    talk = about(frames_of(home, "c"), graded)
    narrow = Processor(processor.tokenizer, processor.geometry, "chat", 200)
    alone = narrow.render(replace(talk, turns=(talk.turns[0], Turn("assistant", "red"))))
    held = next(iter(HeldOut([talk], narrow, [[0]], 4, True)))
    assert held.problems == []
    (row,) = held.choices
    items = held.batch.visual.items
    assert len(items) < len(alone.media.items)
    assert row.items == [*range(len(items))] * 2
    assert row.batch.visual.items[: len(items)] == items
    assert row.batch.lengths.max() <= 200 < row.batch.lengths.max() + TOKENS
    (prompt,) = held.prompts
    assert prompt.items == [*range(len(items))]
