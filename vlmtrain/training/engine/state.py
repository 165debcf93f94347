"""The state to resume a stage: the fp32 weights and AdamW's moments of each trained parameter, by name.

It does not depend on ranks, partitions or ZeRO stages, so any number of processes and any engine can resume from it.
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

from ...errors import some
from .zero import full_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)


class TrainingState:
    """Reads and writes the state of an engine's trained parameters and of their parts' buffers.

    starts: the step of the stage after which a parameter starts to train, for those that do not train from the start.
    Every rank must make the same calls, because the state is gathered parameter by parameter.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        zero_stage: int,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        starts: Mapping[str, int],
    ):
        self.engine, self.zero_stage, self.starts = engine, zero_stage, starts
        self.parameters, self.buffers = dict(parameters), dict(buffers)
        inner = engine.optimizer
        # DeepSpeed wraps AdamW only under ZeRO
        self.adamw = inner if zero_stage == 0 else inner.optimizer

    def share(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """The tensors that `rank` writes. Parameters are distributed to ranks round-robin."""
        if not any(self.updates.values()):
            self._make_moments(self.updates)  # no update has been made yet
        mine: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self.parameters.items()):
            for kind, tensor in self._full(parameter):
                if number % world_size == rank:
                    mine[f"{name}/{kind}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        if rank == 0:
            mine |= {f"{name}/buffer": tensor.detach().cpu().clone() for name, tensor in self.buffers.items()}
        return mine

    @property
    def updates(self) -> dict[str, int]:
        """Number of updates that AdamW has made, by the label of the parameter group."""
        return {label: int(self.adamw.state.get(flat, {}).get("step", 0)) for label, flat in self._flats()}

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
        self._check(opened, where, new)
        self._make_moments(updates)
        for name, parameter in self.parameters.items():
            for kind in KINDS if name not in new else ():
                key = f"{name}/{kind}"
                self._set(parameter, kind, opened[where[key]].get_tensor(key))
        for name, tensor in self.buffers.items():
            if name not in new:
                tensor.copy_(opened[where[f"{name}/buffer"]].get_tensor(f"{name}/buffer"))

    def _check(self, opened: Mapping[Path, safe_open], where: Mapping[str, Path], new: set[str]) -> None:
        """Check all names and shapes before loading, so that the state is never partially loaded."""
        shapes = {f"{n}/{kind}": full_shape(p) for n, p in self.parameters.items() if n not in new for kind in KINDS}
        shapes |= {f"{n}/buffer": tensor.shape for n, tensor in self.buffers.items() if n not in new}
        folder = next(iter(opened)).parent
        for problem, names in (("lacks", shapes.keys() - where), ("has unexpected tensors", where.keys() - shapes)):
            if names:
                raise ValueError(f"{folder} {problem} {some(names)}: it was saved by another stage")
        for key, wanted in shapes.items():
            found = opened[where[key]].get_slice(key).get_shape()
            if list(found) != list(wanted):
                raise ValueError(f"{where[key]}: {key} has the shape {tuple(found)}, expected {tuple(wanted)}")

    def _full(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameter's full fp32 weight and moments. This is a collective call under ZeRO."""
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
        """The span of a flattened parameter that this rank holds under ZeRO-1 and 2."""
        address = parameter._hp_mapping.lp_fragment_address
        return whole.narrow(0, address.start, address.numel)

    def _fragment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This rank's fp32 weights or moments of a parameter under ZeRO-1 and 2, in the group's flat tensors."""
        mapping = parameter._hp_mapping
        (flat,) = self.adamw.param_groups[mapping.param_group_index]["params"]
        address = mapping.hp_fragment_address
        return (flat if kind == "weight" else self.adamw.state[flat][kind]).data.narrow(0, address.start, address.numel)

    def _flats(self) -> list[tuple[str, Tensor]]:
        """The tensors that AdamW updates, each with the label of its group."""
        groups = self.adamw.param_groups
        if self.zero_stage < 3:
            return [(group["label"], flat) for group in groups for flat in group["params"]]
        inner = self.engine.optimizer  # passes one flat tensor at a time to AdamW
        return [
            (groups[inner.sub_group_to_group_id[number]]["label"], flat)
            for number, flat in enumerate(inner.fp32_partitioned_groups_flat)
        ]

    def _make_moments(self, updates: Mapping[str, int]) -> None:
        """Create the state of AdamW, which it would create at its first update, so that it can be filled."""
        for label, flat in self._flats():
            self.adamw.state[flat] = {
                "step": torch.tensor(float(updates.get(label, 0)), device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self.zero_stage == 3:
            self._set_partition(parameter, kind, value)
            return
        if kind == "weight":
            parameter.data.copy_(value)  # every rank holds all of it
        elif self.zero_stage == 0:
            self.adamw.state[parameter][kind].copy_(value)
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
