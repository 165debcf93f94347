"""Experts by modality: chosen modules of a language model exist twice, for text and for visual tokens.

    llm.visual_experts=[attention, mlp, norms]

This is Mixture-of-Transformers (Liang et al., 2024, section 2) with all three, and the visual expert of CogVLM (Wang et
al., 2023, section 2.1) with attention and mlp. All positions attend to each other in one sequence; the embeddings and
the output embeddings are shared. Each position is computed by one of two experts, so the FLOPs are those of the dense
model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import first_line
from .attention import plain_attention, segments_obstacle
from .blocks import block_list, first_blocks
from .loading import mismatches, read_tensors
from .within import Within

KEY = "visual_experts"  # of a language model's configuration: the parts that exist twice
PARTS = ("attention", "mlp", "norms")
FILE = "visual_experts.safetensors"
"""Weights of the visual experts in a folder; the others are those of an ordinary Hugging Face model."""


class Rows(NamedTuple):
    """Which positions of a batch of `shape` ``(B, T)`` go to which expert: indices into the flattened batch."""

    text: Tensor
    visual: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, visual_mask: Tensor, device: torch.device) -> Rows:
        flat = visual_mask.flatten()
        text, visual = (chosen.nonzero()[:, 0].to(device) for chosen in (~flat, flat))
        return cls(text, visual, visual_mask.shape)


class Routing:
    """The rows that all experts of a language model read at the moment; without any, all positions are text."""

    def __init__(self) -> None:
        self.rows: Rows | None = None

    def when_recomputing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The `context_fn` of a checkpoint: activations are recomputed with the rows of the forward pass."""
        return nullcontext(), Within(self, rows=self.rows)

    def read(self, llm: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the language model: takes its argument ``visual_mask`` ``(B, T)``."""
        mask = options.get("visual_mask")
        self.rows = None if mask is None else Rows.of(mask, options["inputs_embeds"].device)
        if not options.get("levels"):  # which its blocks add at the same positions
            options = {name: value for name, value in options.items() if name != "visual_mask"}
        return arguments, options

    def forget(self, llm: nn.Module, arguments: tuple, output: object) -> None:
        """Forward hook of the language model."""
        self.rows = None


class Experts(nn.Module):
    """A module that maps each position ``(B, T, ...)`` by itself, once for text and once for visual tokens.

    Both are called whatever the batch contains, if need be with no rows, so that all ranks make the same calls and
    every weight has a gradient.
    """

    def __init__(self, text: nn.Module, visual: nn.Module, routing: Routing):
        super().__init__()
        self.text, self.visual, self.routing = text, visual, routing

    @torch._disable_dynamo
    def forward(self, x: Tensor) -> Tensor:
        rows = self.routing.rows
        if rows is None:
            return self.text(x)
        if x.shape[:2] != rows.shape:
            shape = ", ".join(map(str, rows.shape))
            raise ValueError(f"a {type(self.text).__name__} reads {tuple(x.shape)}, expected ({shape}, ...)")
        flat = x.flatten(0, 1)
        text, visual = (
            expert(flat.index_select(0, chosen)[None])[0]
            for expert, chosen in ((self.text, rows.text), (self.visual, rows.visual))
        )
        out = text.new_empty(len(flat), *text.shape[1:])
        return out.index_copy(0, rows.text, text).index_copy(0, rows.visual, visual).unflatten(0, rows.shape)


def add_experts(llm: nn.Module, parts: Sequence[str]) -> None:
    """Give a dense language model experts by modality, both with its weights; model folders remember it.

    parts: which of `PARTS` exist twice: the linear layers of attention; the feed-forward layers; the norms of the
    blocks, of queries and keys, and after the last block. Raises ValueError for a model that has other experts already,
    or that does not compute these parts for each position by itself.
    """
    given, name, known = f"llm.visual_experts=[{', '.join(parts)}]", type(llm).__name__, experts_of(llm)
    if known:
        if set(known) != set(parts):
            raise ValueError(f"{given}, but the language model was trained with [{', '.join(known)}]")
        return
    obstacle = segments_obstacle(llm)
    if obstacle is not None:
        raise ValueError(f"{given}: {obstacle}, which cannot have them")
    places = list(_places(llm))
    for part in parts:
        if part not in (kind for _, kind in places):
            raise ValueError(f"{given}: {name} has no {part} that could exist twice")
    routing = Routing()
    for path, kind in places:
        if kind in parts:
            dense = llm.get_submodule(path)
            llm.set_submodule(path, Experts(dense, copy.deepcopy(dense), routing))
    llm.visual_routing = routing
    llm.register_forward_pre_hook(routing.read, with_kwargs=True)
    llm.register_forward_hook(routing.forget, always_call=True)
    setattr(llm.config.get_text_config(), KEY, list(parts))
    try:
        _try(llm)
    except Exception as error:  # the code of a model can raise anything
        raise ValueError(f"{given}: {name} does not support them ({first_line(error)})") from None


def _places(llm: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of the modules that can exist twice, and the part that each belongs to."""
    path, count = block_list(llm)
    owner = path.rpartition(".")[0]
    for name, module in llm.get_submodule(owner).named_children():
        if _is_norm(module) and "emb" not in name:
            yield f"{owner}.{name}", "norms"
    for number in range(count):
        for name, child in llm.get_submodule(f"{path}.{number}").named_children():
            place = f"{path}.{number}.{name}"
            if _is_norm(child):
                yield place, "norms"
            elif "att" in name:
                for inner, module in child.named_modules():
                    if isinstance(module, nn.Linear | Conv1D) or _is_norm(module):
                        yield f"{place}.{inner}", "norms" if _is_norm(module) else "attention"
            elif next(child.parameters(), None) is not None:
                yield place, "mlp"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@torch.no_grad()
def _try(llm: nn.Module) -> None:
    """Run the first block on more positions than it has heads: modules may read heads where positions are expected."""
    table, length = llm.get_input_embeddings().weight, llm.config.get_text_config().num_attention_heads + 1
    row, options = table.new_zeros(1, length, table.shape[1]), {}
    if table.is_meta:  # where transformers cannot make a mask
        options["attention_mask"] = row.new_zeros(1, 1, length, length)
    mask = torch.arange(length, device="cpu")[None] % 2 == 0
    with first_blocks(llm, 1), plain_attention(llm):
        llm(inputs_embeds=row, visual_mask=mask, use_cache=False, **options)


def restore_experts(llm: nn.Module) -> None:
    """Do what the configuration of a loaded model says, if `add_experts` was called before it was saved."""
    saved = getattr(llm.config.get_text_config(), KEY, None)
    if saved:
        add_experts(llm, saved)


def experts_of(llm: nn.Module) -> tuple[str, ...]:
    """The parts of a language model that exist twice."""
    return () if routing_of(llm) is None else tuple(getattr(llm.config.get_text_config(), KEY))


def routing_of(llm: nn.Module) -> Routing | None:
    """The routing of the experts of a language model; None for a dense one."""
    return getattr(llm, "visual_routing", None)


def dense_name(name: str) -> str:
    """The name that a module within an expert has in the dense model."""
    return ".".join(each for each in name.split(".") if each not in ("text", "visual"))


def save_experts(llm: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write the weights of the visual experts in `state`, and return the others under the names of the dense model."""
    dense, visual = _split(llm, state)
    if visual:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(visual, folder / FILE, metadata={"format": "pt"})
    return dense


def load_experts(llm: nn.Module, folder: Path) -> None:
    """Give a loaded dense model the experts that `save_experts` wrote beside it, if any.

    Raises ValueError for a missing file, and for tensors that do not fit.
    """
    restore_experts(llm)
    if routing_of(llm) is None:
        return
    state, own = read_tensors(folder / FILE), _split(llm, llm.state_dict())[1]
    problems = mismatches(state, own)
    if problems:
        raise ValueError(f"{folder / FILE} does not fit {type(llm).__name__}: {problems}")
    llm.load_state_dict(state, strict=False)


def _split(llm: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """From a model's `state`, the tensors of the dense model with the text experts, and those of the visual experts."""
    paths = [f"{path}." for path, module in llm.named_modules() if isinstance(module, Experts)]
    dense, visual = {}, {}
    for name, tensor in state.items():
        path = next(filter(name.startswith, paths), "")
        if path and name.startswith(f"{path}visual."):
            visual[name] = tensor
        else:
            dense[path + name.removeprefix(path).removeprefix("text.") if path else name] = tensor
    return dense, visual
