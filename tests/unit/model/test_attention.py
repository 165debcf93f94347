"""Packed rows: no sample sees another, and each has the same outputs as alone with the library's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from vlmtrain.model.attention import attend_in_segments, segment_arguments

VOCABULARY, WIDTH = 89, 32
IDS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**IDS, **SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
LLMS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral, window": MistralConfig(**GROUPED, sliding_window=4),
    "qwen2, window": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "phi3": Phi3Config(**GROUPED),
    "gemma2, soft-cap and window": Gemma2Config(**GROUPED, sliding_window=4, attn_logit_softcapping=2.0),
    "gemma3, window": Gemma3TextConfig(
        **GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "opt": OPTConfig(**IDS, **SHAPE, ffn_dim=48, word_embed_proj_dim=WIDTH),
    "gpt2": GPT2Config(**IDS, n_embd=WIDTH, n_layer=2, n_head=4),
}
LENGTHS = (7, 1, 12, 5)


@pytest.fixture(params=LLMS)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A language model prepared for packing, and the same one with the library's plain attention."""
    torch.manual_seed(0)
    config = LLMS[request.param]
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # make outputs far from uniform, so that a different input gives a different answer
        for parameter in reference.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    packed = AutoModelForCausalLM.from_config(config).eval()
    packed.load_state_dict(reference.state_dict())
    attend_in_segments(packed)
    return packed, reference


def samples() -> list[torch.Tensor]:
    return [torch.randint(1, VOCABULARY, (length,)) for length in LENGTHS]


def packed_logits(model: nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    ids, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]
    boundaries = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    embeddings = model.get_input_embeddings()(ids)
    options = segment_arguments(boundaries)
    return model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **options).logits[0]


def test_each_sample_has_the_same_outputs_as_alone(pair):
    packed, reference = pair
    rows = samples()
    found = packed_logits(packed, rows).split(list(LENGTHS))
    for row, logits in zip(rows, found):
        alone = reference(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=2e-5)


def test_gradients_are_those_of_the_samples_alone(pair):
    packed, reference = pair
    rows, weights = samples(), torch.randn(sum(LENGTHS), VOCABULARY)
    (packed_logits(packed, rows).log_softmax(-1) * weights).sum().backward()
    for row, weight in zip(rows, weights.split(list(LENGTHS))):
        (reference(row[None], use_cache=False).logits[0].log_softmax(-1) * weight).sum().backward()
    for (name, one), (_, other) in zip(packed.named_parameters(), reference.named_parameters()):
        scale = float(other.grad.abs().max()) if other.grad is not None else 0.0
        if scale:
            assert float((one.grad - other.grad).abs().max()) <= 1e-5 * max(scale, 1.0) * 10, name


@pytest.mark.parametrize("edited", range(len(LENGTHS)))
def test_editing_a_sample_changes_no_logit_of_another(pair, edited):
    packed, _ = pair
    rows = samples()
    before = packed_logits(packed, rows).split(list(LENGTHS))
    rows[edited] = torch.where(rows[edited] == 1, 2, rows[edited] - 1)
    after = packed_logits(packed, rows).split(list(LENGTHS))
    for number, (one, other) in enumerate(zip(before, after)):
        if number == edited:
            assert not torch.equal(one, other)
        else:
            assert torch.equal(one, other)


def test_generation_and_rows_of_one_sample_are_unchanged(pair):
    packed, reference = pair
    ids = torch.randint(1, VOCABULARY, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            packed(ids, use_cache=False).logits, reference(ids, use_cache=False).logits, rtol=1e-4, atol=2e-5
        )
        mask = torch.ones_like(ids)
        mask[0, :4], mask[1, :1] = 0, 0
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(packed.generate(ids, **options), reference.generate(ids, **options))


def test_a_model_with_custom_attention_is_refused():
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"BloomForCausalLM.*layout=padded"):
        attend_in_segments(AutoModelForCausalLM.from_config(config))


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MIXED = {
    "convolution": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "recurrent": RecurrentGemmaConfig(**IDS, **SHAPE, intermediate_size=48, lru_width=WIDTH),
    "linear attention": MiniMaxConfig(**GROUPED, **EXPERTS, layer_types=["linear_attention", "full_attention"]),
    "mamba": GraniteMoeHybridConfig(
        **GROUPED,
        **EXPERTS,
        shared_intermediate_size=16,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        layer_types=["mamba", "attention"],
    ),
    "sinks": GptOssConfig(**GROUPED, **EXPERTS),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_model_that_mixes_samples_outside_attention_is_refused(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MIXED[kind])
    with pytest.raises(ValueError, match=rf"layout=packed: {type(model).__name__} has .*use layout=padded"):
        attend_in_segments(model)
