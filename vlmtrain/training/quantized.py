"""Linear layers with frozen 4-bit weights, for use under adapters (QLoRA; Dettmers et al., 2023).

    lora: {llm: {rank: 64, alpha: 16, quantize: nf4}}

bitsandbytes quantizes and dequantizes. With double quantization as in the paper, a weight takes 4 bits, plus 8 / 64
bits for the scale of its block and 32 / (64 * 256) bits for the scale of the scales: 4.127 bits.
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

PACKED = ("codes", "scales", "scale_scales")
_BLOCK, _SCALES_BLOCK = 64, 256


class QuantizedLinear(nn.Module):
    """Linear layer ``(..., in) -> (..., out)`` that stores the weight of the layer it replaces in NF4.

    All packed tensors are bytes, which a change of dtype does not affect: codes ``(N / 2, 1)``, two per byte; the
    scales of the blocks ``(N / 64,)``; and, as fp32, the mean of these scales and the scales of the remainder
    ``(4 + 4 N / (64 * 256),)``. The weight is quantized from bf16, so that the codes do not depend on the compute
    dtype, and dequantized to the dtype of the input.
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
        """The dequantized weight, with the shape and dtype of a plain layer."""
        return _unpack(*self.packed, self.shape, self.dtype)

    def unpacked(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        """Dequantize the weight from the tensors of a part's `state` under `prefix`."""
        return _unpack(*(state[prefix + name] for name in PACKED), self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x, *self.packed, self.shape, self.is_transposed)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """``x W^T``, with W kept in 4 bits for the backward pass. W has no gradient."""

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
    """Quantize a weight into codes, scales and the scales of the scales."""
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
    """The values of the 256 codes of a scale."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a part with 4-bit weights, by path."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
