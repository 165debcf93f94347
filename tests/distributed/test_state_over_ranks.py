"""A checkpoint loaded with another number of ranks and saved again is bitwise identical, including all rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..conftest import run_script
from .state_runs import ENGINES, STEP

WORKER = Path(__file__).with_name("state_runs.py")


def read(run_dir: Path, ranks: int) -> tuple[dict[str, Tensor], dict]:
    folder = run_dir / "instruct" / "checkpoints" / f"step-{STEP:06d}"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == ranks
    shares = [load_file(file) for file in files]
    assert len({name for share in shares for name in share}) == sum(map(len, shares)), "each is written once"
    return {name: tensor for share in shares for name, tensor in share.items()}, json.loads(
        (folder / "vlmtrain.json").read_text()
    )["record"]


@pytest.mark.parametrize("chain", [(1, 2, 1), pytest.param((2, 4, 1), marks=pytest.mark.slow)], ids=str)
def test_a_state_is_the_same_for_any_number_of_ranks(chain, tmp_path):
    names = [f"{number}. {ranks} ranks" for number, ranks in enumerate(chain)]
    run_script(WORKER, str(tmp_path), names[0], ranks=chain[0])
    again = f"{names[0]} again"
    run_script(WORKER, str(tmp_path), names[0], again, ranks=chain[0])  # for the rates of its groups
    for i in (1, 2):
        run_script(WORKER, str(tmp_path), names[i - 1], names[i], ranks=chain[i])
    for engine in ENGINES:
        wanted, record = read(tmp_path / f"{names[0]}-{engine}", chain[0])
        assert {name.rpartition("/")[2] for name in wanted} >= {"weight", "exp_avg", "exp_avg_sq"}
        assert all(tensor.any() for name, tensor in wanted.items() if name.startswith("connector.")), "it has trained"
        assert set(record["updates"].values()) == {STEP} and len(record["updates"]) >= 4
        rates = json.loads((tmp_path / f"{again}-{engine}" / "groups.json").read_text())
        assert len({rate for _, rate, _ in rates}) >= 4 and {decay for _, _, decay in rates} == {0.0, 0.1}
        for i in (1, 2):
            found, facts = read(tmp_path / f"{names[i]}-{engine}", chain[i])
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(found[name], tensor), (engine, chain[i], name)
            for key in ("updates", "cursor", "bad_steps", "drawn"):
                assert facts[key] == record[key], (engine, chain[i], key)
            assert json.loads((tmp_path / f"{names[i]}-{engine}" / "groups.json").read_text()) == rates
