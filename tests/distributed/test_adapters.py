"""Low-rank adapters: equal to training with peft, merged at the end of the stage, and saved in peft's format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlmtrain.model.parts import load_part, module_state

from ..conftest import data_overrides, metrics, run, train
from ..stages import make_stage

STEPS = 6
EPS = 1e-3  # with a smaller value, AdamW divides rounding errors by each other where gradients nearly vanish
LORA = "{rank: 4, alpha: 12, dropout: 0.0, targets: all}"


def line(files, run_dir, *more: str) -> list[str]:
    return [
        "recipe=llava_1_5_lora",
        "mini=true",
        *data_overrides(files),
        "data.validation=null",
        f"run_dir={run_dir}",
        "workers=0",
        "stages.align.max_steps=2",
        "stages.align.batch_size=8",
        f"stages.instruct.lora={{llm: {LORA}}}",
        f"stages.instruct.max_steps={STEPS}",
        "stages.instruct.batch_size=8",
        "stages.instruct.max_grad_norm=null",
        f"stages.instruct.optimizer.eps={EPS}",
        "stages.instruct.schedule.name=constant",
        "stages.instruct.schedule.warmup_ratio=0",
        *more,
    ]


def peft_alone(overrides: list[str], start: Path) -> tuple[list[float], dict]:
    """The losses and the merged language model's weights of the same stage, trained with peft and plain torch."""
    from peft import LoraConfig, get_peft_model

    from vlmtrain.data.loader import StepStream, step_loader
    from vlmtrain.data.sources import build_source
    from vlmtrain.model import VLMWrapper
    from vlmtrain.objectives import LanguageModelling
    from vlmtrain.settings import compose
    from vlmtrain.training.assembly import build_parts, build_tokenizer
    from vlmtrain.training.batching import build_batching
    from vlmtrain.training.processing import build_processor, image_size_of

    settings = compose([*overrides, "stages.instruct.lora=null"])
    stage, tokenizer, objective = settings.stages["instruct"], build_tokenizer(settings), LanguageModelling()
    parts = build_parts(settings, stage, start, tokenizer)
    processor = build_processor(settings, stage, parts, objective, tokenizer)
    source = build_source(settings.data.split("instruct"), image_size_of(parts), settings.seed)
    batching = build_batching(source, processor, stage, 1, 0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(parts["llm"], config)
    rate = 2e-3
    with torch.no_grad():  # the run initializes A with different random numbers; start from the same values
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                torch.manual_seed(sum(map(ord, name.removeprefix("base_model.model."))))
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model = VLMWrapper(parts["vision"].requires_grad_(False), parts["connector"], parts["llm"]).eval()
    trained = [p for p in model.llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": rate}, {"params": model.connector.parameters(), "lr": 1e-3}],
        eps=EPS,
        weight_decay=0.0,
    )
    losses = []
    stream = StepStream(batching, source, processor, 0, 1, 0, STEPS, None)
    for data in step_loader(stream, 0, pin_memory=False):
        (batch,) = data.micro_batches
        loss = objective(model, batch, None) / data.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module_state(wrapped.merge_and_unload())


@pytest.fixture(scope="module")
def aligned(llava_files, tmp_path_factory) -> Path:
    """A run whose first stage is finished."""
    folder = tmp_path_factory.mktemp("aligned")
    train(*line(llava_files, folder, "stage=align"))
    return folder


@pytest.fixture(scope="module")
def adapters(aligned, tmp_path_factory) -> Path:
    """Adapters created by peft, with the same A as in `peft_alone` and with B zero."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(load_part("llm", aligned / "align" / "model"), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                torch.manual_seed(sum(map(ord, name.removeprefix("base_model.model."))))
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine, ranks", [("zero0", 1), ("zero3", 2)])
def test_a_stage_equals_pefts_own(engine, ranks, aligned, adapters, llava_files, tmp_path):
    from peft import PeftModel

    base = aligned / "align" / "model"
    begun = f"stages.instruct.lora.llm={{rank: 4, alpha: 12, dropout: 0, init_from: {adapters}}}"
    overrides = [o for o in line(llava_files, tmp_path) if not o.startswith("stages.instruct.lora=")]
    losses, weights = peft_alone(overrides, base)
    more = ["engine.parameter_persistence_threshold=0"] if engine == "zero3" else []
    train(*overrides, begun, f"init_from={base}", "stage=instruct", f"engine={engine}", *more, ranks=ranks)
    assert [r["loss"] for r in metrics(tmp_path, "instruct")] == pytest.approx(losses, rel=1e-5)
    model = tmp_path / "instruct" / "model"
    found = module_state(load_part("llm", model))
    assert found.keys() == weights.keys()
    begin = module_state(load_part("llm", base))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6, msg=name)
        if name.endswith("proj.weight"):
            assert (tensor - begin[name]).abs().max() > 1e-2, name
    # the adapters, loaded with peft on the base model that they were trained on, give the merged model
    again = PeftModel.from_pretrained(load_part("llm", base), model / "adapters" / "llm").merge_and_unload()
    for name, tensor in module_state(again).items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-7, msg=name)
    card = (model / "README.md").read_text()  # the size of the merged model, and the adapters
    assert f"| {sum(parameter.numel() for parameter in load_part('llm', base).parameters()):,} |" in card
    assert "Adapters of llm: rank 4, alpha 12, on " in card and "also stored separately in `adapters/llm`" in card
    parts = json.loads((tmp_path / "instruct" / "summary.json").read_text())["parts"]
    assert parts["llm"]["trainable_parameters"] == sum(
        t.numel() for t in load_file(adapters / "adapter_model.safetensors").values()
    )


def test_merging_is_exact_for_transposed_weights_and_leaves_the_rest(tokenizer):
    """GPT-2 stores its weights as (in, out)."""
    from vlmtrain.model.llm import build_random_llm
    from vlmtrain.training.adapters import add_adapters, merged

    torch.manual_seed(0)
    llm = build_random_llm({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}, tokenizer).eval()
    plain = module_state(llm)
    stage = make_stage(train={"llm": 1e-3}, lora={"llm": {"rank": 2, "alpha": 6, "targets": ["c_attn", "mlp.c_proj"]}})
    add_adapters(stage, {"llm": llm})
    assert all(torch.equal(tensor, plain[name]) for name, tensor in merged(llm, module_state(llm)).items())
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(12)[None]
    expected = llm(ids).logits
    whole = merged(llm, module_state(llm))
    assert whole.keys() == plain.keys()
    changed = {name for name in whole if not torch.equal(whole[name], plain[name])}
    layers = ("attn.c_attn", "mlp.c_proj")
    assert changed == {f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers}
    other = build_random_llm({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}, tokenizer).eval()
    other.load_state_dict(whole, strict=False)
    torch.testing.assert_close(other(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_norms_and_new_tokens_train_together_with_adapters(llava_files, tmp_path):
    groups = "stages.instruct.groups=[{match: llm.new_tokens, lr: 1e-2}, {match: 'llm.*norm*', lr: 1e-3}]"
    train(*line(llava_files, tmp_path, groups, "llm.new_tokens=[boxed]"))
    before, after = (module_state(load_part("llm", tmp_path / s / "model")) for s in ("align", "instruct"))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    norms = {name for name in after if "norm" in name}
    linear = {name for name in after if name.endswith("_proj.weight")}
    assert changed == norms | linear | {"model.embed_tokens.weight"}
    assert torch.equal(after["model.embed_tokens.weight"][:-1], before["model.embed_tokens.weight"][:-1])


def plain_llm(tokenizer) -> nn.Module:
    from vlmtrain.model.llm import build_random_llm

    torch.manual_seed(0)
    return build_random_llm({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, tokenizer).eval()


def small_llm(tokenizer, options: dict) -> nn.Module:
    from vlmtrain.training.adapters import add_adapters

    llm = plain_llm(tokenizer)
    for weights in options.pop("weights", ()):
        llm.load_state_dict(weights, strict=False)
    dtype = options.pop("dtype", torch.float32)
    stage = make_stage(train={"llm": 1e-3}, lora={"llm": {"rank": 2, "alpha": 6, "targets": ["c_attn"], **options}})
    add_adapters(stage, {"llm": llm.to(dtype)})
    return llm


def test_adapters_start_only_from_the_weights_they_were_trained_on(tokenizer, tmp_path):
    from peft import PeftModel

    from vlmtrain.training.adapters import merged, save_adapters

    llm = small_llm(tokenizer, {})
    torch.nn.init.normal_(llm.get_parameter("transformer.h.0.attn.c_attn.lora_B.default.weight"))
    state = module_state(llm)
    save_adapters(llm, state, tmp_path / "made", None)
    whole, begun = merged(llm, state), {"init_from": str(tmp_path / "made")}
    ids = torch.arange(12)[None]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-2)):
        again = small_llm(tokenizer, {**begun, "dtype": dtype})(ids).logits.float()
        torch.testing.assert_close(again, llm(ids).logits, rtol=tolerance, atol=tolerance)
    with pytest.raises(
        ValueError, match=r"stages\.s\.lora\.llm\.init_from=.*made .* set init_from to the model"
    ) as error:
        small_llm(tokenizer, {**begun, "weights": [whole]})
    assert "\n" not in str(error.value)
    peft_alone = PeftModel.from_pretrained(plain_llm(tokenizer), tmp_path / "made").eval()
    torch.testing.assert_close(peft_alone(ids).logits, llm(ids).logits, rtol=1e-5, atol=1e-6)
    # adapters saved by peft have no hash of their base weights, and are accepted
    peft_alone.save_pretrained(tmp_path / "theirs")
    small_llm(tokenizer, {"init_from": str(tmp_path / "theirs"), "weights": [whole]})
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    for option, value in (
        *(("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"c_attn": 1}), ("bias", "all")),
        *(("init_lora_weights", "pissa"), ("peft_type", "VERA"), ("modules_to_save", ["lm_head"])),
    ):
        (tmp_path / "made" / "adapter_config.json").write_text(json.dumps({**config, option: value}))
        with pytest.raises(ValueError, match=rf"adapter_config\.json has {option}=.*expected plain LoRA"):
            small_llm(tokenizer, dict(begun))


@pytest.mark.parametrize(
    "lora, said",
    [
        ("{llm: {targets: [qproj]}}", "lora.llm.targets: qproj matches no linear layer; there are down_proj"),
        ("{llm: {rang: 8}}", "Did you mean 'stages.instruct.lora.llm.rank'?"),
        ("{llm: {rank: 0}}", "lora.llm.rank=0: expected an integer from 1 to 10^12"),
        ("{llm: {dropout: 1}}", "lora.llm.dropout=1: expected a number of at least 0 and below 1"),
        ("{vision: {rank: 8}}", "vision is frozen: set stages.instruct.train.vision"),
        ("{lmm: {rank: 8}}", "the stage has only vision, connector, llm"),
        ("{llm: 8}", "stages.instruct.lora.llm=8: expected a mapping"),
        ("{llm: {targets: 5}}", "lora.llm.targets=5: expected all, or a list of at least one name"),
        ("{llm: {init_from: nowhere}}", "init_from=nowhere holds no adapters"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(lora, said, llava_files, tmp_path):
    few = [o for o in line(llava_files, tmp_path) if "lora" not in o]
    wrong = ["recipe=llava_1_5", *few, f"stages.instruct.lora={lora}"]
    done = run(sys.executable, "-m", "vlmtrain.train", *wrong, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert not list(tmp_path.glob("*/metrics.jsonl"))
