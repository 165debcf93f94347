"""Sharing images: every dialogue is trained as if it was alone, whatever it shares its images with."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.stages import make_stage
from vlmtrain.data import file_index, llava
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.hf_dataset import HFDataset
from vlmtrain.data.image_groups import image_groups
from vlmtrain.data.images import ImageFolder
from vlmtrain.data.layouts import PackedBatching
from vlmtrain.data.llava import open_llava
from vlmtrain.data.loader import StepData, StepStream
from vlmtrain.data.mixture import Mixture
from vlmtrain.data.processor import Processor
from vlmtrain.data.record_reader import RecordReader
from vlmtrain.data.records import BadSample, Conversation, Turn, check_conversation
from vlmtrain.data.rendered import Rendered
from vlmtrain.training.batching import build_batching

from .test_loader import Flat, add_up, same_when_resumed

ROW, BATCH, STEPS, TOKENS = 120, 8, 6, 12
IMAGES = [Flat(value) for value in range(8)]


class Talks:
    """Dialogue i is about image i // 4, or, if i is a multiple of 7, about none; those in `bad` are broken."""

    def __init__(self, bad: tuple[int, ...] = ()):
        self.bad = bad

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Conversation:
        if index in self.bad:
            raise BadSample(f"dialogue {index}: broken")
        return talk(index, () if index % 7 == 0 else (IMAGES[index // 4],))


def talk(index: int, media: tuple) -> Conversation:
    question = "<image>" * len(media) + "What" * (1 + index % 5)
    return Conversation(f"dialogue {index}", (Turn("user", question), Turn("assistant", f"number {index}")), media)


@pytest.fixture
def processor(tokenizer) -> Processor:
    geometry = Geometry((4, 4), "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tokens=TOKENS)
    return Processor(tokenizer, geometry, "chat", ROW, share_images=True)


GROUPS = torch.arange(32) // 4


def stream(processor, micro=None, rank=0, world=1, bad=(), first=0, last=STEPS, cursor=None) -> StepStream:
    mixture = Mixture({"all": Talks(bad)}, seed=0).keeping_together(GROUPS)
    batching = PackedBatching(mixture, processor, BATCH, micro, world, share_images=True)
    return StepStream(batching, mixture, processor, rank, world, first, last, cursor)


def dialogues(data: StepData) -> Counter:
    """The dialogues of a step, each as (tokens, targets, value of the image) of a sample of its own."""
    found = Counter()
    for batch in data.micro_batches:
        if batch.boundaries is None:
            continue
        values = [int(image[0, 0, 0]) for image in batch.visual.pixels[0][: len(batch.visual.items)]]
        for start, end in zip(batch.boundaries.tolist(), batch.boundaries.tolist()[1:]):
            branch = torch.zeros(end - start) if batch.branch is None else batch.branch[0, start:end]
            index = batch.visual.index[0, start:end]
            shows = values[int(index.max())] if int(index.max()) >= 0 else None
            for number in range(1, int(branch.max()) + 1) if branch.any() else (0,):
                own = (branch == 0) | (branch == number)
                assert batch.positions[0, start:end][own].tolist() == list(range(int(own.sum())))
                tokens = (tuple(each[0, start:end][own].tolist()) for each in (batch.input_ids, batch.targets))
                found[(*tokens, shows)] += 1
    return found


def alone(processor: Processor, index: int) -> tuple:
    conversation = Talks()[index]
    tokens = processor.render(conversation)
    shows = conversation.media[0].value if conversation.media else None
    return tuple(tokens.input_ids.tolist()), tuple(tokens.targets.tolist()), shows


def test_every_dialogue_is_trained_as_if_it_was_alone(processor):
    source = stream(processor, last=12)
    data, most = list(source), ROW * source.batching.micro_rows
    seen = sum(map(dialogues, data), Counter())
    assert set(seen) == {alone(processor, index) for index in range(32)}
    assert max(seen.values()) - min(seen.values()) <= 1
    assert sum(step.samples for step in data) == seen.total()
    separate = sum(len(tokens) * count for (tokens, _, _), count in seen.items())
    assert sum(step.tokens for step in data) < 0.8 * separate
    shown = sum(step.image_tokens for step in data)
    assert shown == TOKENS * sum(step.work.views for step in data) < TOKENS * 0.5 * seen.total()
    assert all(batch.input_ids.numel() <= most for step in data for batch in step.micro_batches)


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_has_the_same_dialogues_however_it_is_distributed(processor, world):
    ranks = [list(stream(processor, 2, rank, world)) for rank in range(world)]
    for reference, *shares in zip(stream(processor), *ranks):
        assert sum(map(dialogues, shares), Counter()) == dialogues(reference)
        add_up(shares, reference)
        assert len({str(share.cursor) for share in shares}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_from_a_cursor_equals_never_having_stopped(processor, workers):
    same_when_resumed(partial(stream, processor, bad=(3, 17)), STEPS, workers)


def test_a_broken_dialogue_does_not_take_the_others_with_it(processor):
    seen = sum((dialogues(data) for data in stream(processor, bad=(5,), last=12)), Counter())
    assert set(seen) == {alone(processor, index) for index in range(32) if index != 5}


def test_dialogues_of_a_broken_image_are_reported_one_by_one(processor, monkeypatch):
    def fail(self):
        raise BadSample("broken")

    found = [data.bad for data in stream(processor, last=8)]
    assert not any(found)
    monkeypatch.setattr(Flat, "load", fail)
    bad = Counter(record.index for data in stream(processor, last=8) for record in data.bad)
    assert set(bad) == {index for index in range(32) if index % 7}


def test_the_pairs_of_a_tree_are_counted_once(processor):
    parts = [processor.render(talk(index, (IMAGES[0],))) for index in range(3)]
    tree, shared = Rendered.tree(parts), parts[0].shared
    seen = sum(len(part) * (len(part) + 1) - shared * (shared + 1) for part in parts) + shared * (shared + 1)
    assert tree.squared == seen - len(tree)  # each position sees itself, which counts half


@pytest.mark.parametrize("per", ["sample", "sqrt"])
def test_loss_weights_of_a_tree_are_those_of_its_dialogues(processor, per):
    parts = [processor.render(talk(index, (IMAGES[0],))) for index in (1, 12, 3)]
    own = torch.cat([part.weighed(per).weights[part.shared :] for part in parts])
    weights = Rendered.tree(parts).weighed(per).weights
    assert torch.equal(weights[parts[0].shared :], own) and not weights[: parts[0].shared].any()


def test_molmo2s_weights_are_the_roots_of_dialogues_and_targets(processor):
    parts = [processor.render(talk(index, (IMAGES[0],))) for index in (1, 12, 3)]
    tree = Rendered.tree(parts).weighed("sqrt_dialogues", 0.5)
    for number, part in enumerate(parts, start=1):
        own, count = tree.weights[tree.branch == number], int((part.weights > 0).sum())
        assert own[own > 0].tolist() == pytest.approx([0.5 / math.sqrt(3 * count)] * count)
    assert tree.weights[tree.branch == 0].sum() == 0


RECORDS = [
    {"id": i, **({"image": shown} if shown else {}), "conversations": [
        {"from": "human", "value": "<image>" * (len(shown) if isinstance(shown, list) else bool(shown)) + "q"},
        {"from": "gpt", "value": "a"},
    ]}
    for i, shown in enumerate(["a.png", "b.png", None, "a.png", ["a.png", "b.png"], None, ["a.png", "b.png"], "c.png"])
]  # fmt: skip


@pytest.fixture
def file(tmp_path) -> Path:
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "data.json").write_text(json.dumps([*RECORDS, {"id": "broken"}]))
    return tmp_path / "data.json"


def test_records_of_the_same_image_files_are_drawn_one_after_the_other(file):
    listed = [{"json_path": str(file), "sampling_strategy": chosen} for chosen in ("all", "first:3")]
    (file.parent / "list.yaml").write_text(json.dumps({"datasets": listed}))
    sources = {"all": open_llava(file, file.parent), "listed": open_llava(file.parent / "list.yaml", file.parent)}
    mixture = Mixture({**sources, "talks": Talks()}, seed=3)
    groups = image_groups(mixture)
    assert groups.tolist()[:21] == [0, 1, 2, 0, 4, 5, 4, 7, 8, 9, 10, 11, 9, 13, 14, 13, 16, 17, 9, 10, 20]
    assert groups.tolist()[21:] == list(range(21, 53))
    together = mixture.keeping_together(groups)
    orders = [[together.draw(epoch * 53 + i) for i in range(53)] for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 3
    for order in orders:
        assert sorted(order) == list(range(53))
        drawn = [int(groups[index]) for index in order]
        assert sum(one != other for one, other in zip(drawn, drawn[1:])) + 1 == len(set(drawn))


@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_a_long_search_for_the_same_images_tells_its_progress(processor, file, monkeypatch, capsys, seconds):
    """Each record takes a number of `seconds`; after ten, progress is shown every 15."""
    monkeypatch.setattr(llava, "TOLD_EVERY", 1)
    clock = count(0.0, seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(file_index, "WORTHWHILE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "cache"))
    stage = make_stage(layout="packed", share_images=True, max_length=ROW)

    def told() -> list[str]:
        source = Mixture({"all": open_llava(file, file.parent)})
        build_batching(source, processor, stage, world_size=1, workers=0)
        return capsys.readouterr().err.splitlines()

    expected = [(3, "00:24"), (7, "00:08")] if seconds == 4 else []
    assert told() == [f"stage s: images: {read} of 9 records, {left} left" for read, left in expected]
    assert told() == []  # the second time, they are stored


def test_large_groups_are_not_drawn_earlier_than_others():
    mixture = Mixture({"all": Talks()}).keeping_together(torch.cat([torch.zeros(8), torch.arange(1, 25)]).long())
    places = [place for epoch in range(200) for place in range(32) if mixture.draw(32 * epoch + place) < 8]
    assert sum(places) / len(places) == pytest.approx(15.5, abs=1.5)  # 200 draws with a deviation of 7 have 0.5


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def reader(file) -> RecordReader:
    return RecordReader(ImageFolder(file.parent))


def test_the_dialogues_of_a_record_are_read_like_records_of_their_own(reader):
    told = [turns("<image>\nq", "a"), turns("<image>\nr", "b", "s", "c")]
    record = {"id": 7, "image": "a.png", "system": "be brief", "source": "x"}
    found = reader.read({**record, "dialogues": told}, "r")
    assert found.id == "r (id 7)" and found.unused == ("source",)
    own = [reader.read({**record, "conversations": each}, "r") for each in told]
    assert [each.turns for each in found.dialogues] == [each.turns for each in own]
    assert all(each.media == own[0].media for each in found.dialogues)
    check_conversation(found)


def test_the_mark_of_a_video_is_replaced_in_every_dialogue():
    class Clip:
        def probe(self): ...

    told = [(Turn("user", f"<video>{text}"), Turn("assistant", "<video>")) for text in "qr"]
    found = Conversation("r", told[0], (Clip(),), others=(told[1],))
    assert [turn.text for each in found.dialogues for turn in each.turns] == [
        "<image>q",
        "<video>",
        "<image>r",
        "<video>",
    ]


def test_dialogues_are_read_from_a_column(file):
    from datasets import Dataset

    told = [turns("<image>q", "a"), turns("<image>r", "b")]
    Dataset.from_list([{"image": "a.png", "talks": told}]).to_parquet(file.parent / "data.parquet")
    (found,) = HFDataset(file.parent / "data.parquet", columns={"dialogues": "talks"}, images=file.parent)
    assert [[turn.text for turn in each.turns] for each in found.dialogues] == [["<image>q", "a"], ["<image>r", "b"]]


BAD = {
    "no list": ({"dialogues": "[]"}, r"'dialogues' must be a non-empty list, got \[\]"),
    "an empty dialogue": ({"dialogues": [[]]}, "r dialogue 1: 'dialogues' must be a non-empty list"),
    "other text": ({"dialogues": [turns("q", "a")], "conversations": []}, "'dialogues' replaces 'conversations'"),
    "other images": (
        {"image": ["a.png", "b.png"], "dialogues": [
            [{"role": "user", "content": [{"type": "image", "index": i}]}, {"role": "assistant", "content": "a"}]
            for i in range(2)
        ]},
        "dialogue 2 does not show the images of dialogue 1",
    ),
    "a missing mark": (
        {"image": "a.png", "dialogues": [turns("<image>q", "a"), turns("q", "a")]},
        "r dialogue 2: 0 <image> marks in the user's turns, but 1 images",
    ),
    "another text before the image": (
        {"image": "a.png", "dialogues": [turns("<image>q", "a"), turns("What<image>q", "a")]},
        "r: dialogues 1 and 2 differ in their images or the text before them",
    ),
    "an answer before the image": (
        {"image": "a.png", "dialogues": [turns("q", "a", "<image>q", "a")] * 2},
        "r: an answer before the last image cannot be shared",
    ),
}  # fmt: skip


@pytest.mark.parametrize("record, said", BAD.values(), ids=BAD)
def test_dialogues_that_cannot_share_their_images_are_refused(reader, processor, record, said):
    with pytest.raises(BadSample, match=said):
        processor.render(reader.read(record, "r"))


def test_dialogues_need_share_images(reader, processor):
    conversation = reader.read({"image": "a.png", "dialogues": [turns("<image>q", "a")] * 2}, "r")
    assert processor.render(conversation).dialogues == 2
    assert processor.lengths([conversation]) == [None]
    with pytest.raises(BadSample, match="r: evaluation reads one dialogue per record, got 2"):
        processor.renderer.showable(conversation)
    processor.share_images = False
    with pytest.raises(BadSample, match=r"r: several dialogues .* need .* layout=packed and share_images=true"):
        processor.render(conversation)


def test_dialogues_beyond_the_length_are_dropped_whole(processor):
    first = talk(0, (IMAGES[0],))
    conversation = Conversation("r", first.turns, first.media, others=(first.turns,) * 30)
    tokens = processor.render(conversation)
    parts = tokens.parts[1:]
    assert set(parts) == {parts[0]} and len(tokens) <= ROW < len(tokens) + parts[0]


def test_records_of_several_dialogues_join_others(processor):
    def first_row(records: list[Conversation]) -> list:
        mixture = Mixture({"all": records})
        batching = PackedBatching(mixture, processor, 4, None, 1, share_images=True)
        (step,) = islice(StepStream(batching, mixture, processor, 0, 1, 0, 1), 1)
        return [batch.branch.unique().tolist() for batch in step.micro_batches if batch.branch is not None]

    media = (IMAGES[0],)
    both = Conversation("both", talk(1, media).turns, media, others=(talk(2, media).turns,))
    assert max(chain(*first_row([both, talk(3, media), both]))) >= 3
