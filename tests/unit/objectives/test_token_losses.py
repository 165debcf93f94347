"""Cross-entropy by chunks of rows, compared with torch's over float32 logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmtrain.objectives import token_losses as module
from vlmtrain.objectives.token_losses import token_losses


@pytest.fixture(params=[1, 64, 2**24])
def chunked(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_losses_and_gradients_are_those_of_the_dense_computation(dtype, rows, chunked):
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(rows, 29, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(29, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    found = token_losses(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    (own,) = torch.autograd.grad((found * weights).sum(), logits)
    assert own.dtype == dtype
    torch.testing.assert_close(own, gradient, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_nan_logit_reaches_the_loss(chunked):
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    assert token_losses(logits, torch.tensor([0, 1, 2])).isnan().tolist() == [False, True, False]


def test_an_impossible_token_adds_no_loss_and_gets_no_gradient(chunked):
    logits = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
    loss = token_losses(logits, torch.tensor([0]))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([2.0]).log())
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.5, 0.0]]))


def test_no_other_tensor_as_large_as_the_logits_is_kept(chunked):
    kept: list[torch.Tensor] = []
    logits = torch.randn(64, 512, dtype=torch.bfloat16, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_losses(logits, torch.zeros(64, dtype=torch.long))
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]
