"""Random access to records: equal to parsing the complete file, and all kinds of broken files."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vlmtrain.data import file_index, indexed_json
from vlmtrain.data.indexed_json import IndexedJson
from vlmtrain.data.records import BadSample

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | words
    | st.sampled_from(['"', "\\", "]}", "é😀"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


def write(folder: Path, content: str | bytes, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(st.lists(values, min_size=1, max_size=6), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_array_equals_the_result_of_parsing_it_whole(tmp_path, records, indent, ascii_only, chunk):
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_json, "CHUNK", chunk)
        source = IndexedJson(write(tmp_path, text))
    assert [source[i] for i in range(len(source))] == json.loads(text) == records


@given(st.lists(values, min_size=1, max_size=6), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]))
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_lines_equal_the_result_of_parsing_each(tmp_path, records, ends, between):
    text = between.join(json.dumps(record, ensure_ascii=False) for record in records) + between * ends
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_json, "CHUNK", 7)
        source = IndexedJson(write(tmp_path, text, "data.jsonl"))
    assert [source[i] for i in range(len(source))] == records


@pytest.mark.parametrize(
    "name, text", [("a.json", '[{"a": "é"}, 2]'), ("a.jsonl", '{"a": "é"}\n2'), ("a.ndjson", '{"a": "é"}\n2\n')]
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path, name, text, mark):
    source = IndexedJson(write(tmp_path, mark + text.encode(), name))
    assert [source[0], source[1]] == [{"a": "é"}, 2] and len(source) == 2


def test_indented_lines_and_records_after_spaces_are_records(tmp_path):
    source = IndexedJson(write(tmp_path, '\n  {"a": 1}\n\t\n \r\n2 \n   ', "data.jsonl"))
    assert [source[i] for i in range(len(source))] == [{"a": 1}, 2]


def test_numbers_of_any_length_do_no_harm(tmp_path):
    text = f'[{{"id": {"9" * 5000}}}, {{"x": 1e999}}, NaN, {{"a": 1, "a": 2}}]'
    source = IndexedJson(write(tmp_path, text))
    assert source[0] == {"id": float("inf")} and source[1] == {"x": float("inf")}
    assert source[2] != source[2] and source[3] == {"a": 2}


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"id": 1}',
            r"must contain a list of records, got an object at byte 0; if each line is a record, rename .*data\.jsonl",
        ),
        ("null", "must contain a list of records, got null at byte 0"),
        ("  7", "must contain a list of records, got '7' at byte 2"),
        (b"\xff\xfe[\x001\x00]\x00", "must contain a list of records, got 'ÿ' at byte 0"),
        ("[", "record 0, byte 1: Expecting value"),
        ('[{"id": 1}', "record 1, byte 10: expected ',' or ']' after the previous record, got the end of the file"),
        ('[{"id": 1} {"id": 2}]', r"record 1, byte 11: expected ',' or '\]' after the previous record, got '{'"),
        ('[{"é": 1}, {"id": }]', "record 1, byte 19: Expecting value"),
        ('[{"id": 1}, {"id": "cut', "record 1, byte 19: Unterminated string"),
        ("[1, 2, tru", "record 2, byte 7: Expecting value"),
        ("[1, 2, ]", "record 2, byte 7: a comma without a record after it"),
        ("[, 1]", "record 0, byte 1: Expecting value"),
        ("[1] [2]", "record 1, byte 4: unexpected content after the end of the list"),
        ('[1, "a\nb"]', "record 1, byte 6: Invalid control character"),
        ('[1, "\\x"]', "record 1, byte 5: Invalid"),
        ("[1, 'a']", "record 1, byte 4: Expecting value"),
        ("[1, " + "[" * 100_000 + "]" * 100_000 + "]", "record 1, byte 4: nested too deeply"),
        ("", "is empty: no records"),
        (" \n", "is empty: no records"),
        (b"\xef\xbb\xbf", "is empty: no records"),
        ("[]", "is empty: no records"),
        ("[ \n ]\n", "is empty: no records"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 5, 4 * 2**20])
def test_a_broken_array_is_an_error_that_says_where(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(indexed_json, "CHUNK", chunk)
    with pytest.raises(ValueError, match=message) as error:
        IndexedJson(write(tmp_path, text))
    assert not isinstance(error.value, BadSample) and str(tmp_path / "data.json") in str(error.value)


@pytest.mark.parametrize("chunk", [1, 13, 4 * 2**20])
def test_a_damaged_array_is_refused_where_the_standard_parser_refuses_it(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(indexed_json, "CHUNK", chunk)
    random = Random(0)
    whole = json.dumps(
        [{"id": -1.5e3, "text": 'a\\ud83d\\ude00 "é\n'}, [True, None, {}], "x", 12, "\\"], indent=1
    ).encode()
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.randint(1, 2)):
            at = random.randrange(len(damaged))
            damaged[at : at + random.randint(0, 1)] = random.choice(
                [b"", b"]", b",", b'"', b"\\", b"{", b"1", b"e", b" "]
            )
        try:
            expected = json.loads(damaged.decode())
        except ValueError:
            expected = None
        try:
            source = IndexedJson(write(tmp_path, bytes(damaged)))
            found = [source[i] for i in range(len(source))]
        except ValueError as error:
            assert not isinstance(error, BadSample)
            found, refused = None, refused + 1
        assert found == expected, damaged
    assert 100 < refused < 300


def test_a_long_record_is_read_and_one_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_json, "CHUNK", 10)
    monkeypatch.setattr(indexed_json, "MAX_RECORD", 5000)
    assert IndexedJson(write(tmp_path, json.dumps([1, "a" * 4000, 2])))[1] == "a" * 4000
    with pytest.raises(ValueError, match="record 1, byte 4: it does not end within"):
        IndexedJson(write(tmp_path, '[1, "' + "a" * 40_000))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"id": 2', "is not valid JSON: Expecting ',' delimiter"),
        (b'{"id": 2} {"id": 3}', "is not valid JSON: Extra data"),
        (b"text", "is not valid JSON: Expecting value"),
        (b'"\xe9"', "is not valid UTF-8: .*byte 1"),
        (b"\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON: nested too deeply"),
        (b"{\x0c}", "is not valid JSON"),
    ],
)
def test_a_broken_line_is_one_bad_record_that_is_named(tmp_path, line, message):
    source = IndexedJson(write(tmp_path, b'{"id": 1}\n\n' + line + b'\n{"id": 3}', "data.jsonl"))
    assert source[0] == {"id": 1} and source[2] == {"id": 3} and len(source) == 3
    with pytest.raises(BadSample, match=rf"^data\.jsonl record 1 \(line 3\) {message}"):
        source[1]


def test_bytes_that_are_not_text_affect_only_one_record_of_an_array(tmp_path):
    source = IndexedJson(write(tmp_path, b'["\xc3\xa9", "\xe9", "\xc3\xa9"]'))
    assert source[0] == source[2] == "é"
    with pytest.raises(BadSample, match=r"^data\.json record 1 is not valid UTF-8"):
        source[1]


def test_a_file_that_cannot_be_read_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl does not exist"):
        IndexedJson(tmp_path / "absent.jsonl")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("", "pipe.json"):
        with pytest.raises(ValueError, match="cannot be read: it is not a regular file"):
            IndexedJson(tmp_path / name)


@pytest.mark.parametrize("content", ['["first"]', '["other", "number"]', '["first", "second", "third"]'])
def test_a_file_that_changes_stops_the_run(content, tmp_path):
    source = IndexedJson(write(tmp_path, '["first", "second"]'))
    assert source[1] == "second"
    write(tmp_path, content)
    os.utime(tmp_path / "data.json", ns=(1, 1))
    with pytest.raises(ValueError, match=r"data\.json has changed since it was opened") as error:
        source[1]
    assert not isinstance(error.value, BadSample)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_workers_and_copies_read_the_same(tmp_path, name):
    records = [{"id": i, "text": "é" * i} for i in range(100)]
    text = json.dumps(records) if name == "data.json" else "\n".join(map(json.dumps, records))
    source = IndexedJson(write(tmp_path, text, name))
    source[3]
    loader = DataLoader(source, sampler=list(range(100)) * 3, batch_size=None, num_workers=2)
    assert list(loader) == records * 3
    assert pickle.loads(pickle.dumps(source))[99] == records[99]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_json, "CHUNK", 2**16)
    path = write(tmp_path, json.dumps([{"id": i, "text": "word " * 100} for i in range(8000)]))
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    try:
        source = IndexedJson(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert source[7999]["id"] == 7999


# the index on disk


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_index, "WORTHWHILE", 10)
    return tmp_path / "cache" / "vlmtrain" / "index"


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """Names of the files that were scanned."""
    done = []
    for method in ("_index_array", "_index_lines"):
        original = getattr(IndexedJson, method)
        monkeypatch.setattr(
            IndexedJson, method, lambda self, original=original: done.append(self.file.name) or original(self)
        )
    return done


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_file_is_scanned_once(tmp_path, cache, scans, name):
    text = '[{"a": 1}, "bé", 3]' if name == "data.json" else '{"a": 1}\n\n"bé"\n3\n'
    path = write(tmp_path, text, name)
    for _ in range(3):
        source = IndexedJson(path)
        assert [source[i] for i in range(len(source))] == [{"a": 1}, "bé", 3]
    (tmp_path / f"link-{name}").symlink_to(path)
    assert IndexedJson(tmp_path / f"link-{name}")[1] == "bé"
    assert scans == [name]
    assert len(list(cache.glob("*.npz"))) == 1


def test_a_changed_file_is_scanned_again(tmp_path, cache, scans):
    path = write(tmp_path, "[10, 20, 30]")
    assert IndexedJson(path)[1] == 20
    write(tmp_path, "[1, 2000, 3]")
    os.utime(path, ns=(1, 1))
    assert IndexedJson(path)[1] == 2000
    write(tmp_path, "[1, 2000, 3, 4]")
    os.utime(path, ns=(1, 1))
    assert len(IndexedJson(path)) == 4
    assert scans == ["data.json"] * 3 and len(list(cache.glob("*.npz"))) == 1


@pytest.mark.parametrize("damage", ["", "garbage", "half", "flipped"])
def test_a_damaged_index_is_rebuilt(tmp_path, cache, scans, damage):
    path = write(tmp_path, json.dumps(list(range(1000))))
    IndexedJson(path)
    (index,) = cache.glob("*.npz")
    whole = index.read_bytes()
    if damage == "flipped":
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 0xFF
        index.write_bytes(damaged)
    else:
        index.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage.encode())
    assert IndexedJson(path)[999] == 999 and IndexedJson(path)[0] == 0
    assert scans == ["data.json"] * 2 and index.read_bytes() == whole


def test_without_a_place_for_the_index_the_file_is_still_read(tmp_path, cache, scans):
    cache.parent.parent.write_text("in the way")
    path = write(tmp_path, "[10, 20, 30]")
    assert IndexedJson(path)[1] == IndexedJson(path)[1] == 20
    assert scans == ["data.json"] * 2


def test_an_index_that_cannot_be_written_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(file_index.np, "savez", fail)
    assert IndexedJson(write(tmp_path, "[10, 20, 30]"))[1] == 20
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_small_files_and_broken_ones_have_no_index(tmp_path, cache, monkeypatch):
    with pytest.raises(ValueError, match="not valid JSON"):
        IndexedJson(write(tmp_path, "[10, 20, 30"))
    monkeypatch.setattr(file_index, "WORTHWHILE", 100)
    IndexedJson(write(tmp_path, "[10, 20, 30]"))
    assert not list(cache.glob("*.npz"))


def _open_and_log(path: Path, log: Path, barrier: multiprocessing.Barrier) -> None:
    original = IndexedJson._index_array

    def logged(self):
        with open(log, "a") as file:
            file.write("scan\n")
        return original(self)

    IndexedJson._index_array = logged
    barrier.wait()
    assert IndexedJson(path)[1] == 1


def test_processes_that_start_together_scan_once(tmp_path, cache):
    path, log = write(tmp_path, json.dumps(list(range(50_000)))), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_open_and_log, args=(path, log, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "scan\n"
