"""What ``auto`` becomes, by the memory of the devices."""

from __future__ import annotations

import json

import pytest
import torch

from vlmtrain.distributed.world import World
from vlmtrain.planning.plan import Machine, _Vocabulary, plan_run
from vlmtrain.settings import compose
from vlmtrain.training import deciding
from vlmtrain.training.deciding import decided

GIB = 2**30
ALONE = World(0, 1, torch.device("cpu"))


def decide(monkeypatch, file, memory: float, *more: str, world: World = ALONE):
    run = compose(["recipe=llava_1_5", "stage=instruct", "engine=zero3", *more])
    monkeypatch.setattr(deciding, "_memory", lambda device: int(memory))
    monkeypatch.setattr(World, "max", lambda self, values: values)
    monkeypatch.setattr(World, "from_main", lambda self, value: value)
    return decided(run, run.stages["instruct"], file, world, _Vocabulary(run))


def planned(file) -> float:
    return json.loads(file.read_text())["planned_bytes"]


EIGHT = World(0, 8, torch.device("cpu"))


def test_activations_are_recomputed_only_where_memory_is_too_small(tmp_path, monkeypatch):
    micro = "stages.instruct.micro_batch_size=8"
    stage = decide(monkeypatch, tmp_path / "plenty", 10_000 * GIB, micro, world=EIGHT)
    assert stage.gradient_checkpointing is False and stage.micro_batch_size == 8
    enough = planned(tmp_path / "plenty")
    assert decide(monkeypatch, tmp_path / "enough", enough, micro, world=EIGHT).gradient_checkpointing is False
    assert decide(monkeypatch, tmp_path / "few", enough - 1, micro, world=EIGHT).gradient_checkpointing is True
    assert planned(tmp_path / "few") < enough


def test_the_largest_micro_batch_that_fits_is_a_divisor_of_the_share(tmp_path, monkeypatch):
    auto = "stages.instruct.micro_batch_size=auto"
    sizes = []
    for memory in (50, 80, 140, 400):
        stage = decide(monkeypatch, tmp_path / str(memory), memory * GIB, auto, world=EIGHT)
        assert 16 % stage.micro_batch_size == 0 and planned(tmp_path / str(memory)) <= memory * GIB
        if stage.micro_batch_size < 16:
            doubled = f"stages.instruct.micro_batch_size={2 * stage.micro_batch_size}"
            keep = f"stages.instruct.gradient_checkpointing={str(stage.gradient_checkpointing).lower()}"
            auto_off = compose(["recipe=llava_1_5", "stage=instruct", "engine=zero3", doubled, keep])
            (plan,) = plan_run(auto_off, Machine(gpus=8, gpu_memory_gb=memory))
            assert plan.memory[3] > memory * GIB
        sizes.append((not stage.gradient_checkpointing, stage.micro_batch_size))
    assert sizes == sorted(sizes) and len(set(sizes)) > 2


def test_a_decision_is_kept_for_the_same_devices_and_made_again_for_others(tmp_path, monkeypatch):
    file = tmp_path / "decided.json"
    decide(monkeypatch, file, 10_000 * GIB, world=EIGHT)
    record = json.loads(file.read_text()) | {"gradient_checkpointing": True}
    file.write_text(json.dumps(record))
    assert decide(monkeypatch, file, 10_000 * GIB, world=EIGHT).gradient_checkpointing is True
    assert decide(monkeypatch, file, 10_001 * GIB, world=EIGHT).gradient_checkpointing is False
    assert decide(monkeypatch, file, 10_001 * GIB).gradient_checkpointing is False
    assert json.loads(file.read_text())["processes"] == 1


def test_a_decision_is_made_again_for_other_settings(tmp_path, monkeypatch):
    file, auto = tmp_path / "decided.json", "stages.instruct.micro_batch_size=auto"
    sizes = []
    for recompute in ("true", "false"):
        given = f"stages.instruct.gradient_checkpointing={recompute}"
        sizes.append(decide(monkeypatch, file, 140 * GIB, auto, given, world=EIGHT).micro_batch_size)
        assert planned(file) <= 140 * GIB
    assert sizes == [16, 8]


def test_what_is_offloaded_needs_no_memory(tmp_path, monkeypatch):
    auto = "stages.instruct.micro_batch_size=auto"
    decide(monkeypatch, tmp_path / "without", 80 * GIB, auto)
    stage = decide(monkeypatch, tmp_path / "with", 80 * GIB, auto, "engine=zero3_offload")
    assert planned(tmp_path / "without") > 80 * GIB >= planned(tmp_path / "with") and stage.micro_batch_size > 1


def test_values_that_are_given_are_not_decided(tmp_path, monkeypatch):
    given = ("stages.instruct.gradient_checkpointing=true", "stages.instruct.micro_batch_size=4")
    stage = decide(monkeypatch, tmp_path / "none", 1, *given)
    assert stage.gradient_checkpointing is True and stage.micro_batch_size == 4
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("value", ["maybe", "1"])
def test_other_words_are_refused(value):
    with pytest.raises(ValueError, match=r"gradient_checkpointing=.*expected true or false, or auto"):
        compose(["recipe=llava_1_5", f"stages.align.gradient_checkpointing={value}"])


def test_the_plan_says_where_activations_are_recomputed():
    run = compose(["recipe=llava_1_5", "stage=instruct"])
    (plan,) = plan_run(run, Machine(gpus=8, gpu_memory_gb=160))
    assert plan.recomputes == {0: True, 1: True, 2: True, 3: True}
    (between,) = plan_run(run, Machine(gpus=8, gpu_memory_gb=250))
    assert between.recomputes == {0: True, 1: True, 2: False, 3: False}
    (roomy,) = plan_run(run, Machine(gpus=8, gpu_memory_gb=320))
    assert not any(roomy.recomputes.values())
    assert roomy.hardware_flops == roomy.flops == plan.flops < plan.hardware_flops


def test_the_plan_of_an_automatic_micro_batch_is_that_of_its_size():
    (auto,) = plan_run(
        compose(["recipe=llava_1_5", "stage=instruct", "stages.instruct.micro_batch_size=auto"]), Machine(8, 48)
    )
    size = f"stages.instruct.micro_batch_size={auto.micro_batch_size}"
    (given,) = plan_run(compose(["recipe=llava_1_5", "stage=instruct", size]), Machine(8, 48))
    assert auto.micro_batch_size < 16 and auto.memory == given.memory
    assert min(auto.memory.values()) <= 48 * GIB
