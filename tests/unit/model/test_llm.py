"""Language models: which are accepted, and that they compute the same from embeddings as from token ids."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import torch
import transformers

from vlmtrain.model.blocks import first_blocks
from vlmtrain.model.llm import build_random_llm, check_embeddings, load_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
GEMMA_3N = {
    **{"model_type": "gemma3n_text", "num_key_value_heads": 2, "head_dim": 16, "hidden_size_per_layer_input": 8},
    **{"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 400, "laurel_rank": 4},
}


def test_a_model_that_reads_ids_elsewhere_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"llm\.config\.model_type=gemma3n_text reads token ids in more places"):
        build_random_llm({**SMALL, **GEMMA_3N}, tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "opt"])
def test_models_that_read_only_embeddings_are_accepted_unchanged(kind, tokenizer):
    options = {
        "model_type": kind,
        **SMALL,
        **({"head_dim": 16, "num_key_value_heads": 2} if kind == "gemma3_text" else {}),
    }
    options |= {"word_embed_proj_dim": 32, "ffn_dim": 64} if kind == "opt" else {}
    state = torch.random.get_rng_state()
    built = build_random_llm(options, tokenizer)
    torch.random.set_rng_state(state)
    config = transformers.AutoConfig.for_model(
        **options, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    plain = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, built.state_dict()[name]), name


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hiden_size": 32}, "has no key 'hiden_size'. Did you mean 'hidden_size'?"),
        ({"hidden_size": "abc"}, "cannot be built: "),
        ({"num_attention_heads": 0}, "cannot be built: "),
        ({"model_type": "nothing"}, "llm.config.model_type=nothing cannot be built: "),
    ],
)
def test_a_configuration_that_cannot_be_built_is_named_in_one_line(change, said, tokenizer):
    with pytest.raises(ValueError) as refused:
        build_random_llm({"model_type": "llama", **SMALL, **change}, tokenizer)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_only_the_first_blocks_run_within_a_context(tokenizer):
    llm = build_random_llm({"model_type": "llama", **SMALL}, tokenizer)
    ids, ran = torch.arange(5)[None], []
    for number, block in enumerate(llm.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    with first_blocks(llm):
        llm(ids)
    assert ran == [0, 1]
    ran.clear()
    llm(ids)
    assert ran == [0, 1, 2, 3]
    check_embeddings(llm, "x")


def test_a_folder_with_only_a_sentencepiece_model_has_a_tokenizer(tmp_path):
    (tmp_path / "text").write_text("what color is the red circle\na blue square of the circle\n" * 50)
    options = {"model_prefix": str(tmp_path / "tokenizer"), "vocab_size": 60, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), **options)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(str(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "is the square red"
    assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
