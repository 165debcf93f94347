"""Whether a class of another library can represent a model, and models of such classes with given weights."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import some

TOLERANCE = 1e-4


class DoesNotFit(ValueError):
    """A class of another library cannot represent the model; the message gives the reason."""


def require(name: str, *facts: tuple[str, object, object]) -> None:
    """Raise DoesNotFit for a class or family `name` at the first of the facts (what, got, expected) that differ."""
    for what, got, expected in facts:
        if got != expected:
            raise DoesNotFit(f"{name} requires {what}={expected}, got {got}")


def filled(model_class: type[PreTrainedModel], config, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with the weights `state`. Raises DoesNotFit listing the tensors that do not fit."""
    with torch.device("meta"):
        empty = model_class(config)
    own = empty.state_dict()
    missing = own.keys() - state.keys() - empty.all_tied_weights_keys.keys()
    misshaped = (name for name in state if name not in own or own[name].shape != state[name].shape)
    if wrong := {*missing, *misshaped}:
        raise DoesNotFit(f"{model_class.__name__} does not support these parts: {some(wrong)}")
    state = {name: tensor.detach() for name, tensor in state.items()}
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, relative to the largest absolute value of `other`."""
    one, other = one.detach(), other.detach()
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """Tolerance for results that differ only in the order of additions."""
    return max(TOLERANCE, 16 * torch.finfo(dtype).eps)
