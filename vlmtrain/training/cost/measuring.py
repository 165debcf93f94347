"""FLOPs and activations of a model's parts, counted by running them on the meta device, where nothing is computed.

The backward pass runs there too, so that gradients are counted where they flow: through frozen modules only as far as
something that trains. Attention is counted as in fused kernels: half of the square if it is causal, twice that for its
gradients, and only its inputs and its output are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

NAME = "vlmtrain_planning"


@dataclass
class PartCost:
    """Cost of a part for one sample: FLOPs, and the bytes that the backward pass needs, by block.

    flops, backward_flops: of the forward and the backward pass; attention_flops: of attention in both; block_flops: of
    the forward pass, by block. outside: bytes kept outside the blocks; block_input: bytes of a block's input. tokens:
    tokens per view of an image.
    """

    flops: float = 0.0
    backward_flops: float = 0.0
    attention_flops: float = 0.0
    block_flops: dict[int, float] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    outside: int = 0
    block_input: int = 0
    tokens: int = 0

    @property
    def all_flops(self) -> float:
        """FLOPs of both passes."""
        return self.flops + self.backward_flops

    @property
    def recomputed_flops(self) -> float:
        """FLOPs of the blocks whose activations are recomputed, which are those that gradients flow through."""
        return sum(self.block_flops[block] for block in self.blocks)

    @property
    def kept(self) -> int:
        """Bytes kept without recomputation."""
        return self.outside + sum(self.blocks.values())

    @property
    def at_work(self) -> int:
        """Bytes of gradients alive at once in the backward pass: as many as are kept for one block, or outside.

        The logits are outside the blocks, and their gradient is as large as they are.
        """
        return max(self.outside, *self.blocks.values(), 0)

    @property
    def kept_checkpointed(self) -> int:
        """Bytes kept with gradient checkpointing: the blocks' inputs, and the activations of one block at a time."""
        return self.outside + self.block_input * len(self.blocks) + max(self.blocks.values(), default=0)

    def repeated(self, times: float) -> PartCost:
        """The cost with the FLOPs of that many samples."""
        return replace(self, flops=self.flops * times, backward_flops=self.backward_flops * times)

    def with_last_block_repeated(self, shorter: PartCost, times: int) -> PartCost:
        """The cost of the part with more blocks like its last one, given the cost without that one."""
        last = max(self.block_flops)
        numbers = range(last + 1, last + 1 + times)
        return replace(
            self,
            flops=self.flops + times * (self.flops - shorter.flops),
            backward_flops=self.backward_flops + times * (self.backward_flops - shorter.backward_flops),
            attention_flops=self.attention_flops + times * (self.attention_flops - shorter.attention_flops),
            block_flops=self.block_flops | dict.fromkeys(numbers, self.block_flops[last]),
            blocks=self.blocks | (dict.fromkeys(numbers, self.blocks[last]) if last in self.blocks else {}),
        )


class _FusedAttention(torch.autograd.Function):
    """The memory of attention without its computation; `count` is called with the FLOPs of the backward pass."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, flops: float, count) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        ctx.flops, ctx.count = flops, count
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.count(2 * ctx.flops)
        query, key, value, _ = ctx.saved_tensors
        return *(torch.empty_like(tensor) for tensor in (query, key, value)), None, None


class Meter:
    """Counts what runs inside `part`, including the backward pass that `backward` runs there."""

    def __init__(self) -> None:
        self.costs: dict[str, PartCost] = {}
        self._attention = 0.0
        self._counter = FlopCounterMode(display=False)
        self._block: int | None = None
        self._before = 0.0

    @contextmanager
    def part(self, name: str, module: nn.Module, *blocks: str) -> Iterator[None]:
        """Count the operations of `module` as `name`; `blocks` are the paths of its lists of transformer blocks."""
        cost = self.costs.setdefault(name, PartCost())
        self._attention = 0.0
        known = {p.untyped_storage()._cdata for p in module.parameters()}
        kept: list[Tensor] = []  # kept alive to the end, or a new tensor could reuse an address

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                kept.append(tensor)
                if self._block is None:
                    cost.outside += storage.nbytes()
                else:
                    cost.blocks[self._block] = cost.blocks.get(self._block, 0) + storage.nbytes()
            return tensor

        hooks = self._watch(module, blocks, cost)
        counter = self._counter = FlopCounterMode(display=False)
        try:
            with (
                _attention_counted(self._attend),
                counter,
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        cost.flops += self._flops() - cost.backward_flops
        cost.attention_flops += self._attention

    def backward(self, name: str, outputs: Iterable[Tensor | None]) -> None:
        """Run and count the backward pass from the outputs of a part, if anything in it trains."""
        wanted = [tensor for tensor in outputs if tensor is not None and tensor.requires_grad]
        before = self._flops()
        if wanted:
            torch.autograd.backward(wanted, [torch.empty_like(tensor) for tensor in wanted])
        self.costs[name].backward_flops += self._flops() - before

    def _flops(self) -> float:
        return self._counter.get_total_flops() + self._attention

    def _count(self, flops: float) -> None:
        self._attention += flops

    def _watch(self, module: nn.Module, blocks: Sequence[str], cost: PartCost) -> list:
        """Hooks that note the current block, the FLOPs that it takes, and the size of its input."""

        def enter(number: int, module: nn.Module, arguments: tuple, options: Mapping) -> None:
            self._block, self._before = number, self._flops()
            states = next((a for a in (*arguments, *options.values()) if isinstance(a, Tensor)), None)
            if states is not None and torch.is_grad_enabled():
                cost.block_input = states.numel() * states.element_size()

        def leave(*_) -> None:
            cost.block_flops[self._block] = cost.block_flops.get(self._block, 0.0) + self._flops() - self._before
            self._block = None

        hooks = []
        for number, block in enumerate(block for path in blocks for block in module.get_submodule(path).children()):
            hooks.append(block.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
            hooks.append(block.register_forward_hook(leave))
        return hooks

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        rows, columns = query.shape[-2], key.shape[-2]
        products = query.shape[:-1].numel() * columns * (query.shape[-1] + value.shape[-1]) * 2
        flops = products / 2 if causal and rows == columns else products
        self._count(flops)
        return _FusedAttention.apply(query, key, value, flops, self._count)


@contextmanager
def _attention_counted(attend) -> Iterator[None]:
    """Route all attention through `attend`."""
    from transformers import AttentionInterface

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        return attend(query, key, value, is_causal)

    def library(module, query, key, value, attention_mask, **options):
        causal = options.get("is_causal", getattr(module, "is_causal", True))
        return attend(query, key, value, causal).transpose(1, 2), None

    AttentionInterface.register(NAME, library)
    # torch's attention modules would take the fast path where nothing requires gradients
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own
        torch.backends.mha.set_fastpath_enabled(fast)


def _uncounted(*arguments, **options) -> None:
    raise AssertionError("attention ran outside a Meter")


def use_counted_attention(module: nn.Module) -> None:
    """Route the attention of Hugging Face models in `module` through the `Meter` that is active when they run."""
    from transformers import AttentionInterface

    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, _uncounted)
    for child in module.modules():
        if hasattr(child, "set_attn_implementation") and hasattr(child, "config"):
            child.set_attn_implementation(NAME)
