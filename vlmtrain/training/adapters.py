"""Low-rank adapters (LoRA; Hu et al., 2021) for any part, with peft.

    lora: {llm: {rank: 128, alpha: 256, dropout: 0.05}}

A part with adapters trains only the adapters, at the part's learning rate (`groups` can select original weights in
addition). At the end of the stage, they are merged into the weights, ``W + alpha / rank * B A``, and also saved
separately in peft's format. With ``quantize: nf4``, the weights under the adapters are stored in 4 bits (see
`vlmtrain.training.quantized`). W is then the dequantized weight: in training, in merging, and as the base model that
the adapters belong to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import some
from ..files import read_json
from ..model.experts import dense_name
from ..model.loading import mismatches, read_tensors
from ..model.parts import state_hash
from ..settings import LoRA, Stage
from .quantized import PACKED, QuantizedLinear, quantized_layers

FOLDER = "adapters"  # within a model folder, with one folder per part
_ADAPTER = "default"
_BASE = ".base_layer."
_UNDER = f"{_BASE}weight"
_BELONGS_TO = "base_sha256"  # in the metadata of the adapter's safetensors file, which peft ignores

# options of peft that affect neither the scaling of adapters nor the weights that they are added to
_HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "eva_config"),
    *("layers_to_transform", "layers_pattern", "runtime_config", "megatron_config", "megatron_core"),
    *("ensure_weight_tying", "qalora_group_size"),
)
_IDLE = (None, False, "none", [], {})
_PLAIN = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # other values modify the base weights
}


def add_adapters(stage: Stage, parts: Mapping[str, nn.Module]) -> None:
    """Add the adapters of a stage to its parts. New adapters do not change the output until they are trained.

    Raises ValueError for targets that match no layer, or adapters in `init_from` that do not fit.
    """
    for part, options in (stage.lora or {}).items():
        if part not in parts:
            continue
        key = f"{stage.prefix}.lora.{part}"
        peft = _peft(key, options.quantize)
        module = parts[part]
        dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        targets = _targets(module, options.targets, key)
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(module.get_submodule(target), Conv1D) for target in targets),
        )
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        peft.inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
        for parameter in trainable:  # peft freezes them, but groups may still select some
            parameter.requires_grad_(True)
        for layer in _layers(module).values():
            layer.to(dtype)
            if options.quantize:
                layer.base_layer = QuantizedLinear(layer.base_layer)
        if options.init_from is not None:
            _load(module, Path(options.init_from), options, key)


def _peft(key: str, quantize: str | None) -> Any:
    if quantize and not find_spec("bitsandbytes"):
        raise ValueError(f"{key}.quantize={quantize} needs bitsandbytes: pip install -e '.[qlora]'")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about missing kernels that are not used here
    try:
        import peft
    except ImportError:
        raise ValueError(f"{key} needs peft: pip install -e '.[lora]'") from None
    return peft


def _targets(module: nn.Module, wanted: str | tuple[str, ...], key: str) -> list[str]:
    """Names of the linear layers that get adapters: those that match the patterns, or all but the output embedding.

    A pattern matches the last components of a name: ``q_proj`` or ``layers.*.mlp.*``. In a language model with experts
    for visual tokens, names without the components ``text`` and ``visual`` select both. Layers of torch's
    MultiheadAttention cannot have adapters, because it stores its projections in one tensor or bypasses the forward
    pass of the layer.
    """
    head = getattr(module, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and not isinstance(layer, NonDynamicallyQuantizableLinear)
        and layer is not head
    ]
    if wanted == "all":
        chosen = linear
    else:
        patterns = [wanted] if isinstance(wanted, str) else wanted
        names = {n: (f".{n}", f".{dense_name(n)}") for n in linear}
        found = {p: [n for n in linear if any(fnmatchcase(each, f"*.{p}") for each in names[n])] for p in patterns}
        idle = [pattern for pattern, names in found.items() if not names]
        if idle:
            kinds = sorted({dense_name(name).rpartition(".")[2] for name in linear})
            raise ValueError(f"{key}.targets: {some(idle)} matches no linear layer; there are {some(kinds)}")
        chosen = [name for name in linear if any(name in names for names in found.values())]
    if not chosen:
        raise ValueError(f"{key}: {type(module).__name__} has no linear layer that could have an adapter")
    return chosen


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters, by path."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def is_adapter(parameter: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return ".lora_" in parameter


def _unpacked(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a part's `state` with 4-bit weights dequantized, under their usual names."""
    packed = {f"{path}.": layer for path, layer in quantized_layers(module).items()}
    whole = {f"{prefix}weight": layer.unpacked(state, prefix) for prefix, layer in packed.items()}
    bits = {prefix + name for prefix in packed for name in PACKED}
    return {name: tensor for name, tensor in state.items() if name not in bits} | whole


def merged(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a part's `state` with the adapters merged into the weights, under the original names."""
    layers = _layers(module)
    plain = _unpacked(module, state)
    found = {name.replace(_BASE, "."): tensor for name, tensor in plain.items() if not is_adapter(name)}
    for path, layer in layers.items():
        a, b = (state[f"{path}.lora_{half}.{_ADAPTER}.weight"].float() for half in "AB")
        change = layer.scaling[_ADAPTER] * (b @ a)
        weight = found[f"{path}.weight"]
        # added in fp32 and rounded once
        found[f"{path}.weight"] = (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)
    return found


def save_adapters(module: nn.Module, state: Mapping[str, Tensor], folder: Path, base: str | None) -> None:
    """Save the adapters of a part for ``PeftModel.from_pretrained``. base: path of the base model."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    adapters = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor
        for name, tensor in state.items()
        if is_adapter(name)
    }
    # a single entry: safetensors writes several in random order, and equal adapters should give identical files
    said = {_BELONGS_TO: _base_hash(module, state)}
    save_file(adapters, folder / "adapter_model.safetensors", metadata=said)
    config = {**module.peft_config[_ADAPTER].to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(config, indent=2, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    (folder / "adapter_config.json").write_text(text + "\n")


def _base_hash(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Hash of the weights under a part's adapters, rounded to bf16, so that it does not depend on the compute dtype.

    Weights stored in 4 bits are dequantized first.
    """
    under = {name: tensor for name, tensor in _unpacked(module, state).items() if name.endswith(_UNDER)}
    return state_hash({name: tensor.detach().to(torch.bfloat16) for name, tensor in under.items()})


def _check_options(config: Mapping, file: Path, key: str) -> None:
    """Raise ValueError for adapters that peft scales or applies differently from plain LoRA."""
    others = {
        option: value
        for option, value in config.items()
        if option not in _HARMLESS and value not in _PLAIN.get(option, _IDLE)
    }
    if others:
        said = ", ".join(f"{option}={value}" for option, value in others.items())
        raise ValueError(f"{key}.init_from: {file} has {said}: expected plain LoRA (W + alpha / rank * B A)")


def _load(module: nn.Module, folder: Path, options: LoRA, key: str) -> None:
    """Load saved adapters. Raises ValueError naming the options or tensors that do not fit."""
    if not (folder / "adapter_config.json").exists():
        raise ValueError(f"{key}.init_from={folder} holds no adapters: it has no adapter_config.json")
    config = read_json(folder / "adapter_config.json")
    for option, theirs in (("rank", "r"), ("alpha", "lora_alpha")):
        if config.get(theirs) != getattr(options, option):
            raise ValueError(
                f"{key}.{option}={getattr(options, option)}, but {folder} has {theirs}={config.get(theirs)}"
            )
    _check_options(config, folder / "adapter_config.json", key)
    file = folder / "adapter_model.safetensors"
    own = {name: p for name, p in module.named_parameters() if is_adapter(name)}
    given = {
        name.removeprefix("base_model.model.").replace(".weight", f".{_ADAPTER}.weight"): tensor
        for name, tensor in read_tensors(file).items()
    }
    problems = mismatches(given, own)
    if problems:
        raise ValueError(f"{key}.init_from={folder} does not fit: {problems}")
    with safe_open(file, framework="pt") as opened:
        belongs_to = (opened.metadata() or {}).get(_BELONGS_TO)  # absent from adapters saved by peft
    parameters = dict(module.named_parameters())
    is_known = not any(parameter.is_meta for parameter in parameters.values())
    if belongs_to and is_known and _base_hash(module, parameters) != belongs_to:
        raise ValueError(
            f"{key}.init_from={folder} was trained on base weights other than those of this stage: set init_from to "
            "the model that these adapters were trained on, before merging (otherwise they would be applied twice), "
            "and use the same quantize"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if not parameter.is_meta:
                parameter.copy_(given[name])
