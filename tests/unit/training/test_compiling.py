"""Compiled blocks compute what they did before, whatever the shapes, without being compiled again for each."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from vlmtrain.model.attention import attend_in_segments, attention_arguments
from vlmtrain.model.llm import build_random_llm
from vlmtrain.model.parts import module_state
from vlmtrain.training.compiling import compile_blocks

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_results_stay_and_one_compilation_serves_all_blocks_and_shapes(tokenizer, monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "0")  # which the compiler sets: undone at the end
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    llm = build_random_llm(LLAMA, tokenizer).train()
    names = set(module_state(llm))
    rows = [torch.randn(*shape, 32, requires_grad=True) for shape in ((2, 9), (3, 17), (4, 30), (2, 31), (5, 12))]

    def run(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = llm(inputs_embeds=row, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().mean(), row)
        return logits.detach(), gradient

    expected = [run(row) for row in rows]
    compile_blocks({"llm": llm})
    for row, wanted in zip(rows, expected):
        for found, value in zip(run(row), wanted):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    assert set(module_state(llm)) == names


def test_one_compilation_serves_packed_rows_however_many_samples_they_hold(tokenizer):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    llm = build_random_llm(LLAMA, tokenizer).train()
    attend_in_segments(llm)
    rows = [[9], [4, 13], [30, 2, 5], [8, 8, 8, 8], [3, 20, 3, 20, 7], [11, 1]]

    def run(lengths: list[int]) -> torch.Tensor:
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        row = torch.linspace(-1, 1, 32 * int(boundaries[-1])).view(1, -1, 32).requires_grad_()
        return llm(
            inputs_embeds=row, position_ids=positions, use_cache=False, **attention_arguments(boundaries)
        ).logits.detach()

    expected = [run(row) for row in rows]
    compile_blocks({"llm": llm})
    graphs = []
    for row, wanted in zip(rows, expected):
        torch.testing.assert_close(run(row), wanted, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == graphs[1:2] * len(graphs[1:])
