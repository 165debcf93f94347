"""The state to resume a stage: the fp32 weights and the optimizer's moments of each trained parameter, by name.

It does not depend on ranks, partitions or ZeRO stages, so any number of processes and any engine can resume from it.
8-bit moments are an exception: they are quantized in blocks of the tensors of a rank, and saved as these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

from ...errors import some
from ..optimizer import EIGHT_BIT
from .optimizers import AVERAGE, eight_bit_tensors, make_state
from .zero import full_shape

QUANTIZED = "8bit/"
"""Prefix of the names of 8-bit moments, before the rank and the number of the tensor."""


class TrainingState:
    """Reads and writes the state of an engine's trained parameters and of their parts' buffers.

    moments: the names of the optimizer's tensors for each parameter. starts: the step of the stage after which a
    parameter starts to train, for those that do not train from the start. averages: whether there is an average of the
    weights.

    Every rank must make the same calls, because the state is gathered parameter by parameter.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        zero_stage: int,
        parameters: Mapping[str, nn.Parameter],
        moments: Mapping[str, Sequence[str]],
        buffers: Mapping[str, Tensor],
        starts: Mapping[str, int],
        averages: bool,
    ):
        self.engine, self.zero_stage, self.starts = engine, zero_stage, starts
        self.parameters, self.buffers = dict(parameters), dict(buffers)
        inner = engine.optimizer
        self.kinds = {name: ("weight", *moments[name], *[AVERAGE] * averages) for name in parameters}
        self.averages = averages
        # DeepSpeed wraps the optimizer only under ZeRO
        self.optimizer = inner if zero_stage == 0 else inner.optimizer

    def share(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """The tensors that `rank` writes. Parameters are distributed to ranks round-robin."""
        if not any(self.optimizer.state.get(flat) for _, flat in self._flats()):
            self.prepare({})  # no update has been made yet
        mine: dict[str, Tensor] = {}
        for number, name in enumerate(self.parameters):
            for kind in self.kinds[name]:
                tensor = self.full(name, kind)
                if number % world_size == rank:
                    mine[f"{name}/{kind}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if rank == 0 or self.zero_stage:
            mine |= {key: tensor.cpu().clone() for key, tensor in self._quantized().items()}
        if rank == 0:
            mine |= {f"{name}/buffer": tensor.detach().cpu().clone() for name, tensor in self.buffers.items()}
        return mine

    @property
    def updates(self) -> dict[str, int]:
        """Number of updates that AdamW has made, by the label of the parameter group."""
        found: dict[str, int] = {}
        for group, flat in self._flats():
            made = int(self.optimizer.state.get(flat, {}).get("step", 0))  # Muon does not count them
            found[group["label"]] = max(made, found.get(group["label"], 0))
        return found

    def load(self, files: list[Path], step: int, updates: Mapping[str, int]) -> None:
        """Load the files of all ranks, saved after `step`. Raises ValueError naming the tensors that do not fit.

        updates: number of updates made, by group label. Parameters that start to train at this step are not in the
        files and keep their values.
        """
        opened = {}
        for file in files:
            try:
                opened[file] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
        where = {key: file for file, tensors in opened.items() for key in tensors.keys()}  # noqa: SIM118 - no mapping
        new = {name for name, start in self.starts.items() if start == step}
        self.prepare(updates)
        quantized = self._quantized()
        if quantized and self.zero_stage and len(files) != dist.get_world_size():
            raise ValueError(
                f"{files[0].parent} was saved by {len(files)} ranks with optimizer.name=adamw_8bit, which resumes with "
                f"the same number of ranks, not with {dist.get_world_size()}"
            )
        self._check(opened, where, new, quantized)
        for key, tensor in quantized.items():
            tensor.copy_(opened[where[key]].get_tensor(key))
        for name, parameter in self.parameters.items():
            for kind in self.kinds[name] if name not in new else ():
                key = f"{name}/{kind}"
                self._set(parameter, kind, opened[where[key]].get_tensor(key))
        for name, tensor in self.buffers.items():
            if name not in new:
                tensor.copy_(opened[where[f"{name}/buffer"]].get_tensor(f"{name}/buffer"))

    def _check(
        self,
        opened: Mapping[Path, safe_open],
        where: Mapping[str, Path],
        new: set[str],
        quantized: Mapping[str, Tensor],
    ) -> None:
        """Check all names and shapes before loading, so that the state is never partially loaded."""
        known = {name: parameter for name, parameter in self.parameters.items() if name not in new}
        shapes = {f"{name}/{kind}": full_shape(p) for name, p in known.items() for kind in self.kinds[name]}
        shapes |= {key: tensor.shape for key, tensor in quantized.items()}
        shapes |= {f"{n}/buffer": tensor.shape for n, tensor in self.buffers.items() if n not in new}
        named = {key for key in where if not key.startswith(QUANTIZED)}  # of all ranks
        folder = next(iter(opened)).parent
        for problem, names in (("lacks", shapes.keys() - where), ("has unexpected tensors", named - shapes.keys())):
            if names:
                raise ValueError(f"{folder} {problem} {some(names)}: it was saved by another stage")
        for key, wanted in shapes.items():
            found = opened[where[key]].get_slice(key).get_shape()
            if list(found) != list(wanted):
                raise ValueError(f"{where[key]}: {key} has the shape {tuple(found)}, expected {tuple(wanted)}")

    def full(self, name: str, kind: str) -> Tensor:
        """A parameter's full fp32 weight, a moment or its average. This is a collective call under ZeRO."""
        parameter = self.parameters[name]
        if self.zero_stage == 0:
            return parameter if kind == "weight" else self.optimizer.state[parameter][kind]
        if self.zero_stage == 3:
            return (
                safe_get_full_fp32_param(parameter)
                if kind == "weight"
                else safe_get_full_optimizer_state(parameter, kind)
            )
        whole = torch.zeros_like(parameter, dtype=torch.float32).flatten()
        if parameter._hp_mapping is not None:
            self._span(parameter, whole).copy_(self._fragment(parameter, kind))
        dist.all_reduce(whole, group=parameter._dp_group)
        return whole.view_as(parameter)

    def _quantized(self) -> dict[str, Tensor]:
        """The 8-bit moments of this rank, by name: they are the same on all ranks without ZeRO."""
        rank = dist.get_rank() if self.zero_stage else 0
        return {
            f"{QUANTIZED}{rank}/{number}/{key}": tensor
            for number, (group, flat) in enumerate(self._flats())
            if group["moments"] == EIGHT_BIT
            for key, tensor in eight_bit_tensors(self.optimizer.state[flat]).items()
        }

    @staticmethod
    def _span(parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The span of a flattened parameter that this rank holds under ZeRO-1 and 2."""
        address = parameter._hp_mapping.lp_fragment_address
        return whole.narrow(0, address.start, address.numel)

    def _fragment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This rank's fp32 weights or moments of a parameter under ZeRO-1 and 2, in the group's flat tensors."""
        mapping = parameter._hp_mapping
        (flat,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
        address = mapping.hp_fragment_address
        return (flat if kind == "weight" else self.optimizer.state[flat][kind]).data.narrow(
            0, address.start, address.numel
        )

    def _flats(self) -> list[tuple[Mapping[str, Any], Tensor]]:
        """The tensors that the optimizer updates, each with its group."""
        groups = self.optimizer.param_groups
        if self.zero_stage < 3:
            return [(group, flat) for group in groups for flat in group["params"]]
        inner = self.engine.optimizer  # passes one flat tensor at a time to the optimizer
        return [
            (groups[inner.sub_group_to_group_id[number]], flat)
            for number, flat in enumerate(inner.fp32_partitioned_groups_flat)
        ]

    def prepare(self, updates: Mapping[str, int]) -> None:
        """Create the optimizer's state, which it would create at its first update, and the average of the weights."""
        for group, flat in self._flats():
            make_state(self.optimizer, group, flat, updates.get(group["label"], 0))
            if self.averages:
                self.optimizer.state[flat][AVERAGE] = flat.detach().float().clone()

    def average(self, decay: float) -> None:
        """Move the average of the weights towards the weights."""
        for _, flat in self._flats():
            self.optimizer.state[flat][AVERAGE].lerp_(flat.detach().float(), 1 - decay)

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self.zero_stage == 3:
            self._set_partition(parameter, kind, value)
            return
        if kind == "weight":
            parameter.data.copy_(value)  # every rank holds all of it
        elif self.zero_stage == 0:
            self.optimizer.state[parameter][kind].copy_(value)
        if self.zero_stage in (1, 2) and parameter._hp_mapping is not None:
            self._fragment(parameter, kind).copy_(self._span(parameter, value.flatten()))

    def _set_partition(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set this rank's partition under ZeRO-3. The last partitions are padded."""
        size = parameter.ds_tensor.numel()
        rank = dist.get_rank(parameter.ds_process_group)
        flat = value.flatten()[rank * size : (rank + 1) * size]
        part = F.pad(flat, (0, size - flat.numel())).to(parameter.ds_tensor.device)
        if kind != "weight":
            safe_set_local_optimizer_state(parameter, part, kind)
            return
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)
        if parameter.numel() == value.numel():  # a persistent parameter, which is not partitioned
            parameter.data.copy_(value.view_as(parameter))
