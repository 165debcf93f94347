"""The DeepSpeed engine of one stage. It contains the trained parts; frozen encoders stay outside."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import deepspeed
import torch
from torch import Tensor, nn

from ...batch import Batch
from ...connectors import Features
from ...model import VLMWrapper
from ...objectives import Objective
from ...settings import Engine, Stage
from ...visual import Visual
from ..feature_cache import FeatureCache
from ..optimizer import Schedule, parameter_groups
from ..phases import PhaseTimer
from ..trainable import Group, frozen_encoders
from .optimizers import AVERAGE, build_optimizer
from .state import TrainingState
from .zero import bucket_elements

# Clipping at this norm has no effect, but makes every engine report the norm.
NO_CLIPPING = 1e9


class StageModule(nn.Module):
    """The module that the engine runs: computes the losses of a batch from a model and an objective."""

    def __init__(self, model: VLMWrapper, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, features: Features | None) -> tuple[Tensor, Tensor | None]:
        return self.objective(self.model, batch, features), self.objective.of_targets


class StageEngine:
    """Trains the parts of one stage. Frozen encoders are replicated, so that a rank can call them at any time."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        dtype: torch.dtype,
        parts: dict[str, nn.Module],
        objective: Objective,
        groups: Sequence[Group],
        schedule: Schedule,
        accumulation: int,
        device: torch.device,
        world_size: int,
    ):
        self.dtype = dtype
        self.device = device
        self.schedule = schedule
        self.parts = parts
        vision = parts.get("vision")
        self._groups = groups
        self.feature_caches: dict[str, FeatureCache] = {}
        self.timer = PhaseTimer(device)
        encoders = {} if vision is None else vision.encoders
        self._frozen = {
            name: encoders[name].to(device) for name in (frozen_encoders(vision, groups) if encoders else ())
        }
        trained = [name for name in encoders if name not in self._frozen]
        inside = None if not trained else vision.only(trained) if self._frozen else vision
        for name in trained:
            encoders[name].register_forward_pre_hook(lambda *_: self.timer.start("vision"))
            encoders[name].register_forward_hook(lambda *_: self.timer.stop())
        others = (parts.get(part) for part in ("connector", "llm", "fusion"))
        module = StageModule(VLMWrapper(inside, *others), objective)
        # DeepSpeed without ZeRO cannot accumulate bf16 gradients in fp32; ZeRO-1 makes the same update
        in_bf16 = self.dtype is torch.bfloat16
        self.zero_stage = max(int(in_bf16), engine.used_stage(world_size, in_bf16))
        in_groups = parameter_groups(parts, groups, stage.optimizer)
        optimizer = build_optimizer(in_groups, stage.optimizer, offload=engine.offload_optimizer != "none")
        # fp32 without ZeRO is the only engine that does not report the gradient norm
        self._clips_itself = self.zero_stage == 0
        self._max_norm = stage.max_grad_norm or NO_CLIPPING
        self._moments = {parameter: group["moments"] for group in in_groups for parameter in group["params"]}
        self._decay = stage.ema
        if self.zero_stage == 3:
            _register_borrowed_parameters(module)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(None):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=self._config(engine, accumulation, bucket_elements(parts), world_size),
            )
        self.world_size = self._engine.dp_world_size
        if self._clips_itself and self.world_size == 1:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients to sum over one rank
        if self._decay is not None:
            self.training_state.prepare({})

    @property
    def model(self) -> VLMWrapper:
        """The complete model in its current state, for validation."""
        inner = self._engine.module.model
        if not self._frozen:
            return inner
        return VLMWrapper(self.parts["vision"], inner.connector, inner.llm, inner.fusion)

    def set_rates(self, step: int) -> dict[str, float]:
        """Set the learning rates of all groups for a step. Returns the highest rate of each label."""
        rates: dict[str, float] = {}
        for group in self._engine.optimizer.param_groups:
            rate = self.schedule.rate(step, group["peak_lr"], group["warmup_steps"])
            group["lr"] = rate * group["scale"]
            rates[group["label"]] = max(group["lr"], rates.get(group["label"], 0.0))
        return rates

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Compute the summed loss of a micro-batch on this rank, and `Objective.of_targets`."""
        features = None
        if self._frozen:
            with torch.no_grad(), self.timer.phase("vision"):
                features = self._frozen_features(batch.visual)
        with self.timer.phase("forward"):
            return self._engine(batch, features)

    def _frozen_features(self, visual: Visual) -> Features | tuple[Features | None, ...]:
        """The features of the frozen encoders; a tuple with None for the others if there are any."""
        known: list[Features | None] = []
        for number, name in enumerate(self.parts["vision"].encoders):
            cached, pixels = visual.cached[number] if visual.cached else None, visual.pixels[number]
            if name not in self._frozen:
                known.append(None)
            elif cached is None:
                known.append(self._frozen[name].encode(pixels))
            else:
                known.append(self.feature_caches[name](pixels, cached))
        if any(each is None for each in known):
            return tuple(known)
        return self.parts["vision"].encode_all(visual.pixels, known=known)

    def backward(self, loss: Tensor, total_weight: float) -> None:
        """Accumulate a micro-batch's gradients of (global summed loss / total_weight); update after the last one.

        If the gradient of a step is not finite on some rank, no rank makes an update.
        """
        # the engine averages over ranks where a sum is required
        with self.timer.phase("backward"):
            self._engine.backward(loss * (self.world_size / total_weight), scale_wrt_gas=False)
        with self.timer.phase("optimizer"):
            self._step()

    def _step(self) -> None:
        """Update the weights after the last micro-batch of a step."""
        if self._clips_itself and self._engine.is_gradient_accumulation_boundary():
            for parameter in self._moments:
                if parameter.grad is None:  # as in the sum over ranks, so that momentum still applies
                    parameter.grad = torch.zeros_like(parameter)
            self._own_norm = nn.utils.clip_grad_norm_(self._moments, self._max_norm)
            if not torch.isfinite(self._own_norm):
                self._engine.zero_grad()  # AdamW skips parameters without gradient; other engines check it themselves
        self._engine.step()

    def average(self) -> None:
        """Move the average of the weights, if there is one, towards the weights."""
        if self._decay is not None:
            self.training_state.average(self._decay)

    def grad_norm(self) -> float:
        """Global gradient norm of the step just taken, before clipping."""
        return float(self._own_norm if self._clips_itself else self._engine.get_global_grad_norm())

    def state(self, part: nn.Module, keep: bool = True, averaged: bool = False) -> dict[str, Tensor]:
        """Full weights of a part on the host, gathered over ranks. Every rank must call this.

        keep: whether this rank keeps them; other ranks take part and get an empty dict. averaged: whether to take the
        average of the weights where there is one.
        """
        state = {}
        training = self.training_state if averaged else None
        trained = {parameter: name for name, parameter in training.parameters.items()} if training else {}
        for name, tensor in (*part.named_parameters(), *_persistent_buffers(part)):  # tied parameters appear once
            if tensor in trained:
                whole = training.full(trained[tensor], AVERAGE).to(tensor.dtype)
                if keep:
                    state[name] = whole.to("cpu", copy=True).contiguous()
                continue
            with deepspeed.zero.GatheredParameters([tensor]):
                if keep:
                    state[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return state

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context with eval mode and without gradients, for validation."""
        modes = {module: module.training for module in self._engine.module.modules()}
        self._engine.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def training_state(self) -> TrainingState:
        """The state that a checkpoint must save to resume the stage."""
        buffers = {
            f"{part}.{name}": tensor
            for part in dict.fromkeys(group.part for group in self._groups)
            for name, tensor in _persistent_buffers(self.parts[part])
        }
        named = {
            f"{group.part}.{name}": self.parts[group.part].get_parameter(name)
            for group in self._groups
            for name in group.names
        }
        starts = {f"{group.part}.{name}": group.from_step for group in self._groups for name in group.names}
        parts = {group.part: group.from_step for group in sorted(self._groups, key=lambda group: -group.from_step)}
        starts |= {name: parts[name.partition(".")[0]] for name in buffers}
        return TrainingState(
            self._engine,
            self.zero_stage,
            named,
            {name: self._moments[parameter] for name, parameter in named.items()},
            buffers,
            {name: step for name, step in starts.items() if step},
            self._decay is not None,
        )

    def close(self) -> None:
        self._engine.destroy()

    def _config(self, engine: Engine, accumulation: int, bucket: int, world_size: int) -> dict:
        config = {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: row counts vary, and the loss is weighted here
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0 if self._clips_itself else self._max_norm,
            "zero_optimization": {"stage": self.zero_stage, "reduce_bucket_size": bucket},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self.dtype is torch.bfloat16},
        }
        zero = config["zero_optimization"]
        if self.zero_stage == 2:
            zero["overlap_comm"] = self.device.type == "cuda" and world_size > 1
        if self.zero_stage == 3:
            zero["stage3_prefetch_bucket_size"] = bucket * 9 // 10
            zero["stage3_param_persistence_threshold"] = engine.parameter_persistence_threshold
        if self.dtype is torch.bfloat16:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        offloads = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
        for option, device in offloads.items():
            if device != "none":
                zero[option] = {"device": device, "pin_memory": torch.cuda.is_available()}
        return config


def _register_borrowed_parameters(module: nn.Module) -> None:
    """Register parameters used outside the forward pass of their own module, which ZeRO-3 would not gather."""
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention):  # it accesses the weights of its output projection directly
            for parameter in child.out_proj.parameters():
                deepspeed.zero.register_external_parameter(child, parameter)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the state dict that are not parameters, which are empty there under ZeRO-3."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    yield from ((name, tensor) for name, tensor in module.state_dict().items() if name not in parameters)
