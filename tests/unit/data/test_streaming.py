"""Streams: the records of a memory-mapped data set, in an order that neither workers nor restarts change."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import datasets
import pytest
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from vlmtrain.cli import main
from vlmtrain.data import sources
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.hf_dataset import HFDataset
from vlmtrain.data.hf_stream import HFStream
from vlmtrain.data.layouts import Batching, PackedBatching, PaddedBatching
from vlmtrain.data.loader import StepData, StepStream, step_loader
from vlmtrain.data.mixture import Mixture
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import BadSample, Conversation, StreamError
from vlmtrain.data.sources import build_source, first_look
from vlmtrain.settings import compose, compose_evaluation
from vlmtrain.settings.data import read_data

from .test_hf_dataset import encoded
from .test_loader import Numbered, same

FILES, EACH = 3, 10
RECORDS = FILES * EACH
COLORS = [(number, 0, 255 - number) for number in range(RECORDS)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # five seconds per pass over the files
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Thirty records with images in three Parquet files; sample i answers "number i"."""
    folder = tmp_path_factory.mktemp("shards")
    for file in range(FILES):
        numbers = range(file * EACH, (file + 1) * EACH)
        columns = {
            "image": [encoded(COLORS[number]) for number in numbers],
            "question": ["What" * (1 + number % 5) for number in numbers],
            "answer": [f"number {number}" for number in numbers],
        }
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{file}.parquet")
    return folder


def opened(path: Path, samples: int = RECORDS, buffer: int = 8, seed: int = 0, **options) -> HFStream:
    place = [options.pop(key, None) for key in ("columns", "images")]
    return HFStream(path, options.pop("split", "train"), None, *place, False, samples, buffer, seed, **options)


def facts(conversation: Conversation) -> tuple:
    images = tuple(image.load().getpixel((0, 0)) for image in conversation.images)
    return tuple(turn.text for turn in conversation.turns), images


def numbers(source, indices) -> list[int]:
    return [int(source[index].turns[-1].text.split()[-1]) for index in indices]


# records and their order


def lines(count: int) -> list[str]:
    return [json.dumps({"query": "What?", "label": f"number {number}"}) for number in range(count)]


@pytest.mark.parametrize("place", ["*.parquet", "folder", "one.jsonl", "one.jsonl.gz", "one.csv", "one.tsv"])
def test_each_pass_has_the_records_of_the_memory_mapped_data_set(place, shards, tmp_path):
    path = {"*.parquet": shards / "*.parquet", "folder": shards}.get(place, tmp_path / place)
    if place.startswith("one.jsonl"):
        text = "\n".join(lines(RECORDS))
        path.write_bytes(gzip.compress(text.encode()) if place.endswith(".gz") else text.encode())
    elif place.startswith("one"):
        rows = ["query,label", *(f"What?,number {number}" for number in range(RECORDS))]
        path.write_text("\n".join(rows).replace(",", "\t" if place == "one.tsv" else ",") + "\n")
    stream, stored = opened(path), HFDataset(path)  # the stream first: the library keeps what it learns of a file
    known = sorted(facts(stored[index]) for index in range(RECORDS))
    passes = [[facts(stream[start + index]) for index in range(RECORDS)] for start in (0, RECORDS)]
    assert sorted(passes[0]) == sorted(passes[1]) == known
    assert passes[0] != known and passes[0] != passes[1]
    assert numbers(opened(path), range(RECORDS)) == [int(said[1].split()[-1]) for said, _ in passes[0]]
    assert numbers(opened(path, seed=1), range(RECORDS)) != numbers(stream, range(RECORDS))


def test_the_order_is_that_of_the_library(shards):
    import numpy as np

    files = sorted(map(str, shards.glob("*.parquet")))
    plain = datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)
    shuffled = plain.with_format("arrow").shuffle(generator=np.random.default_rng([5, 0]), buffer_size=8)
    wanted = [text for table in shuffled.iter(batch_size=7) for text in table["answer"].to_pylist()]
    stream = opened(shards, seed=5)
    assert [stream[index].turns[1].text for index in range(RECORDS)] == wanted


@pytest.mark.parametrize("buffer, farthest", [(1, EACH), (8, 2 * EACH)])
def test_records_are_shuffled_across_the_buffer_only(buffer, farthest, tmp_path):
    """One file: nothing but the buffer shuffles."""
    (tmp_path / "one.jsonl").write_text("\n".join(lines(RECORDS)))
    order = numbers(opened(tmp_path / "one.jsonl", buffer=buffer), range(RECORDS))
    assert all(position - number < farthest for position, number in enumerate(order))
    assert (order == list(range(RECORDS))) == (buffer == 1)
    assert all(number <= position + buffer for position, number in enumerate(order))


def test_an_index_is_a_record_in_any_order_of_access_in_any_process(shards, monkeypatch):
    monkeypatch.setattr("vlmtrain.data.hf_stream.CHUNK", 4)
    stream = opened(shards)
    known = numbers(stream, range(2 * RECORDS))
    asked = [0, 3, 41, 40, 41, 2, 59, 7, 7, 30]
    assert numbers(stream, asked) == [known[index] for index in asked]
    loader = DataLoader(stream, sampler=list(range(2 * RECORDS)), batch_size=None, num_workers=2)
    assert [int(each.turns[1].text.split()[-1]) for each in loader] == known
    assert numbers(pickle.loads(pickle.dumps(stream)), asked) == [known[index] for index in asked]
    with pytest.raises(IndexError):
        stream[-1]


# epochs and mixtures


def draws(mixture: Mixture, epoch: int) -> list[int]:
    return [mixture.draw(epoch * mixture.epoch_size + position) for position in range(mixture.epoch_size)]


def test_an_epoch_continues_where_the_last_one_stopped(shards):
    mixture = Mixture({"stream": opened(shards, samples=12)}, {"stream": 12})
    order = numbers(opened(shards), range(36))
    epochs = [numbers(mixture, draws(mixture, epoch)) for epoch in range(3)]
    assert epochs == [order[:12], order[12:24], order[24:]]


def test_a_mixture_reads_each_stream_in_order_and_draws_the_others_as_before(shards):
    stream, other = opened(shards, samples=12), opened(shards, samples=5, seed=3)
    parts = {"stored": Numbered(), "stream": stream, "other": other}
    mixture = Mixture(parts, {"stored": 30, "stream": 12, "other": 5})
    alone = Mixture({"stored": Numbered()}, {"stored": 30})
    for epoch in range(3):
        drawn = draws(mixture, epoch)
        by_source = [[index for index in drawn if mixture.source_number(index) == number] for number in range(3)]
        assert sorted(by_source[0]) == sorted(draws(alone, epoch)) == list(range(30))
        assert numbers(mixture, by_source[1]) == numbers(stream, range(epoch * 12, epoch * 12 + 12))
        assert numbers(mixture, by_source[2]) == numbers(other, range(epoch * 5, epoch * 5 + 5))
        places = [position for position, index in enumerate(drawn) if mixture.source_number(index) == 1]
        assert places != list(range(places[0], places[0] + 12))
    with pytest.raises(IndexError):
        mixture[len(mixture)]  # the stored records are in the first epoch only


@pytest.fixture
def processor(tokenizer) -> Processor:
    geometry = Geometry((4, 4), "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tokens=3)
    return Processor(tokenizer, geometry, "chat", max_length=200)


def batching_of(layout: str, processor: Processor, shards: Path) -> Batching:
    parts = {"stored": Numbered(), "stream": opened(shards, samples=12)}
    mixture = Mixture(parts, {"stored": 30, "stream": 12})
    if layout == "packed":
        return PackedBatching(mixture, processor, 8, 4, 1)
    return PaddedBatching(mixture, processor, 8, 2, 4)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_steps_are_the_same_with_workers_and_after_an_interruption(layout, processor, shards):
    last, stopped = 13, 7  # of a stream of 30 records, 12 per epoch: into the second pass

    def steps(workers: int, first: int = 0, cursor: dict | None = None) -> list[StepData]:
        batching = batching_of(layout, processor, shards)
        stream = StepStream(batching, batching.mixture, processor, 0, 1, first, last, cursor)
        return list(step_loader(stream, workers, pin_memory=False))

    whole = steps(0)
    assert sum(step.drawn[1] for step in whole) > RECORDS / 2 and not any(step.bad for step in whole)
    for found, wanted in (
        (steps(2), whole),
        (steps(2, stopped, whole[stopped - 1].cursor), whole[stopped:]),
        (steps(0, stopped, whole[stopped - 1].cursor), whole[stopped:]),
    ):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            same(one, other)


# settings


def read(entry: object, **group) -> object:
    return read_data({"format": "hf", "instruct": entry, **group}).split("instruct")


def test_the_keys_of_a_source_select_a_stream(shards):
    entry = {"path": str(shards), "streaming": True, "samples": 12, "shuffle_buffer": 8}
    stream = build_source(read(entry), (48, 48), seed=4).sources["instruct"]
    assert numbers(stream, range(9)) == numbers(opened(shards, seed=4), range(9)) and len(stream) == 12
    assert "within a buffer of 8, and an epoch is the next 12 records" in stream.note
    assert stream.note.startswith(f"{shards} is streamed: ")


@pytest.mark.parametrize(
    "entry, group, said",
    [
        ({"streaming": True}, {}, "data.instruct.samples is missing: data.instruct.streaming=true requires"),
        ({"streaming": True, "weight": 1.0}, {}, "data.instruct.samples is missing"),
        (
            {"streaming": True, "weight": 1.0, "samples": 9},
            {},
            "give all sources of this split a weight",
        ),
        ({"shuffle_buffer": 5}, {}, "data.instruct.shuffle_buffer=5 requires data.instruct.streaming=true"),
        ({"streaming": True, "samples": 9, "shuffle_buffer": 0}, {}, "data.instruct.shuffle_buffer=0: expected an int"),
        ({"streaming": "yes"}, {}, "data.instruct.streaming=yes: expected true or false"),
        ({"streaming": True, "samples": 9}, {"clean_list": "x"}, "data.instruct.streaming=true cannot be used with"),
        ({"streaming": True, "format": "webdataset"}, {}, "unknown key 'data.instruct.streaming'"),
        ({}, {"streaming": True}, "unknown key 'data.streaming'"),
    ],
)
def test_settings_that_cannot_work_are_named(entry, group, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        read({"path": "x", **entry}, **group)


STREAMED = "{path: x, streaming: true, samples: 9}"


def test_validation_and_clean_lists_cannot_use_a_stream(tmp_path, capsys):
    split = ["recipe=llava_1_5", "data=hf", "data.align=x"]
    refused = r"data\.validation\.streaming=true cannot be used for validation, which draws from all records"
    with pytest.raises(ValueError, match=refused):
        compose([*split, "data.instruct=x", f"data.validation={STREAMED}"])
    with pytest.raises(ValueError, match=refused):
        compose_evaluation(["data=hf", f"data.validation={STREAMED}"])
    with pytest.raises(SystemExit):
        main(["check", *split, f"data.instruct={STREAMED}", "--clean-list", str(tmp_path / "bad.json")])
    assert "data.instruct.streaming=true cannot be used with --clean-list" in capsys.readouterr().err


# data that cannot be streamed


@pytest.mark.parametrize(
    "place, said",
    [
        ("saved", "saved cannot be loaded: Arrow files are read in place without streaming: set streaming=false"),
        ("one.arrow", "one.arrow cannot be loaded: Arrow files are read in place without streaming"),
        ("lists.jsonl", "columns.caption=captions of .*lists.jsonl contains lists of captions, which streaming=true"),
        ("empty.jsonl", "empty.jsonl (cannot be loaded|cannot be streamed|is empty)"),
        ("broken.parquet", "broken.parquet cannot be loaded: "),
        ("absent.parquet", "absent.parquet does not exist"),
        ("no-such-data", "no-such-data cannot be loaded: "),
    ],
)
def test_what_cannot_be_streamed_is_an_error_in_one_line(place, said, tmp_path):
    if place == "saved":
        datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]}).save_to_disk(tmp_path / place)
    elif place in ("one.arrow", "broken.parquet"):
        (tmp_path / place).write_bytes(b"neither")
    elif place == "lists.jsonl":
        (tmp_path / place).write_text(json.dumps({"image": "a.png", "captions": ["one", "two"]}))
    elif place == "empty.jsonl":
        (tmp_path / place).write_text("")
    with pytest.raises(ValueError, match=said.replace(".", r"\.").replace(r"\.*", ".*")) as error:
        opened(place if place == "no-such-data" else tmp_path / place)
    assert "\n" not in str(error.value)


def test_a_slice_of_a_split_is_an_error(shards):
    with pytest.raises(ValueError, match=r"Bad split: train\[:2\]"):
        opened(shards, split="train[:2]")


def test_an_unreadable_file_ends_a_stream_but_a_bad_record_does_not(shards, tmp_path):
    (tmp_path / "0.jsonl").write_text("\n".join([*lines(2), json.dumps({"query": None, "label": "x"})]))
    stream = opened(tmp_path / "0.jsonl", buffer=1)
    assert numbers(stream, range(2)) == [0, 1]
    with pytest.raises(BadSample, match=r"^0\.jsonl record 2 of the stream: expected 'query' and 'label'"):
        stream[2]
    assert numbers(stream, [3, 4]) == [0, 1]
    (tmp_path / "0.jsonl").write_text("{")
    for _ in range(2):  # also when it is asked again: no record is left out
        with pytest.raises(StreamError, match=r"0\.jsonl cannot be read beyond record \d+ of its stream: .*; if the"):
            stream[200]


def test_a_streams_error_is_one_line_also_from_a_worker():
    """As PyTorch passes it on, and once more from the thread that pins memory."""
    error = StreamError("dataset x cannot be read: y")
    for _ in range(2):
        try:
            raise error
        except StreamError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(StreamError, match=r"^dataset x cannot be read: y$") as caught:
            wrapped.reraise()
        error = caught.value


def test_only_the_first_records_of_a_stream_are_checked_before_training(shards, monkeypatch):
    monkeypatch.setattr(sources, "STREAM_LOOKED_AT", 4)
    asked = []

    class Watched(HFStream):
        def __getitem__(self, index: int) -> Conversation:
            asked.append(index)
            return super().__getitem__(index)

    stream = Watched(shards, "train", None, None, None, False, 10**6, 8, 0)
    assert first_look(Mixture({"stored": Numbered(), "stream": stream})).problems == []
    assert asked == [0, 1, 2, 3]
    stream.close()


def test_a_buffer_beyond_two_gib_is_an_error_that_names_the_key(shards, monkeypatch):
    """What Arrow raises for a buffer with more bytes than its offsets can count."""
    import pyarrow as pa

    def take(*_):
        raise pa.ArrowInvalid("offset overflow while concatenating arrays, consider casting")

    monkeypatch.setattr("pyarrow.compute.take", take)
    with pytest.raises(StreamError, match=r"^shuffle_buffer=8: so many records of .* are more than the 2 GiB"):
        opened(shards)[0]


def test_files_with_different_columns_are_named_as_the_cause(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "q", "label": "a"}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"query": "q", "label": "a", "system": "s"}))
    stream = opened(tmp_path / "*.jsonl")
    with pytest.raises(StreamError, match="the files have different columns"):
        for index in range(4):
            stream[index]
