"""The parts of a model on disk: one folder per part, with safetensors weights, and a manifest that describes them.

MODEL_DIR/vlmtrain.json     {"parts": {"connector": {"sha256": ..., "dtype": ..., "stage": ...}, ...},
                             "files": {"connector/config.json": SHA-256, ...}}
MODEL_DIR/vision/           an encoder (open_clip) or a Hugging Face folder
MODEL_DIR/connector/        config.json (name, widths, options), model.safetensors
MODEL_DIR/fusion/           the same; absent for concatenation
MODEL_DIR/llm/              a Hugging Face folder
MODEL_DIR/processor/        tokenizer, template and image geometry
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..connectors import CONNECTORS, build_connector
from ..connectors.in_turn import ConnectorsInTurn
from ..errors import first_line
from ..files import read_object
from .folder import MANIFEST, check_files, read_manifest
from .fusion import CONCATENATION, FUSIONS, build_fusion
from .joining import joining
from .llm import hidden_width, load_llm, save_llm, saved_llm_skeleton
from .loading import load_strictly
from .vision import VisionEncoder, load_vision, read_description, vision_from

PARTS = ("vision", "connector", "fusion", "llm")
FIXED = ("in_dim", "out_dim", "input_grid", "grids", "newline")  # what a connector joins, not options of it


def make_connector(
    name: str,
    vision: VisionEncoder,
    llm: nn.Module | None,
    options: dict,
    dtype: torch.dtype = torch.float32,
    newline: bool | None = None,
    fusion: str = CONCATENATION,
) -> nn.Module:
    """Build a new connector between an encoder and a language model; its arguments are stored in `config`.

    llm: None if there is no language model yet, for a connector that can be trained alone. newline: see `joining`.
    fusion: the name of the one that takes its tokens.
    """
    grids = [list(grid) for grid in vision.grids]
    several = CONNECTORS[name].several_encoders if name in CONNECTORS else False
    width = list(vision.width) if isinstance(vision.width, tuple) else vision.width
    in_turn = {}
    if vision.join == "separate" and not several:
        able = ", ".join(known for known, found in CONNECTORS.items() if found.several_encoders)
        raise ValueError(f"vision.join=separate needs a connector that takes several encoders ({able}), got {name}")
    if vision.join == "tokens":
        if several:
            raise ValueError(f"vision.join=tokens needs a connector for one encoder, got {name}: use join=separate")
        in_turn = {"grids": grids}
    arguments = {
        "name": name,
        "in_dim": [width] if several and isinstance(width, int) else width,
        "out_dim": None if llm is None else FUSIONS[fusion].takes(vision.width, hidden_width(llm)),
        "input_grid": grids if isinstance(width, list) else list(vision.grid),
        **in_turn,
        **options,
        **({} if newline is None or llm is None else {"newline": newline}),
    }
    connector = connector_from(arguments)
    vision.give_levels(connector.num_levels)
    return connector.to(dtype)


def connector_from(arguments: dict) -> nn.Module:
    """Build the connector that a `config` describes, with new weights."""
    listed = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    newline, grids = listed.pop("newline", None), listed.pop("grids", None)
    if grids is None:
        connector = build_connector(**listed)
    else:
        each = zip(listed.pop("in_dim"), grids, strict=True)
        listed.pop("input_grid")
        own = [build_connector(**listed, in_dim=width, input_grid=tuple(grid)) for width, grid in each]
        connector = ConnectorsInTurn(own, grids)
    connector.config = {key: value for key, value in arguments.items() if key != "newline"}
    return joining(connector, newline)


def connector_skeleton(model: Path) -> nn.Module | None:
    """The connector of a model folder without weights, on the meta device; None if the folder has no connector."""
    config = model / "connector" / "config.json"
    if not config.exists():
        return None
    with torch.device("meta"):
        return _saved_connector(config)


def _saved_connector(config: Path) -> nn.Module:
    """The connector of a config.json, with new weights. Raises ValueError, naming the file."""
    return _described(config, connector_from)


def _saved_fusion(config: Path) -> nn.Module:
    return _described(config, lambda arguments: build_fusion(**arguments))


def _described(config: Path, build: Callable[[dict], nn.Module]) -> nn.Module:
    arguments = read_object(config)
    try:
        return build(arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        part = config.parent.name
        raise ValueError(f"{config} describes no {part} that can be built: {first_line(error)}") from None


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied parameters appear once, under their first name."""
    parameters = dict(module.named_parameters())
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - parameters.keys()
    return {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items() if name not in tied
    }


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_part(name: str, module: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Write one part: its architecture and the weights `state`."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "vision":
        module.save(folder, state)
    elif name == "llm":
        save_llm(module, folder, state)
    elif not module.config:
        raise ValueError(f"{type(module).__name__} cannot be saved: build it with build_{name}")
    else:
        (folder / "config.json").write_text(json.dumps(module.config, indent=2) + "\n")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_part(name: str, model: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> nn.Module:
    """Load one part of a model folder. Raises ValueError with the file or tensor that is wrong.

    The hash of the weights must equal the one in the manifest.
    """
    facts, folder = read_manifest(model)[name], model / name
    check_files(model, name)
    saved_as = getattr(torch, facts["dtype"])
    if name == "vision":
        module = load_vision(folder, saved_as, trust_remote_code)
    elif name == "llm":
        module = load_llm(folder, saved_as, trust_remote_code)
    else:
        saved = _saved_connector if name == "connector" else _saved_fusion
        module = saved(folder / "config.json").to(saved_as)
        load_strictly(module, folder / "model.safetensors")
    state = module_state(module)
    if state_hash(state) != facts["sha256"]:
        raise ValueError(f"the weights in {folder} are not those that {model / MANIFEST} lists: their hash differs")
    for tensor_name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{folder}: {tensor_name} has values that are not finite")
    return module.to(dtype)


def part_skeleton(name: str, model: Path, trust_remote_code: bool = False) -> nn.Module:
    """One part of a model folder, with new weights."""
    if name == "vision":
        return vision_from(read_description(model / name))
    if name == "llm":
        return saved_llm_skeleton(model / name, trust_remote_code)
    return (_saved_connector if name == "connector" else _saved_fusion)(model / name / "config.json")


def part_facts(state: dict[str, Tensor], sha256: str | None = None) -> dict[str, str]:
    """Manifest entry for a part's weights; `sha256` is their `state_hash` if it has already been computed."""
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    return {"sha256": sha256 or state_hash(state), "dtype": str(dtype).removeprefix("torch.")}
