"""Hugging Face datasets: the same records as read by the library itself, and the errors for broken ones."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vlmtrain.data.hf_dataset import HFDataset, choose_columns
from vlmtrain.data.records import BadSample, check_conversation, is_video
from vlmtrain.data.video import VideoFolder

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(color: tuple[int, int, int] = RED) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def encoded(color: tuple[int, int, int] = RED) -> bytes:
    out = io.BytesIO()
    picture(color).save(out, "PNG")
    return out.getvalue()


def talk(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def save(folder: Path, columns: dict, features: datasets.Features | None = None) -> Path:
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "data")
    return folder / "data"


def texts(source: HFDataset) -> list[list[str]]:
    return [[turn.text for turn in source[i].turns] for i in range(len(source))]


def colors(source: HFDataset, index: int) -> list[tuple[int, ...]]:
    return [image.load().getpixel((0, 0)) for image in source[index].images]


# text


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"conversations": [talk("See <image>?", "red", "Sure?", "yes")]}, ["See <image>?", "red", "Sure?", "yes"]),
        (
            {"messages": [[{"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "a"}]]},
            ["<image> q", "a"],
        ),
        (
            {
                "messages": [
                    [
                        {"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "image", "text": None}]},
                        {
                            "role": "assistant",
                            "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
                        },
                    ]
                ]
            },
            ["A <image>", "bc"],
        ),
        (
            {
                "texts": [
                    [{"user": "q", "assistant": "a", "source": "x"}, {"user": "r", "assistant": "b", "source": "x"}]
                ]
            },
            ["<image>\nq", "a", "r", "b"],
        ),
        (
            {"texts": [[{"user": "q", "assistant": "a"}, {"user": "r <image>", "assistant": "b"}]]},
            ["q", "a", "r <image>", "b"],
        ),
        ({"question": ["q"], "answer": ["a"]}, ["<image>\nq", "a"]),
        ({"question": ["q <image>"], "answer": ["a"]}, ["q <image>", "a"]),
        ({"caption": ["red"]}, ["<image>", "red"]),
        ({"text": ["red <image>"]}, ["<image>", "red <image>"]),
    ],
)
def test_text_of_every_form(tmp_path, columns, expected):
    features = datasets.Features({"image": datasets.Image()})
    columns = {**columns, "image": [encoded()]}
    features = datasets.Dataset.from_dict(columns).features | features
    source = HFDataset(save(tmp_path, columns, datasets.Features(features)))
    assert texts(source) == [expected] and colors(source, 0) == [RED]
    assert source[0].id == "data record 0"
    check_conversation(source[0])


def test_messages_kept_as_an_object_of_lists(tmp_path):
    features = datasets.Features(
        {"conversations": datasets.Sequence({"from": datasets.Value("string"), "value": datasets.Value("string")})}
    )
    columns = {"conversations": [{"from": ["human", "gpt"], "value": ["q", "a"]}]}
    assert texts(HFDataset(save(tmp_path, columns, features))) == [["q", "a"]]


def test_a_system_turn_and_an_id(tmp_path):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    source = HFDataset(save(tmp_path, {"messages": [messages], "id": [17]}))
    assert [(turn.role, turn.text) for turn in source[0].turns] == [("system", "s"), ("user", "u"), ("assistant", "a")]
    assert source[0].id == "data record 0 (id 17)"


# images


def test_images_equal_those_that_the_library_decodes(tmp_path):
    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    columns = {"images": [[picture()], [picture(BLUE), picture()]], "caption": ["one", "two"]}
    path = save(tmp_path, columns, features)
    source, reference = HFDataset(path), datasets.load_from_disk(path)
    for i in range(2):
        assert [image.load().tobytes() for image in source[i].images] == [p.tobytes() for p in reference[i]["images"]]
        for image in source[i].images:
            image.check()
    assert texts(source) == [["<image>", "one"], ["<image>\n<image>", "two"]]


def test_images_are_opened_by_our_own_decoder(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    eps = io.BytesIO()
    picture().save(eps, "EPS")
    source = HFDataset(save(tmp_path, {"image": [eps.getvalue()], "caption": ["x"]}, features))
    with pytest.raises(BadSample, match=r"image 0 of 'image' is not an image: it starts with b'%!PS"):
        source[0].images[0].load()


@pytest.mark.parametrize(
    "value",
    [
        encoded(),
        [encoded()],
        {"bytes": encoded(), "path": None},
        {"bytes": encoded(), "path": "/nowhere.png"},
        [{"bytes": None, "path": "red.png"}],
        "red.png",
        ["deep/../red.png"],
    ],
)
def test_bytes_paths_and_lists_of_them(tmp_path, value):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    picture().save(tmp_path / "images" / "red.png")
    path = save(tmp_path, {"image": [value], "caption": ["x"]})
    assert colors(HFDataset(path, images=tmp_path / "images"), 0) == [RED]


@pytest.mark.parametrize(
    "columns, features",
    [
        ({"video": ["clip.mp4"]}, None),
        ({"video": [{"bytes": b"clip", "path": None}]}, None),
        ({"video": [{"bytes": b"clip", "path": None}]}, {"video": datasets.Video()}),
        ({"clip": ["clip.mp4"]}, None),
    ],
)
def test_videos_are_read(tmp_path, columns, features):
    (name,) = columns
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    columns |= {"video_start": [1.0], "question": ["<video>q"], "answer": ["a"]}
    if features:
        features = datasets.Features({**features, "video_start": datasets.Value("float64")} | dict.fromkeys(
            ("question", "answer"), datasets.Value("string")
        ))  # fmt: skip
    path = save(tmp_path, columns, features)
    chosen = {"video": name} if name != "video" else None
    source = HFDataset(path, columns=chosen, videos=VideoFolder(tmp_path))
    (video,) = source[0].media
    assert is_video(video) and video.start == 1.0 and video.open().read() == b"clip"
    check_conversation(source[0])


@pytest.mark.parametrize("value", [None, "", []])
def test_a_record_without_an_image_is_text_only(tmp_path, value):
    path = save(
        tmp_path,
        {"image": [value, "red.png" if value != [] else ["red.png"]], "question": ["q", "q"], "answer": ["a", "a"]},
    )
    source = HFDataset(path, images=tmp_path)
    assert source[0].images == () and texts(source) == [["q", "a"], ["<image>\nq", "a"]]


def test_paths_may_not_lead_out_of_the_folder(tmp_path):
    picture().save(tmp_path / "red.png")
    (tmp_path / "images").mkdir()
    columns = {"image": [{"path": str(tmp_path / "red.png")}, {"path": "../red.png"}], "caption": ["x", "y"]}
    path = save(tmp_path, columns)
    for i in range(2):
        with pytest.raises(BadSample, match=rf"data record {i}: image path .* leads out .*data\.outside_images=true"):
            HFDataset(path, images=tmp_path / "images")[i]
        assert colors(HFDataset(path, images=tmp_path / "images", outside=True), i) == [RED]


# locations


def table(count: int = 3) -> datasets.Dataset:
    columns = {"image": [encoded()] * count, "caption": [f"é{i}" for i in range(count)]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.mark.parametrize(
    "place", ["one.parquet", "*.parquet", "one.arrow", "file.arrow", "one.jsonl", "folder", "saved", "dict"]
)
def test_every_location_gives_the_same_records(tmp_path, place):
    data = table()
    if place in ("one.parquet", "*.parquet"):
        data.to_parquet(tmp_path / "one.parquet")
    elif place == "one.arrow":
        with pa.OSFile(str(tmp_path / place), "wb") as out, pa.ipc.new_stream(out, data.data.schema) as writer:
            writer.write_table(data.data.table)
    elif place == "file.arrow":
        with pa.OSFile(str(tmp_path / place), "wb") as out, pa.ipc.new_file(out, data.data.schema) as writer:
            writer.write_table(data.data.table)
    elif place == "one.jsonl":
        picture().save(tmp_path / "red.png")
        lines = [json.dumps({"image": "red.png", "caption": f"é{i}"}) for i in range(3)]
        (tmp_path / place).write_text("\n".join(lines))
    elif place == "folder":
        (tmp_path / place).mkdir()
        data.to_parquet(tmp_path / place / "train-00000.parquet")
        table(1).to_parquet(tmp_path / place / "test-00000.parquet")
    elif place == "saved":
        data.save_to_disk(tmp_path / place)
    else:
        datasets.DatasetDict({"train": data, "test": table(1)}).save_to_disk(tmp_path / place)
    source = HFDataset(tmp_path / place, images=tmp_path)
    assert texts(source) == [["<image>", f"é{i}"] for i in range(3)]
    assert colors(source, 2) == [RED]
    if place in ("folder", "dict"):
        assert len(HFDataset(tmp_path / place, split="test")) == 1
    if place in ("folder", "one.parquet"):
        assert len(HFDataset(tmp_path / place, split="train[:2]")) == 2
    if place == "one.parquet":
        assert len(HFDataset(tmp_path / place, split="validation")) == 3


def test_a_folder_of_images_with_captions(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, color in (("red", RED), ("blue", BLUE)):
        picture(color).save(tmp_path / "pictures" / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in ("red", "blue")]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    source = HFDataset(tmp_path / "pictures")
    found = {source[i].turns[1].text: colors(source, i) for i in range(2)}
    assert found == {"red": [RED], "blue": [BLUE]}


@pytest.mark.parametrize("place", ["parquet", "saved"])
def test_workers_and_copies_read_the_same(tmp_path, place):
    data = table(40)
    if place == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
    else:
        data.save_to_disk(tmp_path / "data.parquet")
    source = HFDataset(tmp_path / "data.parquet")
    source[1]
    loader = DataLoader(source, sampler=list(range(40)) * 3, batch_size=None, num_workers=2)
    assert [conversation.turns[1].text for conversation in loader] == [f"é{i}" for i in range(40)] * 3
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_indices_beyond_the_end_are_errors(tmp_path):
    source = HFDataset(save(tmp_path, {"caption": ["x"], "image": [encoded()]}))
    for index in (1, -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.parquet", None, r"absent\.parquet does not exist"),
        ("absent/folder/data", None, "data does not exist"),
        ("*.parquet", None, r"\*\.parquet does not exist"),
        ("broken.parquet", b"no parquet", r"broken\.parquet cannot be loaded: "),
        ("empty.parquet", b"", r"empty\.parquet cannot be loaded: "),
        ("broken.arrow", b"no arrow", r"broken\.arrow cannot be loaded: "),
        ("broken.jsonl", b'{"a": ', r"broken\.jsonl cannot be loaded: "),
        ("data.txt", b"a,b", r"data\.txt cannot be loaded: expected files of one kind, \.parquet"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        HFDataset(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("path", ["nobody/no-such-data", "no-such-data"])
def test_an_unknown_or_unreachable_id_is_an_error_in_one_line(path):
    with pytest.raises(ValueError, match=f"^dataset {path} cannot be loaded: ") as error:
        HFDataset(path)
    assert "\n" not in str(error.value)


def test_a_folder_without_data_or_with_a_script_is_an_error(tmp_path):
    (tmp_path / "code").mkdir()
    with pytest.raises(ValueError, match="code cannot be loaded"):
        HFDataset(tmp_path / "code")
    (tmp_path / "code" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="code cannot be loaded"):
        HFDataset(tmp_path / "code")
    assert not (tmp_path / "ran").exists()


def test_files_of_two_kinds_are_an_error(tmp_path):
    table().to_parquet(tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_text('{"caption": "x"}')
    with pytest.raises(ValueError, match="expected files of one kind"):
        HFDataset(tmp_path / "data.*")


def test_an_unknown_split_is_an_error(tmp_path):
    datasets.DatasetDict({"train": table(), "test": table(1)}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match="there is no split 'validation'; it has train, test"):
        HFDataset(tmp_path / "dict", split="validation")
    (tmp_path / "folder").mkdir()
    table().to_parquet(tmp_path / "folder" / "train.parquet")
    with pytest.raises(ValueError, match=r"folder cannot be loaded: .*validation"):
        HFDataset(tmp_path / "folder", split="validation")


def test_an_arrow_file_cut_between_two_batches_is_an_error(tmp_path):
    folder = save(tmp_path, {"question": ["q"] * 3000, "answer": ["a"] * 3000})
    (file,) = folder.glob("*.arrow")
    whole = file.read_bytes()
    assert len(HFDataset(folder)) == len(HFDataset(file)) == 3000
    with pa.ipc.open_stream(whole) as reader:
        schema, batch = reader.schema, reader.read_next_batch()
    end = len(schema.serialize()) + len(batch.serialize())
    file.write_bytes(whole[:end])
    assert len(pa.ipc.open_stream(whole[:end]).read_all()) == 1000
    for path in (folder, file):
        with pytest.raises(ValueError, match=r"cannot be loaded: .*\.arrow has no end marker, so it was truncated"):
            HFDataset(path)


def test_a_data_set_without_records_is_an_error(tmp_path):
    table().select([]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data\.parquet (is empty: no records|cannot be loaded: .*no data)"):
        HFDataset(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data (is empty: no records|cannot be loaded)"):
        HFDataset(save(tmp_path, {"caption": [], "image": []}))


# columns


@pytest.mark.parametrize(
    "given, present, expected",
    [
        ({}, ["id", "image", "conversations"], {"messages": "conversations", "image": "image", "id": "id"}),
        ({}, ["images", "texts", "x"], {"messages": "texts", "image": "images"}),
        ({}, ["question", "answer", "answers", "jpg"], {"question": "question", "answer": "answer", "image": "jpg"}),
        ({}, ["text"], {"caption": "text"}),
        ({}, ["videos", "texts", "video_end"], {"messages": "texts", "video": "videos", "video_end": "video_end"}),
        ({"question": "query", "answer": None}, ["query", "answer"], {"question": "query", "answer": "answer"}),
        ({"caption": "text"}, ["text", "question", "answer", "messages"], {"caption": "text"}),
        (
            {"messages": "m", "image": "i", "id": "n"},
            ["m", "i", "n", "image"],
            {"messages": "m", "image": "i", "id": "n"},
        ),
        ({"messages": "messages"}, ["messages", "conversations"], {"messages": "messages"}),
    ],
)
def test_columns_are_found_by_their_names_or_as_configured(given, present, expected):
    assert choose_columns(given, present, "data") == expected


@pytest.mark.parametrize(
    "given, present, message",
    [
        (
            {},
            ["a", "b"],
            "cannot determine which columns of data contain the text; it has a, b: set columns.messages=…, or",
        ),
        ({}, ["question"], "cannot determine which columns"),
        ({}, ["Messages"], "cannot determine which columns"),
        ({}, ["messages", "conversations"], "cannot determine which columns"),
        ({}, ["caption", "text"], "cannot determine which columns"),
        ({}, ["caption", "question", "answer"], "cannot determine which columns"),
        ({"question": "q"}, ["q", "reply"], "cannot determine which columns"),
        ({"question": "q", "caption": "c"}, ["q", "c", "answer"], "cannot determine which columns"),
        (
            {},
            ["caption", "image", "jpg"],
            "which column of data contains the images; set columns.image to one of image, jpg",
        ),
        ({"caption": "x"}, ["caption"], "columns.caption=x: data has the columns caption"),
        ({"captoin": "caption"}, ["caption"], "columns.captoin: expected one of messages, .* Did you mean 'caption'"),
    ],
)
def test_ambiguous_columns_are_an_error(given, present, message):
    with pytest.raises(ValueError, match=message):
        choose_columns(given, present, "data")


@pytest.mark.parametrize("role", ["caption", "question"])
def test_a_column_of_numbers_is_not_a_text_column(tmp_path, role):
    path = save(tmp_path, {role: [3], "answer": ["a"]} if role == "question" else {role: [3]})
    with pytest.raises(ValueError, match=rf"columns\.{role}={role} of .*data must contain strings, got .*int64"):
        HFDataset(path)


# broken records


BROKEN = {
    "no messages": ({"messages": [talk("q", "a"), None]}, "expected 'messages'; got 'id'"),
    "empty messages": ({"messages": [talk("q", "a"), []]}, "'messages' must be a non-empty list"),
    "a text": ({"messages": ["q", "q"]}, "'messages' is a string, but not JSON"),
    "texts": ({"messages": [["q"], ["q"]]}, "a turn must be an object"),
    "an unknown speaker": ({"messages": [[{"from": "bot", "value": "x"}]] * 2}, "'from' must be one of human"),
    "no value": ({"messages": [[{"from": "human", "value": None}]] * 2}, "a turn must be an object"),
    "an unknown role": ({"messages": [[{"role": "tool", "content": "x"}]] * 2}, "'role' must be one of human"),
    "no content": ({"messages": [[{"role": "user", "content": None}]] * 2}, "a turn must be an object"),
    "an unknown item": (
        {"messages": [[{"role": "user", "content": [{"type": "audio"}]}]] * 2},
        "must be of type text, image or video",
    ),
    "a null pair": ({"texts": [[{"user": "q", "assistant": None}]] * 2}, "the answer must be a string, got None"),
    "no question": (
        {"question": ["q", None], "answer": ["a", "b"]},
        "expected 'question' and 'answer'; got 'answer', 'id'",
    ),
    "no caption": ({"caption": ["x", None], "image": [encoded()] * 2}, "expected 'caption'; got 'image', 'id'"),
    "a caption alone": ({"caption": ["x", "y"], "image": [encoded(), None]}, "a caption but no image"),
    "an image of another type": (
        {"caption": ["x", "y"], "image": [3, 4]},
        "image 0 of 'image' must be bytes, base64 or a path, got 4",
    ),
    "an image that is null": (
        {"caption": ["x", "y"], "image": [[encoded()], [None]]},
        "must be bytes, base64 or a path, got None",
    ),
    "an empty image": (
        {"caption": ["x", "y"], "image": [{"bytes": None, "path": None}, {"bytes": None, "path": ""}]},
        "must be bytes, base64 or a path",
    ),
}


@pytest.mark.parametrize("columns, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named(tmp_path, columns, message):
    source = HFDataset(save(tmp_path, {**columns, "id": ["x", "y"]}))
    with pytest.raises(BadSample, match=rf"^data record 1 \(id y\): .*{message}"):
        source[1]


# forms of other projects


@pytest.mark.parametrize("name, sep", [("data.csv", ","), ("data.tsv", "\t")])
def test_tables_of_text_are_read(tmp_path, name, sep):
    (tmp_path / "a.png").write_bytes(encoded())
    rows = [("image", "question", "label"), ("a.png", "How many?", "3"), ("a.png", "What?", "7")]
    (tmp_path / name).write_text("\n".join(sep.join(row) for row in rows))
    source = HFDataset(tmp_path / name, images=tmp_path)
    assert texts(source) == [["<image>\nHow many?", "3"], ["<image>\nWhat?", "7"]] and colors(source, 0) == [RED]


@pytest.mark.parametrize("name, sep", [("data.csv", ","), ("data.tsv", "\t")])
def test_cells_are_read_as_they_are_written(tmp_path, name, sep):
    """Not as numbers, dates or missing values."""
    answers = ["007", "3", "1.50", "12345678901234567890", "NA", "None", "True", "2020-01-02", "nan"]
    rows = [sep.join(("question", "answer")), *(sep.join(("q", answer)) for answer in answers)]
    (tmp_path / name).write_text("\n".join(rows))
    assert [said[1] for said in texts(HFDataset(tmp_path / name))] == answers


def test_an_empty_cell_is_a_missing_value(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\nq,3\nr,\n")
    source = HFDataset(tmp_path / "data.csv")
    assert source[0].turns[1].text == "3"
    with pytest.raises(BadSample, match="expected 'question' and 'answer'"):
        source[1]


def test_tables_that_would_be_misread_are_refused(tmp_path):
    (tmp_path / "data.tsv").write_text('question\tanswer\nq\t"hello\nr\tb\ns\tc"\n')
    with pytest.raises(BadSample, match="record 0 cannot be read: 'answer' has tabs and line breaks"):
        HFDataset(tmp_path / "data.tsv")[0]
    (tmp_path / "a.csv").write_text("question,answer\nq,a\n")
    (tmp_path / "b.csv").write_text("question,label\nq,a\n")
    with pytest.raises(ValueError, match=r"b\.csv has the columns question, label, but .*a\.csv has question, answer"):
        HFDataset(tmp_path / "?.csv")
    with pytest.raises(ValueError, match="name=other selects a configuration of a Hub ID"):
        HFDataset(tmp_path / "a.csv", name="other")


def test_labels_are_read_by_their_names(tmp_path):
    features = {"query": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    source = HFDataset(save(tmp_path, {"query": ["q", "r"], "label": [1, 0]}, datasets.Features(features)))
    assert texts(source) == [["q", "dog"], ["r", "cat"]]


def test_each_of_several_captions_is_a_record(tmp_path):
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    columns = {"image": [encoded(), encoded(BLUE)], "captions": [["a", "b", "c"], ["d"]]}
    source = HFDataset(save(tmp_path, columns, datasets.Features(features)))
    assert texts(source) == [["<image>", word] for word in "abcd"]
    assert [colors(source, i) for i in range(4)] == [[RED], [RED], [RED], [BLUE]]
    assert source[1].turns[1].grading.captions == ("a", "b", "c")
    assert [source[i].id for i in (2, 3)] == ["data record 2", "data record 3"]


def test_values_that_the_library_stores_as_json_are_decoded(tmp_path):
    """Messages whose content is text in one turn and items in the next: the type is mixed."""
    (tmp_path / "a.png").write_bytes(encoded())
    talks = [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
        ],
        [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
    ]
    rows = [{"messages": talks[0], "image": "a.png"}, {"messages": talks[1], "image": None}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = HFDataset(tmp_path / "data.jsonl", images=tmp_path)
    assert "Json" in str(source.reader.features["messages"])
    assert texts(source) == [["<image>q", "a"], ["r", "b"]] and colors(source, 0) == [RED]


@pytest.mark.parametrize("name", ["img", "mask"])
def test_an_image_column_that_nothing_reads_is_an_error_at_once(tmp_path, name):
    columns = {"question": ["q"], "answer": ["a"], name: [encoded()]}
    features = {"question": datasets.Value("string"), "answer": datasets.Value("string"), name: datasets.Image()}
    path = save(tmp_path, columns, datasets.Features(features))
    with pytest.raises(
        ValueError, match=rf"nothing reads the column {name} \(Image\): set data\.columns\.image={name}"
    ):
        HFDataset(path)
    assert colors(HFDataset(path, columns={"image": name}), 0) == [RED]
    assert HFDataset(path, ignored=[name])[0].images == ()


def test_other_columns_are_listed_as_unused(tmp_path):
    source = HFDataset(save(tmp_path, {"question": ["q"], "answer": ["a"], "source": ["x"], "width": [3]}))
    assert sorted(source[0].unused) == ["source", "width"]
