"""Who sees whom: samples of packed rows have the same outputs as alone with the library's own attention, and prefixes,
branches and bidirectional positions agree with dense masks written from their definitions."""

from __future__ import annotations

import sys
from copy import deepcopy

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

from vlmtrain.model import attention
from vlmtrain.model.attention import attend_in_segments, attention_arguments, follow_rules, segment_attention

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


def build_pair(config) -> tuple[nn.Module, nn.Module]:
    """A language model prepared for packing, and the same one with the library's plain attention."""
    torch.manual_seed(0)
    # Models keep the configuration that they are given, and it says which attention they use.
    reference = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():  # make outputs far from uniform, so that a different input gives a different answer
        for parameter in reference.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    packed = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    packed.load_state_dict(reference.state_dict())
    attend_in_segments(packed)
    assert reference.config._attn_implementation == "eager"
    return packed, reference


@pytest.fixture(params=LLMS)
def pair(request) -> tuple[nn.Module, nn.Module]:
    return build_pair(LLMS[request.param])


def samples() -> list[torch.Tensor]:
    return [torch.randint(1, VOCABULARY, (length,)) for length in LENGTHS]


def packed_logits(model: nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    ids, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]
    boundaries = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    embeddings = model.get_input_embeddings()(ids)
    options = attention_arguments(boundaries)
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


# Positions of one sample: 14 in a message tree with two branches, whose parts alternate, and two images.
BRANCH = (0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 1, 0, 2)
IMAGES = (-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, -1, -1, -1, 2)
PREFIX = {14: 4, 9: 3, 1: 1, 5: 0}
RULES = [("prefix",), ("branch",), ("bidirectional",), ("prefix", "branch", "bidirectional")]
each_rule = pytest.mark.parametrize("names", RULES, ids="+".join)


def dense_mask(samples: list[int], names: tuple[str, ...], window: int | None) -> torch.Tensor:
    """Who sees whom in one row of samples, ``(T, T)`` bool, position by position; negative lengths are padding."""
    places = []
    for number, length in enumerate(samples):
        places += [(number if length > 0 else None, place, max(length, 0)) for place in range(abs(length))]
    allowed = torch.zeros(len(places), len(places), dtype=torch.bool)
    for q, (sample, own, length) in enumerate(places):
        for k, (other, place, _) in enumerate(places):
            if sample is None or other != sample:
                allowed[q, k] = q == k
                continue
            sees = place <= own
            if "prefix" in names and own < PREFIX[length] and place < PREFIX[length]:
                sees = True
            if "bidirectional" in names and IMAGES[own] == IMAGES[place] != -1:
                sees = True
            if "branch" in names and BRANCH[place] not in (0, BRANCH[own]):
                sees = False
            if window is not None:  # it counts what the query can see, so not the positions of other branches
                between = [BRANCH[at] for at in range(place + 1, own + 1)]
                sees = sees and sum("branch" not in names or each in (0, BRANCH[own]) for each in between) < window
            allowed[q, k] = sees
    return allowed


def rules_of(rows: list[list[int]], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The arguments that say the same for rows of samples."""

    def spread(values: tuple[int, ...], padding: int) -> torch.Tensor:
        parts = [[values[:length] if length > 0 else (padding,) * -length for length in row] for row in rows]
        return torch.tensor([sum(row, ()) for row in parts])

    prefix = torch.tensor([PREFIX[length] for row in rows for length in row if length > 0])
    rules = {"prefix": prefix, "branch": spread(BRANCH, 0), "bidirectional": spread(IMAGES, -1)}
    return {name: rules[name] for name in names}


LAYOUTS = {"right": [[14], [9, -5]], "left": [[-5, 9], [14]], "packed": [[9, 14, 1, 5]]}


def is_real(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[length > 0 for length in row for _ in range(abs(length))] for row in rows])


def library_mask(rows: list[list[int]], window: int | None) -> torch.Tensor:
    """The causal mask of rows that are padded on the left, as the library makes it: ``(B, 1, T, T)``."""
    real = is_real(rows)
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    if window is not None:
        causal = causal & ~causal.tril(-window)
    return (causal & real[:, None])[:, None]


def boundaries_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([0, *rows[0]]).cumsum(0).int()


@each_rule
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_rules_agree_with_a_dense_mask(names, layout, window, softcap):
    check_rules(names, layout, window, softcap)


TREES = {
    "branches": (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4),
    "one position each": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
    "nothing shared": (1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_trees_of_a_packed_row_agree_with_a_dense_mask(tree, window, softcap, monkeypatch):
    """Branches one after the other need no mask over the complete sample."""
    monkeypatch.setattr(sys.modules[__name__], "BRANCH", TREES[tree])
    monkeypatch.setattr(attention, "_allowed", None)
    check_rules(("branch",), "packed", window, softcap)


def check_rules(names: tuple[str, ...], layout: str, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    rows = LAYOUTS[layout]
    allowed = torch.stack([dense_mask(row, names, window) for row in rows])
    real = is_real(rows)
    batch, length = real.shape
    shapes = [(batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 8)]
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.7
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(2, 1))

    mask = library_mask(rows, window) if layout == "left" else None
    arguments = attention_arguments(boundaries_of(rows) if layout == "packed" else None, **rules_of(rows, names))
    options = {"scaling": 0.7, "sliding_window": window, "softcap": softcap}
    found, _ = segment_attention(nn.Module(), query, key, value, mask, **options, **arguments)

    assert found.isfinite().all()
    tolerances = {"rtol": 1e-5, "atol": 1e-5} if softcap else {}  # weights under a soft cap are computed in float32
    torch.testing.assert_close(found[real], expected[real], **tolerances)
    weight = torch.randn_like(expected[real])
    gradients = [torch.autograd.grad((out[real] * weight).sum(), (query, key, value)) for out in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, **tolerances)


@pytest.mark.parametrize("boundaries", [None, torch.tensor([0, 4, 9], dtype=torch.int32)])
def test_without_rules_no_mask_is_built(boundaries, monkeypatch):
    monkeypatch.setattr(attention, "_allowed", None)
    query, key, value = torch.randn(3, 1, 2, 9, 8).unbind()
    found, _ = segment_attention(nn.Module(), query, key, value, None, **attention_arguments(boundaries))
    for start, end in [(0, 9)] if boundaries is None else [(0, 4), (4, 9)]:
        parts = (tensor[:, :, start:end] for tensor in (query, key, value))
        alone = nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)
        assert torch.equal(found[:, start:end], alone)


def test_nothing_given_means_no_arguments():
    assert attention_arguments() == {}
    bounds, branch = torch.tensor([0, 4, 9], dtype=torch.int32), torch.zeros(1, 9)
    assert attention_arguments(bounds, branch=branch).keys() == {*attention_arguments(bounds), "branch", "trees"}
    assert attention_arguments(bounds)["max_length_q"] == 5


RULED = ["llama", "mistral, window", "gemma2, soft-cap and window", "gemma3, window"]


@each_rule
@pytest.mark.parametrize("layout", ["right", "packed"])
@pytest.mark.parametrize("name", RULED)
def test_models_give_the_logits_of_an_explicit_mask(name, layout, names):
    config, rows = LLMS[name], LAYOUTS[layout]
    model, reference = build_pair(config)
    positions = torch.tensor([[place for length in row for place in range(abs(length))] for row in rows])
    real = is_real(rows)
    ids = torch.randint(1, VOCABULARY, positions.shape)

    def explicit(window: int | None) -> torch.Tensor:
        allowed = torch.stack([dense_mask(row, names, window) for row in rows])[:, None]
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    if "gemma" in name:
        masks = {"full_attention": explicit(None), "sliding_attention": explicit(config.sliding_window)}
    else:
        masks = explicit(getattr(config, "sliding_window", None))
    options = {"position_ids": positions, "use_cache": False}
    arguments = attention_arguments(boundaries_of(rows) if layout == "packed" else None, **rules_of(rows, names))
    with torch.no_grad():
        found = model(ids, **options, **arguments).logits
        expected = reference(ids, **options, attention_mask=masks).logits
        causal = model(ids, **options, **attention_arguments(arguments.get("cu_seq_lens_q"))).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found[real], causal[real], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["right", "packed"])
@pytest.mark.parametrize("edited", [1, 2])
def test_editing_a_branch_changes_no_logit_of_another(layout, edited):
    model, _ = build_pair(LLMS["llama"])
    rows = LAYOUTS[layout]
    rules = rules_of(rows, ("branch", "bidirectional"))
    arguments = attention_arguments(boundaries_of(rows) if layout == "packed" else None, **rules)
    ids = torch.randint(1, VOCABULARY, rules["branch"].shape)
    with torch.no_grad():
        before = model(ids, use_cache=False, **arguments).logits
        changed = torch.where(rules["branch"] == edited, ids % (VOCABULARY - 1) + 1, ids)
        after = model(changed, use_cache=False, **arguments).logits
    same = (before == after).all(-1)
    assert torch.equal(same, rules["branch"] != edited)


@pytest.mark.parametrize("repeated", [False, True], ids=["prefill", "every step"])
@each_rule
@pytest.mark.parametrize("name", ["llama", "gemma2, soft-cap and window", "gemma3, window"])
def test_greedy_decoding_with_a_cache_gives_the_tokens_without(name, names, repeated):
    torch.manual_seed(1)
    model, _ = build_pair(LLMS[name])
    rows, new = [[-5, 9], [14]], 6
    branch = torch.tensor([[0] * 10 + [1] * 4, [0] * 8 + [1] * 6])  # a prompt never holds two branches
    rules = {**rules_of(rows, names), **({"branch": branch} if "branch" in names else {})}
    mask = torch.tensor([[0] * 5 + [1] * 9, [1] * 14])
    ids, cache, steps = torch.randint(1, VOCABULARY, mask.shape), None, []
    inputs = ids
    with torch.no_grad():
        for step in range(new):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            arguments = attention_arguments(**rules) if step == 0 or repeated else {}
            options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            output = model(inputs, use_cache=True, **options, **arguments)
            steps.append(output.logits[:, -1])
            inputs, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            ids, mask = torch.cat([ids, inputs], 1), torch.cat([mask, torch.ones_like(inputs)], 1)

        for row, start in enumerate((5, 0)):
            whole = ids[row : row + 1, start:-1]
            later = {"branch": 1, "bidirectional": -1}  # generated tokens are causal and continue the branch
            extended = {
                key: rule[row : row + 1]
                if key == "prefix"
                else nn.functional.pad(rule[row : row + 1, start:], (0, new - 1), value=later[key])
                for key, rule in rules.items()
            }
            logits = model(whole, use_cache=False, **attention_arguments(**extended)).logits[0, -new:]
            torch.testing.assert_close(torch.stack(steps)[:, row], logits, rtol=1e-4, atol=2e-5)
            assert torch.equal(logits.argmax(-1), ids[row, -new:])


def test_gradients_are_the_same_with_checkpointing():
    model, _ = build_pair(LLMS["llama"])
    rows = LAYOUTS["right"]
    arguments = attention_arguments(**rules_of(rows, RULES[-1]))
    ids, gradients = torch.randint(1, VOCABULARY, (2, 14)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(ids, use_cache=False, **arguments).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_a_model_is_prepared_for_rules_or_refused():
    model = AutoModelForCausalLM.from_config(deepcopy(LLMS["llama"]))
    follow_rules(model, attention_arguments(torch.tensor([0, 4], dtype=torch.int32)))
    assert model.config._attn_implementation == "sdpa"  # without rules, nothing changes
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2 .*share_images=true: .*takes no mask"):
        follow_rules(model, ["branch"])
    model.config._attn_implementation = "sdpa"
    for _ in range(2):
        follow_rules(model, ["prefix", "branch", "bidirectional"])
        assert model.config._attn_implementation == "vlmtrain_segments"
    mamba = AutoModelForCausalLM.from_config(deepcopy(MIXED["mamba"]))
    with pytest.raises(
        ValueError, match=r"GraniteMoeHybridForCausalLM has layers .*not support fusion\.attention=prefix"
    ):
        follow_rules(mamba, ["prefix"])
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))

    with torch.no_grad():
        cache = model(torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="empty cache"):
            model(torch.ones(1, 2, dtype=torch.long), past_key_values=cache, prefix=torch.tensor([1]))
