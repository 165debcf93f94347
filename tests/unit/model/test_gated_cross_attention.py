"""Gated cross-attention: published layers and models, who sees which image, packing, generation, and saving."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.processing_idefics import image_attention_mask_for_packed_input_ids
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from tests.talks import IMAGE, TALKS, asked, close, greedy, image, rows, talk
from vlmtrain import build_model
from vlmtrain.data import BadSample, Processor
from vlmtrain.data.images import ImageInMemory
from vlmtrain.data.video import FrameSequence
from vlmtrain.interop.fitting import DoesNotFit
from vlmtrain.interop.own import as_own
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.fusion import build_fusion
from vlmtrain.model.gated_layer import STYLES, GatedLayer
from vlmtrain.model.media import Media
from vlmtrain.model.parts import module_state, state_hash
from vlmtrain.visual import Seen

MEDIA_TOKENS = 4
PERCEIVER = {"perceiver_resampler": {"num_queries": MEDIA_TOKENS, "depth": 1, "num_heads": 2, "head_dim": 8}}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def build(opened: float = 1.0, kind: str = "llama", kv: int = 4, **fusion) -> tuple[VLMWrapper, Processor]:
    """A small model whose gates are `opened`, with `kv` heads of keys."""
    torch.manual_seed(0)
    shape = {**SMALL, "num_key_value_heads": kv, "tie_word_embeddings": False}
    config = {"config": {"model_type": kind, **shape}, "new_tokens": [IMAGE]}
    options = {"every": 2, **fusion}
    model, processor = build_model("tiny", PERCEIVER, {"tiny": config}, fusion={"gated_cross_attention": options})
    with torch.no_grad():
        for parameter in model.llm.parameters():  # outputs far from uniform, so that another image gives another answer
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
        for layer in model.fusion.layers:
            layer.gate.fill_(opened)
            layer.feed_forward_gate.fill_(opened)
            layer.v.weight.mul_(10)
    return model, processor


@pytest.fixture(scope="module")
def built() -> tuple[VLMWrapper, Processor]:
    return build()


# what the text sees


def test_seen_images_are_counted_within_each_sample():
    index = torch.tensor([[-1, 0, -1, 1, -1, -1], [2, -1, -1, -1, -1, -1], [-1] * 6])
    seen = Seen.of(index)
    assert seen.images.tolist() == [[0, 1], [2, 2], [0, 0]]
    assert seen.last.tolist() == [[-1, 0, 0, 1, 1, 1], [0] * 6, [-1] * 6]
    assert seen.first.tolist() == [[0] * 6] * 3
    row = torch.tensor([[0, -1, 1, -1, -1, -1, 2, -1]])
    packed = Seen.of(row, torch.tensor([0, 4, 6, 8], dtype=torch.int32))
    assert packed.images.tolist() == [[0, 1, 2]]
    assert packed.last.tolist() == [[0, 0, 1, 1, -1, -1, 2, 2]]
    assert packed.first[0, [0, 3, 6, 7]].tolist() == [0, 0, 2, 2]


def test_the_last_images_of_packed_samples_are_those_of_transformers(built):
    """Its function is given one sample at a time, as it does not know where packed samples end without their marks."""
    _, processor = built
    samples = [processor(each) for each in TALKS]
    packed = processor.pack(samples)
    mark = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    before = 0
    for found, sample in zip(packed.visual.seen.last[0].split(packed.segments.tolist()), samples):
        ids = sample.tokens.input_ids[None]
        assert (ids[0] == mark).sum() == len(sample.tokens.media.placements)
        tokenizer = type("Tokenizer", (), {"convert_tokens_to_ids": lambda self, _: mark, "eos_token_id": -1})()
        expected = image_attention_mask_for_packed_input_ids(ids, tokenizer, "pt")[0][0]
        assert found.tolist() == [before + number if number >= 0 else -1 for number in expected.tolist()]
        before += len(sample.tokens.media.placements)


def test_an_image_takes_one_position_with_the_embedding_of_its_mark(built):
    model, processor = built
    sample = processor(TALKS[0])
    placements = sample.tokens.media.placements
    assert [(each.slots, each.tokens) for each in placements] == [(1, MEDIA_TOKENS)] * 2
    fused = model.embed(processor.collate([sample]).input_ids, processor.collate([sample]).visual)
    mark = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert fused.embeddings[0, sample.tokens.index >= 0].equal(model.llm.get_input_embeddings().weight[[mark, mark]])
    assert fused.media.tokens.shape == (2, MEDIA_TOKENS, model.vision.width)
    assert not (sample.tokens.targets == mark).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt"])
@pytest.mark.parametrize("style", STYLES)
def test_with_gates_of_zero_the_logits_are_those_of_the_language_model(style, kind):
    model, processor = build(0.0, kind, style=style)
    batch = processor.collate([processor(each) for each in TALKS])
    with torch.no_grad():
        expected = model.llm(input_ids=batch.input_ids).logits
        assert model(batch).equal(expected)
        model.fusion.layers[-1].gate.fill_(0.5)
        assert not model(batch).equal(expected)


@pytest.mark.parametrize("attend", ["last", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_changes_its_own_run_of_text_and_what_follows(attend, packed):
    model, processor = build(attend=attend)
    if packed:
        attend_in_segments(model.llm)
    samples = [processor(each) for each in TALKS]
    before = rows(model, processor, samples, packed)
    for number, sample in enumerate(samples):
        for place in range(len(sample.tokens.media.placements)):
            pixels = list(sample.pixels[0])
            pixels[place] = 255 - pixels[place]
            edited = [*samples]
            edited[number] = sample._replace(pixels=(tuple(pixels),))
            changed = [(one != other).any(-1) for one, other in zip(before, rows(model, processor, edited, packed))]
            start = int((sample.tokens.index == place).nonzero()[0])
            assert not any(each.any() for i, each in enumerate(changed) if i != number)
            assert not changed[number][:start].any() and changed[number][start:].all()


def test_only_the_last_image_is_attended_to():
    """Without self-attention between positions, the text after another image does not depend on an earlier one."""
    found = {}
    for attend in ("last", "all"):
        model, processor = build(attend=attend)
        for block in model.llm.model.layers:
            nn.init.zeros_(block.self_attn.o_proj.weight)
        sample = processor(TALKS[0])
        edited = sample._replace(pixels=((255 - sample.pixels[0][0], sample.pixels[0][1]),))
        (one,), (other,) = (rows(model, processor, [each]) for each in (sample, edited))
        found[attend] = (one != other).any(-1)
    first, second = (int((sample.tokens.index == place).nonzero()[0]) for place in (0, 1))
    positions = torch.arange(len(sample.tokens))
    assert found["last"].equal((positions >= first) & (positions < second))
    assert found["all"].equal(positions >= first)


def test_text_without_images_can_have_the_logits_of_the_language_model_alone():
    with torch.no_grad():
        for on_text in (False, True):
            model, processor = build(on_text=on_text)
            batch = processor.collate([processor(TALKS[1])])
            assert model(batch).equal(model.llm(input_ids=batch.input_ids).logits) != on_text


def test_a_position_that_sees_no_image_does_not_see_the_mean_of_all():
    """A softmax over scores that are all masked would be uniform."""
    model, processor = build()
    alone = rows(model, processor, [processor(TALKS[1])])[0]
    for attend in ("last", "all"):
        model.fusion.attend = attend
        together = rows(model, processor, [processor(each) for each in TALKS])
        close(together[1], alone)


def test_padded_packed_and_single_samples_have_the_same_logits_and_gradients(built):
    model, processor = built
    samples = [processor(each) for each in TALKS]
    expected = [rows(model, processor, [sample])[0] for sample in samples]
    for one, other in zip(rows(model, processor, samples), expected):
        close(one, other)
    model, processor = build()
    attend_in_segments(model.llm)
    for one, other in zip(rows(model, processor, samples, packed=True), expected):
        close(one, other)
    gradients = []
    for batches in ([processor.pack(samples)], [processor.collate([sample]) for sample in samples]):
        model.zero_grad()
        for batch in batches:
            model(batch).flatten(0, 1)[batch.trained.positions].logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    "shown, positions, tokens",
    [
        ({"image_fit": "tiles"}, 1, 2),
        ({"image_fit": "tiles", "image_tile_style": "internvl"}, 3, 1),
        ({"image_fit": "native", "image_pixels": [576, 9216]}, 1, 1),
    ],
)
def test_views_take_one_position_for_each_place_in_the_text(shown, positions, tokens):
    shown |= {"image_tiles": [[1, 1], [2, 1]]} if shown["image_fit"] == "tiles" else {}
    config = {"config": {"model_type": "llama", **SMALL}, "new_tokens": [IMAGE]}
    fusion = {"gated_cross_attention": {"every": 2}}
    model, processor = build_model("tiny", "linear", {"tiny": config}, fusion=fusion, max_length=60, **shown)
    tall = BytesIO()
    Image.new("RGB", (48, 96), "red").save(tall, "png")
    sample = processor(replace(talk(1), media=(ImageInMemory(tall.getvalue(), "tall"),)))
    assert int((sample.tokens.index >= 0).sum()) == positions <= processor.geometry.most_tokens
    batch = processor.collate([sample, processor(talk(None))])
    assert model(batch).isfinite().all()
    media = model.embed(batch.input_ids, batch.visual).media
    assert media.tokens.shape[:2] == (positions, sample.tokens.media.placements[0].tokens)
    assert len(sample.tokens.media.items) == positions * (3 if tokens == 2 else 1)


def test_images_of_unequal_numbers_of_tokens_are_told_apart(built):
    """The tokens of an image are padded to those of the longest; each sample alone has no padding."""
    model, processor = built
    sample = processor(TALKS[0])
    batch = processor.collate([sample])
    tokens = torch.randn(7, model.vision.width, generator=torch.Generator().manual_seed(0))

    def logits(counts: list[int]) -> Tensor:
        placements = [replace_tokens(each, n) for each, n in zip(batch.visual.placements, counts)]
        model.connect = lambda *_: type(connected)(tokens[: sum(counts)])
        try:
            return model(batch._replace(visual=batch.visual._replace(placements=tuple(placements))))[0]
        finally:
            del model.connect

    connected = model.connect(model.encode(batch.visual), batch.visual)
    second = int((sample.tokens.index == 1).nonzero()[0])
    with torch.no_grad():
        close(logits([3, 4])[:second], logits([3, 3])[:second])
        assert not logits([3, 4])[second:].allclose(logits([3, 3])[second:])


def replace_tokens(placement, tokens: int):
    return placement._replace(tokens=tokens)


# training


def test_a_batch_without_images_gives_all_weights_a_gradient(built):
    model, processor = built
    model.zero_grad()
    model(processor.collate([processor(TALKS[1])])).sum().backward()
    for name, parameter in [*model.fusion.named_parameters(), *model.connector.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.fusion.layers[0].k.weight.grad.equal(torch.zeros_like(model.fusion.layers[0].k.weight))


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_recomputed_activations_have_the_same_gradients(kind):
    """Two forward passes before the backward passes, so that activations are recomputed with their own images."""
    gradients = []
    for recompute in (False, True):
        model, processor = build(kind=kind)
        if recompute:
            options = {"use_reentrant": False, "context_fn": model.fusion.reading.when_recomputing}
            model.llm.gradient_checkpointing_enable(options)
            model.llm.train()
        batches = [processor.collate([processor(each)]) for each in (TALKS[0], TALKS[2])]
        for loss in [model(batch).logsumexp(-1).sum() for batch in batches]:
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert model.fusion.layers[0].k.weight.grad.abs().max() > 0


# generation


@pytest.mark.parametrize("options", [{}, {"attend": "all"}, {"style": "mllama", "kv": 2, "qk_norm": True}])
def test_generation_with_caches_equals_reading_the_complete_text(options):
    model, processor = build(**options)
    prompts = [processor.prompt(asked(each)) for each in TALKS]
    expected = [greedy(model, processor, prompt, 5) for prompt in prompts]
    assert len(set(map(tuple, expected))) > 1
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(processor.collate(prompts), **options).tolist() == expected
    for prompt, ids in zip(prompts, expected):
        assert model.generate(processor.collate([prompt]), **options).tolist() == [ids]


def test_the_images_are_read_once_per_layer(built, monkeypatch):
    model, processor = built
    calls = []
    read = GatedLayer.read
    monkeypatch.setattr(GatedLayer, "read", lambda self, media: calls.append(self) or read(self, media))
    batch = processor.collate([processor.prompt(asked(TALKS[0]))])
    model.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert calls == list(model.fusion.layers)


def test_beams_see_the_images_of_their_own_prompt(built):
    model, processor = built
    prompts = [processor.prompt(asked(each)) for each in TALKS]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(processor.collate(prompts), **options).tolist()
    assert together == [model.generate(processor.collate([one]), **options).tolist()[0] for one in prompts]
    assert len(set(map(tuple, together))) > 1


# published layers


def open_flamingo_layer(weights: dict[str, Tensor], x: Tensor, media: Tensor, text_time: Tensor) -> Tensor:
    """A layer of Flamingo for media ``(B, n, M, C)`` and the number of the last image, from 1, at each position."""
    normed = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for t in range(x.shape[1]):
            number = int(text_time[row, t])
            if number == 0:
                continue
            seen = media[row, number - 1]
            heads = []
            for h in range(8):
                part = slice(64 * h, 64 * h + 64)
                q = weights["q.weight"][part] @ normed[row, t]
                k, v = (seen @ weights[f"{name}.weight"][part].T for name in ("k", "v"))
                heads.append((k @ q / 8).softmax(0) @ v)
            out[row, t] = weights["out.weight"] @ torch.cat(heads)
    x = x + weights["gate"].tanh() * out
    normed = F.layer_norm(x, x.shape[-1:], weights["feed_forward_norm.weight"], weights["feed_forward_norm.bias"])
    inner = F.gelu(normed @ weights["feed_forward.0.weight"].T)
    return x + weights["feed_forward_gate"].tanh() * (inner @ weights["feed_forward.2.weight"].T)


@torch.no_grad()
def test_a_layer_equals_open_flamingos(built):
    model, processor = built
    batch = processor.collate([processor(each) for each in TALKS])
    media = model.embed(batch.input_ids, batch.visual).media
    layer = model.fusion.layers[0]
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    states = torch.randn(*batch.input_ids.shape, 32)
    found = layer(states, *layer.read(media), media.sees, media.mask)
    weights = dict(layer.named_parameters())
    close(found, open_flamingo_layer(weights, states, media.tokens[media.images], batch.visual.seen.last + 1))


def test_the_number_and_places_of_layers_are_the_published_ones():
    facts = {"width": 4096, "media_width": 1024}
    llm = {"blocks": 32, "heads": 32, "intermediate_size": 11008, "norm_eps": 1e-6}
    with torch.device("meta"):
        fusion = build_fusion("gated_cross_attention", **facts, llm=llm)
        idefics = build_fusion("gated_cross_attention", **facts, llm=llm, style="idefics")
        mllama = build_fusion("gated_cross_attention", **facts, llm={**llm, "kv_heads": 8}, style="mllama")
    # Llama 3.2 Vision: entries 3, 8, …, 38 of 40 are such layers
    assert [number + place for place, number in enumerate(mllama.numbers)] == [*range(3, 40, 5)]
    assert fusion.numbers == [3, 7, 11, 15, 19, 23, 27, 31] and idefics.numbers == [0, 4, 8, 12, 16, 20, 24, 28]
    assert sum(p.numel() for p in fusion.layers[0].parameters()) == 139_476_994
    layer = idefics.layers[0]
    assert layer.q.weight.shape == (4096, 4096) and layer.k.weight.shape == (4096, 1024) and layer.heads == 32


IDEFICS_NAMES = {
    "norm": "input_layernorm",
    "q": "cross_attn.q_proj",
    "k": "cross_attn.k_proj",
    "v": "cross_attn.v_proj",
    "out": "cross_attn.o_proj",
    "gate": "alpha_cross_attn",
    "q_norm": "cross_attn.q_layer_norm",
    "k_norm": "cross_attn.k_layer_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward_gate": "alpha_dense",
}


LLM = {"blocks": 4, "heads": 4, "intermediate_size": 48, "norm_eps": 1e-6}


def take(layer: GatedLayer, source: nn.Module, names: dict[str, str]) -> None:
    """Load the weights of another library's layer; names: of its modules and gates, by ours."""
    state = source.state_dict()
    split = [(name, *name.rpartition(".")[::2]) for name in layer.state_dict()]
    found = {name: state[names.get(name) or f"{names[module]}.{last}"] for name, module, last in split}
    layer.load_state_dict({name: found[name].view_as(each) for name, each in layer.state_dict().items()})


def attended(layer: GatedLayer, media_width: int) -> tuple:
    """States, media, what is added to scores, where an image is seen, and the inputs of the layer beside the states."""
    states, media = torch.randn(2, 5, 32), torch.randn(2, 6, media_width)  # two images of three tokens
    last = torch.tensor([[-1, 0, 0, 1, 1], [-1, -1, -1, -1, 0]])
    seen = (torch.arange(2) == last[..., None]).repeat_interleave(3, -1)
    sees = last[..., None] >= 0
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    read = layer.read(Media(media.unflatten(1, (2, 3)).flatten(0, 1), torch.arange(4).view(2, 2), sees, seen))
    return states, media, bias, sees, (*read, sees, seen | ~sees)


def opened(source: nn.Module) -> nn.Module:
    """With open gates and without weights that are equal."""
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.ndim == 1 or "alpha" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(5)
    return source.eval()


@pytest.mark.parametrize(("qk_norm", "gates"), [(False, "scalar"), (True, "vector")])
@torch.no_grad()
def test_a_layer_equals_idefics(qk_norm, gates):
    torch.manual_seed(0)
    alpha = {"alpha_type": "vector" if gates == "vector" else "float", "qk_layer_norms": qk_norm}
    config = IdeficsConfig(**SMALL, vision_config={"embed_dim": 16}, perceiver_config={}, **alpha)
    config._attn_implementation = "eager"
    source = opened(IdeficsGatedCrossAttentionLayer(config, layer_idx=0))
    options = {"style": "idefics", "qk_norm": qk_norm, "gates": gates}
    fusion = build_fusion("gated_cross_attention", width=32, media_width=16, llm=LLM, **options)
    layer = fusion.layers[0]
    take(layer, source, IDEFICS_NAMES)
    states, media, bias, sees, inputs = attended(layer, 16)
    expected = source(states, None, media, bias, sees[..., 0].float())
    close(layer(states, *inputs), expected)
    assert len(layer.gate) == (32 if gates == "vector" else 1)


@torch.no_grad()
def test_a_layer_equals_mllama():
    """At positions that see an image; others add nothing here, and the mean of all values there."""
    torch.manual_seed(0)
    config = MllamaTextConfig(**SMALL, num_key_value_heads=2, rms_norm_eps=1e-6, pad_token_id=0)
    config._attn_implementation = "eager"
    source = opened(MllamaCrossAttentionDecoderLayer(config, layer_idx=0))
    source.cross_attn_attn_gate.fill_(0.7), source.cross_attn_mlp_gate.fill_(0.9)
    llm = {**LLM, "kv_heads": 2}
    options = {"style": "mllama", "qk_norm": True, "on_text": False}
    fusion = build_fusion("gated_cross_attention", width=32, media_width=32, llm=llm, **options)
    names = {
        **IDEFICS_NAMES,
        **{"gate": "cross_attn_attn_gate", "feed_forward_gate": "cross_attn_mlp_gate"},
        **{"q_norm": "cross_attn.q_norm", "k_norm": "cross_attn.k_norm"},
    }
    take(fusion.layers[0], source, names)
    states, media, bias, expected_sees, inputs = attended(fusion.layers[0], 32)
    text = expected_sees[:, None].float()
    expected = source(states, media, bias * text, None, text)
    found = fusion.layers[0](states, *inputs)
    close(found[expected_sees[..., 0]], expected[expected_sees[..., 0]])
    assert found[~expected_sees[..., 0]].equal(states[~expected_sees[..., 0]])


# model folders


def test_saved_and_loaded_is_bit_equal(tmp_path, built):
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, prepared = VLMWrapper.from_pretrained(tmp_path), Processor.from_pretrained(tmp_path)
    parts = json.loads((tmp_path / "vlmtrain.json").read_text())["parts"]
    assert parts["fusion"]["sha256"] == state_hash(module_state(model.fusion))
    batches = [each.collate([each(talk) for talk in TALKS]) for each in (processor, prepared)]
    with torch.no_grad():
        assert again(batches[1]).equal(model(batches[0]))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert alone.state_dict().keys() == model.llm.state_dict().keys()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"style": "flamingo"}, "fusion.style=flamingo: expected one of openflamingo, idefics"),
        ({"gates": "matrix"}, "fusion.gates=matrix: expected one of scalar, vector"),
        ({"qk_norm": "rms"}, "fusion.qk_norm=rms: expected one of True, False"),
        (
            {"style": "mllama", "heads": 3, "every": 1},
            "fusion.heads=3: expected a multiple of the language model's 2 key/value heads",
        ),
        ({"attend": "first"}, "fusion.attend=first: expected one of last, all"),
        ({"every": 0}, "fusion.every=0: expected a whole number of at least 1"),
        ({"every": 4}, "fusion.every=4: the language model has only 3 blocks"),
        ({"evry": 4}, "Unknown option fusion.evry"),
    ],
)
def test_options_out_of_bounds_are_refused(options, said):
    llm = {**LLM, "blocks": 3, "kv_heads": 2}
    with pytest.raises(ValueError, match=said):
        build_fusion("gated_cross_attention", width=32, media_width=16, llm=llm, **options)


def test_the_image_token_is_added():
    model, processor = build_model("tiny", PERCEIVER, "tiny", fusion={"gated_cross_attention": {"every": 2}})
    assert model.llm.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert processor.renderer.slot == processor.tokenizer.get_vocab()[IMAGE] != processor.renderer.filler


def test_exports_and_videos_are_refused(built):
    with pytest.raises(DoesNotFit, match="fusion=gated_cross_attention: exports need visual tokens that are in the"):
        as_own(*built)
    video = FrameSequence((image(0), image(1)), 1.0)
    with pytest.raises(BadSample, match="the fusion of the model supports images, not videos"):
        built[1](replace(talk(1), media=(video,)))
