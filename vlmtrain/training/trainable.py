"""The parameters that a stage trains and their learning rates, from `train` and the finer patterns of `groups`.

    train:  {vision: null, connector: 1e-3, llm: null}
    groups: [{match: "vision.blocks[20:]", lr: 2e-6, layer_decay: 0.9}, {match: "llm.*norm*", lr: 1e-4, from_step: 500}]

A pattern is the name of a part, optionally followed by a dot and a parameter name within it. ``*`` matches anything.
``blocks`` (or ``layers``) matches the part's transformer blocks, whatever the library calls them, with an optional
slice in brackets. ``llm.new_tokens`` matches only the input and output embeddings of the tokens that llm.new_tokens
adds. With `from_step`, the matched parameters are frozen for that many optimizer steps of the stage and then train.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import some
from ..model.blocks import block_list
from ..model.experts import routing_of
from ..settings import STAGE_PARTS, Pattern, Stage
from .adapters import is_adapter
from .engine.zero import full_shape
from .quantized import quantized_layers

NEW_TOKENS = "llm.new_tokens"


@dataclass(frozen=True)
class Group:
    """Parameters of one part that train at `lr` times `scale`, after the first `from_step` steps of the stage.

    label: the part, or the pattern that selected them. rows: the rows of a matrix that train; None for all.
    warmup_steps, weight_decay: None for those of the stage.
    """

    label: str
    part: str
    lr: float
    scale: float
    names: tuple[str, ...]
    from_step: int = 0
    rows: tuple[int, ...] | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None

    def size(self, module: nn.Module) -> int:
        """Number of trained parameters in the part `module`."""
        shapes = [full_shape(module.get_parameter(name)) for name in self.names]
        if self.rows is not None:
            shapes = [(len(self.rows), *shape[1:]) for shape in shapes]
        return sum(math.prod(shape) for shape in shapes)


def groups_of(part: str, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.part == part]


def is_frozen(part: str, groups: Sequence[Group]) -> bool:
    """Whether nothing of a part trains in `groups`, which may start later in the stage (see `Stage.trains`)."""
    return not groups_of(part, groups)


def frozen_encoders(vision: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Names of the encoders of the part ``vision`` of which nothing trains in `groups`."""
    trained = [name for group in groups_of("vision", groups) for name in group.names]
    return [name for name in vision.encoders if not _within(name, trained)]


def _within(encoder: str, names: Sequence[str]) -> list[str]:
    """The names of parameters that belong to an encoder of the part ``vision``; without a name, all of them."""
    return [name for name in names if not encoder or name.startswith(f"{encoder}.")]


def trained_groups(stage: Stage, parts: Mapping[str, nn.Module]) -> list[Group]:
    """The parameters that a stage trains. If several patterns match a parameter, the first one applies.

    Raises ValueError for a pattern that matches nothing.
    """
    groups: list[Group] = []
    for part in (part for part in STAGE_PARTS if part in parts):
        left = [n for n, parameter in parts[part].named_parameters() if parameter.requires_grad]
        packed = [f"{path}.weight" for path in quantized_layers(parts[part])]
        for i, entry in enumerate(stage.groups):
            if entry.part != part:
                continue
            key = f"{stage.prefix}.groups[{i}]"
            if entry.match == NEW_TOKENS:
                groups.append(_new_tokens(parts[part], entry, left, key))
                left = [n for n in left if n not in groups[-1].names]
                continue
            pattern = re.compile(_pattern(entry.match, parts[part], key))
            matched = [n for n in (_own(left) if entry.match == part else left) if pattern.fullmatch(n)]
            in_bits = [n for n in packed if pattern.fullmatch(n)] if entry.match != part else []
            if in_bits and entry.lr is not None:
                raise ValueError(
                    f"{key}.match={entry.match} would train {some(in_bits)}, which is stored in 4 bits due to "
                    f"{stage.prefix}.lora.{part}.quantize: use a narrower pattern, such as {part}.*lora_* or "
                    f"{part}.*norm*"
                )
            packed = [n for n in packed if n not in in_bits]
            if not matched:
                everything = [n for n, _ in parts[part].named_parameters()]
                raise ValueError(
                    f"{key}.match={entry.match} matches no remaining parameter of {part}; it has {some(everything)}"
                )
            left = [n for n in left if n not in set(matched)]
            if entry.lr is not None:
                found = _by_depth(entry, matched, parts[part])
                own = {name: getattr(entry, name) for name in ("from_step", "warmup_steps", "weight_decay")}
                groups += [replace(group, **own) for group in found]
        if part in stage.rates and next(parts[part].parameters(), None) is None:
            raise ValueError(f"{stage.prefix}.train.{part}={stage.rates[part]}: {part} has no weights; expected null")
        if part in stage.rates and left:
            groups.append(Group(part, part, stage.rates[part], 1.0, tuple(_own(left))))
    if not groups:
        raise ValueError(f"stage {stage.name} would train nothing: the parts that it trains have no parameters")
    return groups


def check_starts(groups: Sequence[Group], stage: Stage, steps: int | None) -> None:
    """Raise ValueError for a group that would start to train only after the last of the `steps`, if they are known."""
    for group in groups:
        if steps is not None and group.from_step >= steps:
            raise ValueError(
                f"{stage.prefix}.groups: {group.label} has from_step={group.from_step}, but the stage has only "
                f"{steps} steps"
            )


def _new_tokens(llm: nn.Module, entry: Pattern, left: list[str], key: str) -> Group:
    """The rows of the new tokens in the input and output embeddings."""
    if not getattr(llm, "new_token_ids", ()):
        raise ValueError(f"{key}.match={NEW_TOKENS}, but llm.new_tokens is empty")
    tables = {id(table.weight) for table in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    names = tuple(name for name, parameter in llm.named_parameters() if id(parameter) in tables and name in left)
    if not names or entry.lr is None or (entry.layer_decay, entry.weight_decay) != (None, None):
        raise ValueError(
            f"{key}: {NEW_TOKENS} needs an lr, no layer_decay and no weight_decay, and must precede entries "
            "that match it"
        )
    return Group(NEW_TOKENS, "llm", entry.lr, 1.0, names, entry.from_step, llm.new_token_ids, entry.warmup_steps)


def _own(names: list[str]) -> list[str]:
    """The parameters that the name of a part selects: its adapters if it has any, otherwise all."""
    return [name for name in names if is_adapter(name)] or names


def _by_depth(entry: Pattern, names: list[str], module: nn.Module) -> list[Group]:
    """Return one group or, with layer decay, one per block, with a rate that decays with the distance to the top.

    Block i of L, from 1, has the scale ``decay ** (L + 1 - i)``. Parameters before the blocks count as block 0, those
    after them as block L + 1 (BEiT; LAVIS, published code).
    """
    decay, facts = entry.layer_decay, (entry.match, entry.part, entry.lr)
    if decay is None:
        return [Group(*facts, 1.0, tuple(names))]
    encoder = _encoder_of(entry.match, module, "groups")
    path, count = block_list(module.encoders[encoder] if encoder else module)
    path = f"{encoder}.{path}" if encoder else path
    by_depth: dict[int, list[str]] = {}
    seen_blocks = False
    for name in _within(encoder, [name for name, _ in module.named_parameters()]):
        inside = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
        seen_blocks = seen_blocks or inside is not None
        if name in names:
            depth = int(inside.group(1)) + 1 if inside else (count + 1 if seen_blocks else 0)
            by_depth.setdefault(depth, []).append(name)
    return [Group(*facts, decay ** (count + 1 - depth), tuple(n)) for depth, n in sorted(by_depth.items())]


def _pattern(match: str, module: nn.Module, key: str) -> str:
    """Convert a pattern to a regular expression over the part's parameter names."""
    part, _, rest = match.partition(".")
    if not rest:
        return ".*"
    encoder = _encoder_of(match, module, key)
    if encoder:
        own = _pattern(part + rest.removeprefix(encoder), module.encoders[encoder], key)
        return rf"{re.escape(encoder)}\.{own}"
    found = re.fullmatch(r"(?:blocks|layers)(?:\[(?P<slice>-?\d*(?::-?\d*)?)\])?(?P<tail>\..*)?", rest)
    if not found:
        return _glob(rest) + r"(?:\..*)?"
    path, count = block_list(module)
    chosen = range(count)
    if found["slice"]:
        bounds = [int(bound) if bound else None for bound in found["slice"].split(":")]
        index = bounds[0]
        if len(bounds) == 2:
            chosen = chosen[slice(*bounds)]
        elif index is None or not -count <= index < count:
            raise ValueError(f"{key}.match: block {index} does not exist, as there are {count} blocks")
        else:
            chosen = [chosen[index]]
    numbers = "|".join(map(str, chosen)) or "(?!)"
    return rf"{re.escape(path)}\.(?:{numbers}){_glob(found['tail'] or '')}(?:\..*)?"


def _encoder_of(match: str, module: nn.Module, key: str) -> str:
    """The encoder that a pattern names, of several; an empty string if the part is not several encoders.

    Raises ValueError for blocks or layer decay of several encoders, which have blocks of their own.
    """
    encoders = getattr(module, "encoders", {})
    first = match.split(".")[1] if "." in match else ""
    if len(encoders) < 2 or first in encoders:
        return first if len(encoders) > 1 else ""
    if re.match(r"(blocks|layers)\b", first) or ("*" not in first and first) or key == "groups":
        names = ", ".join(encoders)
        raise ValueError(
            f"{key}.match={match}: name one of the encoders ({names}), as in vision.{next(iter(encoders))}"
        )
    return ""


def _glob(text: str) -> str:
    return ".*".join(map(re.escape, text.split("*")))


def freeze(parts: Mapping[str, nn.Module], groups: list[Group], checkpointing: bool) -> None:
    """Make exactly the parameters of `groups` trainable. Parts without trained parameters are set to eval mode."""
    for part, module in parts.items():
        trained = {name for group in groups if group.part == part for name in group.names}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        for group in groups:
            if group.part == part and group.rows is not None:
                for name in group.names:
                    _train_rows(module.get_parameter(name), group.rows)
        module.train(bool(trained))
        if part == "vision":
            for name, encoder in module.encoders.items():
                encoder.train(bool(_within(name, [*trained])))
        if checkpointing and part == "llm":
            # Activations are recomputed only in training mode, which does not affect a frozen model without dropout.
            options = {"use_reentrant": False}
            reading = routing_of(module) or ("fusion" in parts and parts["fusion"].reading)
            if reading:
                options["context_fn"] = reading.when_recomputing
            module.activation_checkpointing_enable(options)
            if not trained and not _drops_out(module):
                module.train()


def _train_rows(parameter: nn.Parameter, rows: tuple[int, ...]) -> None:
    """Zero the gradient of all other rows, so that AdamW without weight decay leaves them bitwise unchanged."""

    def keep(gradient: Tensor) -> Tensor:
        chosen = torch.zeros(len(gradient), 1, device=gradient.device, dtype=gradient.dtype)
        chosen[list(rows)] = 1
        return gradient * chosen

    parameter.register_hook(keep)


def part_size(module: nn.Module) -> int:
    """Number of parameters of a part, including those stored in 4 bits."""
    packed = quantized_layers(module).values()
    bits = {id(parameter) for layer in packed for parameter in layer.packed}
    plain = (math.prod(full_shape(parameter)) for parameter in module.parameters() if id(parameter) not in bits)
    return sum(plain) + sum(math.prod(layer.shape) for layer in packed)


def _drops_out(llm: nn.Module) -> bool:
    config = llm.config.get_text_config().to_dict()
    return any(value for key, value in config.items() if "dropout" in key and isinstance(value, float))
