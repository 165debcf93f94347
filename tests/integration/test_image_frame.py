"""Tokens around images and after their rows: where they stand, what trains, and who hands them on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from io import BytesIO

import pytest
from PIL import Image

from tests.conftest import gpt, human, train
from vlmtrain import build_model
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageInMemory
from vlmtrain.interop.export import export
from vlmtrain.interop.probes import noise
from vlmtrain.objectives import OBJECTIVES
from vlmtrain.settings import compose
from vlmtrain.training.assembly import build_skeleton, build_tokenizer
from vlmtrain.training.init_from import overruled_controls
from vlmtrain.training.processing import build_processor, image_controls

WORDS = ["[start]", "[end]"]


@pytest.fixture(scope="module")
def framed():
    return build_model("tiny", "mlp", {"tiny": {"new_tokens": WORDS, "image_frame": WORDS}})


def png() -> bytes:
    encoded = BytesIO()
    Image.new("RGB", (48, 48)).save(encoded, "PNG")
    return encoded.getvalue()


def conversation(*turns: str) -> Conversation:
    said = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(turns))
    marks = "".join(turns[::2]).count("<image>")
    return Conversation("one", said, (ImageInMemory(png(), "one"),) * marks)


def test_each_image_stands_between_the_tokens(framed):
    _, processor = framed
    start, end = processor.tokenizer.convert_tokens_to_ids(WORDS)
    tokens = processor.render(conversation("<image>\n<image>\nwhat color?", "red"))
    ids, index = tokens.input_ids.tolist(), tokens.index.tolist()
    for number in (0, 1):
        first, count = index.index(number), index.count(number)
        assert count == 16 and ids[first - 1] == start and ids[first + count] == end
    assert ids.count(start) == ids.count(end) == 2
    assert not {start, end} & set(tokens.targets.tolist())


def rendered(said: str, shared: bool = True) -> str:
    _, processor = shared_frame(shared)
    tokens = processor.render(conversation(said, "red"))
    return processor.tokenizer.decode(tokens.input_ids[: tokens.answers[0][0]]).partition("<|user|>")[2]


@cache
def shared_frame(shared: bool):
    llm = {"tiny": {"new_tokens": ["[fake]"], "image_frame": ["[fake]"] * 2, "image_frame_shared": shared}}
    return build_model("tiny", "linear", llm, fusion={"gated_cross_attention": {"every": 2}})


def test_images_side_by_side_share_the_token_between_them():
    shown, alone = "[fake]<image>[fake]", "<image>[fake]"
    for said, expected in (
        ("<image><image><image>what?", f"{shown}{alone}{alone}what?"),
        ("<image> <image> what", f"{shown}{alone}what"),
        ("see <image> and <image>", f"see{shown}and{shown}"),
        ("<image>\n<image>\nwhat", f"{shown}\n{shown}\nwhat"),
    ):
        assert rendered(said).strip("\n").startswith(expected), said
    assert rendered("<image> <image> what", shared=False).strip("\n").startswith(f"{shown} {shown} what")


def test_lengths_and_packing_count_the_shared_tokens():
    _, processor = shared_frame(True)
    talks = [conversation(said, "red") for said in ("<image><image>what?", "see <image> <image> red", "what?")]
    plans = [processor.plan(talk) for talk in talks]
    expected = [len(processor.render(talk)) for talk in talks]
    assert processor.renderer.lengths(talks, plans) == expected


@pytest.mark.parametrize(
    ("llm", "inputs", "message"),
    [
        ({"image_frame": WORDS}, {}, "needs the same token twice in llm.image_frame"),
        ({}, {}, "needs the same token twice in llm.image_frame"),
        (
            {"image_frame": WORDS[:1] * 2},
            {"image_fit": "tiles", "image_tiles": [[1, 2]]},
            "does not go with image_fit=tiles",
        ),
    ],
)
def test_shared_tokens_that_are_refused(llm, inputs, message):
    with pytest.raises(ValueError, match=r"llm\.image_frame_shared " + message):
        build_model("tiny", "mlp", {"tiny": {"new_tokens": WORDS, "image_frame_shared": True, **llm}}, **inputs)


def test_the_tokens_are_text_in_a_turn(framed):
    _, processor = framed
    start, end = processor.tokenizer.convert_tokens_to_ids(WORDS)
    tokens = processor.render(conversation("what is [start] red [end]", "red [end]"))
    assert not {start, end} & {*tokens.input_ids.tolist(), *tokens.targets.tolist()}


def test_a_run_from_a_model_keeps_its_frame(framed, tmp_path):
    model, processor = framed
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (48, 48)).save(tmp_path / "0.png")
    records = [{"image": "0.png", "conversations": [human("<image>\nwhat color?"), gpt("red")]}] * 2
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = ["data=llava_json", f"data.images={tmp_path}", f"data.instruct={tmp_path / 'data.json'}"]
    line = ["recipe=llava_1_5", "mini=true", "stage=instruct", *data, "data.validation=null", "batch_size=2"]
    line = [*line[:-1], "stages.instruct.max_steps=1", f"init_from={tmp_path / 'model'}"]
    train(*line, "run_dir=run", cwd=tmp_path)
    again = Processor.from_pretrained(tmp_path / "run" / "instruct" / "model")
    assert again.geometry.frame == tuple(WORDS)
    talk = conversation("<image>\nwhat color?", "red")
    assert again.render(talk).input_ids.equal(processor.render(talk).input_ids)

    assert not overruled_controls(compose(line))
    (warning,) = overruled_controls(compose([*line, f"llm.image_frame={WORDS[::-1]}"]))
    assert image_controls(compose(line)) == (tuple(WORDS), "", False)
    assert image_controls(compose([*line, "llm.image_frame=['','']"])) == (("", ""), "", False)
    assert "replaces the tokens of init_from" in warning and "to keep ['[start]', '[end]']" in warning


def test_a_frame_that_is_not_a_token_is_refused():
    with pytest.raises(ValueError, match=r"llm\.image_frame: '\[start\]' is not a token of the tokenizer: list it in"):
        build_model("tiny", "mlp", {"tiny": {"image_frame": WORDS}})
    with pytest.raises(ValueError, match=r"llm\.image_frame.*expected a list of two tokens"):
        build_model("tiny", "mlp", {"tiny": {"image_frame": ["[start]"]}})


def test_tokens_around_frames_are_ordinary_text_in_a_turn():
    """They must be tokens of the tokenizer, and the text of a turn cannot make them."""
    line = ["recipe=llava_1_5", "mini=true", "stages.instruct.video.frame_tokens=['[start]','[end]']"]
    with pytest.raises(ValueError, match=r"stages\.instruct\.video\.frame_tokens: '\[start\]' is not a token"):
        stage_processor(line)
    processor = stage_processor([*line, "llm.new_tokens=['[start]','[end]']"])
    tokens = processor.render(conversation("what [start] color?", "red")).input_ids.tolist()
    assert processor.tokenizer.convert_tokens_to_ids("[start]") not in tokens


def test_positions_in_time_need_rows_of_them():
    line = ["recipe=llava_1_5", "mini=true", "stages.instruct.video.positions_per_second=2"]
    with pytest.raises(ValueError, match=r"positions_per_second=2 needs llm\.positions=mrope or interleaved_mrope"):
        stage_processor(line)
    assert stage_processor([*line, "llm.positions=mrope"]).geometry.video.positions_per_second == 2


def stage_processor(line: list[str]) -> Processor:
    run = compose(line)
    stage, tokenizer = run.stages["instruct"], build_tokenizer(run)
    return build_processor(run, stage, build_skeleton(run, stage, tokenizer), OBJECTIVES[stage.objective], tokenizer)


LINE = {"tiny": {"new_tokens": ["|NEWLINE|"], "image_newline": "|NEWLINE|"}}


@pytest.fixture(scope="module")
def lined():
    return build_model("tiny", "avgpool", LINE, image_fit="native", image_pixels=[576, 9216])


def test_each_row_ends_with_a_newline(lined):
    """The same tokens as without newlines, which are inserted and not trained."""
    _, processor = lined
    newline = processor.tokenizer.convert_tokens_to_ids("|NEWLINE|")
    sizes = ((48, 96), (96, 48))
    encoded = tuple(noise(size, seed) for seed, size in enumerate(sizes))
    turns = Turn("user", "<image>\n<image>\nwhat color? |NEWLINE|"), Turn("assistant", "red")
    talk = Conversation("one", turns, encoded)
    tokens = processor.render(talk)
    ids, index = tokens.input_ids.tolist(), tokens.index.tolist()
    rows = [placement.newlines for placement in tokens.media.placements]
    assert [(row, index.count(number) // row) for number, row in enumerate(rows)] == [(2, 4), (4, 2)]
    for number, row in enumerate(rows):
        first, columns = index.index(number), index.count(number) // row
        block = index[first : first + row * (columns + 1)]
        assert block == ([number] * columns + [-1]) * row
        assert ids[first + columns : first + row * (columns + 1) : columns + 1] == [newline] * row
    assert ids.count(newline) == sum(rows)  # the one in the question is text
    assert newline not in tokens.targets.tolist()
    shorter = replace(talk, turns=(Turn("user", "<image>\n<image>\nwhat color?"), turns[1]))
    (length,) = processor.lengths([shorter])
    tokens = processor.render(shorter)
    assert length == tokens.length and length.image_tokens == 16

    geometry = replace(processor.geometry, newline="")
    other = Processor(processor.tokenizer, geometry, processor.renderer.template, processor.max_length)
    plain, kept = other.render(shorter), tokens.input_ids != newline
    assert tokens.input_ids[kept].equal(plain.input_ids) and tokens.targets[kept].equal(plain.targets)


def test_a_newline_reads_the_embedding_of_its_token(lined):
    model, processor = lined
    sample = processor.prompt(Conversation("one", (Turn("user", "<image>\nwhat?"),), (noise((48, 48)),)))
    batch = processor.collate([sample])
    embedded = model.embed(batch.input_ids, batch.visual).embeddings[0]
    newline = processor.tokenizer.convert_tokens_to_ids("|NEWLINE|")
    rows = embedded[batch.input_ids[0] == newline]
    assert len(rows) == 2 and (rows == model.llm.get_input_embeddings().weight[newline]).all()


@pytest.mark.parametrize(
    ("connector", "llm", "inputs", "message"),
    [
        ("mlp", {**LINE["tiny"], "new_tokens": []}, {}, r"'\|NEWLINE\|' is not a token of the tokenizer: list it in"),
        ("mlp", LINE["tiny"], {"image_fit": "tiles"}, "does not go with image_fit=tiles"),
        ("perceiver_resampler", LINE["tiny"], {}, "needs a connector whose tokens form a grid"),
        ("mlp", {**LINE["tiny"], "positions": "mrope"}, {}, r"does not go with llm\.positions=mrope"),
    ],
)
def test_newlines_that_are_refused(connector, llm, inputs, message):
    with pytest.raises(ValueError, match=r"llm\.image_newline.*" + message):
        build_model("tiny", connector, {"tiny": llm}, **inputs)


def test_newlines_need_tokens_in_the_text():
    llm = {"tiny": {"new_tokens": ["|NEWLINE|", "<image>"], "image_newline": "|NEWLINE|"}}
    with pytest.raises(ValueError, match=r"llm\.image_newline=.* needs fusion=concatenation"):
        build_model("tiny", "perceiver_resampler", llm, fusion="gated_cross_attention")


def test_a_run_from_a_model_keeps_its_newlines(lined, tmp_path):
    _, processor = lined
    lined[0].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert Processor.from_pretrained(tmp_path).geometry == processor.geometry
    line = ["recipe=llava_1_5", "mini=true", f"init_from={tmp_path}"]
    assert image_controls(compose(line)) == (("", ""), "|NEWLINE|", False)
    assert image_controls(compose([*line, "llm.image_newline=''"])) == (("", ""), "", False)
    (warning,) = overruled_controls(compose([*line, "llm.image_newline=red"]))
    assert "replaces the tokens of init_from" in warning and "to keep |NEWLINE|" in warning


def test_an_export_writes_the_newlines(lined, tmp_path):
    model, processor = lined
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and "only Fuyu's class" in done.remarks[0]
