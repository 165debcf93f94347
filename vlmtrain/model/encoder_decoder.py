"""Encoder-decoder language models (T5, FlanT5): images and questions enter the encoder, answers the decoder.

A row of a batch consists of the encoder's positions and, after them, the decoder's, which begin with its start token
(see `vlmtrain.batch.Decoder`). The decoder sees all real positions of the encoder, and its own in causal order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..batch import Decoder
from .logits import logits_at

FAMILIES = ("t5",)
BLOCKS = ("encoder.block", "decoder.block")
"""Paths of the blocks of both; patterns of a stage count those of the encoder."""


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether a language model of this configuration is run as encoder and decoder.

    Others that transformers can also run decoder-only, such as BART, are run decoder-only.
    """
    return config.model_type in FAMILIES


def auto_class(config: PreTrainedConfig) -> str:
    """Name of the class of transformers that builds and loads a language model of this configuration."""
    return "AutoModelForSeq2SeqLM" if is_encoder_decoder(config) else "AutoModelForCausalLM"


def own_names(config: Mapping) -> dict:
    """A configuration with T5's names of the usual keys, besides those that it has.

    Its decoder is as deep as its encoder. transformers translates some names itself, but only after it derives others.
    """
    width, heads, depth = (config.get(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    shape = {"d_model": width, "num_heads": heads, "num_layers": depth, "num_decoder_layers": depth}
    shape |= {"d_ff": config.get("intermediate_size"), "d_kv": width and heads and width // heads}
    return {**{key: value for key, value in shape.items() if value is not None}, **config}


def start_token(llm: nn.Module) -> int | None:
    """Id of the token with which the decoder begins; None for a decoder-only model."""
    return llm.config.decoder_start_token_id if is_encoder_decoder(llm.config) else None


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether a model of the T5 family has an output embedding of its own, as T5 v1.1 and FlanT5.

    Their configuration says ``tie_word_embeddings=true`` in transformers all the same; only with tied embeddings are
    the decoder's outputs scaled.
    """
    return is_encoder_decoder(config) and not config.scale_decoder_outputs


def prepared(llm: nn.Module) -> nn.Module:
    """A language model as transformers built or loaded it, whose head is its own if it `has_own_head`."""
    if not is_encoder_decoder(llm.config):
        return llm
    llm.block_path = BLOCKS[0]
    if has_own_head(llm.config):
        head = "lm_head.weight"
        llm._tied_weights_keys = {name: source for name, source in llm._tied_weights_keys.items() if name != head}
        llm.all_tied_weights_keys.pop(head, None)
        if llm.lm_head.weight is llm.shared.weight:
            llm.lm_head.weight = nn.Parameter(llm.shared.weight.detach().clone())
    return llm


def decoder_logits(llm: nn.Module, embeddings: Tensor, decoder: Decoder, keep: Tensor | None) -> Tensor:
    """Logits ``(B, Td, V)`` of the decoder's positions in rows of `embeddings` ``(B, T, D)``.

    With `keep`, positions ``(K,)`` of the decoder in the flattened batch, only theirs, ``(K, V)``.
    """
    width = embeddings.shape[1]
    encoded, mask = _encoder_input(embeddings, decoder)
    columns = decoder.starts[:, None] + torch.arange(decoder.width, device=embeddings.device)
    columns = columns.clamp(max=width - 1)
    decoded = embeddings.gather(1, columns.unsqueeze(-1).expand(-1, -1, embeddings.shape[2]))
    if keep is not None:
        rows = keep // width
        keep = rows * decoder.width + (keep % width - decoder.starts[rows]).clamp(min=0)
    with logits_at(llm, keep, columns.shape):
        options = {"inputs_embeds": encoded, "attention_mask": mask, "decoder_inputs_embeds": decoded}
        return llm(**options, use_cache=False).logits


def generate_answers(llm: nn.Module, embeddings: Tensor, decoder: Decoder, **options) -> Tensor:
    """Generate after the start token of the decoder; the new token ids ``(B, new)``."""
    encoded, mask = _encoder_input(embeddings, decoder)
    return llm.generate(inputs_embeds=encoded, attention_mask=mask, **options)[:, 1:]


def _encoder_input(embeddings: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """The encoder's embeddings, padded on the right, and the mask of its real positions."""
    columns = torch.arange(decoder.encoder_width, device=embeddings.device)
    return embeddings[:, : decoder.encoder_width], (columns < decoder.starts[:, None]).long()
