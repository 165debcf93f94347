"""LLaVA's format: the records of valid files, and the errors for broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from vlmtrain.data.file_lists import read_list
from vlmtrain.data.llava import LlavaJson, open_llava
from vlmtrain.data.records import BadSample, Turn
from vlmtrain.data.sources import first_look

DEEP = json.loads("[" * 500 + "]" * 500)
TALK = [{"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name, color in (("red.png", (255, 0, 0)), ("deep/blue.png", (0, 0, 255))):
        Image.new("RGB", (4, 4), color).save(folder / name)
    return folder


def read(folder: Path, records: object, images: Path | None = None, name: str = "data.json") -> LlavaJson:
    text = records if isinstance(records, str) else json.dumps(records)
    (folder / name).write_text(text, encoding="utf-8")
    return LlavaJson(folder / name, images)


def marked(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_json_gives_turns_and_images_in_order(tmp_path, images):
    records = [
        {"id": "a", "image": "red.png", "conversations": marked("<image>\nColor?", "red", "Sure?", "yes")},
        {"id": 7, "conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
        {"image": ["deep/blue.png", "red.png"], "conversations": marked("see <image> and <image>", "blue, red")},
    ]
    one, two, three = read(tmp_path, records, images)
    assert one.turns == (
        Turn("user", "<image>\nColor?"),
        Turn("assistant", "red"),
        Turn("user", "Sure?"),
        Turn("assistant", "yes"),
    )
    assert one.id == "data.json record 0 (id a)" and two.id == "data.json record 1 (id 7)"
    assert three.id == "data.json record 2"
    assert [turn.role for turn in two.turns] == ["system", "user", "assistant"] and two.images == ()
    assert [picture.load().getpixel((0, 0)) for picture in three.images] == [(0, 0, 255), (255, 0, 0)]
    assert [picture.load().getpixel((0, 0)) for picture in one.images] == [(255, 0, 0)]


def test_jsonl_gives_the_same_as_json(tmp_path, images):
    records = [
        {"id": i, "image": "red.png", "conversations": marked("<image>", f"line\u2028end\x85é{i}")} for i in range(3)
    ]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    from_lines = read(tmp_path, lines, images, "data.jsonl")
    from_json = read(tmp_path, records, images)
    assert [c.turns for c in from_lines] == [c.turns for c in from_json]
    assert [c.images for c in from_lines] == [c.images for c in from_json]
    windows = read(tmp_path, lines.replace("\n", "\r\n"), images, "windows.jsonl")
    assert [c.turns for c in windows] == [c.turns for c in from_json]


def test_text_only_data_needs_no_folder(tmp_path):
    (conversation,) = read(tmp_path, [{"id": 1, "conversations": TALK}])
    assert conversation.images == () and conversation.turns[1] == Turn("assistant", "red")
    for nothing in (None, "", []):
        assert read(tmp_path, [{"image": nothing, "conversations": TALK}])[0].images == ()


def test_further_keys_do_no_harm(tmp_path, images):
    record = {"id": "a", "image": "red.png", "conversations": marked("<image>", "red"), "images": [], "source": [None]}
    record["conversations"][0]["language"] = "x"
    plain = {key: record[key] for key in ("id", "image")} | {"conversations": marked("<image>", "red")}
    one, two = read(tmp_path, [record, plain], images)
    assert one.turns == two.turns and one.images == two.images


def test_an_id_of_any_kind_is_shown_in_one_short_line(tmp_path):
    for id, name in (
        (7, "7"),
        ("a\nb\ud800", r"a\nb\ud800"),
        (0.5, "0.5"),
        ("x" * 9999, f"{'x' * 100}…{'x' * 100}"),
        (DEEP, "[[[[[...]]]]]"),
    ):
        assert read(tmp_path, [{"id": id, "conversations": TALK}])[0].id == f"data.json record 0 (id {name})"
    assert read(tmp_path, [{"id": None, "conversations": TALK}])[0].id == "data.json record 0"


def test_chat_role_names_are_accepted_too(tmp_path):
    talk = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    assert read(tmp_path, [{"conversations": talk}])[0].turns == (Turn("user", "q"), Turn("assistant", "a"))


BROKEN = {
    "not an object": ("text", "expected an object, got str"),
    "null": (None, "expected an object, got NoneType"),
    "no conversations": (
        {"id": "x"},
        "expected 'conversations', or 'dialogues', or 'question' and 'answer', or 'caption'; got 'id'",
    ),
    "empty conversations": ({"id": "x", "conversations": []}, "'conversations' must be a non-empty list"),
    "conversations of another type": ({"id": "x", "conversations": "hi"}, "is a string, but not JSON"),
    "a turn that is text": ({"id": "x", "conversations": ["hi"]}, "a turn must be an object"),
    "a turn without value": ({"id": "x", "conversations": [{"from": "human"}]}, "a turn must be an object"),
    "a value of another type": (
        {"id": "x", "conversations": [{"from": "human", "value": 3}]},
        "'value' must be a string",
    ),
    "a turn without role": ({"id": "x", "conversations": [{"value": "q"}]}, "'from' must be one of human, .*got None"),
    "an unknown role": ({"id": "x", "conversations": [{"from": "bot", "value": "q"}]}, "'from' must be .*got 'bot'"),
    "a role of another type": ({"id": "x", "conversations": [{"from": ["human"], "value": "q"}]}, "'from' must be"),
    "an image of another type": (
        {"id": "x", "image": 5, "conversations": TALK},
        "of 'image' must be bytes, base64 or a path",
    ),
    "an empty image name": (
        {"id": "x", "image": [""], "conversations": TALK},
        "of 'image' must be bytes, base64 or a path",
    ),
    "images of another type": (
        {"id": "x", "image": ["red.png", 5], "conversations": TALK},
        "of 'image' must be bytes, base64 or a path",
    ),
    "an absolute path": ({"id": "x", "image": "/etc/passwd", "conversations": TALK}, "leads out of"),
    "a path upwards": ({"id": "x", "image": "../data.json", "conversations": TALK}, "leads out of"),
    "a path that turns back": (
        {"id": "x", "image": "deep/../../a", "conversations": TALK},
        "leads out of",
    ),
    "a path in Windows' way": ({"id": "x", "image": "deep\\blue.png", "conversations": TALK}, "has backslashes"),
    "a list within a list": (
        {"id": "x", "image": [["red.png"]], "conversations": TALK},
        "of 'image' must be bytes, base64 or a path",
    ),
    "a deep value": ({"id": "x", "conversations": [DEEP]}, "a turn must be an object"),
    "a deep role": ({"id": "x", "conversations": [{"from": DEEP, "value": "q"}]}, "'from' must be one of"),
}


@pytest.mark.parametrize("record, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_and_leaves_the_others_alone(tmp_path, images, record, message):
    good = {"id": "good", "image": "red.png", "conversations": marked("<image>", "red")}
    source = read(tmp_path, [good, record, good], images)
    assert len(source) == 3
    assert source[0].turns == source[2].turns
    name = r"data\.json record 1 \(id x\)" if isinstance(record, dict) else r"data\.json record 1"
    with pytest.raises(BadSample, match=f"^{name}: .*{message}"):
        source[1]
    assert len(first_look(source, limit=5).problems) == 1


def test_an_image_without_a_folder_is_a_bad_sample(tmp_path):
    source = read(tmp_path, [{"id": "x", "image": "red.png", "conversations": marked("<image>", "red")}])
    with pytest.raises(BadSample, match=r"record 0 \(id x\): the record has an image, but data\.images is not set"):
        source[0]


def pictured(path: str) -> list[dict]:
    return [{"id": "x", "image": path, "conversations": marked("<image>", "red")}]


def test_links_may_not_lead_out_of_the_folder_unless_that_is_allowed(tmp_path, images):
    (tmp_path / "private").mkdir()
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "private" / "green.png")
    (images / "file.png").symlink_to(tmp_path / "private" / "green.png")
    (images / "folder").symlink_to(tmp_path / "private")
    (images / "inside.png").symlink_to(images / "deep" / "blue.png")
    (images / "twice.png").symlink_to(images / "file.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (tmp_path / "images-too").mkdir()
    (images / "beside").symlink_to(tmp_path / "images-too")
    outside = ["file.png", "folder/green.png", "twice.png", "../private/green.png", str(tmp_path / "private/green.png")]
    for path in [*outside, "beside/x.png"]:
        source = read(tmp_path, pictured(path), images)
        with pytest.raises(
            BadSample, match=r"\(id x\): image path .* leads out of data\.images; data\.outside_images=true"
        ):
            source[0]
    for path in outside:
        (picture,) = LlavaJson(read(tmp_path, pictured(path), images).records.file, images, outside=True)[0].images
        assert picture.load().getpixel((0, 0)) == (0, 255, 0)
    for path in ("inside.png", "deep/../deep/blue.png", str(images / "deep/blue.png")):
        assert read(tmp_path, pictured(path), images)[0].images[0].load().getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(BadSample, match=r"loop\.png"):
        read(tmp_path, pictured("loop.png"), images)[0].images[0].load()


def test_a_folder_that_is_itself_a_link_is_followed(tmp_path, images):
    (tmp_path / "link").symlink_to(images)
    for folder in (tmp_path / "link", str(tmp_path / "link") + "/"):
        assert read(tmp_path, pictured("deep/blue.png"), folder)[0].images[0].load().getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    "path",
    ["a\0b.png", "a\0b/c.png", "n" * 300, "n/" * 3000, "n" * 300 + "/a.png", "\ud800.png", "\ud800/a.png"]
    + ["deep", "deep/", ".", "..", "deep/..", "/", "red.png/a.png", "red.png/..", "~"],
)
def test_any_bad_path_is_only_a_bad_sample(tmp_path, images, path, outside):
    (tmp_path / "data.json").write_text(json.dumps(pictured(path)))
    with pytest.raises(BadSample) as error:
        LlavaJson(tmp_path / "data.json", images, outside)[0].images[0].load()
    str(error.value).encode()


def test_an_absolute_path_needs_no_folder_if_outside_images_are_allowed(tmp_path, images):
    read(tmp_path, pictured(str(images / "red.png")))
    (picture,) = open_llava(tmp_path / "data.json", None, outside=True)[0].images
    assert picture.load().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(BadSample, match=r"data\.images is not set"):
        open_llava(tmp_path / "data.json", None)[0]


def test_problems_are_found_before_training(tmp_path, images):
    (images / "short.png").write_bytes((images / "red.png").read_bytes()[:40])
    pictures = ["red.png", "missing.png", "short.png", "red.png", "half\0.png"]
    talks = [marked("<image>", "a")] * 3 + [marked("no mark", "a")] + [marked("<image>", "a")]
    records = [{"id": i, "image": p, "conversations": t} for i, (p, t) in enumerate(zip(pictures, talks))]
    problems = first_look(read(tmp_path, records, images), limit=10).problems
    wanted = ("missing.png does not exist", "short.png", "(id 3): 0 <image>", "half")
    assert [part in text for part, text in zip(wanted, problems)] == [True] * 4
    assert len(problems) == 4
    assert first_look(read(tmp_path, records, images)).problems == problems[:1]


def test_repaired_records_are_counted_before_training(tmp_path, images):
    early, good, late = marked("q", "a", "r", "b")[1:], marked("q", "a"), marked("q", "a", "r")
    read(tmp_path, [{"conversations": turns} for turns in (early, good, late)])
    assert first_look(LlavaJson(tmp_path / "data.json", images, repair=True))[1:] == (2, 3)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("data.json", "", "data.json is empty: no records"),
        ("data.json", " \n", "data.json is empty: no records"),
        ("data.json", "[]", "data.json is empty: no records"),
        ("data.json", '[{"id": 1}', "data.json is not valid JSON: record 1, byte 10"),
        ("data.json", '{"id": 1}', "data.json must contain a list of records, got an object"),
        ("data.json", "null", "data.json must contain a list of records, got null"),
        ("data.jsonl", "\n\n", "data.jsonl is empty: no records"),
    ],
)
def test_a_broken_file_is_an_error_at_once(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text, None, name)
    assert not isinstance(error.value, BadSample)
    assert str(tmp_path) in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        LlavaJson(tmp_path / "absent.json", None)
    with pytest.raises(ValueError, match="cannot be read"):
        LlavaJson(tmp_path, None)
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(BadSample, match=r"latin\.json record 0 is not valid UTF-8"):
        LlavaJson(tmp_path / "latin.json", None)[0]


def test_a_missing_image_folder_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"data\.images=.*nowhere is not a folder"):
        read(tmp_path, [{"conversations": TALK}], tmp_path / "nowhere")


# mixtures


@pytest.fixture
def parts(tmp_path) -> Path:
    (tmp_path / "more").mkdir()
    for name, count in (("a.json", 10), ("more/b.jsonl", 7)):
        lines = [json.dumps({"id": f"{Path(name).stem}{i}", "conversations": TALK}) for i in range(count)]
        text = f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines)
        (tmp_path / name).write_text(text)
    return tmp_path


def mix(folder: Path, *entries: object, seed: int = 0) -> list[int]:
    """Indices of the records in a mixture."""
    (folder / "mix.yaml").write_text(json.dumps({"datasets": entries}))
    source = open_llava(folder / "mix.yaml", None, seed)
    return [int(source[i].id.split("record ")[1].split()[0]) for i in range(len(source))]


@pytest.mark.parametrize(
    "strategy, expected",
    [
        (None, range(10)),
        ("all", range(10)),
        ("first:3", range(3)),
        ("first:25%", range(3)),
        ("first:0.1%", range(1)),
        ("end:3", range(7, 10)),
        ("end:30%", range(7, 10)),
        ("end:100%", range(10)),
        ("first:11", range(10)),
        ("end: 999", range(10)),
        ("random:12", range(10)),
    ],
)
def test_a_mixture_selects_the_same_records_as_published_code(parts, strategy, expected):
    entry = {"json_path": "a.json"} | ({"sampling_strategy": strategy} if strategy else {})
    assert mix(parts, entry) == list(expected)


def test_the_files_of_a_mixture_follow_one_another(parts):
    absolute = {"json_path": str(parts / "more" / "b.jsonl"), "sampling_strategy": "end:2"}
    again = {"json_path": "more/b.jsonl", "sampling_strategy": "first:1"}
    assert mix(parts, {"json_path": "a.json", "sampling_strategy": "first:2"}, absolute, again) == [0, 1, 5, 6, 0]
    source = open_llava(parts / "mix.yaml", None)
    assert source[2].id == "b.jsonl record 5 (id b5)" and source[3].turns[1].text == "red"
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]
    assert len(list(source)) == 5


def test_a_mixture_reads_yaml_as_it_is_written(parts):
    text = """
    datasets:
      - json_path: a.json   # ten
        sampling_strategy: "first:10%"
      - json_path: more/b.jsonl
        sampling_strategy: all
    """
    (parts / "mix.yml").write_text(text)
    listed = [(part.path, part.strategy) for part in read_list(parts / "mix.yml")]
    assert listed == [(parts / "a.json", "first:10%"), (parts / "more/b.jsonl", "all")]
    assert len(open_llava(parts / "mix.yml", None)) == 8


def test_a_random_choice_is_fixed_by_the_seed(parts):
    entries = [{"json_path": "a.json", "sampling_strategy": "random:5"}] * 2
    chosen = mix(parts, *entries, seed=1)
    assert chosen == mix(parts, *entries, seed=1) and len(chosen) == 10
    assert len(set(chosen[:5])) == len(set(chosen[5:])) == 5
    others = [mix(parts, *entries, seed=seed) for seed in range(20)]
    assert len({tuple(other) for other in others}) > 15 and {i for other in others for i in other} == set(range(10))
    assert any(other[:5] != other[5:] for other in others)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must contain a non-empty list 'datasets', got None"),
        ("[]", "must contain a non-empty list 'datasets'"),
        ("datasets:", "must contain a non-empty list 'datasets'"),
        ("datasets: {a: b}", "must contain a non-empty list 'datasets'"),
        ("datasets: [", "is not valid YAML: .*line 1"),
        ("a: !!python/object/apply:os.system [false]", "is not valid YAML"),
        ("\0", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("datasets: [a.json]", r"datasets\[0\]: expected an object with 'json_path', got 'a\.json'"),
        ("datasets: [{json_path: a.json}, {}]", r"datasets\[1\]: 'json_path' must be a path, got None"),
        ("datasets: [{json_path: 3}]", "'json_path' must be a path, got 3"),
        ("datasets: [{json_path: a.json, sampling_stategy: all}]", "unknown key .*Did you mean 'sampling_strategy'"),
        ("datasets: [{json_path: a.json, sampling_strategy: half}]", "sampling_strategy must be all, or .*got 'half'"),
        ("datasets: [{json_path: a.json, sampling_strategy: first}]", "sampling_strategy must be"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:'}]", "sampling_strategy must be"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:-1'}]", "sampling_strategy must be"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:x%'}]", "sampling_strategy must be"),
        ("datasets: [{json_path: a.json, sampling_strategy: 5}]", "sampling_strategy must be .*got 5"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'end:0'}]", "end:0 selects no records"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:101%'}]", "first:101% selects no records, or more"),
        ("datasets: [{json_path: absent.json}]", r"absent\.json does not exist"),
        ("datasets: [{json_path: ''}]", "'json_path' must be a path"),
    ],
)
def test_a_broken_mixture_is_an_error_at_once(parts, text, message):
    (parts / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_llava(parts / "mix.yaml", None)
    assert not isinstance(error.value, BadSample) and str(parts) in str(error.value)


def test_a_mixture_that_cannot_be_read_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml does not exist"):
        open_llava(tmp_path / "absent.yaml", None)
    (tmp_path / "latin.yaml").write_bytes(b"datasets: \xe9")
    with pytest.raises(ValueError, match=r"latin\.yaml cannot be read"):
        open_llava(tmp_path / "latin.yaml", None)


# InternVL's meta JSON


def meta(folder: Path, **entry: object) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(folder / name / "x.png")
        record = {"image": "x.png", "conversations": marked("<image>", name)}
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"id": i, **record}) for i in range(10)))
    entries = {"one": {"annotation": "a.jsonl", "root": "a", **entry}, "two": {"annotation": "b.jsonl", "root": "b"}}
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


@pytest.mark.parametrize("repeat, count", [(1, 10), (2, 20), (0.3, 3), (1.5, 15)])
def test_a_meta_json_lists_files_with_their_image_folders(tmp_path, repeat, count):
    source = open_llava(meta(tmp_path, repeat_time=repeat, length=10, data_augment=False), None)
    said = [source[i].turns[1].text for i in range(len(source))]
    assert said == ["a"] * count + ["b"] * 10
    numbers = [source[i].id.split("(id ")[1].rstrip(")") for i in range(count)]
    assert numbers == [str(i % 10) for i in range(count)]  # a part is the first records, as in InternVL's code
    assert {source[i].images[0].path.parent.name for i in range(count)} == {"a"}
    assert source[count].images[0].load().size == (9, 9)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"length": 11}, "has 10 records, not length=11"),
        ({"repeat_time": 0}, "repeat_time must be a number above 0"),
        ({"data_augment": True}, "data_augment=True is not supported"),
        ({"max_dynamic_patch": 6}, "unknown key 'max_dynamic_patch'"),
        ({"annotation": 5}, "expected an object with a path as 'annotation'"),
    ],
)
def test_a_broken_entry_of_a_meta_json_is_named(tmp_path, entry, message):
    with pytest.raises(ValueError, match=rf"meta\.json.*{message}"):
        open_llava(meta(tmp_path, **entry), None)


# compressed files


@pytest.mark.parametrize("name", ["data.json.gz", "data.jsonl.gz"])
def test_a_gz_file_is_read_as_what_it_contains(tmp_path, images, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = [{"image": "red.png", "conversations": marked("<image>", word)} for word in ("a", "b")]
    lines = "jsonl" in name
    (tmp_path / name).write_bytes(
        gzip.compress(("\n".join(map(json.dumps, records)) if lines else json.dumps(records)).encode())
    )
    for _ in range(2):
        source = open_llava(tmp_path / name, images)
        assert [source[i].turns[1].text for i in range(2)] == ["a", "b"]
    assert len(list((tmp_path / "cache").rglob("*data.json*"))) == 1
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} cannot be read: "):
        open_llava(tmp_path / name, images)
    assert len(list((tmp_path / "cache").rglob("*data*"))) == 1
