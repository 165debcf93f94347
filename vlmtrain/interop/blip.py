"""Export to Hugging Face's BLIP-2 and InstructBLIP classes."""

from __future__ import annotations

import copy

import torch
from tokenizers import AddedToken, processors
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionModel,
    BlipImageProcessorPil,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionModel,
    PreTrainedTokenizerBase,
)

from ..connectors.published import published_state
from ..connectors.qformer import EPS, QFormer
from ..data.connector_text import TextReader
from ..data.geometry import Geometry
from ..data.processor import Processor
from ..model import VLMWrapper
from ..model.encoder_decoder import is_encoder_decoder
from .blip_towers import as_blip_tower
from .chat_template import Speech, spoken_words, typed_speech
from .fitting import DoesNotFit, filled
from .llava import ROUNDING, Exported, generation_settings


@torch.no_grad()
def as_blip(model: VLMWrapper, processor: Processor) -> Exported:
    """Convert to Blip2ForConditionalGeneration, or InstructBlipForConditionalGeneration if the Q-Former reads text.

    Unchanged tensors are shared. Raises DoesNotFit for parts that these classes do not support.
    """
    connector, reads = model.connector, model.connector.reads_text
    _check(connector, processor.geometry)
    tower_class = InstructBlipVisionModel if reads else Blip2VisionModel
    tower = as_blip_tower(model.vision, connector.ln_vision, tower_class)
    speech, queries = _speech(processor)
    blip2, instructblip, *_ = QFormer.PUBLISHED
    text_config, language = _language_state(model.llm, speech, processor)
    state = {
        **{f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()},
        **published_state(connector, instructblip if reads else blip2),
        **language,
    }
    model_class = InstructBlipForConditionalGeneration if reads else Blip2ForConditionalGeneration
    config = model_class.config_class(
        vision_config=tower.config.to_dict(),
        qformer_config=_qformer_config(connector).to_dict(),
        text_config=text_config.to_dict(),
        num_query_tokens=connector.core.num_queries,
        image_token_index=speech.image_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    exported = filled(model_class, config, state, next(model.llm.parameters()).dtype)
    exported.generation_config = generation_settings(processor, speech)
    exported.language_model.generation_config = exported.generation_config
    look = {"image_mean": list(processor.geometry.mean), "image_std": list(processor.geometry.std), "resample": 3}
    height, width = processor.geometry.size
    pictures = BlipImageProcessorPil(**look, size={"height": height, "width": width})
    remarks = [f"images that are not {height}x{width}: {ROUNDING}"]
    if reads:
        done = InstructBlipProcessor(pictures, speech.tokenizer, _reading_tokenizer(processor.reader), queries)
        remarks.append(
            "batches: InstructBLIP's processor pads the Q-Former's input on the left, which shifts its positions: "
            "batch only instructions of the same length, or pass them one by one"
        )
    else:
        done = Blip2Processor(pictures, speech.tokenizer, queries)
    if not queries:
        remarks.append("prompts must come from processor.tokenizer.apply_chat_template, which adds the image tokens")
    return Exported(exported, done, tuple(remarks))


def _check(connector: nn.Module, geometry: Geometry) -> None:
    """Raise DoesNotFit for a connector or an image preparation that the classes do not support."""
    if not isinstance(connector, QFormer):
        raise DoesNotFit(f"connector={connector.config['name']}: BLIP-2's classes support only qformer")
    if not isinstance(connector.ln_vision, nn.LayerNorm):
        raise DoesNotFit(
            "connector.vision_norm=false: BLIP-2's classes normalize the encoder's features (train with "
            "connector.vision_norm=true)"
        )
    if geometry.fit != "squash":
        raise DoesNotFit(f"image_fit={geometry.fit}: BLIP-2's processors stretch images (train with image_fit=squash)")


def _speech(processor: Processor) -> tuple[Speech, int]:
    """Tokenizer and template of the export, and the number of image tokens that its processor puts before the text."""
    renderer = processor.renderer
    if renderer.images_first:
        return spoken_words(processor), processor.geometry.tokens
    if processor.reader:
        raise DoesNotFit(
            f"template={renderer.template}: in InstructBLIP's processor the Q-Former reads the complete prompt, not "
            "the instruction (train with template=blip)"
        )
    speech = typed_speech(processor)
    mark = speech.tokenizer.convert_ids_to_tokens(speech.image_id)
    shown = f"{{{{- prompt | replace('{mark}', '{mark * processor.geometry.tokens}') -}}}}"
    template = f"{{%- set prompt -%}}{speech.template}{{%- endset -%}}{shown}"
    speech.tokenizer.chat_template = template
    return speech._replace(template=template), 0


def _qformer_config(connector: QFormer) -> Blip2QFormerConfig | InstructBlipQFormerConfig:
    core, given = connector.core, connector.config
    first = core.layers[0]
    crossing = [i for i, layer in enumerate(core.layers) if layer.cross_attention is not None]
    options = {
        "hidden_size": core.query_tokens.shape[-1],
        "num_hidden_layers": len(core.layers),
        "num_attention_heads": first.self_attention.attention.num_heads,
        "intermediate_size": first.query_ffn.up.out_features,
        "cross_attention_frequency": crossing[1] if crossing[1:] else len(core.layers),
        "encoder_hidden_size": given["in_dim"],
        "hidden_dropout_prob": core.dropout.p,
        "attention_probs_dropout_prob": core.dropout.p,
        "layer_norm_eps": EPS,
        "hidden_act": "gelu",
    }
    if core.embedding is None:
        return Blip2QFormerConfig(**options)
    words, positions = core.embedding.words.num_embeddings, core.embedding.positions.num_embeddings
    return InstructBlipQFormerConfig(**options, vocab_size=words, max_position_embeddings=positions)


def _language_state(llm: nn.Module, speech: Speech, processor: Processor) -> tuple:
    """Configuration and tensors of the language model, with an additional row for the image token."""
    config = copy.deepcopy(llm.config.get_text_config())
    tables = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    rows = len(tables[0].weight)
    lacking = max(0, speech.image_id + 1 - rows)
    config.vocab_size = rows + lacking
    # the classes read the end-of-answer token from this configuration and not from their own files
    config.eos_token_id = processor.renderer.stop_ids
    config.bos_token_id, config.pad_token_id = speech.tokenizer.bos_token_id, speech.tokenizer.pad_token_id
    if is_encoder_decoder(config):
        config.bos_token_id = speech.tokenizer.eos_token_id  # the text after images where there is no prompt
    grown = {tensor.data_ptr() for table in tables if table is not None for tensor in table.parameters()}
    state = {
        f"language_model.{name}": _with_rows(tensor, lacking) if tensor.data_ptr() in grown else tensor
        for name, tensor in llm.state_dict().items()
    }
    return config, state


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """Append rows with the mean of the others to a table or bias; greedy decoding never selects their tokens."""
    return torch.cat([table, table.mean(0, keepdim=True).expand(rows, *table.shape[1:])]) if rows else table


def _reading_tokenizer(reader: TextReader) -> PreTrainedTokenizerBase:
    """The Q-Former's tokenizer, which adds the special tokens itself. Raises DoesNotFit if that is not possible."""
    tokenizer = copy.deepcopy(reader.tokenizer)
    frame = []
    for name, token_id in (("[CLS]", reader.vocabulary.start), ("[SEP]", reader.vocabulary.end)):
        if token_id >= len(tokenizer):
            tokenizer.add_tokens([AddedToken(name, special=True, normalized=False)], special_tokens=True)
        frame.append((tokenizer.convert_ids_to_tokens(token_id), token_id))
    start, end = (token for token, _ in frame)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{start} $A {end}", f"{start} $A {end} $B {end}", list(dict.fromkeys(frame))
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"
    tokenizer.model_max_length = tokenizer.init_kwargs["model_max_length"] = reader.max_length
    words = "What color is it, 1 or 2?"
    if tokenizer(words).input_ids != reader.encode(words).tolist():
        raise DoesNotFit("the connector's tokenizer cannot be exported so that it adds its special tokens itself")
    return tokenizer
