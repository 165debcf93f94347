"""Tokens around images: where they stand, what trains, and who hands them on."""

from __future__ import annotations

import json
from io import BytesIO

import pytest
from PIL import Image

from tests.conftest import gpt, human, train
from vlmtrain import build_model
from vlmtrain.data import Conversation, Processor, Turn
from vlmtrain.data.images import ImageInMemory
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
    assert image_controls(compose(line)) == (tuple(WORDS), "")
    assert image_controls(compose([*line, "llm.image_frame=['','']"])) == (("", ""), "")
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
