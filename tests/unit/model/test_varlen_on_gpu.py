"""On a GPU, the variable-length kernels compute what loops over segments compute in fp32 on the host.

A kernel multiplies in bf16 and accumulates in fp32. An output is a mean of values, whose weights are rounded to bf16
(relative error 2^-9) and which is rounded itself (2^-9), so relative errors are around 2^-8. Gradients multiply several
rounded factors, with differences between them: 2^-6.
"""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from vlmtrain.model.attention import attention_arguments, segment_attention
from vlmtrain.model.varlen import has_kernel
from vlmtrain.model.vision import build_vision
from vlmtrain.model.vision.image_attention import Segments, attend_in_images

pytestmark = pytest.mark.gpu
DEVICE, LENGTHS, WIDTH = torch.device("cuda"), (7, 1, 130, 33, 64), 64
OUTPUTS, GRADIENTS = 2**-7, 2**-6  # largest relative errors in norm, twice those argued above for outputs


def inputs(heads: int, groups: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output, with values that bf16 represents."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), WIDTH) for count in (heads, groups, groups)]
    shapes.append((1, sum(LENGTHS), heads, WIDTH))
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def run(attend, tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    *leaves, weights = (tensor.to(device, dtype, copy=True) for tensor in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    output, _ = attend(*leaves)
    output.backward(weights)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, limit, one, other in zip("oqkv", (OUTPUTS, *3 * (GRADIENTS,)), found, expected):
        error = (one.cpu().float() - other).norm() / other.norm()
        assert error <= limit, f"{name}: {error:.4f}"


@pytest.mark.parametrize("window", [None, 16])
def test_samples_of_a_packed_row(window):
    def attend(query: Tensor, key: Tensor, value: Tensor):
        boundaries = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
        options = attention_arguments(boundaries.to(query.device), segments=torch.tensor(LENGTHS))
        assert has_kernel(query) == query.is_cuda
        return segment_attention(None, query, key, value, None, WIDTH**-0.5, sliding_window=window, **options)

    tensors = inputs(8, 2)
    found = run(attend, tensors, DEVICE, torch.bfloat16)
    assert_near(found, run(attend, tensors, torch.device("cpu"), torch.float32))


def test_images_of_a_packed_row():
    def attend(query: Tensor, key: Tensor, value: Tensor):
        segments, scale = Segments.of(LENGTHS, query.device), WIDTH**-0.5
        return attend_in_images(None, query, key, value, segments, scale)

    tensors = inputs(4, 4)
    found = run(attend, tensors, DEVICE, torch.bfloat16)
    assert_near(found, run(attend, tensors, torch.device("cpu"), torch.float32))


@torch.no_grad()
def test_images_in_a_native_tower(tmp_path):
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    Siglip2VisionModel(Siglip2VisionConfig(**size, patch_size=16, num_patches=64)).save_pretrained(tmp_path)
    look = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(look))
    tower = build_vision("hf", path=str(tmp_path), layer=-1).eval()
    images = [torch.randn(3, 16 * height, 16 * width) for height, width in ((4, 9), (7, 7), (12, 3))]
    alone = torch.cat([tower.encode((image,)).patches for image in images])
    tower = tower.to(DEVICE, torch.bfloat16)
    together = tower.encode(tuple(image.to(DEVICE, torch.bfloat16) for image in images)).patches
    error = (together.cpu().float() - alone).norm() / alone.norm()
    assert error <= 2**-5, error  # four layers of roundings, and the bf16 of weights and pixels
