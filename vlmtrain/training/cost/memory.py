"""Memory of a stage on one GPU, by ZeRO stage: what DeepSpeed keeps for each trained or frozen parameter.

tests/distributed/test_memory_plan.py checks it against the memory growth of small runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.zero import LIVE

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class States:
    """Parameter counts of a stage. A frozen encoder stays outside the engine, unsharded on every GPU.

    quantized: those of `frozen_inside` that are stored in 4 bits. packed: their bytes; unpacked: how many of them are
    dequantized at once. moments: mean bytes of a trained parameter's moments, and of its average if there is one.
    offload_optimizer, offload_parameters: whether the optimizer's states, and the weights under ZeRO-3, are in host
    memory. bucket: see `bucket_elements`.
    """

    trained: int
    frozen_inside: int
    frozen_outside: int
    bf16: bool
    quantized: int = 0
    packed: int = 0
    unpacked: int = 0
    moments: float = 8
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 500_000_000

    def bytes(self, zero_stage: int, world_size: int, activations: int = 0) -> int:
        """Peak bytes on each of `world_size` GPUs: weights, gradients, optimizer states, buffers, `activations`.

        Gradients to be communicated, in fp32, fill a bucket while the backward pass frees activations.
        """
        weight = 2 if self.bf16 else 4
        inside = self.trained + self.frozen_inside - self.quantized
        held = weight * inside + self.packed
        bucket = 4 * min(self.trained, self.bucket)
        # a bucket that holds all gradients is sent last; without ZeRO, all buckets are
        left = 0.0 if zero_stage == 0 and not self.bf16 else 1 - min(1.0, self.bucket / max(1, self.trained))
        passing = max(activations, bucket + left * activations)
        if zero_stage == 0 and not self.bf16 and world_size == 1:
            passing = max(0, activations - 4 * self.trained)  # nothing is sent: gradients replace the activations
        if zero_stage == 3:
            # weights, an fp32 copy, moments and gradients are sharded; what is in use is gathered
            sharded = held + (8 + self.moments) * self.trained
            whole = min(held, weight * LIVE) + weight * 2 * min(self.trained, self.bucket)
        elif self.bf16 and zero_stage < 2:
            # DeepSpeed's bf16 optimizer keeps a step's gradients in fp32, unsharded, and copies them once
            sharded = (4 + self.moments) * self.trained
            whole = held + weight * self.trained + 8 * self.trained
        elif zero_stage == 0:
            sharded = 0
            whole = held + (4 + self.moments) * self.trained
        else:
            gradients = self.trained if zero_stage == 1 else min(self.trained, self.bucket)
            sharded = (8 + self.moments) * self.trained
            whole = held + weight * gradients
        if self.offload_optimizer and zero_stage:
            sharded = held if zero_stage == 3 else 0
        if self.offload_parameters and zero_stage == 3:
            sharded -= held
        return round(sharded / world_size + whole + weight * (self.frozen_outside + self.unpacked) + passing)
