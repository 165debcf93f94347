"""Language models of Hugging Face, decoder-only or encoder-decoder, with their tokenizers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import first_line, nearest
from ..registry import Registry
from .attention import plain_attention
from .blocks import first_blocks
from .encoder_decoder import FAMILIES, auto_class, has_own_head, is_encoder_decoder, own_names, prepared
from .experts import load_experts, restore_experts, save_experts
from .loading import load_hf_config, load_hf_model
from .rotary import restore_multimodal_rotary


class LanguageModel(ABC):
    """How a language model and its tokenizer are built; the base class of those that a module registers.

    The model is one of Hugging Face's interface: it takes ``inputs_embeds``, has ``get_input_embeddings`` and
    ``generate``, and its classes are known to ``AutoConfig`` and ``AutoModelForCausalLM``, because a model folder holds
    an ordinary Hugging Face folder. The parameters of `build` other than tokenizer, dtype and weights are its options.
    """

    @classmethod
    @abstractmethod
    def tokenizer(cls, **options: Any) -> PreTrainedTokenizerBase:
        """Build the fast tokenizer, given the options of `build`."""

    @classmethod
    @abstractmethod
    def build(
        cls, *, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, weights: bool = True, **options: Any
    ) -> nn.Module:
        """Build the model. weights: False skips loading published weights, to inspect sizes."""


LANGUAGE_MODELS: Registry[LanguageModel] = Registry(
    "llm", LanguageModel, {}, builder="build", fixed=("tokenizer", "dtype", "weights")
)
register = LANGUAGE_MODELS.register
LARGE = 10**9
"""Number of parameters above which only a part of a model is run to check it."""


def build_llm(
    path: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a language model from a Hub ID or a folder."""
    config = load_hf_config(path, "llm.path", trust_remote_code)
    _check_generative(config, f"llm.path={path}")
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    llm = prepared(load_hf_model(auto_class(config), path, dtype=dtype, **options))
    load_experts(llm, Path(path))
    check_embeddings(llm, f"llm.path={path}")
    return llm


def build_llm_skeleton(
    path: str, dtype: torch.dtype, config: Mapping | None, trust_remote_code: bool = False
) -> nn.Module:
    """Build the architecture without weights, from `config` or the configuration of a Hub ID or folder."""
    if config is None:
        known = load_hf_config(path, "llm.path", trust_remote_code)
    else:
        known = transformers.AutoConfig.for_model(**config)
    _check_generative(known, f"llm.path={path}")
    llm = _built(known, trust_remote_code).to(dtype)
    restore_experts(llm)
    return llm


def _built(config: PreTrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The architecture of a configuration, with new weights."""
    known = getattr(transformers, auto_class(config))
    llm = prepared(known.from_config(config, trust_remote_code=trust_remote_code))
    if has_own_head(config):  # its logits start as large as those of a tied head, whose inputs are scaled
        llm.lm_head.weight.data *= config.d_model**-0.5
    return llm


def build_random_llm(config: dict, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a language model with random weights.

    config: a Hugging Face configuration with its ``model_type``; the vocabulary size and special token ids are taken
    from the tokenizer. Raises ValueError for a key that the model's configuration does not have, and for values with
    which it cannot be built.
    """
    given = f"llm.config.model_type={config.get('model_type')}"
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    try:
        known = transformers.AutoConfig.for_model(config.get("model_type"))
        usual = transformers.LlamaConfig()  # configs/llm/tiny.yaml sets its keys for all kinds of models
        for key in config:
            if not hasattr(known, key) and not hasattr(usual, key):
                raise ValueError(f"{given} has no key '{key}'.{nearest(key, vars(known))}")
        if is_encoder_decoder(known):
            config, ids["decoder_start_token_id"] = own_names(config), tokenizer.pad_token_id
        full = transformers.AutoConfig.for_model(**config, vocab_size=len(tokenizer), **ids)
        _check_generative(full, given)
        llm = _built(full).to(dtype)
    except Exception as error:  # transformers raises anything for values of a wrong type or size
        message = first_line(error)
        raise ValueError(message if given in message else f"{given} cannot be built: {message}") from None
    if not llm.get_input_embeddings().weight.is_meta:
        copied = copy.deepcopy(llm)  # with other weights, as initial values of 0 could hide a difference
        generator = torch.Generator().manual_seed(0)
        for parameter in copied.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
        check_embeddings(copied, given)
    return llm


@torch.no_grad()
def check_embeddings(llm: nn.Module, given: str) -> None:
    """Raise ValueError unless the model computes the same from embeddings of tokens as from their ids.

    Images enter a model as embeddings. A model that reads ids in another place as well, such as Gemma 3n with its
    embeddings per layer, would miss them. Only the first blocks of a large model are run. `given` is the setting.
    """
    was_training = llm.training
    llm.eval()
    large = sum(p.numel() for p in llm.parameters()) > LARGE
    ids = torch.arange(8)[None] % llm.get_input_embeddings().num_embeddings
    options = {"decoder_input_ids": ids} if is_encoder_decoder(llm.config) else {}
    try:
        with first_blocks(llm) if large else nullcontext(), plain_attention(llm):
            from_ids = llm(input_ids=ids, use_cache=False, **options).logits.float()
            embeddings = llm.get_input_embeddings()(ids)
            found = llm(inputs_embeds=embeddings, use_cache=False, **options).logits.float()
    except Exception as error:  # the code of a model can raise anything
        raise ValueError(f"{given} cannot run: {first_line(error)}") from None
    finally:
        llm.train(was_training)
    difference = float((found - from_ids).abs().max() / from_ids.abs().max().clamp(min=1e-12))
    if not difference < 0.01:
        raise ValueError(
            f"{given} reads token ids in more places than its embedding (its logits from embeddings differ by "
            f"{difference:.0%}): such models are not supported"
        )


def _check_generative(config: PreTrainedConfig, given: str) -> None:
    """Raise ValueError unless the model is causal or in `encoder_decoder.FAMILIES`; `given` is the setting.

    Rejected are models like BERT, whose class in transformers is causal only with ``is_decoder``, and models without
    a causal class.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    if is_encoder_decoder(config):
        if getattr(config, "decoder_start_token_id", None) is None:
            raise ValueError(f"{given}: its config.json has no decoder_start_token_id, with which the decoder begins")
        return
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    sees_both_sides = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes
    if not own_code and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or sees_both_sides):
        raise ValueError(
            f"{given} is not a causal language model ({kind}{', which is bidirectional' if sees_both_sides else ''}): "
            f"expected a causal model such as llama, qwen2 or opt, or an encoder-decoder model ({', '.join(FAMILIES)})"
        )


def load_tokenizer(path: str, key: str = "llm.path", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model. Raises ValueError if there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path} has no tokenizer: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{key}={path}: a fast tokenizer (tokenizer.json) is required, got {type(tokenizer).__name__}")
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
    """Add each of `words` as a token unless it already is one."""
    known, normalizer = tokenizer.get_vocab(), tokenizer.backend_tokenizer.normalizer
    # a normalizer that changes a word, such as Llama 2's, which puts a space before it, would hide it within a text
    kept = {word: normalizer is None or normalizer.normalize_str(word) == word for word in words if word not in known}
    tokenizer.add_tokens([AddedToken(word, normalized=same) for word, same in kept.items()])


def give_tokens(llm: nn.Module, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
    """Resize a model's embeddings for the tokens added by `add_tokens`; new rows are drawn like the existing ones.

    The ids of the tokens are stored in ``llm.new_token_ids``.
    """
    if words and len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=not llm.get_input_embeddings().weight.is_meta)
    llm.new_token_ids = tuple(tokenizer.convert_tokens_to_ids(list(words)))


def choose_attention(llm: nn.Module, name: str | None) -> None:
    """Set the attention implementation that transformers calls `name`; None keeps the model's default.

    Model folders do not store it. Raises ValueError if the implementation is not available.
    """
    if name is None:
        return
    try:
        llm.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ValueError(f"llm.attn_implementation={name}: {first_line(error)}") from None


def check_vocabulary(llm: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer has ids without an embedding in the model."""
    rows = llm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"llm.path: the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {rows}: they do "
            "not match"
        )


def save_llm(llm: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Write the model as an ordinary Hugging Face folder, with the weights of visual experts in a file of their own."""
    transformers.utils.logging.disable_progress_bar()
    llm.save_pretrained(folder, state_dict=save_experts(llm, folder, state))


def load_llm(folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> nn.Module:
    """Load a model that was written by `save_llm`."""
    config = load_hf_config(str(folder), "llm", trust_remote_code)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    llm = prepared(load_hf_model(auto_class(config), str(folder), is_ours=True, **options))
    restore_multimodal_rotary(llm)
    load_experts(llm, folder)
    return llm


def saved_llm_skeleton(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """Build the architecture of a model that was written by `save_llm`, with new weights."""
    config = load_hf_config(str(folder), "llm", trust_remote_code)
    llm = _built(config, trust_remote_code)
    restore_multimodal_rotary(llm)
    restore_experts(llm)
    return llm


def hidden_width(llm: nn.Module) -> int:
    """Width of the model's token embeddings."""
    return llm.get_input_embeddings().embedding_dim


def max_positions(llm: nn.Module) -> int | None:
    """Maximum sequence length of the model's positions in tokens, or None if the configuration does not give it."""
    return getattr(llm.config.get_text_config(), "max_position_embeddings", None)
