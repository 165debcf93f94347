"""Settings of the parts of a model: keys of the groups ``vision``, ``connector``, ``fusion`` and ``llm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from ..connectors import CONNECTORS
from ..model.experts import PARTS as EXPERTS
from ..model.fusion import FUSIONS
from ..model.llm import LANGUAGE_MODELS
from ..model.vision import ENCODERS
from ..model.vision.multiscale import SCALES, are_scales
from ..model.vision.several import JOINS, LOOKS
from ..registry import Registry
from .fields import (
    IMAGE_SIZE,
    MAPPING,
    SWITCH,
    TEXT,
    WORDS,
    Kind,
    by_name,
    key,
    list_of,
    number,
    one_of,
    optional,
    read,
    whole,
)

_POSITIONS = optional(one_of("mrope", "interleaved_mrope", "xdrope"))
_FRAME = optional(list_of(TEXT, "a list of two tokens", sizes=(2,)))
_SOME = list_of(one_of(*EXPERTS), f"a list of one or more of {', '.join(EXPERTS)}, each once", sizes=(1, 2, 3))
_EXPERTS = optional(_SOME._replace(fits=lambda value: _SOME.fits(value) and len(set(value)) == len(value)))
_LAYERS = list_of(whole(), "a list of layers")
_SCALES = Kind(SCALES, are_scales, lambda value, key: tuple(value))
_CHANNELS = list_of(number(), "three numbers, one for each of R, G and B", sizes=(3,))


@dataclass(frozen=True)
class Encoder:
    """The keys that every vision encoder has."""

    image_size: int | tuple[int, int] | None = key(IMAGE_SIZE)  # in pixels; null: the encoder's own
    layer: int = key(whole())  # index of the hidden state that the connector receives
    levels: tuple[int, ...] | None = key(optional(_LAYERS))  # further hidden states; null: as the connector needs
    scales: tuple[int, ...] | None = key(optional(_SCALES))  # at which images are seen; null: only their own
    path = name = pretrained = model_config = None  # of those without such a key
    trust_remote_code = False
    is_pretrained = True

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `vlmtrain.model.vision.build_vision`."""
        return dict(vars(self))


@dataclass(frozen=True)
class OpenClipOptions(Encoder):
    """A vision encoder from open_clip."""

    provider: str = key(one_of("open_clip"))
    name: str | None = key(optional(TEXT))  # name of the model in open_clip
    pretrained: str | None = key(optional(TEXT))  # tag or file of the weights; null: random weights
    model_config: Mapping | None = key(optional(MAPPING))  # architecture, instead of a name

    @property
    def is_pretrained(self) -> bool:
        """Whether the options say where the weights come from."""
        return self.pretrained is not None


@dataclass(frozen=True)
class HFVisionOptions(Encoder):
    """A vision encoder from Hugging Face Transformers."""

    provider: str = key(one_of("hf"))
    path: str = key(TEXT)  # Hub ID or folder
    trust_remote_code: bool = key(SWITCH)  # run code from the Hub ID or folder
    image_mean: tuple[float, ...] | None = key(optional(_CHANNELS))  # null: the preprocessor's
    image_std: tuple[float, ...] | None = key(optional(_CHANNELS))  # null: the preprocessor's
    final_norm: bool = key(SWITCH)  # layer -1 after the encoder's final norm


@dataclass(frozen=True)
class OwnEncoder(Encoder):
    """A vision encoder that a module registers."""

    provider: str = key(TEXT)
    options: Mapping = field(default_factory=dict)  # those of its `build`

    @property
    def arguments(self) -> dict[str, Any]:
        common = {name: value for name, value in vars(self).items() if name != "options"}
        return {**common, **self.options}


@dataclass(frozen=True)
class PatchOptions:
    """No vision encoder: the pixels of patches."""

    provider: str = key(one_of("patches"))
    patch_size: int = key(whole(1))  # side of a patch in pixels
    image_size: int | tuple[int, int] | None = key(IMAGE_SIZE)  # in pixels; null: 10 x 10 patches
    path = name = pretrained = model_config = scales = None
    trust_remote_code = False
    is_pretrained = True

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


class EncoderOfSeveral(NamedTuple):
    """One of several encoders: the keys of its provider, and those of `LOOKS` that are set."""

    options: OpenClipOptions | HFVisionOptions | PatchOptions | OwnEncoder
    look: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.options.arguments, **self.look}


def _encoder(value: Mapping, name: str) -> EncoderOfSeveral:
    kinds = {"image_fit": one_of("squash", "pad", "crop"), "grid": IMAGE_SIZE, **dict.fromkeys(LOOKS[2:], _CHANNELS)}
    look = {key: kinds[key](value[key], f"{name}.{key}") for key in LOOKS if value.get(key) is not None}
    mine = LOOKS[:2] if value.get("provider") == "hf" else LOOKS
    own = {key: each for key, each in value.items() if key not in mine}
    return EncoderOfSeveral(_by_provider(ENCODERS, OwnEncoder, **_SINGLE)(own, name), MappingProxyType(look))


@dataclass(frozen=True)
class SeveralOptions:
    """Several vision encoders, whose features are joined."""

    provider: str = key(one_of("several"))
    # by name, in the order of their features
    encoders: Mapping[str, EncoderOfSeveral] = key(
        by_name(Kind("a mapping with a provider", MAPPING.fits, _encoder), "{NAME: {provider: PROVIDER, ...}, ...}")
    )
    join: str = key(one_of(*JOINS))  # channels, tokens (a connector for each) or separate (a connector reads several)
    # name of an encoder, or [height, width], to whose grid all features are resized; null: their own
    grid: str | tuple[int, int] | None = key(
        Kind(
            "null, the name of an encoder, or [height, width]",
            lambda value: isinstance(value, str) or (not isinstance(value, int) and IMAGE_SIZE.fits(value)),
            lambda value, key: value if value is None or isinstance(value, str) else tuple(value),
        )
    )
    align_corners: bool = key(SWITCH)  # of the bilinear resizing
    path = name = pretrained = model_config = scales = None

    @property
    def trust_remote_code(self) -> bool:
        return any(each.options.trust_remote_code for each in self.encoders.values())

    @property
    def is_pretrained(self) -> bool:
        return all(each.options.is_pretrained for each in self.encoders.values())

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `vlmtrain.model.vision.build_vision`."""
        return {**vars(self), "encoders": {name: each.arguments for name, each in self.encoders.items()}}


@dataclass(frozen=True)
class LanguageModel:
    """The keys that every language model has."""

    provider: str = key(TEXT)
    chat_template: str | None = key(optional(TEXT))  # used if the tokenizer has none: a name, or a Jinja template
    new_tokens: tuple[str, ...] = key(WORDS)  # tokens to add to the tokenizer
    attn_implementation: str | None = key(optional(TEXT))  # null: the library's default
    positions: str | None = key(_POSITIONS)  # rows of rotary positions; null: the model's own
    image_frame: tuple[str, str] | None = key(_FRAME)  # tokens before and after each image
    image_frame_shared: bool | None = key(optional(SWITCH))  # whether images side by side share the one between them
    image_newline: str | None = key(optional(TEXT))  # token after each row of an image's tokens
    visual_experts: tuple[str, ...] | None = key(_EXPERTS)  # modules that exist once more for visual tokens; null: none
    path = config = None  # of those without such a key
    trust_remote_code = False
    is_pretrained = True


@dataclass(frozen=True)
class TinyLLM(LanguageModel):
    """A language model with random weights and a tokenizer built from the vocabulary of the procedural data."""

    provider: str = key(one_of("tiny"))
    config: Mapping = key(MAPPING)  # configuration of the Hugging Face class
    is_pretrained = False


@dataclass(frozen=True)
class HFLLM(LanguageModel):
    """A language model from Hugging Face Transformers."""

    provider: str = key(one_of("hf"))
    path: str = key(TEXT)  # Hub ID or folder
    trust_remote_code: bool = key(SWITCH)  # run code from the Hub ID or folder


@dataclass(frozen=True)
class OwnLLM(LanguageModel):
    """A language model that a module registers."""

    chat_template: str | None = key(optional(TEXT), None)
    new_tokens: tuple[str, ...] = key(WORDS, ())
    attn_implementation: str | None = key(optional(TEXT), None)
    positions: str | None = key(_POSITIONS, None)
    image_frame: tuple[str, str] | None = key(_FRAME, None)
    image_frame_shared: bool | None = key(optional(SWITCH), None)
    image_newline: str | None = key(optional(TEXT), None)
    visual_experts: tuple[str, ...] | None = key(_EXPERTS, None)
    options: Mapping = field(default_factory=dict)  # those of its `build`


class Choice(NamedTuple):
    """The name of a part and its options."""

    name: str
    options: Mapping[str, Any]


def _choice(registry: Registry) -> Kind:
    """A part whose keys depend on its name."""

    def build(value: Mapping, key: str) -> Choice:
        options = dict(value)
        name = options.pop("name", None)
        registry.check_options(name, options)
        return Choice(name, MappingProxyType(options))

    return Kind(f"a {registry.kind}", MAPPING.fits, build)


def _by_provider(registry: Registry, own: type, **classes: type) -> Kind:
    """A part whose keys depend on its provider; `own` holds those of a provider that a module registers."""

    def build(value: Mapping, name: str) -> Any:
        provider = value.get("provider")
        if provider in classes:
            return read(classes[provider], value, f"{name}.")
        common = {each.name for each in fields(own) if "kind" in each.metadata}
        options = {option: given for option, given in value.items() if option not in common}
        registry.check_options(provider, options)
        known = {option: given for option, given in value.items() if option in common}
        return read(own, known, f"{name}.", options=MappingProxyType(options))

    return Kind("a mapping", MAPPING.fits, build)


_SINGLE = {"open_clip": OpenClipOptions, "hf": HFVisionOptions, "patches": PatchOptions}
Vision = OpenClipOptions | HFVisionOptions | PatchOptions | OwnEncoder | SeveralOptions
LLM = TinyLLM | HFLLM | OwnLLM
VISION = _by_provider(ENCODERS, OwnEncoder, several=SeveralOptions, **_SINGLE)
CONNECTOR, FUSION = _choice(CONNECTORS), _choice(FUSIONS)
LANGUAGE_MODEL = _by_provider(LANGUAGE_MODELS, OwnLLM, tiny=TinyLLM, hf=HFLLM)
