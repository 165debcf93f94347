"""Mixtures: the share of each source, and an order that depends only on seed and position."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from vlmtrain.data.mixture import Mixture
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.sources import build_source
from vlmtrain.settings.data import read_data


class Named:
    def __init__(self, name: str, size: int):
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        assert 0 <= index < self.size
        return Conversation(f"{self.name}{index}", (Turn("user", "q"), Turn("assistant", "a")))


def epoch(mixture: Mixture, number: int) -> list[str]:
    start = number * mixture.epoch_size
    return [mixture[mixture.draw(start + i)].id for i in range(mixture.epoch_size)]


def test_without_counts_every_record_comes_once_per_epoch():
    mixture = Mixture({"a": Named("a", 7), "b": Named("b", 3)})
    everything = {f"a{i}" for i in range(7)} | {f"b{i}" for i in range(3)}
    assert len(mixture) == mixture.epoch_size == 10
    assert {mixture[i].id for i in range(10)} == everything
    for number in range(3):
        assert sorted(epoch(mixture, number)) == sorted(everything)


def test_counts_hold_in_each_epoch_and_every_record_is_drawn_equally_often():
    mixture = Mixture({"a": Named("a", 10), "b": Named("b", 3), "c": Named("c", 4)}, {"a": 4, "b": 5, "c": 4})
    seen = Counter()
    for number in range(15):
        drawn = epoch(mixture, number)
        assert Counter(name[0] for name in drawn) == {"a": 4, "b": 5, "c": 4}
        seen.update(drawn)
    assert {seen[f"a{i}"] for i in range(10)} == {6}
    assert {seen[f"b{i}"] for i in range(3)} == {25}
    assert {seen[f"c{i}"] for i in range(4)} == {15}


def test_the_order_depends_on_seed_epoch_and_position_only():
    def order(seed: int, number: int) -> tuple[str, ...]:
        return tuple(epoch(Mixture({"a": Named("a", 30), "b": Named("b", 5)}, seed=seed), number))

    torch.manual_seed(1)
    here = order(0, 2)
    torch.manual_seed(2)
    assert here == order(0, 2)
    everything = {order(seed, number) for seed in range(4) for number in range(3)}
    assert len(everything) == 12
    assert all(list(one) != sorted(one) for one in everything)


def test_adding_a_source_does_not_change_the_draws_of_the_others():
    """The half of `a` that the first epoch draws depends only on `a`."""
    alone = Mixture({"a": Named("a", 20)}, {"a": 10})
    both = Mixture({"z": Named("z", 9), "a": Named("a", 20)}, {"z": 9, "a": 10})
    assert sorted(epoch(alone, 0)) == sorted(name for name in epoch(both, 0) if name[0] == "a")


def shapes(**amounts) -> dict:
    return {"format": "shapes", "split": "text", **amounts}


@pytest.mark.parametrize(
    "amounts, counts",
    [
        (({"size": 30}, {"size": 10}), (30, 10)),
        (({"size": 30, "samples": 6}, {"size": 10}), (6, 10)),
        (({"size": 30, "samples": 6}, {"size": 10, "samples": 25}), (6, 25)),
        (({"size": 30, "weight": 1}, {"size": 10, "weight": 3}), (10, 30)),
        (({"size": 30, "weight": 0.5}, {"size": 10, "weight": 0.5}), (20, 20)),
    ],
)
def test_samples_and_weights_as_they_are_written(amounts, counts):
    data = {"format": "llava_json", "instruct": {"one": shapes(**amounts[0]), "two": shapes(**amounts[1])}}
    mixture = build_source(read_data(data).split("instruct"), (48, 48), seed=0)
    assert tuple(mixture.counts.values()) == counts and mixture.epoch_size == sum(counts)


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"one": shapes(size=5, weight=1), "two": shapes(size=5)}, "data.instruct.two"),
        ({"one": shapes(size=5, weight=1, samples=2), "two": shapes(size=5, weight=1)}, "data.instruct.one"),
        ({"one": shapes(size=5, weight=0)}, "data.instruct.one.weight=0"),
        ({"one": shapes(size=5, samples=2.5)}, "data.instruct.one.samples=2.5"),
        ({"one": shapes(size=5, samples="many")}, "data.instruct.one.samples=many"),
        ({"one": shapes(size=5, sampels=2)}, "Did you mean 'data.instruct.one.samples'"),
        ({"one": {"format": "shape", "size": 5}}, "Did you mean 'shapes'"),
        ({"one": {"format": "shapes", "split": "text"}}, "data.instruct.one.size is missing"),
    ],
)
def test_invalid_settings_are_named(entry, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        read_data({"format": "llava_json", "instruct": entry})
