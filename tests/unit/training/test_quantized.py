"""Adapters over 4-bit weights, compared with plain layers that have the weights as dequantized by bitsandbytes."""

from __future__ import annotations

import sys

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from vlmtrain.model.parts import module_state, state_hash
from vlmtrain.planning.plan import Machine, plan_run
from vlmtrain.settings import compose
from vlmtrain.training.adapters import add_adapters, merged, save_adapters
from vlmtrain.training.trainable import part_size, trained_groups

from ...stages import make_stage

RANK, ALPHA = 2, 6
NF4 = {"rank": RANK, "alpha": ALPHA, "quantize": "nf4"}
# Dettmers et al. (2023), appendix E
VALUES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """A weight as dequantized by bitsandbytes from 4 bits with double quantization, in fp32."""
    codes, state = bnb.quantize_4bit(weight.detach().bfloat16(), compress_statistics=True, quant_type="nf4")
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state)


def with_adapters(module: nn.Module, **options) -> nn.Module:
    add_adapters(make_stage(train={"llm": 1e-3}, lora={"llm": {**NF4, **options}}), {"llm": module})
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return module


def plain_llm(tokenizer, kind: str = "llama") -> nn.Module:
    from vlmtrain.model.llm import build_random_llm

    torch.manual_seed(0)
    shapes = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    }
    return build_random_llm({"model_type": kind, **shapes[kind]}, tokenizer).eval()


def on_unpacked_weights(llm: nn.Module) -> nn.Module:
    """The same model, with the dequantized weights in the layers that get adapters."""
    head = llm.get_output_embeddings()
    with torch.no_grad():
        for layer in llm.modules():
            if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
                layer.weight.copy_(unpacked(layer.weight))
    return llm


def logits(llm: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return llm(torch.arange(12)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(24, 10), lambda: nn.Linear(64, 40, bias=False), lambda: Conv1D(10, 24)]
)
def test_output_and_gradients_are_those_of_a_plain_layer(make, dtype):
    torch.manual_seed(1)
    plain = make().to(dtype)
    if getattr(plain, "bias", None) is not None:
        nn.init.normal_(plain.bias)
    weight = unpacked(plain.weight)
    weight = (weight.T if isinstance(plain, Conv1D) else weight).to(dtype)
    bias = None if plain.bias is None else plain.bias.detach().clone()
    layer = with_adapters(nn.Sequential(plain))
    a, b = (layer.get_parameter(f"0.lora_{half}.default.weight") for half in "AB")
    x = torch.randn(3, 5, weight.shape[1]).to(dtype).requires_grad_()
    gradient = torch.randn(3, 5, weight.shape[0]).to(dtype)
    out = layer(x)
    found = torch.autograd.grad(out, (x, a, b), gradient)
    by_hand = F.linear(x, weight, bias) + ALPHA / RANK * F.linear(F.linear(x, a), b)
    expected = torch.autograd.grad(by_hand, (x, a, b), gradient)
    # the same sums in another order; in bf16 they are rounded to 8 bits, some more often
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    torch.testing.assert_close(out, by_hand, **tolerance)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_weights_are_the_papers_values_times_their_blocks_largest():
    torch.manual_seed(2)
    plain = nn.Linear(64, 16, bias=False)
    blocks = plain.weight.detach().bfloat16().float().clone()  # a row is a block
    held = with_adapters(nn.Sequential(plain))[0].base_layer.weight
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = VALUES[(blocks[..., None] / largest[..., None] - VALUES).abs().argmin(-1)]
    # the largest values are themselves stored in 8 bits, relative to their mean
    torch.testing.assert_close(held, nearest * largest, rtol=1e-2, atol=0)


def test_bytes_by_hand_and_no_change_of_dtype_reaches_them():
    plain = [nn.Linear(256, 300), nn.Linear(300, 70, bias=False)]
    sizes = [layer.weight.numel() for layer in plain]
    blocks = [-(-size // 64) for size in sizes]
    by_hand = sum(size // 2 + n + 4 * -(-n // 256) + 4 for size, n in zip(sizes, blocks))
    whole = sum(p.numel() for layer in plain for p in layer.parameters())
    with torch.device("meta"):
        skeleton = with_adapters(nn.Sequential(nn.Linear(256, 300), nn.Linear(300, 70, bias=False)))
    model = with_adapters(nn.Sequential(*plain))
    held = {name: p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert sum(p.numel() for p in held.values()) == by_hand == pytest.approx(sum(sizes) * 4.127 / 8, rel=1e-3)
    assert {n: (p.shape, p.dtype) for n, p in skeleton.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in model.named_parameters()
    }
    assert part_size(model) == part_size(skeleton) == whole + RANK * (256 + 300 + 300 + 70)
    before = {name: p.clone() for name, p in held.items()}
    with torch.no_grad():
        full = model(torch.ones(1, 256))
        half = model.bfloat16()(torch.ones(1, 256).bfloat16())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    torch.testing.assert_close(half.float(), full, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_weights_give_the_same_logits(kind, tokenizer):
    llm = with_adapters(plain_llm(tokenizer, kind))
    whole = merged(llm, module_state(llm))
    plain = plain_llm(tokenizer, kind)
    assert {n: (t.shape, t.dtype) for n, t in whole.items()} == {
        n: (t.shape, t.dtype) for n, t in module_state(plain).items()
    }
    plain.load_state_dict(whole, strict=False)
    torch.testing.assert_close(logits(plain), logits(llm), rtol=1e-5, atol=1e-5)


def test_adapters_resume_only_over_the_same_4_bit_weights(tokenizer, tmp_path):
    from peft import PeftModel

    made = tmp_path / "made"
    llm = with_adapters(plain_llm(tokenizer))
    state = module_state(llm)
    save_adapters(llm, state, made, None)

    def again(llm: nn.Module, **options) -> torch.Tensor:
        stage = make_stage(train={"llm": 1e-3}, lora={"llm": {**NF4, "init_from": str(made), **options}})
        add_adapters(stage, {"llm": llm})
        return logits(llm).float()

    expected = logits(llm)
    assert torch.equal(again(plain_llm(tokenizer)), expected)
    torch.testing.assert_close(again(plain_llm(tokenizer).bfloat16()), expected, rtol=5e-2, atol=5e-2)
    # their base is the dequantized weights, also if these are stored as they are
    dense = on_unpacked_weights(plain_llm(tokenizer))
    torch.testing.assert_close(again(dense, quantize=None), expected, rtol=1e-5, atol=1e-5)
    said = r"stages\.s\.lora\.llm\.init_from=.*made was trained on base weights other .* use the same quantize"
    for other, quantize in ((plain_llm(tokenizer), None), (on_merged(llm, tokenizer), "nf4")):
        with pytest.raises(ValueError, match=said) as error:
            again(other, quantize=quantize)
        assert "\n" not in str(error.value)
    # peft loads them on a plain base: on the dequantized one they give the same model
    theirs = PeftModel.from_pretrained(on_unpacked_weights(plain_llm(tokenizer)), made).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    with safe_open(made / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in name for name in load_file(made / "adapter_model.safetensors"))
        base = {n: t.bfloat16() for n, t in dense.state_dict().items() if n.endswith("base_layer.weight")}
        assert file.metadata()["base_sha256"] == state_hash(base)
    for i in range(8):
        save_adapters(llm, state, tmp_path / str(i), None)
        twin = tmp_path / str(i) / "adapter_model.safetensors"
        assert twin.read_bytes() == (made / "adapter_model.safetensors").read_bytes()


def on_merged(llm: nn.Module, tokenizer) -> nn.Module:
    other = plain_llm(tokenizer)
    other.load_state_dict(merged(llm, module_state(llm)), strict=False)
    return other


def stage_of(*overrides: str):
    return compose(["recipe=llava_1_5_lora", "mini=true", *overrides]).stages["instruct"]


@pytest.mark.parametrize(
    "group, said",
    [
        (
            "{match: 'llm.layers[-1:]', lr: 1e-3}",
            r"would train .*layers\.1\..*stored in 4 bits due to stages\.instruct\.lora",
        ),
        (
            "{match: llm.*q_proj.base_layer.weight, lr: 1e-3}",
            r"would train .*q_proj\.base_layer\.weight.*stored in 4 bits",
        ),
        ("{match: 'llm.layers[-1:].*lora_*', lr: 1e-3}", None),
        ("{match: 'llm.*norm*', lr: 1e-3}", None),
        ("{match: llm, lr: 1e-3}", None),
    ],
)
def test_weights_stored_in_4_bits_cannot_train(group, said, tokenizer):
    stage = stage_of(f"stages.instruct.groups=[{group}]")
    llm = with_adapters(plain_llm(tokenizer))
    if said is None:
        names = [name for g in trained_groups(stage, {"llm": llm}) for name in g.names]
        assert all(llm.get_parameter(name).is_floating_point() for name in names)
    else:
        with pytest.raises(ValueError, match=said) as error:
            trained_groups(stage, {"llm": llm})
        assert "\n" not in str(error.value)


def test_invalid_settings_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"^stages\.instruct\.lora\.llm\.quantize=int8: expected null or nf4$"):
        stage_of("stages.instruct.lora.llm.quantize=int8")
    with pytest.raises(ValueError, match=r"^stages\.s\.lora\.llm: Sequential has no linear layer that could have an"):
        with_adapters(nn.Sequential(nn.LayerNorm(8)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"lora\.llm\.quantize=nf4 needs bitsandbytes: pip install -e '\.\[qlora\]'$"):
        with_adapters(nn.Sequential(nn.Linear(8, 8)))


def test_a_7b_models_memory_by_hand():
    """Vicuna-7B's linear layers in bf16, at 2 bytes per weight, compared with 4 bits and their scales."""
    line = ["recipe=llava_1_5_lora", "stage=instruct", "precision=bf16", "stages.instruct.micro_batch_size=1"]
    machine = Machine(gpus=8, gpu_memory_gb=80)
    (dense,), (held,) = (
        plan_run(compose([*line, *more]), machine) for more in ([], ["stages.instruct.lora.llm.quantize=nf4"])
    )
    sizes = 32 * [*4 * [4096 * 4096], *3 * [4096 * 11008]]
    in_bits = sum(size // 2 + size // 64 + 4 * size // (64 * 256) + 4 for size in sizes)
    at_work = 2 * 4096 * 11008
    assert dense.parts == held.parts and dense.flops_per_sample == pytest.approx(held.flops_per_sample)
    for zero_stage in (1, 2):
        saved = dense.memory[zero_stage] - held.memory[zero_stage]
        assert saved == pytest.approx(2 * sum(sizes) - in_bits - at_work, rel=1e-6)
