"""Import of single projectors: LLaVA's ``mm_projector.bin``, InternVL's ``mlp1`` and nanoVLM's ``MP``."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import first_line, some
from ..files import read_json
from ..model import VLMWrapper
from ..model.llm import build_llm, hidden_width, load_tokenizer
from ..model.loading import read_tensors
from ..model.parts import make_connector
from ..model.vision import VisionEncoder, build_vision

logger = logging.getLogger(__name__)

# name of a tensor that identifies the kind of projector
PROJECTORS = {
    "llava": r"mm_projector\.(?:\d+\.)?weight$",
    "nanovlm": r"(?:MP|modality_projection)\.proj\.weight$",
    "internvl": r"(?:mlp1\.0|multi_modal_projector\.layer_norm)\.weight$",
}
# settings in the config.json of a LLaVA projector and their supported values, the default first
_ASPECTS = {"pad": "pad", "square": "crop", None: "crop"}
_PROJECTOR_KEYS = {
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "image_aspect_ratio": tuple(_ASPECTS),
}


def projector_parts(
    file: Path, llm_path: str | None, vision_path: str | None
) -> tuple[VLMWrapper, PreTrainedTokenizerBase, str]:
    """Build the model of a projector and its encoder and language model, which are published separately.

    Returns the model, the language model's tokenizer and the image fit. llm_path, vision_path: None if the
    ``config.json`` next to the projector names them. Raises ValueError with file, tensor and what was expected.
    """
    state = _tensors(file)
    beside = file.with_name("config.json")
    said = read_json(beside) if beside.exists() else {}
    llm_path, vision_path = llm_path or said.get("_name_or_path"), vision_path or said.get("mm_vision_tower")
    for key, taken in _PROJECTOR_KEYS.items():
        if said.get(key, taken[0]) not in taken:
            raise ValueError(f"{beside}: {key}={said[key]}, expected {' or '.join(map(str, taken))}")
    for key, path in (("--llm", llm_path), ("--vision", vision_path)):
        if not path:
            raise ValueError(f"{file} is a single projector: pass the model that it was trained with as {key}")
    kind = next((kind for kind, names in PROJECTORS.items() if any(re.search(names, str(n)) for n in state)), None)
    if kind is None:
        raise ValueError(
            f"{file} has no tensor mm_projector.*.weight, MP.proj.weight or mlp1.*.weight, but "
            f"{some(map(str, state))} (load other connectors in Python with connector.load_published)"
        )
    layer = said.get("mm_vision_select_layer", -2) if kind == "llava" else said.get("select_layer", -1)
    tokenizer = load_tokenizer(llm_path, "--llm")
    vision = build_vision("hf", path=vision_path, layer=layer)
    llm = build_llm(llm_path)
    if kind == "llava":
        _check_widths(file, state, vision, llm, vision_path, llm_path)
        layers = [name for name in state if re.search(PROJECTORS[kind], name)]
        name, options = ("linear", {}) if len(layers) == 1 else ("mlp", {"depth": len(layers)})
    else:
        name, options = "pixel_shuffle", _shuffle(file, state, kind, vision, vision_path)
    connector = make_connector(name, vision, llm, options)
    try:
        connector.num_tokens(*vision.grid)
        connector.load_published({name: tensor.float() for name, tensor in state.items()})
    except ValueError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    model = VLMWrapper(vision, connector, llm).eval()
    return model, tokenizer, "squash" if kind != "llava" else _ASPECTS[said.get("image_aspect_ratio", "pad")]


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file; no code in it is run."""
    if file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise any exception
        raise ValueError(f"{file} is not a tensor file: {first_line(error).partition('. ')[0]}") from None


def _shuffle(file: Path, state: dict[str, Tensor], kind: str, vision: VisionEncoder, vision_path: str) -> dict:
    """Options of the `pixel_shuffle` connector that corresponds to a projector."""
    name = next(name for name in state if re.search(PROJECTORS[kind], name))
    width = state[name].shape[-1]
    factor = math.isqrt(width // vision.width)
    if factor < 1 or factor**2 * vision.width != width:
        raise ValueError(
            f"{file}: {name} takes {width} channels, expected 4 (or another square) times the {vision.width} of "
            f"{vision_path}"
        )
    if kind == "nanovlm":
        logger.warning(
            "%s: nanoVLM's encoder normalizes the projector's input, which is not done here: train further", file
        )
    return {"factor": factor, "head": "linear" if kind == "nanovlm" else "internvl"}


def _check_widths(
    file: Path, state: dict[str, Tensor], vision: VisionEncoder, llm: nn.Module, vision_path: str, llm_path: str
) -> None:
    weights = sorted(
        (name for name in state if name.endswith("weight")), key=lambda name: [int(n) for n in re.findall(r"\d+", name)]
    )
    for name, side, got, expected, whose in (
        (weights[0], "takes", state[weights[0]].shape[1], vision.width, vision_path),
        (weights[-1], "makes", state[weights[-1]].shape[0], hidden_width(llm), llm_path),
    ):
        if got != expected:
            raise ValueError(f"{file}: {name} {side} {got} channels, expected {expected} of {whose}")
