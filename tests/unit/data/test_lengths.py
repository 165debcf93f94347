"""Steps planned from stored lengths have the same batches, and each process renders only its own samples."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from vlmtrain.data import lengths as tables
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.layouts import PackedBatching, PaddedBatching
from vlmtrain.data.lengths import Lengths, LengthTable, open_lengths
from vlmtrain.data.loader import StepStream, checksum, step_loader
from vlmtrain.data.processor import Processor
from vlmtrain.data.rendered import SampleLength
from vlmtrain.data.sources import build_source
from vlmtrain.settings.data import read_data

from .test_loader import same_batches

RECORDS, STEPS = 60, 5


@pytest.fixture
def world(tmp_path, monkeypatch, tokenizer):
    """A file of captions and questions about images of several sizes, two of which do not exist, and a processor."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "WORTHWHILE", 10)
    records = []
    for i in range(RECORDS):
        words = " ".join(["What color is the circle"] * (1 + i % 4))
        image = {"image": f"{i % 9}.png"} if i % 5 else {}
        question = ("<image>\n" if i % 5 else "") + words
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"red {'circle ' * (i % 7)}"}]
        records.append({"id": i, **image, "conversations": talk})
    (tmp_path / "talks.json").write_text(json.dumps(records))
    for i in range(8):
        Image.new("RGB", (20 + 8 * i, 60 - 4 * i), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    connector = {"name": "linear", "in_dim": 4, "out_dim": 4, "input_grid": None}
    geometry = Geometry(
        (8, 8), "native", (0.5,) * 3, (0.5,) * 3, 0, patch_size=(8, 8), image_pixels=(64, 1024), connector=connector
    )
    return tmp_path, Processor(tokenizer, geometry, "chat", max_length=120)


def mixture_of(folder):
    group = {"format": "llava_json", "images": str(folder), "instruct": str(folder / "talks.json")}
    return build_source(read_data(group).split("instruct"), (8, 8), seed=0)


def batching_of(world, layout: str, ranks: int, lengths: Lengths | None):
    folder, processor = world
    if layout == "packed":
        return PackedBatching(mixture_of(folder), processor, 12, 3, ranks, lengths=lengths)
    return PaddedBatching(mixture_of(folder), processor, 12, 12 // (3 * ranks), 3, lengths)


def streams(world, layout: str, ranks: int, with_lengths: bool) -> list[StepStream]:
    folder, processor = world
    found = []
    for rank in range(ranks):
        lengths = open_lengths(mixture_of(folder), processor) if with_lengths else None
        batching = batching_of(world, layout, ranks, lengths)
        found.append(StepStream(batching, batching.mixture, processor, rank, ranks, 0, STEPS))
    return found


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("ranks, workers", [(2, 0), (1, 3)])
def test_batches_do_not_depend_on_where_lengths_come_from(world, layout, ranks, workers):
    plain = [list(step_loader(stream, 0, False)) for stream in streams(world, layout, ranks, with_lengths=False)]
    assert sum(data.samples for rank in plain for data in rank) > 40 and any(data.bad for data in plain[0])
    for _ in range(2):  # with an empty table and with a complete one
        found = [list(step_loader(stream, workers, False)) for stream in streams(world, layout, ranks, True)]
        for one, other in zip(plain, found, strict=True):
            for before, after in zip(one, other, strict=True):
                same_batches(before.micro_batches, after.micro_batches)
                assert [batch.visual.calls for batch in before.micro_batches] == [
                    batch.visual.calls for batch in after.micro_batches
                ]
                assert before[1:] == after[1:]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_process_renders_only_its_own_samples_once_lengths_are_known(world, layout, monkeypatch):
    folder, processor = world
    lengths = open_lengths(mixture_of(folder), processor)
    lengths.fill(processor, range(RECORDS))
    rendered = []
    render = Processor.render
    monkeypatch.setattr(Processor, "render", lambda *arguments: rendered.append(1) or render(*arguments))
    (own, _) = streams(world, layout, 2, with_lengths=True)
    rendered.clear()  # the bad records at the beginning of the stream, when the rows are estimated
    data = list(own)
    bad = sum(len(each.bad) for each in data)
    assert bad and len(rendered) <= sum(each.samples for each in data) + 2 * bad


def test_lengths_are_shared_by_processes_and_kept(world):
    folder, processor = world
    lengths = open_lengths(mixture_of(folder), processor)
    filling = multiprocessing.Process(target=lengths.fill, args=(processor, range(RECORDS)))
    filling.start()
    filling.join()
    again = open_lengths(mixture_of(folder), processor)
    for index in range(RECORDS):
        missing = index % 5 and index % 9 == 8
        assert (lengths[index] is None) == bool(missing)
        assert again[index] == lengths[index]
        if not missing:
            assert lengths[index] == processor.render(lengths.mixture[index]).length


def test_other_records_or_rendering_have_other_tables(world, tokenizer):
    folder, processor = world
    longer = Processor(tokenizer, processor.geometry, "chat", max_length=121)
    files = {open_lengths(mixture_of(folder), each).tables[0].file for each in (processor, processor, longer)}
    (folder / "talks.json").write_text((folder / "talks.json").read_text() + " ")
    files.add(open_lengths(mixture_of(folder), processor).tables[0].file)
    assert len(files) == 3 and all(file.exists() for file in files)


def test_a_damaged_row_is_unknown(tmp_path):
    length = SampleLength(300, 200, 2, 3, frozenset({(8, 16), (24, 8)}))
    table = LengthTable(tmp_path / "table", 3)
    table[1] = length
    assert [LengthTable(tmp_path / "table", 3)[i] for i in range(3)] == [None, length, None]
    words = np.memmap(tmp_path / "table", np.int32, "r+").reshape(3, -1)
    for column in range(words.shape[1]):
        words[1, column] ^= 1
        assert LengthTable(tmp_path / "table", 3)[1] is None
        words[1, column] ^= 1
    assert table[1] == length


def test_a_length_that_does_not_fit_into_a_row_is_unknown(tmp_path):
    table = LengthTable(None, 1)
    for sizes in ({(8, 8 * i) for i in range(1, 10)}, {(8, 2**15)}):
        table[0] = SampleLength(9, 5, 1, 1, frozenset(sizes))
        assert table[0] is None


def test_images_that_changed_end_the_run_once(world):
    folder, processor = world
    lengths = open_lengths(mixture_of(folder), processor)
    lengths.fill(processor, range(RECORDS))
    for i in range(8):
        Image.new("RGB", (90, 8 + 8 * i)).save(folder / f"{i}.png")
    (stream, _) = streams(world, "padded", 2, with_lengths=True)
    with pytest.raises(ValueError, match=r"images have changed .* run the same command again"):
        list(stream)
    again = [list(stream) for stream in streams(world, "padded", 2, with_lengths=True)]
    assert sum(data.samples for rank in again for data in rank) > 40
    assert not any("images have changed" in bad.problem for rank in again for data in rank for bad in data.bad)


def test_without_disk_space_lengths_are_kept_in_memory(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    table = LengthTable(tmp_path / "table", 3)
    table[1] = SampleLength(5, 0, 0, 0, frozenset())
    assert table.file is None and table[1].tokens == 5


def test_an_error_of_the_planner_ends_the_loader(world):
    folder, _ = world
    (stream,) = streams(world, "packed", 1, with_lengths=False)
    (folder / "talks.json").write_text("[]")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        next(step_loader(stream, 2, False))


def test_a_step_planned_from_other_lengths_has_another_checksum(world):
    one, other = streams(world, "padded", 2, with_lengths=False)
    assert next(iter(one)).plan == next(iter(other)).plan
    mixture = other.mixture
    lengths = other.batching.lengths = Lengths(mixture, [LengthTable(None, RECORDS)])
    index = mixture.draw(0)
    right = one.processor.render(mixture[index]).length
    for wrong in (right._replace(tokens=7), right._replace(sizes=frozenset({(16, 32)})), right._replace(images=9)):
        lengths[index] = wrong
        found = next(other.batching.steps(0, None, 0, 1))
        assert checksum(found.rows) != next(iter(one)).plan
    lengths[index] = right
    assert checksum(next(other.batching.steps(0, None, 0, 1)).rows) == next(iter(one)).plan
