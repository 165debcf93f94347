"""Linear layers whose frozen weights are held in 4 bits, under adapters (QLoRA; Dettmers et al., 2023).

    lora: {llm: {rank: 64, alpha: 16, quantize: nf4}}

bitsandbytes packs and unpacks. With the paper's double quantisation a weight takes 4 bits, a 64th of its block's scale
in 8 bits, and a 64 * 256th of the scales' scale in 32: 4.127 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

KINDS = ("nf4",)
PACKED = ("codes", "scales", "scale_scales")
_BLOCK, _SCALES_BLOCK = 64, 256


class QuantizedLinear(nn.Module):
    """``(..., in) -> (..., out)`` like the linear layer that it takes the place of, whose weight it holds in NF4.

    All that is packed are bytes, which no change of dtype reaches: codes ``(N / 2, 1)``, two a byte; the blocks' scales
    ``(N / 64,)``; and, as fp32, these scales' mean and the scales of what is left ``(4 + 4 N / (64 * 256),)``. The
    weight is packed as bf16, so that the codes are the same in either compute dtype, and unpacked in the input's.
    """

    def __init__(self, linear: nn.Linear | Conv1D):
        super().__init__()
        self.shape, self.is_transposed = tuple(linear.weight.shape), isinstance(linear, Conv1D)
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        for name, packed in zip(PACKED, _pack(linear.weight.detach().to(torch.bfloat16))):
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))

    @property
    def packed(self) -> tuple[nn.Parameter, ...]:
        return self.codes, self.scales, self.scale_scales

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked, as it stands in a plain layer."""
        return _unpack(*self.packed, self.shape, self.dtype)

    def unpacked(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        """The same of the tensors that a part's `state` has under `prefix`."""
        return _unpack(*(state[prefix + name] for name in PACKED), self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x, *self.packed, self.shape, self.is_transposed)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """``x W^T`` that keeps W packed for the backward pass; W has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, scale_scales: Tensor, shape: tuple, transposed: bool):
        ctx.save_for_backward(codes, scales, scale_scales)
        ctx.shape, ctx.transposed = shape, transposed
        weight = _unpack(codes, scales, scale_scales, shape, x.dtype)
        return F.linear(x, weight.T if transposed else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        weight = _unpack(*ctx.saved_tensors, ctx.shape, gradient.dtype)
        return gradient @ (weight.T if ctx.transposed else weight), *[None] * 5


def _pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the scales' scales of a weight."""
    if weight.is_meta:
        blocks = math.ceil(weight.numel() / _BLOCK)
        shapes = ((math.ceil(weight.numel() / 2), 1), (blocks,), (4 + 4 * math.ceil(blocks / _SCALES_BLOCK),))
        return tuple(weight.new_empty(shape, dtype=torch.uint8) for shape in shapes)
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    return codes, state.absmax, torch.cat([state.offset[None], state.state2.absmax]).view(torch.uint8)


def _unpack(codes: Tensor, scales: Tensor, scale_scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if codes.is_meta:
        return codes.new_empty(shape, dtype=dtype)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    mean, *_ = values = scale_scales.clone().view(torch.float32)
    inner = QuantState(values[1:], code=_scale_codes(scales.device), blocksize=_SCALES_BLOCK, dtype=torch.float32)
    outer = QuantState(scales, shape, None, _BLOCK, "nf4", dtype, mean, inner)
    return dequantize_4bit(codes, outer)


@lru_cache
def _scale_codes(device: torch.device) -> Tensor:
    """What the 256 codes of a scale stand for."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a part that are held in 4 bits, by path."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
