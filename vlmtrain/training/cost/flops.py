"""FLOPs of optimizer steps, from the lengths of their samples, and the peaks of devices.

    text      a * tokens + b * tokens^2 + c * targets       for each sample
    images    d + e * patches + f * patches^2               for each view

Only useful work counts: no padding, no recomputation, and no features that are read from a cache (of several encoders,
only if all of an image's features are read). The coefficients are
measured on the meta device (see `stage`), where attention within a sample counts as causal,
also if the model has a sliding window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ...data.geometry import Geometry
from ...data.loader import Work
from ...model.encoder_decoder import is_encoder_decoder
from ...settings import Stage
from ..trainable import Group
from .measuring import PartCost
from .stage import measure_fusion, measure_text, measure_views, reads_media

TFLOPS = {
    torch.bfloat16: {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165},
    torch.float32: {"B200": 1125, "H200": 495, "H100 PCIe": 378, "H100": 495, "A100": 156, "L40S": 183, "4090": 83},
}
"""Dense peaks of NVIDIA's data sheets by precision, the first name that is part of the device's. fp32 runs as TF32."""
_TOKENS, _TARGETS = 64, (32, 64)  # of the samples that are measured
_DECODED = (16, 32)  # targets of an encoder-decoder model, whose encoder must have tokens as well
_SIDES = (2, 4, 8)  # of the square images that are measured, in windows


class StepFlops:
    """FLOPs of the forward and backward passes of a stage's steps.

    parts: on the meta device, with gradients required by what trains in `groups`. geometry: None without an encoder.
    """

    def __init__(self, parts: Mapping[str, nn.Module], groups: list[Group], stage: Stage, geometry: Geometry | None):
        self._text = np.zeros(3)
        if "llm" in parts:
            targets = _DECODED if is_encoder_decoder(parts["llm"].config) else _TARGETS
            few, many = (measure_text(parts, groups, _TOKENS, count) for count in targets)
            of_a_target = (many.all_flops - few.all_flops) / (targets[1] - targets[0])
            of_tokens = few.all_flops - few.attention_flops - of_a_target * targets[0]
            self._text = np.array([of_tokens / _TOKENS, few.attention_flops / _TOKENS**2, of_a_target])
        if geometry is None:
            sizes = []
        elif geometry.fit == "native":
            sizes = [tuple(side * factor for factor in geometry.factors) for side in _SIDES]
        else:
            sizes = [geometry.size]
        shown = [geometry.sizes(size) for size in sizes] or [()]
        views = [measure_views(parts, groups, stage, 1, each) for each in shown]
        patches = [math.prod(parts["vision"].grid_of(size)) for size in sizes] or [0]
        powers = [[1, n, n * n] for n in patches] if len(patches) > 1 else [[1]]
        self._views = {
            part: _solved(powers, [view.get(part, PartCost()) for view in views]) for part in ("vision", "connector")
        }
        self._media = 0.0
        if reads_media(parts):
            few, many = (
                measure_fusion(parts, groups, tokens, views[0]["connector"].tokens).all_flops
                for tokens in (_TOKENS, 2 * _TOKENS)
            )
            self._text[0] += (many - few) / _TOKENS
            self._media = 2 * few - many
        self._objective = views[0]["objective"].all_flops if "objective" in views[0] else 0.0

    def __call__(self, samples: float, tokens: float, targets: float, work: Work) -> float:
        shown = [work.views, work.patches, work.squared_patches]
        encoded = [work.encoded, work.encoded_patches, work.encoded_squared_patches]
        count = len(self._views["vision"])
        images = self._views["vision"] @ encoded[:count] + self._views["connector"] @ shown[:count]
        images += self._media * work.views
        return float(self._text @ [tokens, work.squared_tokens, targets] + images + self._objective * samples)


def _solved(powers: list[list[int]], costs: list[PartCost]) -> np.ndarray:
    return np.linalg.solve(np.array(powers, float), np.array([cost.all_flops for cost in costs]))


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak of a GPU in dense TFLOP/s, None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in TFLOPS[dtype].items() if part in name), None)
