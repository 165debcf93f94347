"""Strict loading: every missing, unexpected or misshaped weight raises an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..errors import first_line, some
from ..files import check_regular
from .encoder_decoder import has_own_head


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Memory-mapped tensors of a safetensors file. Raises ValueError if the file is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is not a complete vlmtrain model") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}") from None


def mismatches(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The tensors of a file that do not fit a model's own, as text: missing, unexpected or of another shape."""
    shapes = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(own[name].shape)})"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    found = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(), "wrong shape": shapes}
    return "; ".join(f"{what}: {some(names)}" for what, names in found.items() if names)


def load_strictly(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module. Raises ValueError listing the tensors that do not fit."""
    state = read_tensors(path)
    problems = mismatches(state, module.state_dict())
    if problems:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {problems}")
    module.load_state_dict(state, assign=True)


def load_hf_config(path: str, key: str, trust_remote_code: bool = False):
    """Load the configuration of a Hugging Face model; `key` is the setting that error messages name.

    trust_remote_code: whether to run custom code of the folder or Hub ID. Raises ValueError if such code is required
    and not allowed, or if there is no model.
    """
    file = Path(path, "config.json")
    check_regular(file)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers can raise anything for values of a wrong type
        if file.is_file() and not isinstance(error, OSError | ValueError):
            raise ValueError(f"{file} is not the configuration of a model: {first_line(error)}") from None
        if not isinstance(error, OSError | ValueError):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{key}={path} requires custom code, which is not run; set {key.split('.')[0]}.trust_remote_code=true "
                "to run it"
            ) from None
        raise ValueError(f"{key}={path} is not a Hugging Face model folder or Hub ID: {first_line(error)}") from None
    _check_depth(config, path)
    return config


def _check_depth(config, path: str) -> None:
    """Raise ValueError if a local folder has fewer tensors than layers: a billion layers would take long to build."""
    count, layers = 0, getattr(config, "num_hidden_layers", None)
    for file in Path(path).glob("*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as tensors:
            count += len(tensors.keys())
    if count and isinstance(layers, int) and layers > count:
        raise ValueError(f"{Path(path, 'config.json')}: num_hidden_layers={layers}, but there are {count} tensors")


def know_blip_towers() -> None:
    """Register BLIP-2's image towers with transformers' Auto classes, which cannot load them on their own."""
    for tower in (transformers.Blip2VisionModel, transformers.InstructBlipVisionModel):
        transformers.AutoConfig.register(tower.config_class.model_type, tower.config_class, exist_ok=True)
        transformers.AutoModel.register(tower.config_class, tower, exist_ok=True)


def load_hf_model(auto_class: str, path: str, is_ours: bool = False, **options) -> nn.Module:
    """`transformers.<auto_class>.from_pretrained` that raises ValueError for missing or misshaped weights.

    is_ours: whether the folder holds only this model, so that unexpected tensors are errors as well. (A CLIP on the
    hub also has a text tower in addition to the requested vision tower.) No code of the folder is run unless `options`
    contain trust_remote_code.
    """
    options.setdefault("trust_remote_code", False)
    if is_ours:
        options["use_safetensors"] = True  # never fall back to a pickle file
    if auto_class == "AutoModel":
        know_blip_towers()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the error below replaces transformers' own report
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # transformers can raise anything for a configuration that cannot be built
        raise ValueError(f"cannot load weights from {path}: {first_line(error)}") from None
    finally:
        transformers.logging.set_verbosity(level)
    wrong = ["missing_keys", "mismatched_keys", "error_msgs", *(["unexpected_keys"] if is_ours else [])]
    problems = [f"{kind.replace('_', ' ')}: {some(map(str, info[kind]))}" for kind in wrong if info.get(kind)]
    if problems:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    _check_tied(model, path)
    return model


def _check_tied(model: nn.Module, path: str) -> None:
    """Raise ValueError if a file holds a separate head although the configuration ties it to the embeddings."""
    # BLIP-2's classes contain a complete model, whose configuration is the relevant one.
    inner = getattr(model, "language_model", None)
    owner = inner if inner is not None and inner.get_output_embeddings() is not None else model
    ties = getattr(owner.config, "tie_word_embeddings", False) and not has_own_head(owner.config)
    if not ties or owner.get_output_embeddings() is None:
        return
    table, head = owner.get_input_embeddings().weight, owner.get_output_embeddings().weight
    where = path if head.shape == table.shape and not torch.equal(head, table) else None
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith("lm_head.weight") and not torch.equal(tensors.get_tensor(name).to(table), table):
                    where = str(file)
    if where is not None:
        raise ValueError(
            f"{where}: lm_head.weight differs from the embeddings, but config.json ties them: expected "
            "tie_word_embeddings=false or no such tensor"
        )
