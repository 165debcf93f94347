"""Adapters over 4-bit weights train in the same way as plain adapters over the dequantized weights."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from vlmtrain.model.folder import read_manifest, write_manifest
from vlmtrain.model.parts import load_part, module_state, part_facts, save_part

from ..conftest import metrics, train
from ..end_to_end.test_resume import interrupt
from .test_adapters import line as plain_line


def line(files, run_dir, base: Path, quantize: str, steps: int, *more: str) -> list[str]:
    lora = f"stages.instruct.lora={{llm: {{rank: 4, alpha: 12, dropout: 0.05, quantize: {quantize}}}}}"
    begun = ["stage=instruct", f"init_from={base}", f"stages.instruct.max_steps={steps}"]
    return [*plain_line(files, run_dir), lora, *begun, *more]


@pytest.fixture(scope="module")
def bases(llava_files, tmp_path_factory) -> tuple[Path, Path]:
    """An initial model, and the same model with the linear layers of its LLM quantized and dequantized."""
    folder = tmp_path_factory.mktemp("bases")
    train(*plain_line(llava_files, folder / "run", "stage=align"))
    base, unpacked = folder / "run" / "align" / "model", folder / "unpacked"
    shutil.copytree(base, unpacked)
    llm = load_part("llm", base)
    with torch.no_grad():
        for layer in llm.modules():
            if isinstance(layer, nn.Linear) and layer is not llm.get_output_embeddings():
                given = layer.weight.bfloat16()
                codes, state = bnb.quantize_4bit(given, compress_statistics=True, quant_type="nf4")
                state.dtype = torch.float32
                layer.weight.copy_(bnb.dequantize_4bit(codes, state))
    weights = module_state(llm)
    save_part("llm", llm, unpacked / "llm", weights)
    write_manifest(unpacked, {**read_manifest(base), "llm": part_facts(weights)})
    return base, unpacked


@pytest.mark.parametrize(
    "engine, precision, ranks",
    [
        ("zero0", "fp32", 1),
        ("zero2", "bf16", 2),
        ("zero3", "fp32", 2),
        pytest.param("zero3", "bf16", 2, marks=pytest.mark.slow),
        pytest.param("zero1", "bf16", 1, marks=pytest.mark.slow),
        pytest.param("zero2_offload", "fp32", 1, marks=pytest.mark.slow),
        pytest.param("zero3_offload", "fp32", 1, marks=pytest.mark.slow),
    ],
)
def test_a_stage_equals_plain_adapters_on_the_dequantized_weights(
    engine, precision, ranks, bases, llava_files, tmp_path
):
    base, unpacked = bases
    more = [f"engine={engine}", f"precision={precision}"]
    more += ["engine.parameter_persistence_threshold=0"] if engine.startswith("zero3") else []
    train(*line(llava_files, tmp_path / "held", base, "nf4", 6, *more), ranks=ranks)
    train(*line(llava_files, tmp_path / "plain", unpacked, "null", 6, *more), ranks=ranks)
    held, plain = ([step["loss"] for step in metrics(tmp_path / run, "instruct")] for run in ("held", "plain"))
    assert held == pytest.approx(plain, rel=1e-5)
    assert held[-1] < 0.8 * held[0]
    models = [tmp_path / run / "instruct" / "model" for run in ("held", "plain")]
    held, plain = (module_state(load_part("llm", model)) for model in models)
    assert held.keys() == plain.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6, msg=name)
    parts = [json.loads((model.parent / "summary.json").read_text())["parts"]["llm"] for model in models]
    assert parts[0]["sha256_before"] == parts[1]["sha256_before"]  # both start from the dequantized weights
    assert all(parts[0][key] == parts[1][key] for key in ("parameters", "trainable_parameters", "frozen_parameters"))


def test_a_stopped_stage_resumes_bit_for_bit(bases, llava_files, tmp_path):
    whole, stopped = (line(llava_files, tmp_path / run, bases[0], "nf4", 16) for run in ("whole", "stopped"))
    train(*whole)
    interrupt(stopped, tmp_path / "stopped", 1, 3, signal.SIGTERM)
    assert len(metrics(tmp_path / "stopped", "instruct")) < 16
    train(*stopped)
    losses = [[step["loss"] for step in metrics(tmp_path / run, "instruct")] for run in ("whole", "stopped")]
    assert losses[0] == losses[1]
    for part in ("llm", "adapters/llm", "connector"):
        files = [
            sorted((tmp_path / run / "instruct" / "model" / part).glob("*.safetensors")) for run in ("whole", "stopped")
        ]
        assert files[0] and [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
