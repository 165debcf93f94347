"""Documents of images and texts: their formats, the rules of sampling, and which tokens are trained on."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import tarfile
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from vlmtrain.data.assignment import assigned
from vlmtrain.data.document_records import open_records
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.interleaved import Documents, Rules, as_conversation, comm_pieces, mmc4_pieces, obelics_pieces
from vlmtrain.data.layouts import PaddedBatching
from vlmtrain.data.lengths import open_lengths
from vlmtrain.data.loader import StepStream
from vlmtrain.data.mixture import Mixture
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import FROM_START, BadSample, Conversation, Dropped, Turn, Window
from vlmtrain.data.rendering import Renderer
from vlmtrain.data.sources import first_look
from vlmtrain.model.tiny_tokenizer import build_tiny_tokenizer

from ...media import slots

LETTERS = "abcdefghij"
MMC4 = partial(mmc4_pieces, 0.24)
CHUNK_END = "<|endofchunk|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of increasing size."""
    folder = tmp_path_factory.mktemp("documents")
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (8 + 8 * number, 8, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def words(*extra: str):
    tokenizer = build_tiny_tokenizer((*LETTERS, "."))
    tokenizer.add_tokens(list(extra))
    return tokenizer


def documents(folder: Path, *records: dict, read=MMC4, joint: str = " ", **rules) -> Documents:
    file = folder / f"{hashlib.sha256(repr(records).encode()).hexdigest()[:16]}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Documents(file, folder, False, 0, Rules(**rules), read, joint)


def page(similarity: list[list[float]], images: int = 3, **more) -> dict:
    infos = [{"image_name": f"{number}.png", "raw_url": f"https://x/{number}"} for number in range(images)]
    return {"text_list": ["a", "b", "c", "d"], "image_info": infos, "similarity_matrix": similarity, **more}


def told(conversation: Conversation) -> list[str]:
    """Texts and the names of images, in order; a text in brackets is not trained on."""
    media = iter(Path(medium.label).name for medium in conversation.media)
    out = []
    for turn in conversation.turns:
        if turn.role == "user":
            out += [next(media) for _ in range(turn.text.count("<image>"))]
        else:
            out.append(turn.text if turn.weight else f"({turn.text})")
    return out


CROSSED = [[0.1, 0.3, 0.2, 0.5], [0.1, 0.6, 0.2, 0.1], [0.1, 0.5, 0.4, 0.1]]


def test_an_assignment_has_the_largest_sum():
    draw = np.random.default_rng(0)
    for _ in range(200):
        rows, columns = map(int, draw.integers(1, 6, 2))
        values = draw.normal(size=(rows, columns)).round(1)
        found = assigned(values)
        places = [column for column in found if column >= 0]
        assert len(places) == len(set(places)) == min(rows, columns)
        wide = values if rows <= columns else values.T
        best = max(
            sum(wide[row, column] for row, column in enumerate(columns))
            for columns in permutations(range(wide.shape[1]), wide.shape[0])
        )
        assert sum(values[row, column] for row, column in enumerate(found) if column >= 0) == pytest.approx(best)


def test_images_stand_before_their_sentences_in_the_order_of_these(folder):
    """Image 0 belongs to the last sentence; image 2 would rather have that of image 1."""
    (found,) = documents(folder, page(CROSSED), train_first_text=False)
    assert told(found) == ["(a)", "1.png", "b", "2.png", "c", "0.png", "d"]


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({"max_images": 2}, ["a", "1.png", "b", "2.png", "c d"]),
        ({"min_image_bytes": "1.png"}, ["a", "1.png", "b", "2.png", "c d"]),
        ({"read": partial(mmc4_pieces, 0.45)}, ["a", "1.png", "b c", "0.png", "d"]),
        ({"next_image": 1.0}, ["1.png", "a", "2.png", "b", "0.png", "c", "d"]),
    ],
)
def test_rules_select_images(folder, rules, expected):
    if "min_image_bytes" in rules:
        rules = {"min_image_bytes": (folder / rules["min_image_bytes"]).stat().st_size}
    (found,) = documents(folder, page(CROSSED), **rules)
    assert told(found) == expected


def test_only_images_that_can_be_used_are_assigned(folder):
    infos = [{"image_name": name} for name in ("0.png", "gone.png", "2.png")]
    (found,) = documents(folder, page(CROSSED, image_info=infos))
    assert told(found) == ["a", "2.png", "b c", "0.png", "d"]


def test_the_datasets_own_assignment_and_missing_images(folder):
    infos = [
        {"image_name": "1.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "gone.png", "matched_text_index": 0, "matched_sim": 0.9},
        {"image_name": None, "matched_text_index": 0, "matched_sim": 0.9},
        {"image_name": "0.png", "matched_text_index": 1, "matched_sim": 0.24},
    ]
    (found,) = documents(folder, {"text_list": ["a", "b", "c"], "image_info": infos})
    assert told(found) == ["a", "0.png", "b", "1.png", "c"]


def test_a_folder_with_none_of_the_images_is_refused(tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text(json.dumps(page(CROSSED)))
    with pytest.raises(ValueError, match=rf"data\.images={tmp_path}/: none of the 3 images that the first 32"):
        Documents(file, tmp_path, False, 0, Rules(), MMC4, " ")


def test_images_in_records_of_tar_shards(folder, tmp_path):
    data = base64.b64encode((folder / "2.png").read_bytes()).decode()
    record = {"text_list": ["a", "b"], "image_info": [{"image_base64": data}], "similarity_matrix": [[0.1, 0.9]]}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        content = json.dumps(record).encode()
        header = tarfile.TarInfo("000.json")
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
    found = Documents(tmp_path, None, False, 0, Rules(), MMC4, " ")[0]
    assert [turn.text for turn in found.turns] == ["", "a", "<image>", "b"]
    assert found.media[0].size() == (24, 8)


def test_obelics_in_json_and_parquet(folder, tmp_path):
    url = "https://x/y.jpg"
    (tmp_path / hashlib.sha256(url.encode()).hexdigest()).write_bytes((folder / "1.png").read_bytes())
    record = {"images": [None, url, None, None], "texts": ["a", None, " b ", "c"], "metadata": "[]"}
    (tmp_path / "docs.jsonl").write_text(json.dumps(record))
    Dataset.from_list([record]).to_parquet(tmp_path / "docs.parquet")
    embedded = {"images": [None, {"bytes": (folder / "1.png").read_bytes()}], "texts": ["a b", None]}
    for file in ("docs.jsonl", "docs.parquet"):
        (found,) = Documents(tmp_path / file, tmp_path, False, 0, Rules(), obelics_pieces, "\n\n")
        assert [turn.text for turn in found.turns] == ["", "a", "<image>", "b\n\nc"]
        assert found.media[0].size() == (16, 8)
    embedded["images"].append(None)
    embedded["texts"].append("c")
    Dataset.from_list([embedded]).to_parquet(tmp_path / "embedded.parquet")
    (found,) = Documents(tmp_path / "embedded.parquet", None, False, 0, Rules(), obelics_pieces, "\n\n")
    assert [turn.text for turn in found.turns] == ["", "a b", "<image>", "c"] and found.media[0].size() == (16, 8)


def test_comm(folder):
    image = {"type": "image", "image_path": "3.png", "url": "https://x"}
    record = {
        **{"data_id": "wiki-1", "title": "a", "summary_info": [{"type": "text", "content": "b"}, image]},
        "step_info": [[{"type": "text", "content": "c"}], [image, {"type": "text", "content": "d"}]],
    }
    (found,) = documents(folder, record, read=comm_pieces)
    assert told(found) == ["a b", "3.png", "c", "3.png", "d"] and "(id wiki-1)" in found.id


@pytest.mark.parametrize(
    "read, change, message",
    [
        (MMC4, {"text_list": None}, "'text_list' must be a list, got None"),
        (MMC4, {"text_list": ["a", 5, "c", "d"]}, r"'text_list\[1\]' must be a string, got 5"),
        (MMC4, {"image_info": [3]}, r"'image_info\[0\]' must be an object, got 3"),
        (MMC4, {"similarity_matrix": CROSSED[:2]}, "'similarity_matrix' must have a row for each of the 3 images"),
        (MMC4, {"similarity_matrix": [["x"] * 4] * 3}, "'similarity_matrix' must have a row for each"),
        (MMC4, {"similarity_matrix": None}, r"'image_info\[0\]' needs a 'matched_text_index' below 4 and a 'matched_s"),
        (MMC4, {"image_info": [{"image_name": "../1.png"}] * 3}, "'../1.png' leads out of data.images"),
        (MMC4, {"image_info": [{"image_base64": "?"}] * 3}, "image 0 of 'image_info' is not valid base64"),
        (obelics_pieces, {}, "'images' must be a list, got None"),
        (obelics_pieces, {"images": ["1.png"], "texts": []}, "'images' and 'texts' of equal length, got 1 and 0"),
        (obelics_pieces, {"images": ["1.png"], "texts": ["a"]}, r"one of 'images\[0\]' and 'texts\[0\]' must be null"),
        (comm_pieces, {"step_info": [5]}, r"'step_info\[0\]' must be a list, got 5"),
        (comm_pieces, {"step_info": [[{"type": "video"}]]}, r"'step_info\[0\]\[0\]' must be an item of type text or"),
        (comm_pieces, {"step_info": [[{"type": "text"}]]}, r"'step_info\[0\]\[0\].content' must be a string, got None"),
    ],
)
def test_broken_documents_name_the_record_and_the_field(folder, read, change, message):
    source = documents(folder, page(CROSSED), {"id": "second", **page(CROSSED), **change}, read=read)
    with pytest.raises(BadSample, match=rf"jsonl record 1 \(id second\): .*{message}") as caught:
        source[1]
    assert not isinstance(caught.value, Dropped)


def test_pickled_files_are_not_read(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pkl: pickled files are not read: convert them to JSON"):
        open_records(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "similarity, reason",
    [([[0.1] * 4] * 3, "similarity below 0.24"), ([[0.9, 0.1, 0.1, 0.1]] * 3, "only kept image is small")],
)
def test_documents_without_images_are_left_out(folder, similarity, reason):
    source = documents(folder, page(similarity), min_image_bytes=10**6 if "small" in reason else 0)
    with pytest.raises(Dropped, match="no image with a text after it"):
        source[0]
    assert first_look(source).problems == []


def render(
    tokenizer, max_length: int, *texts: str, slots_each: int = 2, window: Window = FROM_START, first: float = 1.0
):
    """Render a document whose texts have two images before the third one and one before the second one."""
    marks = ["", "<image>", "<image><image>"][: len(texts)]
    weights = [first, 1.0, 1.0]
    turns = [
        turn
        for mark, text, weight in zip(marks, texts, weights)
        for turn in (Turn("user", mark), Turn("assistant", text, weight=weight))
    ]
    count = "".join(marks).count("<image>")
    conversation = Conversation("doc", tuple(turns), [object()] * count, window=window)
    return Renderer(tokenizer, "interleaved", max_length).render(conversation, slots(*[slots_each] * count))


def spoken(tokenizer, rendered) -> str:
    """Tokens in order, image slots as digits; those that are targets in capital letters or brackets."""
    trained = [False, *(rendered.weights > 0).tolist()]
    out = []
    for token, place, is_target in zip(rendered.input_ids.tolist(), rendered.index.tolist(), trained):
        text = str(place) if place >= 0 else tokenizer.decode([token]).strip()
        out.append(f"[{text}]" if is_target else text)
    return " ".join(out)


def test_targets_of_a_document_by_hand():
    """As OpenFlamingo's code: no text before the first image, no image, and nothing after the end of a chunk."""
    tokenizer, plain = words("<image>", CHUNK_END), words()
    end = plain.eos_token
    rendered = render(tokenizer, 100, "a b", "c", "d e", slots_each=1, first=0.0)
    assert spoken(tokenizer, rendered) == f"a b 0 [c] [{CHUNK_END}] 1 2 [d] [e] [{CHUNK_END}] {end}"
    assert (rendered.targets[rendered.weights > 0] == rendered.input_ids[1:][rendered.weights[:-1] > 0]).all()
    # all text of a page, and its end, without a token for the ends of chunks
    rendered = render(plain, 100, "a b", "c", "d e")
    assert spoken(plain, rendered) == f"a [b] 0 0 [c] 1 1 2 2 [d] [e] [{end}]"
    assert rendered.answers == ((0, 2), (4, 5), (9, 12))


@pytest.mark.parametrize("extra", [(), ("<image>", CHUNK_END)])
def test_a_chat_template_writes_the_same_prompts(extra):
    """As exports need it."""
    tokenizer = words(*extra)
    renderer = Renderer(tokenizer, "interleaved", 100)
    turns = [Turn("user", "a"), Turn("assistant", "b c"), Turn("user", "d")]
    prompt = renderer.prompt(Conversation("doc", tuple(turns)), slots())
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = tokenizer.apply_chat_template(messages, chat_template=renderer.document_template, return_dict=False)
    assert prompt.input_ids.tolist() == whole


def test_names_of_tokens_in_a_text_are_text():
    tokenizer = words("<image>", CHUNK_END)
    rendered = render(tokenizer, 100, f"a {CHUNK_END} <image>", "c")
    ids = tokenizer.convert_tokens_to_ids([CHUNK_END, "<image>"])
    assert [(rendered.input_ids == number).sum() for number in ids] == [1, 0]


def test_a_cut_mark_drops_its_image():
    tokenizer = words()
    whole = render(tokenizer, 100, "a b", "c", "d e")  # a b 00 c 11 22 d e end
    kept = {5: (5, 1), 6: (5, 1), 7: (5, 1), 9: (5, 1), 10: (10, 3), 11: (11, 3), 12: (12, 3)}
    for max_length, (length, images) in kept.items():
        cut = render(tokenizer, max_length, "a b", "c", "d e")
        assert (len(cut), len(cut.media.placements)) == (length, images)
        assert len(cut.media.items) == images == int(cut.index.max()) + 1
        assert (cut.input_ids == whole.input_ids[:length]).all()
        assert (cut.targets[:-1] == whole.targets[: length - 1]).all() and cut.weights[-1] == 0
        assert all(end <= length for _, end in cut.answers)
    for max_length in (2, 3, 4):  # only text, an image without a slot, and an image without text after it
        with pytest.raises(Dropped, match=f"doc: max_length={max_length} leaves no image"):
            render(tokenizer, max_length, "a b", "c", "d e")
    with pytest.raises(Dropped):  # one mark, and it is last
        render(tokenizer, 4, "a b", "c", first=0.0)


def test_a_cut_leaves_no_token_around_an_image_without_the_image():
    tokenizer = words()
    plan = slots(2, 2)
    plan = plan._replace(placements=tuple(placement._replace(before=" j") for placement in plan.placements))
    turns = [Turn("user", "<image>"), Turn("assistant", "a b"), Turn("user", "<image>"), Turn("assistant", "c d")]
    conversation = Conversation("doc", tuple(turns), [object()] * 2)
    found = {
        max_length: spoken(tokenizer, Renderer(tokenizer, "interleaved", max_length).render(conversation, plan))
        for max_length in (5, 6, 7, 8, 9)
    }
    assert set(found.values()) == {"j 0 0 [a] [b]", "j 0 0 [a] [b] j 1 1 [c]"}
    assert [len(text.split()) for text in found.values()] == [5, 5, 5, 5, 9]


def test_a_window_starts_anywhere_and_shows_whole_images():
    tokenizer = words()
    whole = render(tokenizer, 100, "a b", "c", "d e")
    found = {}
    for step in (0, 1, 2, 4, 5, 6):
        start = step / 7
        cut = render(tokenizer, 6, "a b", "c", "d e", window=Window(start))
        found[step] = spoken(tokenizer, cut)
        assert len(cut) <= 6 and (cut.index.max() + 1 == len(cut.media.items) == len(cut.media.placements))
        assert sorted({int(item) for placement in cut.media.placements for item in placement.items}) == list(
            range(len(cut.media.items))
        )
    end = tokenizer.eos_token
    assert found[0] == "a [b] 0 0 [c]" and found[1] == "b 0 0 [c]" and found[2] == "0 0 [c]"
    with pytest.raises(Dropped):  # c 1 1 2 2
        render(tokenizer, 5, "a b", "c", "d e", window=Window(4 / 8))
    assert found[6] == f"0 0 [d] [e] [{end}]"
    assert [item.medium for item in render(tokenizer, 6, "a b", "c", "d e", window=Window(6 / 7)).media.items] == [2]
    assert len(whole) == 12
    two = render(tokenizer, 20, "a b", "c", "d e", window=Window(0.9, 2))  # which needs no window for its length
    assert spoken(tokenizer, two) == "a [b] 0 0 [c]"
    two = render(tokenizer, 11, "a b", "c", "d e", window=Window(0.0, 2))
    assert spoken(tokenizer, two) == "a [b] 0 0 [c]"


def test_texts_may_belong_to_the_next_image():
    images = [Image.new("RGB", (1, 1)) for _ in range(3)]
    one, two, three = images
    rng = random.Random(0)
    found = as_conversation("doc", [one, "a", two, three, "b", "c"], Rules(next_image=1.0), " ", rng)
    assert [turn.text for turn in found.turns] == ["<image>" * 3, "a", "", "b c"]
    assert list(found.media) == images
    found = as_conversation("doc", ["a", one, "b", two], Rules(next_image=1.0), " ", rng)
    assert [turn.text for turn in found.turns] == ["<image>", "a", "<image>", "b"]
    halves = Rules(next_image=0.5)
    moved = [as_conversation("doc", ["a", one, "b"], halves, " ", rng).turns[0].text != "" for _ in range(200)]
    assert 70 < sum(moved) < 130


def pages(count: int) -> list[dict]:
    """Every third page has no image that can be used, and every third has one."""
    matrices = [[[0.1] * 4] * 3, [[0.1, 0.9, 0.1, 0.1], [0.1] * 4, [0.1] * 4], CROSSED]
    return [page(matrices[number % 3], url=f"page-{number}") for number in range(count)]


def steps(source: Documents, share: float | None, ranks: int = 1, stored: bool = False) -> list[list[str]]:
    geometry = Geometry((4, 4), "squash", (0.0,) * 3, (1.0,) * 3, tokens=2)
    processor = Processor(words(), geometry, "interleaved", max_length=20)
    mixture = Mixture({"pages": source}, seed=3, one_image_shares=[share])
    lengths = open_lengths(mixture, processor) if stored else None
    found = []
    for step in range(6):
        ids = []
        for rank in range(ranks):
            batching = PaddedBatching(mixture, processor, 8, 2, 4 // ranks, lengths)
            stream = StepStream(batching, mixture, processor, rank, ranks, step, step + 1)
            (data,) = stream
            assert not data.bad
            ids += [id for batch in data.micro_batches for id in batch.ids]
        found.append(sorted(ids))
    return found


def test_documents_that_are_left_out_give_their_place_to_others(folder):
    source = documents(folder, *pages(48))
    found = steps(source, 0.5)
    assert all(len(step) == 8 for step in found)
    numbers = [int(id.split("page-")[1][:-1]) % 3 for step in found for id in step]
    assert 0 not in numbers and 8 <= numbers.count(1) <= 24  # a third of those that are kept
    assert found == steps(source, 0.5, ranks=2) == steps(source, 0.5, stored=True)
    assert all(int(id.split("page-")[1][:-1]) % 3 == 2 for step in steps(source, 0.0) for id in step)


def test_lengths_known_before_rendering_are_those_of_windows(folder):
    source = documents(folder, *pages(48), random_window=True, max_images=2)
    assert {len(source[number].media) for number in range(48) if number % 3} == {1, 3}
    assert steps(source, 1.0) == steps(source, 1.0, stored=True)


def test_data_of_which_everything_is_left_out_is_reported(folder):
    source = documents(folder, *pages(1))
    processor = Processor(words(), Geometry((4, 4), "squash", (0.0,) * 3, (1.0,) * 3, tokens=2), "interleaved", 20)
    mixture = Mixture({"pages": source}, one_image_shares=[1.0])
    bad = []
    assert PaddedBatching(mixture, processor, 1, 1, 1).look(0, bad) is None
    assert "the document has no image with a text after it" in bad[0].problem
