"""What a stage must remember to go on: of each trained parameter, by name, its fp32 weights and AdamW's moments.

Nothing in it speaks of ranks, partitions or ZeRO stages, so any number of processes and any engine can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import some

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


class TrainingState:
    """Reads and writes the state of an engine's trained parameters and of their parts' buffers.

    Every rank must make the same calls: the state is gathered parameter by parameter.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        zero_stage: int,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
    ):
        self.engine, self.zero_stage = engine, zero_stage
        self.parameters, self.buffers = dict(parameters), dict(buffers)
        inner = engine.optimizer
        # DeepSpeed wraps AdamW under ZeRO, and leaves it alone without
        self.adamw = inner if zero_stage == 0 else inner.optimizer

    def share(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """The tensors that `rank` is to write: parameters are dealt to ranks one by one."""
        mine: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self.parameters.items()):
            for kind, tensor in self._full(parameter):
                if number % world_size == rank:
                    mine[f"{name}/{kind}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if rank == 0:
            mine |= {f"{name}/buffer": tensor.detach().cpu().clone() for name, tensor in self.buffers.items()}
        return mine

    @property
    def steps(self) -> int:
        """Updates that AdamW has made."""
        return max((int(state["step"]) for state in self.adamw.state.values() if "step" in state), default=0)

    def load(self, files: list[Path], steps: int) -> None:
        """Take up the files of all ranks' shares behind `steps` updates. Raises ValueError naming what does not fit."""
        where = self._index(files)
        self._check_names(set(where), files[0].parent)
        self._make_moments(steps)
        opened = {file: safe_open(file, "pt") for file in files}
        for name, parameter in self.parameters.items():
            for kind in KINDS:
                key = f"{name}/{kind}"
                value = opened[where[key]].get_tensor(key)
                if value.shape != _shape(parameter):
                    raise ValueError(
                        f"{where[key]}: {key} has the shape {tuple(value.shape)}, expected {tuple(_shape(parameter))}"
                    )
                self._set(parameter, kind, value)
        for name, tensor in self.buffers.items():
            tensor.copy_(opened[where[f"{name}/buffer"]].get_tensor(f"{name}/buffer"))

    @staticmethod
    def _index(files: list[Path]) -> dict[str, Path]:
        where = {}
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    where |= dict.fromkeys(tensors.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
        return where

    def _check_names(self, found: set[str], folder: Path) -> None:
        wanted = {f"{name}/{kind}" for name in self.parameters for kind in KINDS}
        wanted |= {f"{name}/buffer" for name in self.buffers}
        for problem, names in (("lacks", wanted - found), ("has, of no use here,", found - wanted)):
            if names:
                raise ValueError(f"{folder} {problem} {some(names)}: it was saved by another stage")

    def _full(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """The parameter's whole fp32 weight and moments; a collective call under ZeRO."""
        for kind in KINDS:
            if self.zero_stage == 0:
                yield kind, parameter if kind == "weight" else self.adamw.state[parameter][kind]
            elif self.zero_stage == 3:
                whole = safe_get_full_fp32_param(parameter) if kind == "weight" else None
                yield kind, safe_get_full_optimizer_state(parameter, kind) if whole is None else whole
            else:
                whole = torch.zeros_like(parameter, dtype=torch.float32).flatten()
                if parameter._hp_mapping is not None:
                    self._span(parameter, whole).copy_(self._fragment(parameter, kind))
                dist.all_reduce(whole, group=parameter._dp_group)
                yield kind, whole.view_as(parameter)

    @staticmethod
    def _span(parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """What of a flattened parameter this rank holds under ZeRO-1 and 2."""
        address = parameter._hp_mapping.lp_fragment_address
        return whole.narrow(0, address.start, address.numel)

    def _fragment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This rank's fp32 weights or moments of a parameter under ZeRO-1 and 2, in the group's flat tensors."""
        mapping = parameter._hp_mapping
        (flat,) = self.adamw.param_groups[mapping.param_group_index]["params"]
        address = mapping.hp_fragment_address
        return (flat if kind == "weight" else self.adamw.state[flat][kind]).data.narrow(0, address.start, address.numel)

    def _make_moments(self, steps: int) -> None:
        """AdamW makes its state at its first update; make it now, to be filled."""
        flats = [flat for group in self.adamw.param_groups for flat in group["params"]]
        if self.zero_stage == 3:  # there AdamW is shown one flat tensor at a time
            flats = self.engine.optimizer.fp32_partitioned_groups_flat
        for flat in flats:
            self.adamw.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self.zero_stage == 3:
            self._set_partition(parameter, kind, value)
            return
        if kind == "weight":
            parameter.data.copy_(value)  # every rank holds it whole
        elif self.zero_stage == 0:
            self.adamw.state[parameter][kind].copy_(value)
        if self.zero_stage in (1, 2) and parameter._hp_mapping is not None:
            self._fragment(parameter, kind).copy_(self._span(parameter, value.flatten()))

    def _set_partition(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """ZeRO-3: every rank holds its partition only, the last ones padded."""
        size = parameter.ds_tensor.numel()
        rank = dist.get_rank(parameter.ds_process_group)
        flat = value.flatten()[rank * size : (rank + 1) * size]
        part = F.pad(flat, (0, size - flat.numel())).to(parameter.ds_tensor.device)
        if kind != "weight":
            safe_set_local_optimizer_state(parameter, part, kind)
            return
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)
        if parameter.numel() == value.numel():  # one that stays whole on every rank
            parameter.data.copy_(value.view_as(parameter))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
