"""Published names, with and without their prefix; missing, unexpected and wrongly shaped tensors are reported."""

import pytest
import torch
from connector_samples import C, D, small

Q = {"num_queries": 5, "hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48}


def linear(name: str, out_dim: int, in_dim: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_dim, in_dim), **({f"{name}.bias": (out_dim,)} if bias else {})}


def norm(name: str, dim: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), **({f"{name}.bias": (dim,)} if bias else {})}


def multihead(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    packed = {f"{name}.in_proj_weight": (3 * dim, dim), f"{name}.in_proj_bias": (3 * dim,)}
    return packed | linear(f"{name}.out_proj", dim, dim)


def bert(encoder: str, attention: str, text: bool) -> dict[str, tuple[int, ...]]:
    """Two layers, cross-attention in the first; `attention` is LAVIS's "self" or Hugging Face's "attention"."""
    names = {}
    for i in range(2):
        layer = f"{encoder}.layer.{i}"
        for block, width in (("attention", 32), ("crossattention", C))[: 2 - i]:
            for part, in_dim in (("query", 32), ("key", width), ("value", width)):
                names |= linear(f"{layer}.{block}.{attention}.{part}", 32, in_dim)
            names |= linear(f"{layer}.{block}.output.dense", 32, 32) | norm(f"{layer}.{block}.output.LayerNorm", 32)
        for kind in ("_query", "")[: 1 + text]:
            names |= linear(f"{layer}.intermediate{kind}.dense", 48, 32)
            names |= linear(f"{layer}.output{kind}.dense", 32, 48) | norm(f"{layer}.output{kind}.LayerNorm", 32)
    return names


def embeddings(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.word_embeddings.weight": (50, 32), f"{name}.position_embeddings.weight": (512, 32)}


def lavis(projection: str, text: bool) -> dict[str, tuple[int, ...]]:
    names = {"query_tokens": (1, 5, 32)} | bert("Qformer.bert.encoder", "self", text) | linear(projection, D, 32)
    names |= norm("Qformer.bert.embeddings.LayerNorm", 32) | norm("ln_vision", C)
    return names | (embeddings("Qformer.bert.embeddings") if text else {})


def flamingo() -> dict[str, tuple[int, ...]]:
    names = {"latents": (5, C)} | norm("norm", C)
    for i in range(2):
        attention, feed = f"layers.{i}.0", f"layers.{i}.1"
        names |= norm(f"{attention}.norm_media", C) | norm(f"{attention}.norm_latents", C) | norm(f"{feed}.0", C)
        names |= linear(f"{attention}.to_q", 16, C, False) | linear(f"{attention}.to_kv", 32, C, False)
        names |= linear(f"{attention}.to_out", C, 16, False)
        names |= linear(f"{feed}.1", 4 * C, C, False) | linear(f"{feed}.3", C, 4 * C, False)
    return names


def regnet(name: str, in_dim: int, dim: int) -> dict[str, tuple[int, ...]]:
    names = {f"{name}.conv1.conv.weight": (dim, in_dim, 1, 1), f"{name}.conv2.conv.weight": (dim, 1, 3, 3)}
    names |= {f"{name}.conv3.conv.weight": (dim, dim, 1, 1)}
    for i in (1, 2, 3):
        names |= norm(f"{name}.conv{i}.bn", dim)
    squeezed = in_dim // 4
    names |= {f"{name}.se.fc1.weight": (squeezed, dim, 1, 1), f"{name}.se.fc1.bias": (squeezed,)}
    names |= {f"{name}.se.fc2.weight": (dim, squeezed, 1, 1), f"{name}.se.fc2.bias": (dim,)}
    if in_dim != dim:
        names |= {f"{name}.downsample.conv.weight": (dim, in_dim, 1, 1)} | norm(f"{name}.downsample.bn", dim)
    return names


def deformable() -> dict[str, tuple[int, ...]]:
    names = {"v_pos_emb": (1, 36, 32), "reference_points": (1, 9, 2), "query_position_embeddings.weight": (9, 32)}
    names |= linear("input_proj.0", 32, C) | linear("output_proj", D, 32)
    for part in "qkv":
        names |= linear(f"layers.0.self_attn.{part}_proj", 32, 32)
    names |= linear("layers.0.self_attn.out_proj", 32, 32)
    names |= linear("layers.0.encoder_attn.sampling_offsets", 4 * 4 * 2, 32)
    names |= linear("layers.0.encoder_attn.attention_weights", 4 * 4, 32)
    for part in ("value_proj", "output_proj"):
        names |= linear(f"layers.0.encoder_attn.{part}", 32, 32)
    for part in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
        names |= norm(f"layers.0.{part}", 32)
    return names | linear("layers.0.fc1", 40, 32) | linear("layers.0.fc2", 32, 40)


def mobile_block(name: str) -> dict[str, tuple[int, ...]]:
    names = {f"{name}.0.0.weight": (D, 1, 3, 3), f"{name}.2.0.weight": (D, D, 1, 1)}
    names |= norm(f"{name}.0.1", D) | norm(f"{name}.2.1", D)
    for part, shape in (("fc1", (8, D, 1, 1)), ("fc2", (D, 8, 1, 1))):
        names |= {f"{name}.1.{part}.weight": shape, f"{name}.1.{part}.bias": shape[:1]}
    return names


def hunyuan(first: str, second: str) -> dict[str, tuple[int, ...]]:
    names = {f"{first}.weight": (2 * C, C, 2, 2), f"{first}.bias": (2 * C,), f"{second}.bias": (4 * C,)}
    names |= {f"{second}.weight": (4 * C, 2 * C, 1, 1), "image_newline": (4 * C,)} | linear("mlp", D, 4 * C)
    names |= {f"image_{part}": (D,) for part in ("begin", "end", "sep")}
    return names | norm("before_rms", C, False) | norm("after_rms", D, False)


def molmo(attention: list[str], projector: list[str]) -> dict[str, tuple[int, ...]]:
    names = {}
    for part in attention[:3]:
        names |= linear(f"image_pooling_2d.{part}", C, 2 * C)
    names |= linear(f"image_pooling_2d.{attention[3]}", C, C)
    gate, up, down = (f"image_projector.{part}" for part in projector)
    return names | linear(gate, 32, C, False) | linear(up, 32, C, False) | linear(down, D, 32, False)


def qwen3_merger(name: str, norm_dim: int) -> dict[str, tuple[int, ...]]:
    return (
        norm(f"{name}.norm", norm_dim)
        | linear(f"{name}.linear_fc1", 4 * C, 4 * C)
        | linear(f"{name}.linear_fc2", D, 4 * C)
    )


def cambrian() -> dict[str, tuple[int, ...]]:
    """Two layers of width 32, which read windows of four patches from two encoders."""
    names = {"vision_query": (1, 32)} | linear("mm_projector.0", D, 32) | linear("mm_projector.2", D, D)
    for i, width in enumerate((C, 12)):
        aux = f"mm_projector_aux_{i}"
        names |= linear(f"{aux}.0", 32, width) | linear(f"{aux}.2", 32, 32) | norm(f"{aux}.3", 32)
    for i in range(2):
        layer = f"vision_sampler_0.layers.{i}"
        names |= linear(f"{layer}.proj_context", 32, 32, False) | linear(f"{layer}.proj_in", 32, 64, False)
        names |= linear(f"{layer}.proj_out.linear_1", 32, 32, False) | norm(f"{layer}.norm", 32)
        names |= linear(f"{layer}.proj_out.linear_2", 32, 32, False)
        names |= linear(f"{layer}.cross_attn.o_proj", 32, 32, False)
        names |= {f"{layer}.pos_embed_{encoder}": (4, 32) for encoder in range(2)}
        for part in ("q_proj", "k_proj_0", "k_proj_1", "v_proj_0", "v_proj_1"):
            part = f"{layer}.cross_attn.{part}"
            names |= norm(f"{part}.0", 32) | linear(f"{part}.1", 32, 32, False)
    return names


MLP2 = {"depth": 2}
QWEN_VL = {"query": (16, D), "pos_embed": (16, D), "kv_proj.weight": (D, C)} | multihead("attn", D)
QWEN_VL |= norm("ln_q", D) | norm("ln_kv", D)
PACKER = linear("q_proj_1", 32, C, False) | multihead("clip_attn", 32)
for key in "kv":
    PACKER |= linear(f"{key}_proj_1.0", 32, 4 * C) | linear(f"{key}_proj_1.2", 32, 32)
for key in "qkv":
    PACKER |= norm(f"ln_{key}_1", 32)
C_ABS = {"pos_emb": (1, 36, C)} | regnet("net.0.b1", C, 20) | regnet("net.0.b2", 20, 20) | regnet("net.2.b1", 20, 20)
C_ABS |= regnet("net.2.b2", 20, 20) | linear("readout.0", D, 20) | linear("readout.2", D, D)

# (connector, options, published prefix, names and shapes after the prefix)
PUBLISHED = {
    "LLaVA 1.0": ("linear", {}, "model.mm_projector.", {"weight": (D, C), "bias": (D,)}),
    "LLaVA 1.5": ("mlp", MLP2, "model.mm_projector.", linear("0", D, C) | linear("2", D, D)),
    "LLaVA HF": ("mlp", MLP2, "model.multi_modal_projector.", linear("linear_1", D, C) | linear("linear_2", D, D)),
    "LLaVA three layers": (
        "mlp",
        {"depth": 3},
        "model.mm_projector.",
        linear("0", D, C) | linear("2", D, D) | linear("4", D, D),
    ),
    "KempnerForge": ("mlp", MLP2, "", linear("proj1", D, C) | linear("proj2", D, D)),
    "Molmo2": (
        "attentional_pool",
        {"num_heads": 4, "intermediate_size": 32},
        "model.vision_backbone.",
        molmo(["wq", "wk", "wv", "wo"], ["w1", "w3", "w2"]),
    ),
    "Molmo2 HF": (
        "attentional_pool",
        {"num_heads": 4, "intermediate_size": 32},
        "model.multi_modal_projector.",
        molmo(["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]),
    ),
    "Qwen-VL": (
        "qwen_vl_resampler",
        {"grid": 4, "num_heads": 2},
        "transformer.visual.",
        {f"attn_pool.{name}": shape for name, shape in QWEN_VL.items()} | norm("ln_post", D) | {"proj": (D, D)},
    ),
    "Qwen2-VL": (
        "qwen2_vl_merger",
        {},
        "model.visual.merger.",
        norm("ln_q", C) | linear("mlp.0", 4 * C, 4 * C) | linear("mlp.2", D, 4 * C),
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl_merger",
        {},
        "visual.merger.",
        norm("ln_q", C, False) | linear("mlp.0", 4 * C, 4 * C) | linear("mlp.2", D, 4 * C),
    ),
    "Qwen3-VL": (
        "qwen3_vl_merger",
        {"levels": 2},
        "model.visual.",
        qwen3_merger("merger", C)
        | qwen3_merger("deepstack_merger_list.0", 4 * C)
        | qwen3_merger("deepstack_merger_list.1", 4 * C),
    ),
    "HunyuanOCR": ("hunyuan_merger", {}, "vit.perceive.", hunyuan("proj.0", "proj.2")),
    "HunyuanOCR HF": (
        "hunyuan_merger",
        {},
        "model.vision_tower.patch_merger.",
        hunyuan("proj_conv", "proj_out"),
    ),
    "BLIP-2 HF": (
        "qformer",
        Q,
        "model.",
        {"query_tokens": (1, 5, 32)}
        | bert("qformer.encoder", "attention", False)
        | norm("qformer.layernorm", 32)
        | linear("language_projection", D, 32),
    ),
    "BLIP-2 HF with text": (
        "qformer",
        {**Q, "text_vocab": 50},
        "",
        {"query_tokens": (1, 5, 32)}
        | bert("qformer.encoder", "attention", True)
        | norm("qformer.layernorm", 32)
        | embeddings("embeddings")
        | linear("language_projection", D, 32),
    ),
    "InstructBLIP HF": (
        "qformer",
        {**Q, "text_vocab": 50},
        "",
        {"query_tokens": (1, 5, 32)}
        | bert("qformer.encoder", "attention", True)
        | norm("qformer.embeddings.layernorm", 32)
        | embeddings("qformer.embeddings")
        | linear("language_projection", D, 32),
    ),
    "LAVIS OPT": ("qformer", {**Q, "vision_norm": True}, "", lavis("opt_proj", False)),
    "LAVIS T5": ("qformer", {**Q, "vision_norm": True}, "", lavis("t5_proj", False)),
    "LAVIS InstructBLIP": (
        "qformer",
        {**Q, "vision_norm": True, "text_vocab": 50},
        "",
        lavis("llm_proj", True),
    ),
    "Honeybee C": ("c_abstractor", {"grid": 3, "hidden_size": 20, "depth": 2}, "abstractor.", C_ABS),
    "Honeybee D": (
        "d_abstractor",
        {"grid": 3, "hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 40},
        "abstractor.",
        deformable(),
    ),
    "MobileVLM": (
        "ldp",
        {},
        "model.mm_projector.model.",
        linear("mlp.1", D, C)
        | linear("mlp.3", D, D)
        | mobile_block("mb_block.1.block")
        | mobile_block("mb_block.2.block"),
    ),
    "MobileVLM V2": (
        "ldpv2",
        {"grid": 3},
        "model.mm_projector.",
        linear("mlp.mlp.0", D, C)
        | linear("mlp.mlp.2", D, D)
        | {"peg.peg.0.weight": (D, 1, 3, 3), "peg.peg.0.bias": (D,)},
    ),
    "Idefics3": ("pixel_shuffle", {}, "model.connector.modality_projection.", {"proj.weight": (D, 4 * C)}),
    "nanoVLM": ("pixel_shuffle", {}, "MP.", {"proj.weight": (D, 4 * C)}),
    "InternVL HF": (
        "pixel_shuffle",
        {"head": "internvl"},
        "model.multi_modal_projector.",
        norm("layer_norm", 4 * C) | linear("linear_1", D, 4 * C) | linear("linear_2", D, D),
    ),
    "InternVL": (
        "pixel_shuffle",
        {"head": "internvl"},
        "",
        norm("mlp1.0", 4 * C) | linear("mlp1.1", D, 4 * C) | linear("mlp1.3", D, D),
    ),
    "TokenPacker": (
        "token_packer",
        {"hidden_size": 32, "num_heads": 4},
        "model.mm_projector.",
        PACKER | linear("mlp.0", D, 32) | linear("mlp.2", D, D),
    ),
    "Cambrian-1": (
        "spatial_aggregator",
        {"grid": 3, "hidden_size": 32, "depth": 2, "num_heads": 4},
        "model.",
        cambrian(),
    ),
    "Flamingo": (
        "perceiver_resampler",
        {"num_queries": 5, "depth": 2, "num_heads": 2, "head_dim": 8},
        "perceiver.",
        flamingo(),
    ),
}
CASES = pytest.mark.parametrize("publication", PUBLISHED)


def sample(publication: str, keep: int = 0):
    """A connector and random published weights, without the leading `keep` components of the prefix."""
    name, options, prefix, shapes = PUBLISHED[publication]
    torch.manual_seed(0)
    prefix = ".".join(prefix.split(".")[keep:])
    return small(name, **options), {prefix + key: torch.randn(shape) for key, shape in shapes.items()}


def values(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).sort().values


@CASES
def test_loads_with_any_part_of_the_prefix(publication):
    prefix = PUBLISHED[publication][2]
    for keep in range(prefix.count(".") + 1):
        connector, state = sample(publication, keep)
        connector.load_published(state)
        own = connector.state_dict()
        if publication == "Flamingo":
            own = {name: tensor for name, tensor in own.items() if not name.startswith("proj.")}
        assert torch.equal(values(own.values()), values(state.values()))


@CASES
def test_missing_unexpected_and_misshapen_are_named(publication):
    connector, state = sample(publication)
    before = {name: tensor.clone() for name, tensor in connector.state_dict().items()}
    for name in state:
        with pytest.raises(ValueError) as raised:
            connector.load_published({key: tensor for key, tensor in state.items() if key != name})
        # For an empty state dict the naming convention cannot be determined.
        assert f"missing: {name}" in str(raised.value) or len(state) == 1
        with pytest.raises(ValueError) as raised:
            connector.load_published(state | {name: torch.zeros(*state[name].shape, 1)})
        assert f"shape of {name}: expected {tuple(state[name].shape)}" in str(raised.value)
    with pytest.raises(ValueError, match=r"unexpected: lm_head.weight"):
        connector.load_published(state | {"lm_head.weight": torch.zeros(3)})
    for name, tensor in connector.state_dict().items():
        assert torch.equal(tensor, before[name]), "a refused load must change nothing"


def test_packed_projections_are_split_in_order():
    connector, state = sample("TokenPacker")
    connector.load_published(state)
    packed = state["model.mm_projector.clip_attn.in_proj_weight"]
    for part, rows in zip((connector.attn.q, connector.attn.k, connector.attn.v), packed.chunk(3), strict=True):
        assert torch.equal(part.weight, rows)


def test_position_ids_are_not_weights():
    connector, state = sample("LAVIS InstructBLIP")
    connector.load_published(state | {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]})


@pytest.mark.parametrize("publication", ["Honeybee C", "Honeybee D"])
def test_old_honeybee_checkpoints_have_a_position_for_the_cls_token(publication):
    connector, state = sample(publication)
    name = next(name for name in state if name.endswith("pos_emb"))
    patches = state[name]
    connector.load_published(state | {name: torch.cat([torch.full_like(patches[:, :1], 9.0), patches], dim=1)})
    assert torch.equal(connector.state_dict()[name.removeprefix("abstractor.")], patches)


def test_what_flamingo_does_not_publish_is_reported(caplog):
    connector, state = sample("Flamingo")
    before = connector.proj.weight.clone()
    connector.load_published(state)
    assert torch.equal(connector.proj.weight, before)
    assert "proj.weight" in caplog.text
