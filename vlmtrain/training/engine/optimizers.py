"""The optimizers by name, and the tensors that each keeps for a parameter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...settings.stage import OptimizerOptions
from ..optimizer import EIGHT_BIT, MUON_MOMENTS

AVERAGE = "ema"
"""Key of the average of the weights, which is kept next to the optimizer's tensors."""
MUON_MOMENTUM = 0.95
_QUANTIZED = ("state1", "state2", "absmax1", "absmax2")


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions, offload: bool) -> torch.optim.Optimizer:
    """Build the optimizer of a stage over `groups`.

    offload: whether its tensors are kept on the host; on a GPU, AdamW then runs in DeepSpeed's CPU kernel.
    """
    adamw = {"betas": options.betas, "eps": options.eps}
    if options.name == "muon":
        return MuonAdamW(groups, adamw)
    if options.name == "adamw_8bit":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about missing kernels not used here
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adamw)
    if offload and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **adamw)
    return torch.optim.AdamW(groups, fused=True, **adamw)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with its momentum, and AdamW for the others, as one optimizer.

    Muon's updates have the root mean square of AdamW's, so that both use the same learning rates (Liu et al. 2025,
    "Muon is scalable for LLM training", section 2.2).
    """

    def __init__(self, groups: list[dict[str, Any]], adamw: Mapping[str, Any]):
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group["moments"] == MUON_MOMENTS]
        others = [group for group in self.param_groups if group["moments"] != MUON_MOMENTS]
        self._inner: list[torch.optim.Optimizer] = []  # over the same groups, so that rates set here apply to them
        if matrices:
            muon = torch.optim.Muon(matrices, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
            self._inner.append(muon)
        if others:
            self._inner.append(torch.optim.AdamW(others, fused=True, **adamw))
        for each in self._inner:
            each.state = self.state

    def step(self, closure: None = None) -> None:
        for each in self._inner:
            each.step()


def make_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], flat: Tensor, updates: int) -> None:
    """Create the state of a tensor, as before its first update, which the optimizer would create then."""
    if group["moments"] == EIGHT_BIT:
        optimizer.init_state(group, flat, *_position(optimizer, flat))
        optimizer.state[flat]["step"] = updates
        return
    state = {moment: torch.zeros_like(flat) for moment in group["moments"]}
    if group["moments"] != MUON_MOMENTS:
        state["step"] = torch.tensor(float(updates), device=flat.device)
    optimizer.state[flat] = state


def eight_bit_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The moments of an 8-bit state and the scales of their blocks."""
    return {key: state[key] for key in _QUANTIZED if key in state}


def _position(optimizer: torch.optim.Optimizer, flat: Tensor) -> tuple[int, int]:
    """Index of a tensor's group, and of the tensor in it."""
    return next(
        (i, j) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"]) if p is flat
    )
