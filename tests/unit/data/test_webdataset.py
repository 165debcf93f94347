"""Tar shards: the same records as with tarfile, and all kinds of broken shards."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vlmtrain.data import file_index, webdataset
from vlmtrain.data.records import BadSample, Turn, check_conversation
from vlmtrain.data.webdataset import WebDataset, shard_paths

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(color: tuple[int, int, int] = RED, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(out, format)
    return out.getvalue()


def talk(*values: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]}


def write(path: Path, members: list[tuple[str, object]], format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a shard of (name, content): bytes, text, an object for JSON, or a TarInfo for members without content."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            data = content.encode() if isinstance(content, str) else content
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def texts(source: WebDataset) -> list[list[str]]:
    return [[turn.text for turn in source[i].turns] for i in range(len(source))]


def colors(source: WebDataset, index: int) -> list[tuple[int, ...]]:
    return [image.load().getpixel((0, 0)) for image in source[index].images]


def test_members_may_be_videos(tmp_path):
    """Their bytes are those of the member; the file is decoded in place."""
    clip = b"not a video"
    record = {**talk("<image> then <video>", "a"), "video": "a.mp4", "video_start": 1, "video_end": 2.5}
    shard = write(
        tmp_path / "s.tar",
        [("a.mp4", clip), ("a.png", picture()), ("a.json", record), ("b.webm", clip), ("b.txt", "c")],
    )
    first, second = WebDataset(shard)
    assert [type(medium).__name__ for medium in first.media] == ["ImageInFile", "VideoInFile"]
    video = first.media[1]
    assert (video.open().read(), video.start, video.end) == (clip, 1, 2.5)
    assert [turn.text for turn in second.turns] == ["<image>", "c"] and second.media[0].open().read() == clip
    lost = write(tmp_path / "t.tar", [("a.json", {**talk("<video>", "a"), "video": "a.mp4"})])
    with pytest.raises(BadSample, match=r"the record has a video, but data\.videos is not set"):
        WebDataset(lost)[0]


def test_members_of_one_name_are_a_record(tmp_path):
    shard = write(
        tmp_path / "shard.tar",
        [
            ("0001.png", picture()),
            ("0001.json", {"id": "other", "image": "/etc/passwd", **talk("See <image>?", "red")}),
            ("0002.txt", "a blue square\n"),
            ("0002.jpg", picture(BLUE, "JPEG")),
            ("0003.json", talk("1 + 1?", "2")),
        ],
    )
    source = WebDataset(shard)
    assert texts(source) == [["See <image>?", "red"], ["<image>", "a blue square\n"], ["1 + 1?", "2"]]
    assert [turn.role for turn in source[0].turns] == ["user", "assistant"]
    assert [source[i].id for i in range(3)] == [f"shard.tar record {i} (id 000{i + 1})" for i in range(3)]
    assert colors(source, 0) == [RED] and source[2].images == ()
    assert np.abs(np.subtract(colors(source, 1)[0], BLUE)).max() < 6
    for i in range(3):
        check_conversation(source[i])
        for image in source[i].images:
            image.check()
    for index in (3, -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(
    "words, expected",
    [
        ({"a.json": talk("Color?", "red", "Sure?", "yes")}, ["<image>\n<image>\nColor?", "red", "Sure?", "yes"]),
        (
            {"a.json": talk("Color?", "red", "Of <image><image>?", "yes")},
            ["Color?", "red", "Of <image><image>?", "yes"],
        ),
        ({"a.json": {"question": "Color?", "answer": "red"}}, ["<image>\n<image>\nColor?", "red"]),
        ({"a.json": {"question": "<image>?<image>", "answer": "red"}}, ["<image>?<image>", "red"]),
        ({"a.json": {"caption": "red", "url": "x"}}, ["<image>\n<image>", "red"]),
        ({"a.caption": "red"}, ["<image>\n<image>", "red"]),
        ({"a.TXT": "\ufeffr\u00e9d <image>"}, ["<image>\n<image>", "r\u00e9d <image>"]),
        ({"a.json": {"url": "x"}, "a.txt": "red"}, ["<image>\n<image>", "red"]),
        ({"a.json": {"caption": "old"}, "a.txt": "red"}, ["<image>\n<image>", "red"]),
        ({"a.json": talk("Color?", "red"), "a.txt": "x", "a.cls": "3"}, ["<image>\n<image>\nColor?", "red"]),
    ],
)
def test_text_of_every_form(tmp_path, words, expected):
    pictures = [("a.0.png", picture()), ("a.1.PNG", picture(BLUE))]
    (conversation,) = source = WebDataset(write(tmp_path / "a.tar", [*pictures, *words.items()]))
    assert [turn.text for turn in conversation.turns] == expected and colors(source, 0) == [RED, BLUE]
    check_conversation(conversation)


def test_several_images_are_in_the_order_of_their_numbers(tmp_path):
    names = ["a.10.png", "a.2.png", "a.1.jpeg", "a.1.b.png", "a.webp"]
    source = WebDataset(write(tmp_path / "a.tar", [*((name, picture()) for name in names), ("a.txt", "x")]))
    assert [image.name for image in source[0].images] == ["a.1.b.png", "a.1.jpeg", "a.2.png", "a.10.png", "a.webp"]


def test_folders_hidden_files_and_files_of_no_record(tmp_path):
    folder = tarfile.TarInfo()
    folder.type = tarfile.DIRTYPE
    members = [
        ("./x.y", folder),
        ("./x.y/a.txt", "one"),
        ("z/a.txt", "two"),
        ("README", "none"),
        ("x.y/.a.txt", "none"),
        ("./x.y/a.png", picture()),
        ("z/a.b.png", picture(BLUE)),
    ]
    source = WebDataset(write(tmp_path / "a.tar", members))
    assert texts(source) == [["<image>", "one"], ["<image>", "two"]]
    assert [source[i].id for i in (0, 1)] == ["a.tar record 0 (id x.y/a)", "a.tar record 1 (id z/a)"]
    assert colors(source, 0) == [RED] and colors(source, 1) == [BLUE]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_are_what_tarfile_reads(tmp_path, format):
    random = np.random.default_rng(0)
    members = []
    for i in range(50):
        name = f"{'deep/' * (i % 3)}{'n' * (i % 90)}é{i}"
        members += [(f"{name}.bin", random.bytes(random.integers(0, 3000))), (f"{name}.txt", f"caption é {i}")]
        members += [(f"{name}.png", random.bytes(random.integers(0, 3000)))]
    if format != tarfile.USTAR_FORMAT:
        members += [("l" * 500 + ".png", b"long"), ("l" * 500 + ".txt", "long")]
    source = WebDataset(write(tmp_path / "a.tar", members, format))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar}
    assert len(source) == len(members) // 3 + (format != tarfile.USTAR_FORMAT)
    for i in range(len(source)):
        (image,) = source[i].images
        assert image.open().read() == expected.pop(image.name)
        assert source[i].turns[1].text.encode() == expected.pop(image.name.replace(".png", ".txt"))
    assert all(name.endswith(".bin") for name in expected)


def test_names_in_another_encoding_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("\xe9.png", picture()), ("\xe9.txt", b"x"), ("\xe8.png", b"none"), ("\xe8.txt", b"y")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    source = WebDataset(tmp_path / "a.tar")
    assert source[0].id == r"a.tar record 0 (id \udce9)" and colors(source, 0) == [RED]
    with pytest.raises(BadSample, match=r"image \\udce8\.png in .*a\.tar is not an image"):
        source[1].images[0].load()


BROKEN = {
    "no text": ([("b.png", picture())], "expected a .txt, a .caption or a .json, got none of these"),
    "a json of another kind": (
        [("b.json", {"url": 1})],
        "expected 'conversations', or 'dialogues', or 'question' and 'answer', or 'caption'; got 'url'",
    ),
    "two captions": (
        [("b.png", picture()), ("b.txt", "x"), ("b.caption", "y")],
        "expected one .txt or .caption, got both",
    ),
    "a caption but no image": ([("b.txt", "x")], "a caption but no image"),
    "a caption of another type": (
        [("b.png", picture()), ("b.json", {"caption": 3})],
        "the caption must be a string, got 3",
    ),
    "no answer": ([("b.json", {"question": "x"})], "expected .*'question' and 'answer', or 'caption'; got 'question'"),
    "a broken json": ([("b.json", '{"question":')], r"member b\.json is not valid JSON"),
    "a deep json": ([("b.json", "[" * 100_000)], "nested too deeply"),
    "a json of latin letters": ([("b.json", b'{"question": "\xe9"}')], r"member b\.json is not valid UTF-8"),
    "a list": ([("b.json", "[]")], r"member b\.json must contain an object, got list"),
    "broken turns": ([("b.json", {"conversations": [{"from": "bot", "value": "x"}]})], "'from' must be one of"),
    "no turns": ([("b.json", {"conversations": []})], "'conversations' must be a non-empty list"),
    "a text of latin letters": ([("b.txt", b"\xe9"), ("b.png", picture())], r"member b\.txt is not valid UTF-8"),
    "one name twice": (
        [("b.png", picture()), ("./b.png", picture()), ("b.txt", "x")],
        "two members with the same name",
    ),
    "an absolute name": ([("/b.png", picture()), ("/b.txt", "x")], r"member /b\.png has a path that leads out"),
    "a name upwards": ([("x/../../b.png", picture()), ("x/../../b.txt", "x")], "has a path that leads out"),
}


@pytest.mark.parametrize("members, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_and_leaves_the_others_alone(tmp_path, members, message):
    good = [("good.png", picture()), ("good.txt", "red")]
    last = [("last.png", picture()), ("last.txt", "red")]
    source = WebDataset(write(tmp_path / "data.tar", [*good, *members, *last]))
    assert len(source) == 3 and source[0].turns == source[2].turns
    with pytest.raises(BadSample, match=rf"^data\.tar record 1 \(id .*b\): .*{message}"):
        source[1]


@pytest.mark.parametrize("kind, name", [(b"1", "a link"), (b"2", "a link"), (b"3", "a device"), (b"6", "a device")])
def test_a_member_that_is_not_a_file_is_a_bad_sample(tmp_path, kind, name):
    special = tarfile.TarInfo()
    special.type, special.linkname = kind, "/etc/passwd"
    source = WebDataset(write(tmp_path / "a.tar", [("a.png", special), ("a.txt", "x"), ("b.json", talk("q", "a"))]))
    with pytest.raises(BadSample, match=rf"record 0 \(id a\): member a\.png is {name}"):
        source[0]
    assert len(source) == 2 and source[1].turns[0].text == "q"


def test_a_sparse_member_is_a_bad_sample(tmp_path):
    header = tarfile.TarInfo("a.png")
    header.type = tarfile.GNUTYPE_SPARSE
    source = WebDataset(write(tmp_path / "a.tar", [("a.png", header), ("a.txt", "x")]))
    with pytest.raises(BadSample, match=r"member a\.png is a sparse file"):
        source[0]


def test_members_of_absurd_size_are_bad_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_IMAGE", 50)
    monkeypatch.setattr(webdataset, "MAX_WORDS", 10)
    members = [("a.png", picture()), ("a.txt", "x"), ("b.gif", b"small"), ("b.txt", "x" * 11)]
    source = WebDataset(write(tmp_path / "a.tar", members))
    for i, name in enumerate((r"a\.png has \d\d bytes: too many", r"b\.txt has 11 bytes: too many")):
        with pytest.raises(BadSample, match=name):
            source[i]


def test_a_huge_size_does_not_affect_the_records_before_it(tmp_path):
    data = bytearray(write(tmp_path / "a.tar", [("a.json", talk("q", "a")), ("b.json", talk("q", "b"))]).read_bytes())
    for size in (10**9, 2**62, 2**70):
        header = tarfile.TarInfo("b.json")
        header.size = size
        data[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(data)
        source = WebDataset(tmp_path / "a.tar")
        assert len(source) == 2 and source[0].turns[1].text == "a"
        with pytest.raises(BadSample, match=r"member b\.json is truncated"):
            source[1]


def test_a_negative_size_is_an_error_and_not_an_endless_loop(tmp_path):
    data = bytearray(write(tmp_path / "a.tar", [("a.json", talk("q", "a")), ("b.json", talk("q", "b"))]).read_bytes())
    header = tarfile.TarInfo("b.json")
    header.size = -512
    data[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar has no readable tar header at byte 1024: a negative size"):
        WebDataset(tmp_path / "a.tar")


def test_a_truncated_shard_keeps_its_complete_records(tmp_path):
    members = [(f"{i}.{kind}", content) for i in range(4) for kind, content in (("txt", "x"), ("png", picture()))]
    whole = write(tmp_path / "a.tar", members).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        headers = tar.getmembers()
    assert len(WebDataset(tmp_path / "a.tar")) == 4
    png = headers[5]
    for cut in (png.offset_data, png.offset_data + 1, png.offset_data + png.size - 1):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        source = WebDataset(tmp_path / "a.tar")
        assert len(source) == 3 and [source[i].turns[1].text for i in (0, 1)] == ["x", "x"]
        with pytest.raises(
            BadSample, match=rf"^a\.tar record 2 \(id 2\): member 2\.png is truncated: it has {png.size} bytes"
        ):
            source[2]
    (tmp_path / "a.tar").write_bytes(whole[: png.offset_data + png.size])  # only the padding is missing
    assert colors(WebDataset(tmp_path / "a.tar"), 2) == [RED]
    (tmp_path / "a.tar").write_bytes(whole[: headers[6].offset])  # only the end marker is missing
    assert len(WebDataset(tmp_path / "a.tar")) == 3
    for cut in (headers[6].offset + 100, headers[6].offset + 511):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(
            ValueError, match=rf"a\.tar has no readable tar header at byte {headers[6].offset}"
        ) as error:
            WebDataset(tmp_path / "a.tar")
        assert not isinstance(error.value, BadSample)


@pytest.mark.parametrize("member", [0, 3])
def test_a_header_that_cannot_be_read_is_an_error_that_says_where(tmp_path, member):
    path = write(tmp_path / "a.tar", [(f"{i}.json", talk("q", "a")) for i in range(5)])
    with tarfile.open(path) as tar:
        at = tar.getmembers()[member].offset
    data = bytearray(path.read_bytes())
    data[at + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"shard .*a\.tar has no readable tar header at byte {at}"):
        WebDataset(path)


def test_damaged_shards_are_errors_and_nothing_else(tmp_path):
    members = [(f"{'n' * 120 * (i % 2)}é{i}.json", talk("q", "a")) for i in range(6)]
    whole = {
        kind: write(tmp_path / "a.tar", members, kind).read_bytes() for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    }
    random = np.random.default_rng(0)
    for i in range(300):
        data = bytearray(whole[(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[i % 2]])
        for at in random.integers(0, len(data), random.integers(1, 8)):
            data[at] = random.integers(0, 256)
        (tmp_path / "a.tar").write_bytes(data[: random.integers(1, len(data))] if i % 3 == 0 else data)
        try:
            source = WebDataset(tmp_path / "a.tar")
        except ValueError as error:
            assert "a.tar" in str(error)
            continue
        for record in range(len(source)):
            try:
                source[record]
            except BadSample as error:
                assert f"record {record}" in str(error)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_shard_is_refused_with_what_to_do(tmp_path, name):
    data = write(tmp_path / "x", [("a.json", talk("q", "a"))]).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data))
    with pytest.raises(
        ValueError, match=rf"{name} is compressed, so records cannot be read by offset: unpack it with gunzip"
    ):
        WebDataset(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b"text", b"text" * 1000])
def test_a_file_that_is_not_a_tar_file_is_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"shard .*a\.tar has no readable tar header at byte 0"):
        WebDataset(tmp_path / "a.tar")


def test_shards_without_records_are_refused_only_if_all_are(tmp_path):
    write(tmp_path / "a.tar", [])
    write(tmp_path / "b.tar", [("README", "x")])
    with pytest.raises(ValueError, match="is empty: no records"):
        WebDataset(tmp_path)
    write(tmp_path / "c.tar", [("c.json", talk("q", "c"))])
    assert texts(WebDataset(tmp_path)) == [["q", "c"]]
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "e.tar", [("e.json", talk("q", "e"))])
    assert texts(WebDataset(tmp_path)) == [["q", "c"], ["q", "e"]]


# shards


@pytest.fixture
def shards(tmp_path) -> Path:
    for i in range(12):
        write(tmp_path / f"shard-{i:03d}.tar", [(f"{i}-{j}.json", talk("q", f"{i}-{j}")) for j in range(i % 3)])
    return tmp_path


EVERY = [f"{i}-{j}" for i in range(12) for j in range(i % 3)]


@pytest.mark.parametrize(
    "path", ["", "*.tar", "shard-{000..011}.tar", "shard-0{00,01,0[2-9],1?}.tar", "shard-{0..0}{00..11}.tar"]
)
def test_every_way_to_name_shards_gives_them_in_order(shards, path):
    source = WebDataset(str(shards / path))
    assert [turns[1] for turns in texts(source)] == EVERY
    assert source[1].id == "shard-002.tar record 0 (id 2-0)" and source[2].id == "shard-002.tar record 1 (id 2-1)"


@pytest.mark.parametrize(
    "path, names",
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..1}-{a,b}", ["0-a", "0-b", "1-a", "1-b"]),
        ("{000..001}", ["000", "001"]),
    ],
)
def test_braces_are_expanded_as_by_a_shell(tmp_path, path, names):
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    assert shard_paths(tmp_path / f"{path}.tar") == [tmp_path / f"{name}.tar" for name in names]


@pytest.mark.parametrize(
    "path, message",
    [
        ("absent.tar", r"shard .*absent\.tar does not exist$"),
        ("absent-*.tar", r"shard .*absent-\*\.tar does not exist"),
        ("shard-{000..012}.tar", r"shard .*shard-012\.tar does not exist \(of .*shard-\{000\.\.012\}\.tar\)"),
        ("shard-{5..1}.tar", r"\{5\.\.1\} must count up"),
        ("shard-{x}.tar", r"expected \{first\.\.last\} or \{one,other\}, got \{x\}"),
        ("shard-{0..999999999999}.tar", "must count upwards and give at most 100000 shards"),
        ("{0..9999}-{0..9999}.tar", "expands to more than 100000 shards"),
    ],
)
def test_missing_shards_are_an_error(shards, path, message):
    with pytest.raises(ValueError, match=message):
        WebDataset(shards / path)


@pytest.mark.parametrize(
    "path", ["https://host/a-{000..012}.tar", "s3://bucket/a.tar", "pipe:cat a.tar", "hf://datasets/a/b.tar", "PIPE:ls"]
)
def test_remote_shards_are_refused(path):
    with pytest.raises(ValueError, match=r"shards must be on a local disk"):
        WebDataset(path)


def test_a_folder_without_shards_is_an_error(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match=r"contains no \.tar files; unpack compressed files"):
        WebDataset(tmp_path)


def test_workers_and_copies_read_the_same(shards):
    source = WebDataset(shards)
    source[3]
    loader = DataLoader(source, sampler=list(range(len(source))) * 5, batch_size=None, num_workers=2)
    assert [conversation.turns[1].text for conversation in loader] == EVERY * 5
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)
    assert source[0].turns[0] == Turn("user", "q")


def test_headers_are_read_once(shards, monkeypatch):
    read, original = [], webdataset._read_headers
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "cache"))
    monkeypatch.setattr(file_index, "WORTHWHILE", 0)
    monkeypatch.setattr(webdataset, "_read_headers", lambda path: read.append(path.name) or original(path))
    for _ in range(2):
        assert [turns[1] for turns in texts(WebDataset(shards))] == EVERY
    assert len(read) == 12
    write(shards / "shard-001.tar", [("new.json", talk("q", "new"))])
    os.utime(shards / "shard-001.tar", ns=(1, 1))
    assert texts(WebDataset(shards))[0] == ["q", "new"] and read[12:] == ["shard-001.tar"]


def test_a_shard_that_changes_stops_the_run(tmp_path):
    path = write(tmp_path / "a.tar", [("a.json", talk("q", "a"))])
    source = WebDataset(path)
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(ValueError, match=r"a\.tar has changed since it was opened") as error:
        source[0]
    assert not isinstance(error.value, BadSample)
