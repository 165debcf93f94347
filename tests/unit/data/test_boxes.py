"""Boxes and points: painted into images, and found where the text says, whatever happens to the image."""

from __future__ import annotations

import copy
import io
import json
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from vlmtrain.data.boxes import BOX_FORMATS, Writing, read_answer, text_of
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.images import ImageFolder
from vlmtrain.data.processor import Processor, Sample
from vlmtrain.data.record_reader import RecordReader
from vlmtrain.data.records import BadSample, Conversation, Turn
from vlmtrain.data.regions import Region
from vlmtrain.visual import WHOLE

from . import chat_formats

WIDTH, HEIGHT = 180, 120
BOX = (63, 18, 117, 81)
SIDE = 96
LOOK = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
TILES = ((1, 2), (2, 1), (2, 2))
NATIVE = {"patch_size": (14, 14), "image_pixels": (784, 20_000), "multiple": 2}
GEOMETRIES = {
    "squash": Geometry((SIDE, SIDE), "squash", **LOOK, tokens=4),
    "pad": Geometry((SIDE, SIDE), "pad", **LOOK, tokens=4),
    "pad, tall": Geometry((SIDE, 64), "pad", **LOOK, tokens=4),
    "crop": Geometry((SIDE, SIDE), "crop", **LOOK, tokens=4),
    "tiles": Geometry((SIDE, SIDE), "tiles", **LOOK, tokens=4, grid=(2, 2), tile_grids=TILES),
    "tiles, internvl": Geometry(
        (SIDE, SIDE), "tiles", **LOOK, tokens=4, grid=(2, 2), tile_grids=((1, 1), *TILES), tile_style="internvl"
    ),
    "tiles, alone": Geometry((SIDE, SIDE), "tiles", **LOOK, tokens=4, tile_grids=TILES, tiles_alone=True),
    "native": Geometry(
        (SIDE, SIDE), "native", **LOOK, tokens=0, connector={"name": "mlp", "in_dim": 8, "out_dim": 8}, **NATIVE
    ),
}
STORED = {  # how an image must be stored for its EXIF orientation to make it upright
    **{1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_270,
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def cells(text: str) -> tuple[float, ...]:
    from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

    return patch_index_to_coordinate(*map(int, re.findall(r"patch_index_(\d+)", text)), 32)


def numbers(units: float, order: tuple[int, ...] = (0, 1, 2, 3)):
    def parse(text: str) -> tuple[float, ...]:
        found = [float(number) / units for number in NUMBER.findall(text.replace("_2d", ""))]
        return tuple(found[i] for i in order if i < len(found))

    return parse


# how the text of each format is read, as fractions of the frame (of pixels, in pixels), and the size of its steps
PARSERS = {
    "qwen_vl": (numbers(1000), 1 / 1000),
    "qwen2_vl": (numbers(1000), 1 / 1000),
    "qwen2_5_vl": (numbers(1), 0),
    "qwen3_vl": (numbers(1000), 1 / 1000),
    "internvl": (numbers(1000), 1 / 1000),
    "llava": (numbers(1), 1 / 100),
    "kosmos2": (cells, 1 / 32),
    "paligemma": (numbers(1023, (1, 0, 3, 2)), 1 / 1023),
    "molmo": (numbers(100), 1 / 1000),
    "molmo2": (lambda text: tuple(float(number) / 1000 for number in NUMBER.findall(text)[2:]), 1 / 1000),
}


def chat(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def painted(box: tuple[int, ...] = BOX, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    image = Image.new("RGB", size, (200, 200, 200))
    image.paste((0, 0, 0), box)
    return image


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> RecordReader:
    """A folder of the same painted image in every orientation, as ORIENTATION.png."""
    folder = tmp_path_factory.mktemp("painted")
    for orientation, transposition in STORED.items():
        image = painted()
        stored = image if transposition is None else image.transpose(transposition)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        stored.save(folder / f"{orientation}.png", exif=exif)
        with Image.open(folder / f"{orientation}.png") as again:
            assert np.array_equal(ImageOps.exif_transpose(again), image)
    return RecordReader(ImageFolder(folder))


def record(orientation: int = 1, answer: str = "<box>", **more) -> dict:
    return {
        "image": f"{orientation}.png",
        "conversations": chat("<image>\nWhere is it?", answer),
        **({"boxes": [list(BOX)]} if "box" in answer else {}),
        **more,
    }


def answer_of(processor: Processor, sample: Sample) -> str:
    start, end = sample.tokens.answers[-1]
    return processor.renderer.decode(sample.tokens.input_ids[start:end])


def found_in(view: torch.Tensor) -> tuple[int, int, int, int]:
    """The bounds of what is painted in a view ``(3, H, W)``."""
    rows, columns = (view.float().mean(0) < 100).nonzero(as_tuple=True)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def whole_view(sample: Sample) -> torch.Tensor:
    items = sample.tokens.media.items
    return next(pixels for item, pixels in zip(items, sample.pixels[0]) if item.box == WHOLE)


@pytest.mark.parametrize("frame", ["seen", "image"])
@pytest.mark.parametrize("fit", GEOMETRIES)
def test_a_painted_box_is_where_the_text_says(fit, frame, reader, tokenizer):
    for name, (parse, step) in PARSERS.items():
        processor = Processor(tokenizer, GEOMETRIES[fit], "chat", 400, boxes=Writing(name, frame))
        images = 2 if fit == "tiles, alone" else 1
        for orientation in STORED:
            given = record(orientation)
            if images == 2:
                given |= {"image": ["1.png", f"{orientation}.png"], "box_images": [1]}
                given["conversations"] = chat("<image><image>\nWhere?", "<box>")
            sample = processor(reader.read(given, "record"))
            view = sample.pixels[0][-1] if images == 2 else whole_view(sample)
            seen = torch.from_numpy(np.array(painted())).permute(2, 0, 1) if frame == "image" else view
            sides = (seen.shape[2], seen.shape[1]) * 2
            expected = found_in(seen)
            if name.startswith("molmo"):
                expected = (expected[0] + expected[2]) / 2, (expected[1] + expected[3]) / 2
            said = parse(answer_of(processor, sample))
            if name != "qwen2_5_vl":
                said = [value * side for value, side in zip(said, sides)]
            assert len(said) == len(expected), name
            for value, true, side in zip(said, expected, sides):
                assert abs(value - true) <= 1 + step * side, (name, orientation, said, expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "molmo", "molmo2"])
def test_a_point_is_where_the_text_says(name, reader, tokenizer):
    processor = Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=Writing(name, "seen"))
    given = record(6, "It is at <point>.", points=[[70, 30]])
    (x, y) = PARSERS[name][0](answer_of(processor, processor(reader.read(given, "record"))))
    scale = 1 if name == "qwen2_5_vl" else SIDE
    assert x * scale == pytest.approx(70 * SIDE / WIDTH, abs=0.6)
    assert y * scale == pytest.approx((30 + 30) * SIDE / WIDTH, abs=0.6)  # 30 rows are padded above


TEXTS = {  # of the box (63, 18, 117, 81) and its center (90, 49.5) in an image of 180 x 120 that is padded to a square
    "qwen_vl": "<box>(350,150),(650,675)</box>",
    "qwen2_vl": "<|box_start|>(350,150),(650,675)<|box_end|>",
    "qwen2_5_vl": '{"bbox_2d": [34, 26, 62, 59]}',  # 96 / 180 of (63, 48, 117, 111)
    "qwen3_vl": '{"bbox_2d": [350, 150, 650, 675]}',
    "internvl": "<box>[[350, 150, 650, 675]]</box>",
    "llava": "[0.35, 0.27, 0.65, 0.62]",  # 111 / 180 is 0.617
    "kosmos2": "<object><patch_index_0139><patch_index_0692></object>",  # rows 4 and 21, columns 11 and 20
    "paligemma": "<loc0153><loc0358><loc0691><loc0665>",
    "molmo": '<point x="50.0" y="41.2">',
    "molmo2": '<points coords="1 1 500 412">',
}


@pytest.mark.parametrize("name", BOX_FORMATS)
def test_formats_are_the_published_ones(name, reader, tokenizer):
    processor = Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=Writing(name))
    assert answer_of(processor, processor(reader.read(record(3), "record"))) == TEXTS[name]


def test_kosmos2_writes_and_reads_as_transformers():
    from transformers.models.kosmos2 import processing_kosmos2 as theirs

    draw, format = random.Random(0), BOX_FORMATS["kosmos2"]
    for _ in range(300):
        (x1, x2), (y1, y2) = (sorted(draw.sample(range(641), 2)) for _ in "xy")
        text = format.write((x1, y1, x2, y2), (640, 640), 0)
        cells = theirs.coordinate_to_patch_index((x1 / 640, y1 / 640, x2 / 640, y2 / 640), 32)
        assert text == "<object><patch_index_{:04}><patch_index_{:04}></object>".format(*cells)
        read = format.read(f"<phrase>it</phrase>{text}", (640, 640), 0, is_box=True)
        assert read == pytest.approx([640 * value for value in theirs.patch_index_to_coordinate(*cells, 32)])


def test_llava_writes_no_trailing_zeros():
    assert BOX_FORMATS["llava"].write((0, 20, 39.9, 100), (100, 50), 0) == "[0.0, 0.4, 0.4, 2.0]"


def placed(name: str, frame: str | None, fit: str) -> Iterator[tuple]:
    """Random regions of images of several sizes, with their places."""
    draw = random.Random(1)
    for _ in range(60):
        width, height = draw.choice([(640, 480), (300, 900), (512, 512), (1000, 250)])
        center, half = (width / 2, height / 2), draw.uniform(0.1, 0.5) * min(width, height)
        if "crop" in fit:  # which shows a square in the middle
            half = min(half, 0.2 * min(width, height))
        x, y = (middle + draw.uniform(-1, 1) * 0.05 * min(width, height) for middle in center)
        box = max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)
        view = GEOMETRIES[fit].map((height, width))
        yield box, (width, height), Writing(name, frame).place(Region(box), view)


@pytest.mark.parametrize("frame", ["seen", "image"])
@pytest.mark.parametrize("fit", ["squash", "pad", "pad, tall", "crop", "tiles", "native"])
def test_what_is_written_is_read_back_on_the_original_image(fit, frame):
    for name, (_, step) in PARSERS.items():
        if name.startswith("molmo"):
            continue
        for box, _, place in placed(name, frame, fit):
            read = read_answer(f"It is at [1, 2] {text_of(place)}.", place)
            # a step, in pixels of the image
            steps = [(step * side or 0.5) / by for side, by in zip(place.frame.seen, place.frame.scale)]
            assert all(abs(a - b) <= 1e-6 + steps[i % 2] for i, (a, b) in enumerate(zip(box, read))), (name, box, read)


def test_the_last_region_of_an_answer_counts():
    _, (width, height), place = next(placed("qwen_vl", None, "squash"))
    read = read_answer("<box>(1,2),(3,4)</box> or <box>( 600, 700),(200,1200)</box>, not <box>(1,2)</box>", place)
    assert read == pytest.approx((0.2 * width, 0.7 * height, 0.6 * width, height))  # sorted and clamped
    assert read_answer("I do not know (1,2),(3,4)", place) is None
    _, (width, height), place = next(placed("qwen3_vl", None, "squash"))
    answer = '```json\n[{"bbox_2d":[100, 200,300, 400], "label": "cat"}]\n```'
    assert read_answer(answer, place) == pytest.approx((0.1 * width, 0.2 * height, 0.3 * width, 0.4 * height))
    _, (width, height), place = next(placed("molmo2", None, "squash"))
    answer = '<points coords="1 1 100 200 2 1000 250;2 3 400 500">cats</points>'
    assert read_answer(answer, place) == pytest.approx((width, height / 4))
    assert read_answer(answer, place._replace(medium=1)) == pytest.approx((0.4 * width, height / 2))
    for broken in ('<points coords="">', '<points coords="1 1 2;;">', "<points coords=1 1 500 500>"):
        assert read_answer(broken, place) is None


def test_crop_cuts_boxes_and_refuses_what_it_does_not_show(reader, tokenizer):
    processor = Processor(tokenizer, GEOMETRIES["crop"], "chat", 400, boxes=Writing("qwen2_5_vl"))
    cut = record(boxes=[[10, 18, 117, 81]])  # columns 30 to 150 are shown
    assert answer_of(processor, processor(reader.read(cut, "record"))) == '{"bbox_2d": [0, 14, 70, 65]}'
    for more in ({"boxes": [[2, 18, 29, 81]]}, {"answer": "<point>", "points": [[20, 30]]}):
        with pytest.raises(BadSample, match=r"record: <(box|point)> .* image_fit=crop cuts it off"):
            processor(reader.read(record(**more), "record"))


BAD = {
    "no marks": ({"answer": "no"}, {"boxes": [[1, 2, 3, 4]]}, "0 <box> marks in the text, but 1 boxes"),
    "too few boxes": ({"answer": "<box> <box>"}, {}, "2 <box> marks in the text, but 1 boxes"),
    "marks of another kind": ({}, {"boxes": None, "points": [[1, 2]]}, "1 <box> marks in the text, but 0 boxes"),
    "empty": ({}, {"boxes": []}, "1 <box> marks in the text, but 0 boxes"),
    "three numbers": ({}, {"boxes": [[1, 2, 3]]}, "'boxes' must be a list of lists of 4 numbers, got"),
    "not a list": ({}, {"boxes": 3}, "'boxes' must be a list of lists"),
    "not numbers": ({}, {"boxes": [["1", 2, 3, 4]]}, "'boxes' must be a list of lists"),
    "infinite": ({}, {"boxes": [[1, 2, float("inf"), 4]]}, "'boxes' must be a list of lists"),
    "outside": ({}, {"boxes": [[1, 2, 181, 4]]}, r"\[1.0, 2.0, 181.0, 4.0\]: expected .* 180x120"),
    "outside when upright": ({"orientation": 6}, {"boxes": [[1, 2, 50, 121]]}, "has 180x120 pixels when it is upright"),
    "negative": ({}, {"boxes": [[-1, 2, 3, 4]]}, "expected .* within image 0"),
    "no width": ({}, {"boxes": [[3, 2, 3, 4]]}, "with left < right"),
    "corners in the wrong order": ({}, {"boxes": [[3, 4, 1, 2]]}, "with left < right and top < bottom"),
    "point outside": ({"answer": "<point>"}, {"points": [[1, 121]]}, r"<point> \[1.0, 121.0\]: expected \[x, y\]"),
    "no such image": ({}, {"box_images": [1]}, "in image 1, but there are 1 images"),
    "images of fewer boxes": ({}, {"box_images": []}, "'box_images' must be a list of the image of each of 'boxes'"),
    "points that the format lacks": (
        {"answer": "<point>"},
        {"points": [[1, 2]]},
        "internvl has no points",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_regions_are_refused(name, reader, tokenizer):
    arguments, more, message = BAD[name]
    processor = Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=Writing("internvl"))
    with pytest.raises(BadSample, match=message) as error:
        processor(reader.read({**record(**arguments), **more}, "file.json record 7"))
    assert "file.json record 7" in str(error.value)


def test_a_record_with_boxes_needs_a_format(reader, tokenizer):
    processor = Processor(tokenizer, GEOMETRIES["pad"], "chat", 400)
    with pytest.raises(BadSample, match=r"record: .*boxes\.format is not set"):
        processor(reader.read(record(), "record"))
    with pytest.raises(ValueError, match=r"boxes\.format=qwen: expected one of qwen_vl"):
        Writing("qwen")


def test_texts_that_have_numbers_stay(reader, tokenizer):
    text = "<box>(1,2),(3,4)</box> <point>"
    given = record(answer=text)
    del given["boxes"]
    plain, with_format = (
        Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=boxes) for boxes in (None, Writing("qwen_vl"))
    )
    for processor in (plain, with_format):
        assert answer_of(processor, processor(reader.read(given, "record"))) == text
    ignoring = RecordReader(reader.images, ignored=["boxes"])
    assert answer_of(plain, plain(ignoring.read({**given, "boxes": [[1, 2]]}, "record"))) == text


def test_regions_follow_their_marks_and_images(reader):
    items = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "<box> <point>"}]
    given = {
        "messages": [{"role": "user", "content": items}, {"role": "assistant", "content": "<point> and <box>"}],
        "images": ["1.png", "2.png"],
        **{"boxes": [[0, 1, 2, 3], [4, 5, 6, 7]], "box_images": [0, 1], "points": [[8, 9], [10, 11]]},
    }
    found = reader.read(given, "record")
    assert [image.relative for image in found.media] == ["2.png", "1.png"]
    places = [((0, 1, 2, 3), 1), ((8, 9), 1), ((10, 11), 1), ((4, 5, 6, 7), 0)]
    assert list(map(tuple, found.regions)) == places and not found.unused


def test_repaired_turns_lose_their_regions():
    """A first turn of the assistant is dropped together with its box."""
    out = io.BytesIO()
    painted().save(out, "PNG")
    turns = [{"from": "gpt", "value": "<box>"}, *chat("<image>What is in <box>?", "<box>")]
    given = {"image": out.getvalue(), "conversations": turns, "boxes": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]}
    found = RecordReader(ImageFolder(None), repair=True).read(given, "record")
    assert [region.at for region in found.regions] == [(4, 5, 6, 7), (8, 9, 10, 11)]


def region_processor(name: str, template: str) -> Processor:
    """A processor of a byte-level tokenizer with the special tokens of Qwen2-VL and PaliGemma."""
    tokenizer = copy.deepcopy(chat_formats.tokenizers()["byte_bpe"])
    added = ["<|box_start|>", "<|box_end|>", *(f"<loc{i:04}>" for i in range(1024))]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return Processor(tokenizer, GEOMETRIES["pad"], template, 400, "vicuna_v1", boxes=Writing(name))


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize(
    "name, expected", {"qwen2_vl": ("<|box_start|>", "<|box_end|>"), "paligemma": ("<loc0153>", "<loc0358>")}.items()
)
def test_tokens_of_a_format_are_the_tokenizers_and_lengths_are_known(name, expected, template, reader):
    processor = region_processor(name, template)
    numbered = processor.tokenizer.convert_tokens_to_ids
    cut = "A thing at <box>, <|im_end|> here"  # whose length only rendering can tell
    conversations = [reader.read(record(answer=text), "record") for text in ("It is at <box>.", cut)]
    for conversation, length in zip(conversations, processor.lengths(conversations)):
        tokens = processor.render(conversation)
        assert length == tokens.length if conversation is conversations[0] else length is None
        start, end = tokens.answers[0]
        ids = tokens.input_ids[start:end].tolist()
        assert set(numbered(list(expected))) <= set(ids) and numbered("<|im_end|>") not in ids[:-1]
        assert (tokens.weights[start - 1 : end - 1] > 0).all()
        written = processor.written(conversation).turns[-1].text
        assert answer_of(processor, processor.load(conversation, tokens)) == written


def test_tokens_of_another_format_are_ordinary_text(reader):
    given = record(answer="at <|box_start|>")
    for name, has_token in {"llava": False, "qwen2_vl": True}.items():
        processor = region_processor(name, "chat")
        tokens = processor.render(reader.read({**given, "boxes": None}, "record"))
        assert (processor.tokenizer.convert_tokens_to_ids("<|box_start|>") in tokens.input_ids.tolist()) == has_token


def test_a_prompt_has_the_text_of_its_boxes(reader, tokenizer):
    processor = Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=Writing("qwen3_vl"))
    given = record(answer="red")
    given["conversations"][0]["value"] = "<image>What color is <box>?"
    found = reader.read({**given, "boxes": [list(BOX)]}, "record")
    asked = Conversation("x", found.turns[:1], found.media, regions=found.regions)
    prompt = processor.tokenizer.decode(processor.prompt(asked).tokens.input_ids)
    assert 'What color is {"bbox_2d": [350, 150, 650, 675]}?' in prompt


def test_the_format_is_saved_only_if_it_is_set(tmp_path, reader, tokenizer):
    for name, boxes in {"with": Writing("llava", "image"), "without": None}.items():
        Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=boxes).save_pretrained(tmp_path / name)
        saved = json.loads((tmp_path / name / "processor/processor.json").read_text())
        assert ("boxes" in saved) == (boxes is not None)
        assert Processor.from_pretrained(tmp_path / name).boxes == boxes


def test_several_dialogues_have_no_regions(reader):
    given = record()
    given["dialogues"] = [given.pop("conversations")] * 2
    with pytest.raises(BadSample, match=r"'dialogues' does not support 'boxes'; data\.ignore=\[boxes\]"):
        reader.read(given, "record")


def test_regions_are_in_images_not_in_videos(tokenizer):
    class Video:
        def probe(self):
            raise AssertionError("not needed")

    turns = (Turn("user", "<image> Where?"), Turn("assistant", "<box>"))
    processor = Processor(tokenizer, GEOMETRIES["pad"], "chat", 400, boxes=Writing("llava"))
    with pytest.raises(BadSample, match="clip: a box or a point is in medium 0, which is not an image"):
        processor.written(Conversation("clip", turns, (Video(),), regions=(Region((0, 0, 9, 9)),)))
