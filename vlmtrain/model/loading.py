"""Strict loading: a weight is where it belongs, or there is an error that names it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..errors import first_line, some


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Memory-mapped tensors of a safetensors file; ValueError if it is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is not a complete vlmtrain model") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}") from None


def load_strictly(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module. Raises ValueError naming every tensor that does not fit."""
    state, own = read_tensors(path), module.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(own[name].shape)})"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(state, assign=True)


def load_hf_config(path: str, key: str, trust_remote_code: bool = False):
    """The configuration of a Hugging Face model; `key` is the setting to name when there is none.

    trust_remote_code: run code that the folder or hub id brings; without it, where some is needed, ValueError.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{key}={path} brings code of its own, which is not run; {key.split('.')[0]}.trust_remote_code=true "
                "runs it"
            ) from None
        raise ValueError(f"{key}={path} is not a Hugging Face model folder or hub id: {first_line(error)}") from None


def know_blip_towers() -> None:
    """Let transformers' Auto classes load BLIP-2's image towers alone, which its own tables leave out."""
    from transformers import AutoConfig, AutoModel, Blip2VisionModel, InstructBlipVisionModel

    for tower in (Blip2VisionModel, InstructBlipVisionModel):
        AutoConfig.register(tower.config_class.model_type, tower.config_class, exist_ok=True)
        AutoModel.register(tower.config_class, tower, exist_ok=True)


def load_hf_model(auto_class: str, path: str, is_ours: bool = False, **options) -> nn.Module:
    """`transformers.<auto_class>.from_pretrained`, which here fails on missing or misfitting weights.

    is_ours: the folder holds this model and nothing else, so unexpected tensors are wrong too. (A hub's
    CLIP has a text tower beside the vision tower that is asked for.) No code of the folder is run unless `options` say
    trust_remote_code.
    """
    options.setdefault("trust_remote_code", False)
    if is_ours:
        options["use_safetensors"] = True  # never a pickle that stands in for it
    import transformers

    if auto_class == "AutoModel":
        know_blip_towers()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the report below replaces its own
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError) as error:
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
    """Raise ValueError if a file holds a head of its own where the configuration ties it to the embeddings."""
    inner = getattr(model, "language_model", None)  # BLIP-2's classes hold a whole one, whose configuration counts
    owner = inner if inner is not None and inner.get_output_embeddings() is not None else model
    if not getattr(owner.config, "tie_word_embeddings", False) or owner.get_output_embeddings() is None:
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
            "tie_word_embeddings=false, or no such tensor"
        )
