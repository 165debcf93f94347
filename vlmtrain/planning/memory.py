"""Memory of a stage on one GPU, by ZeRO stage: what DeepSpeed keeps for each parameter, trained or frozen."""

from __future__ import annotations

from dataclasses import dataclass

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class States:
    """Parameters of a stage by what happens to them. A frozen encoder stays outside the engine, whole on every GPU."""

    trained: int
    frozen_inside: int
    frozen_outside: int
    bf16: bool

    def bytes(self, zero_stage: int, world_size: int) -> int:
        """Weights, gradients and optimiser states on one of `world_size` GPUs."""
        weight = 2 if self.bf16 else 4
        if self.bf16:
            zero_stage = max(1, zero_stage)  # the engine's bf16 is ZeRO-1 at least
        sharded = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "weights")}
        parts = {
            "weights": weight * (self.trained + self.frozen_inside),
            # in bf16, gradients of a step are summed in fp32
            "gradients": 4 * self.trained,
            # AdamW's two moments; and under bf16, or wherever they are sharded, an fp32 copy of the weights
            "optimizer": (12 if self.bf16 or zero_stage > 0 else 8) * self.trained,
        }
        shares = {name: size / world_size if name in sharded[zero_stage] else size for name, size in parts.items()}
        return round(sum(shares.values()) + weight * self.frozen_outside)
