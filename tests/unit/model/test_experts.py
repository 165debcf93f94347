"""Experts by modality: the dense model at first, one expert for each position, gradients, generation, and saving."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MambaConfig, OPTConfig

from tests.stages import make_stage
from tests.talks import TALKS, asked, close, greedy, rows
from vlmtrain import build_model
from vlmtrain.data import Processor
from vlmtrain.interop.export import export
from vlmtrain.interop.fitting import DoesNotFit
from vlmtrain.interop.own import VLMTrainForConditionalGeneration
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.experts import FILE, Experts, add_experts
from vlmtrain.model.llm import build_llm
from vlmtrain.model.parts import module_state
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.settings import compose
from vlmtrain.training.adapters import add_adapters, is_adapter, merged
from vlmtrain.training.trainable import freeze, trained_groups

ALL = ["attention", "mlp", "norms"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "tie_word_embeddings": False}


def stir(module: nn.Module, seed: int) -> None:
    """Weights far from their small initial values, with which a wrong position would hardly show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise) if parameter.ndim == 1 else parameter.copy_(noise / 3)


def build(kind: str = "llama", parts: list[str] | None = ALL, differ: bool = True) -> tuple[VLMWrapper, Processor]:
    """A small model with large weights, and experts with others unless they shall not `differ`."""
    vision = {"tiny": {"image_size": 48}}
    model, processor = build_model(vision, "mlp", {"tiny": {"config": {"model_type": kind, **SHAPE}}})
    stir(model.llm, 0)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(3)
    if parts:
        add_experts(model.llm, parts)
    if differ:
        for number, expert in enumerate(pairs(model.llm)):
            stir(expert.visual, 1 + number)
    return model, processor


@pytest.fixture(scope="module")
def built() -> tuple[VLMWrapper, Processor]:
    return build()


def pairs(llm: nn.Module) -> list[Experts]:
    return [module for module in llm.modules() if isinstance(module, Experts)]


@contextmanager
def both_computed(llm: nn.Module, visual: Tensor) -> Iterator[None]:
    """Let both experts compute all positions, of which `visual` ``(B, T)`` chooses; independent of the routing."""

    def chosen(expert: Experts):
        def forward(x: Tensor) -> Tensor:
            mask = visual.reshape(*visual.shape, *[1] * (x.ndim - 2))
            return torch.where(mask, expert.visual(x), expert.text(x))

        return forward

    for expert in pairs(llm):
        expert.forward = chosen(expert)
    try:
        yield
    finally:
        for expert in pairs(llm):
            del expert.forward


def gradients(model: VLMWrapper, *batches) -> dict[str, Tensor]:
    """All forward passes come before the backward passes."""
    model.zero_grad()
    losses = [model(batch).flatten(0, 1)[batch.trained.positions].logsumexp(-1).sum() for batch in batches]
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# what is computed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_equal_experts_are_the_dense_model(kind, packed):
    (dense, processor), (model, _) = build(kind, None), build(kind, differ=False)
    if packed:
        attend_in_segments(dense.llm)
        attend_in_segments(model.llm)
    samples = [processor(each) for each in TALKS]
    assert all(int(sample.tokens.index[0]) == -1 for sample in samples)  # images in the middle of the text
    found = zip(rows(dense, processor, samples, packed), rows(model, processor, samples, packed))
    for one, other in found:
        assert one.std() > 1
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize(
    "kind, parts", [("llama", ALL), ("qwen3", ["norms"]), ("qwen2", ["attention"]), ("gpt2", ["mlp"])]
)
def test_each_position_is_computed_by_its_own_expert(kind, parts):
    model, processor = build(kind, parts)
    batch = processor.collate([processor(each) for each in TALKS])
    found = model(batch), gradients(model, batch)
    with both_computed(model.llm, batch.visual.mask):
        expected = model(batch), gradients(model, batch)
    close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() == dict(model.named_parameters()).keys() - frozen_in(model)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-3, msg=name)
    with both_computed(model.llm, torch.zeros_like(batch.visual.mask)):
        assert not model(batch).allclose(expected[0], atol=0.1)


def frozen_in(model: VLMWrapper) -> set[str]:
    """Parameters that no output of the model depends on, such as the last norm of the encoder."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def test_padded_packed_and_single_samples_have_the_same_logits_and_gradients():
    model, processor = build("qwen3")
    samples = [processor(each) for each in TALKS]
    attend_in_segments(model.llm)
    expected = [rows(model, processor, [sample])[0] for sample in samples]
    for packed in (False, True):
        for one, other in zip(rows(model, processor, samples, packed), expected):
            close(one, other)
    found = gradients(model, processor.pack(samples))
    for name, gradient in gradients(model, *[processor.collate([sample]) for sample in samples]).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def test_an_expert_without_rows_has_a_gradient_of_zero(built):
    model, processor = built
    found = gradients(model, processor.collate([processor(TALKS[1])]))
    names = [f"llm.{name}" for name, _ in model.llm.named_parameters() if ".visual." in name]
    visual = {name: found[name] for name in names}
    assert not any(gradient.any() for gradient in visual.values())
    assert all(gradient.any() for name, gradient in found.items() if ".text." in name)
    assert visual
    batch = processor.collate([processor(TALKS[0])])
    model.zero_grad()
    mask = torch.ones_like(batch.visual.mask)
    model.llm(inputs_embeds=torch.randn(*mask.shape, 32), visual_mask=mask).logits.logsumexp(-1).sum().backward()
    text = {name: parameter.grad for name, parameter in model.llm.named_parameters() if ".text." in name}
    assert not any(gradient.any() for gradient in text.values())


def test_recomputed_activations_have_the_gradients_of_their_own_rows():
    found = []
    for recompute in (False, True):
        model, processor = build()
        parts = {"connector": model.connector, "fusion": model.fusion, "llm": model.llm}
        freeze(parts, trained_groups(make_stage(train={"llm": 1.0}), parts), recompute)
        batches = [processor.collate([processor(each)]) for each in (TALKS[0], TALKS[1], TALKS[2])]
        found.append(gradients(model, *batches))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_text(built, beams):
    model, processor = built
    prompts = [processor.prompt(asked(each)) for each in TALKS]
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(processor.collate(prompts), **options).tolist()
    alone = [model.generate(processor.collate([prompt]), **options).tolist()[0] for prompt in prompts]
    assert together == (alone if beams > 1 else [greedy(model, processor, prompt, 5) for prompt in prompts])
    assert len(set(map(tuple, together))) > 1


# the model folder


def test_a_folder_holds_a_dense_model_and_the_visual_experts(built, tmp_path):
    model, processor = built
    batch = processor.collate([processor(each) for each in TALKS])
    model.save_pretrained(tmp_path)
    assert VLMWrapper.from_pretrained(tmp_path)(batch).equal(model(batch))
    again = build_llm(str(tmp_path / "llm"))
    for name, tensor in model.llm.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    (tmp_path / "llm" / FILE).rename(tmp_path / FILE)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = batch.input_ids[1:2]
    with torch.no_grad():
        close(dense(input_ids=ids).logits, model.llm(input_ids=ids).logits)
    with pytest.raises(ValueError, match=f"{FILE} is missing"):
        build_llm(str(tmp_path / "llm"))
    shutil.copy(tmp_path / "connector" / "model.safetensors", tmp_path / "llm" / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} does not fit LlamaForCausalLM: missing: model.*visual"):
        build_llm(str(tmp_path / "llm"))


def test_an_exported_model_has_the_experts(built, tmp_path):
    model, processor = built
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.model_class == "VLMTrainForConditionalGeneration" and "llm.visual_experts" in done.remarks[0]
    loaded = VLMTrainForConditionalGeneration.from_pretrained(tmp_path / "out")
    batch = processor.collate([processor(TALKS[0])])
    assert loaded.vlm(batch).equal(model(batch))
    with pytest.raises(DoesNotFit, match=r"llm\.visual_experts=\[attention, mlp, norms\]: .*--format vlmtrain"):
        export(tmp_path / "model", tmp_path / "llava", "llava")


def test_a_model_keeps_its_experts():
    model, _ = build(parts=["mlp", "norms"])
    before = len(pairs(model.llm))
    add_experts(model.llm, ["norms", "mlp"])
    assert len(pairs(model.llm)) == before
    with pytest.raises(ValueError, match=r"experts=\[mlp\], but the language model was trained with \[mlp, norms\]"):
        add_experts(model.llm, ["mlp"])


# what is selected


def test_experts_train_by_themselves(built):
    llm = built[0].llm
    stage = make_stage(train={}, groups=[{"match": "llm.*.visual", "lr": 1e-4}])
    (group,) = trained_groups(stage, {"llm": llm})
    assert set(group.names) == {name for name, _ in llm.named_parameters() if ".visual." in name}
    assert any(name.startswith("model.norm.") for name in group.names)
    stage = make_stage(train={}, groups=[{"match": "llm.layers[1:].self_attn.q_proj", "lr": 1e-4}])
    (group,) = trained_groups(stage, {"llm": llm})
    start = "model.layers.1.self_attn.q_proj"
    assert list(group.names) == [f"{start}.text.weight", f"{start}.visual.weight"]


def test_adapters_for_a_layer_are_for_both_of_its_experts():
    model, processor = build()
    options = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "down_proj"], "init_from": None}
    stage = make_stage(train={"llm": 1e-3}, lora={"llm": options})
    add_adapters(stage, {"llm": model.llm})
    names = [name for name, _ in model.llm.named_parameters() if is_adapter(name)]
    layers = [f"self_attn.q_proj.{one}" for one in ("text", "visual")]
    layers += [f"mlp.{one}.down_proj" for one in ("text", "visual")]
    wanted = [f"model.layers.{block}.{layer}.lora_{half}" for block in (0, 1) for layer in layers for half in "AB"]
    assert {name.removesuffix(".default.weight") for name in names} == set(wanted) and len(names) == len(wanted)
    stir(model.llm, 5)
    plain, _ = build()
    plain.llm.load_state_dict(merged(model.llm, module_state(model.llm)))
    samples = [processor(each) for each in TALKS]
    for one, other in zip(rows(model, processor, samples), rows(plain, processor, samples)):
        close(one, other)


def test_the_doubled_weights_are_those_of_the_blocks_and_the_last_norm():
    """Llama-2-7B: 6.48B on top of 6.74B, all but the embeddings and the output embeddings."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(LlamaConfig())
        dense = sum(p.numel() for p in llm.parameters())
        add_experts(llm, ALL)
    extra = sum(p.numel() for p in llm.parameters()) - dense
    assert (dense, extra) == (6_738_415_616, 6_738_415_616 - 2 * 32000 * 4096)


SMALL = {**SHAPE, "head_dim": 8, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "OPTForCausalLM does not support them": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=40, word_embed_proj_dim=32
    ),
    r"Gemma3RMSNorm reads \(1, 4, 5, 8\)": Gemma3TextConfig(**SMALL),  # it norms queries that are ordered by head
    "which cannot have them": MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=40),
}


@pytest.mark.parametrize("message", OTHERS)
def test_models_that_do_not_compute_positions_by_themselves_are_refused(message):
    with pytest.raises(ValueError, match=rf"llm\.visual_experts=\[attention, mlp, norms\]: .*{message}"):
        add_experts(AutoModelForCausalLM.from_config(OTHERS[message]), ALL)


def test_visual_tokens_outside_the_text_are_refused():
    gated = compose(["recipe=flamingo", "mini=true", "llm.visual_experts=[mlp]"])
    with pytest.raises(ValueError, match=r"llm\.visual_experts needs fusion=concatenation"):
        plan_run(gated, Machine())


@pytest.mark.parametrize("given", [["ffn"], ["mlp", "mlp"], []])
def test_only_names_of_modules_are_accepted_each_once(given):
    with pytest.raises(ValueError, match=r"visual_experts=.*one or more of attention, mlp, norms, each once"):
        build_model("tiny", "linear", {"tiny": {"visual_experts": given}})
