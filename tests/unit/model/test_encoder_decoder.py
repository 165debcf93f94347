"""T5 and FlanT5: their heads survive, and padded rows give transformers' logits, losses and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from tests.integration.tiny_parts import flan_t5, stir, t5_tokenizer
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.evaluation.generation import Prefixes, generate, likelihoods
from vlmtrain.interop.fitting import relative_difference
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments, follow_rules
from vlmtrain.model.deep_levels import receive_levels
from vlmtrain.model.encoder_decoder import start_token
from vlmtrain.model.fusion import FUSIONS
from vlmtrain.model.llm import build_llm, build_llm_skeleton, build_random_llm, give_tokens, load_llm, save_llm
from vlmtrain.model.parts import module_state
from vlmtrain.model.rotary import use_multimodal_rotary
from vlmtrain.objectives.language_modelling import LanguageModelling

TALKS = [("What color is it?", "red"), ("Is it 1 or 2, and why?", "it is 2, as always"), ("Why", "no")]


def talk(question: str, answer: str) -> Conversation:
    return Conversation("t", (Turn("user", question), Turn("assistant", answer)))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A FlanT5 as transformers writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flan")
    stir(flan_t5(vocab_size=len(t5_tokenizer()))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(published) -> VLMWrapper:
    return VLMWrapper(None, None, build_llm(str(published))).eval()


@pytest.fixture(scope="module")
def processor(model) -> Processor:
    return Processor(t5_tokenizer(), None, "blip", 200, decoder_start=start_token(model.llm))


def test_its_own_head_survives_loading_saving_and_new_tokens(published, tmp_path):
    expected = T5ForConditionalGeneration.from_pretrained(published).state_dict()
    llm = build_llm(str(published))
    tokenizer = t5_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = llm.lm_head.weight.shape[0]
    give_tokens(llm, tokenizer, ["<new>"])
    for name in ("lm_head.weight", "shared.weight"):
        assert llm.state_dict()[name].shape[0] == rows + 1 and llm.state_dict()[name][:rows].equal(expected[name])
    save_llm(llm, tmp_path, module_state(llm))
    again = load_llm(tmp_path)
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in llm.state_dict().items())
    assert again.encoder.embed_tokens.weight is again.decoder.embed_tokens.weight is again.shared.weight


def test_a_skeleton_has_its_own_head(published):
    for config in (None, AutoConfig.from_pretrained(published).to_dict()):
        with torch.device("meta"):
            llm = build_llm_skeleton(str(published), torch.float32, config)
        assert llm.lm_head.weight is not llm.shared.weight
    sizes = {name: tensor.shape for name, tensor in module_state(build_llm(str(published))).items()}
    assert {name: tensor.shape for name, tensor in llm.named_parameters()} == sizes


def test_equal_weights_of_head_and_embeddings_stay_apart(published, tmp_path):
    """transformers ties them when it loads them."""
    llm = build_llm(str(published))
    with torch.no_grad():
        llm.lm_head.weight.copy_(llm.shared.weight)
    save_llm(llm, tmp_path, module_state(llm))
    again = load_llm(tmp_path)
    assert again.lm_head.weight is not again.shared.weight and again.lm_head.weight.equal(llm.lm_head.weight)


def test_the_first_t5_stays_tied_and_scales(tmp_path):
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).save_pretrained(tmp_path)
    llm = build_llm(str(tmp_path))
    assert llm.lm_head.weight is llm.shared.weight and llm.config.scale_decoder_outputs


def test_a_random_one_has_the_usual_sizes(tokenizer):
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    llm = build_random_llm({"model_type": "t5", **usual, "tie_word_embeddings": False}, tokenizer)
    config = llm.config
    sizes = (config.d_model, config.d_ff, config.num_layers, config.num_decoder_layers, config.num_heads, config.d_kv)
    assert sizes == (32, 64, 3, 3, 2, 16)
    assert (len(llm.encoder.block), len(llm.decoder.block)) == (3, 3)
    assert start_token(llm) == tokenizer.pad_token_id and llm.lm_head.weight is not llm.shared.weight


def test_padded_rows_have_the_logits_and_the_loss_of_transformers(model, processor, published):
    theirs, tokenizer = T5ForConditionalGeneration.from_pretrained(published).eval(), t5_tokenizer()
    samples = [processor(talk(*each)) for each in TALKS]
    batch = processor.collate(samples, rows=4)
    with torch.no_grad():
        logits = model(batch)
        loss = LanguageModelling()(model, batch, None)
        kept = model(batch, keep=batch.trained.positions)
        expected, found = 0.0, 0
        for row, (question, answer) in zip(logits, TALKS):
            asked, labels = (tokenizer(text, return_tensors="pt").input_ids for text in (question, answer))
            out = theirs(input_ids=asked, labels=labels)
            count = labels.shape[1]
            assert relative_difference(row[:count], out.logits[0]) <= 1e-5
            assert relative_difference(kept[found : found + count], out.logits[0]) <= 1e-5
            found += count
            # by hand: the negative log of the softmax at each label
            odds = out.logits[0].double().exp()
            expected -= (odds.gather(1, labels.T)[:, 0] / odds.sum(1)).log().sum()
    assert len(kept) == found == sum(batch.weights.flatten() > 0) and torch.isfinite(logits).all()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_an_answer_does_not_see_its_later_tokens_or_other_rows(model, processor):
    with torch.no_grad():
        one, other = (
            model(processor.collate([processor(talk("What?", words)), processor(talk("A long question", "it"))]))
            for words in ("it is red", "it is blue")
        )
    same = len(processor.tokenizer("it is ", add_special_tokens=False).input_ids)
    assert relative_difference(one[0, :same], other[0, :same]) <= 1e-5
    assert relative_difference(one[1, :3], other[1, :3]) <= 1e-5
    assert relative_difference(one[0, same + 1], other[0, same + 1]) > 0.01


def test_answers_are_those_of_transformers_without_the_start_token(model, processor, published):
    theirs, tokenizer = T5ForConditionalGeneration.from_pretrained(published).eval(), t5_tokenizer()
    prompts = [processor.prompt(Conversation("p", (Turn("user", question),))) for question, _ in TALKS]
    ids = generate(model, processor, processor.collate(prompts), max_new_tokens=8)
    for row, (question, _) in zip(ids, TALKS):
        asked = tokenizer(question, return_tensors="pt").input_ids
        (expected,) = theirs.generate(asked, max_new_tokens=8, do_sample=False, eos_token_id=2)
        assert row[: len(expected) - 1].equal(expected[1:]) and row[len(expected) - 1 :].eq(0).all()
        assert expected[0] == 0 and processor.renderer.decode(row)


def test_likelihoods_are_sums_over_the_answer(model, processor, published):
    theirs, tokenizer = T5ForConditionalGeneration.from_pretrained(published).eval(), t5_tokenizer()
    samples = [processor(talk(*each)) for each in TALKS]
    starts = [sample.tokens.answers[-1][0] for sample in samples]
    for found, (question, answer) in zip(likelihoods(model, processor.collate(samples), starts), TALKS):
        asked, labels = (tokenizer(text, return_tensors="pt").input_ids for text in (question, answer))
        with torch.no_grad():
            logits = theirs(input_ids=asked, labels=labels).logits[0]
        assert found.total == pytest.approx(-float(F.cross_entropy(logits, labels[0], reduction="sum")), rel=1e-5)
        assert found.tokens == labels.shape[1]
    assert not Prefixes.serve(model)


def test_what_it_cannot_do_is_refused(model):
    for refused, words in (
        (
            lambda: attend_in_segments(model.llm),
            "layout=packed: T5ForConditional.* is an encoder-decoder model",
        ),
        (
            lambda: follow_rules(model.llm, ["prefix"]),
            "encoder-decoder model and does not support fusion.attention=prefix",
        ),
        (lambda: receive_levels(model.llm, 2), "encoder-decoder model, which does not support levels"),
        (lambda: FUSIONS["gated_cross_attention"].facts(model.llm, 16), "needs a decoder-only language model"),
        (lambda: use_multimodal_rotary(model.llm, "mrope"), "llm.positions=mrope: .* has no rotary positions"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


def test_a_configuration_without_a_start_token_is_refused(tmp_path):
    T5Config(d_model=8, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"llm\.path=.*decoder_start_token_id"):
        build_llm(str(tmp_path))
