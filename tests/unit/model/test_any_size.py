"""Encoders and complete models on images of their own sizes: equal to one image at a time."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vlmtrain.batch import Batch
from vlmtrain.data.geometry import Geometry
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.deep_levels import receive_levels
from vlmtrain.model.fusion import Concatenation
from vlmtrain.model.parts import make_connector, save_part
from vlmtrain.model.vision import HFVision, OpenClipVision, VisionEncoder, build_vision
from vlmtrain.visual import Visual, joined

PATCH, WIDTH = 8, 24
SIZES = [(40, 56), (64, 64), (24, 96), (40, 56)]  # 5x7, 8x8, 3x12 and 5x7 patches
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
HF = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**LAYERS, image_size=48, patch_size=PATCH)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**LAYERS, image_size=48, patch_size=PATCH)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**LAYERS, image_size=48, patch_size=PATCH)),
    "vit": lambda: ViTModel(ViTConfig(**LAYERS, image_size=48, patch_size=PATCH), add_pooling_layer=False),
}
TOWERS = {
    "open_clip": {"image_size": 48, "layers": 3, "width": WIDTH, "head_width": 12, "patch_size": PATCH},
    "timm": {"image_size": 48, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}


def encoder(kind: str, layer: int = -1, levels: tuple[int, ...] = (1, 2)) -> VisionEncoder:
    torch.manual_seed(0)
    if kind in HF:
        look = {"image_size": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        built: VisionEncoder = HFVision(HF[kind](), look, layer, levels)
    else:
        text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
        config = {"embed_dim": 12, "vision_cfg": TOWERS[kind], "text_cfg": text}
        built = build_vision("open_clip", model_config=config, image_size=48, layer=layer, levels=levels)
    built.check_any_size()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.double().eval()


def images(patch: int = PATCH, sizes=SIZES) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(3, h // PATCH * patch, w // PATCH * patch).double() for h, w in sizes)


@pytest.fixture(scope="module", params=[*HF, *TOWERS])
def tower(request) -> VisionEncoder:
    return encoder(request.param)


def test_packed_features_are_those_of_each_image(tower):
    shown = images(tower.patch_size[0])
    found = tower.encode(shown)
    assert found.grids == ((5, 7), (8, 8), (3, 12), (5, 7)) and len(found.patches) == 35 + 64 + 36 + 35
    at = 0
    for number, image in enumerate(shown):
        alone = tower(image[None])
        size = alone.patches[0].flatten(0, 1).shape[0]
        for one, all_of_them in zip((alone.patches, *alone.levels), (found.patches, *found.levels), strict=True):
            torch.testing.assert_close(all_of_them[at : at + size], one[0].flatten(0, 1), rtol=0, atol=1e-9)
        if alone.prefix is not None:
            torch.testing.assert_close(found.prefix[number], alone.prefix[0], rtol=0, atol=1e-9)
        at += size


def test_further_calls_change_neither_features_nor_gradients(tower):
    shown, calls = images(tower.patch_size[0]), []
    results = []
    for count in (1, 5):
        with tower.register_forward_hook(lambda *_: calls.append(1)) if count == 5 else torch.enable_grad():
            tower.zero_grad()
            features = tower.encode(shown, count)
            (features.patches**2).sum().backward()
        results.append((features.patches.detach(), {name: p.grad for name, p in tower.named_parameters()}))
    assert len(calls) == 5
    (one, gradients), (other, others) = results
    assert one.equal(other) and all(
        (gradients[name] is None and others[name] is None) or torch.allclose(gradients[name], others[name])
        for name in gradients
    )


def test_an_image_of_the_encoders_own_size_is_not_interpolated(monkeypatch):
    """The towers of both libraries are as they were built, bit for bit."""
    for kind in TOWERS:
        tower = encoder(kind)
        monkeypatch.setattr(OpenClipVision, "_let_interpolate", lambda self: None)
        monkeypatch.setattr("vlmtrain.model.vision.open_clip.MethodType", lambda function, visual: visual._embeds)
        with monkeypatch.context() as context:
            context.setattr(VisionEncoder, "check_any_size", lambda self: None)
            plain = encoder(kind)
        monkeypatch.undo()
        image = torch.randn(1, 3, *tower.image_size).double()
        assert tower(image).patches.equal(plain(image).patches)
        assert tower.encode((image[0],)).patches.equal(plain(image).patches[0].flatten(0, 1))


@pytest.mark.parametrize("kind", ["open_clip", "timm"])
def test_positions_are_interpolated_as_by_resizing(kind):
    """A resized encoder holds a table that was interpolated once; open_clip and timm are held to the same rule."""
    tower, resized = encoder(kind), encoder(kind)
    patch = tower.patch_size[0]
    resized.resize((5 * patch, 7 * patch))
    image = torch.randn(1, 3, 5 * patch, 7 * patch).double()
    torch.testing.assert_close(tower(image).patches, resized(image).patches, rtol=0, atol=1e-6)


def test_an_encoder_with_fixed_positions_is_refused():
    class Fixed(VisionEncoder):
        image_size, patch_size, width, num_blocks = (16, 16), (8, 8), 4, 1

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.set_layers(-1, None)

        def forward(self, pixels):
            return self.as_features(lambda layer: pixels.flatten(2)[..., :1].mT + self.table, pixels)

    with pytest.raises(
        ValueError, match="image_fit=native needs an encoder that interpolates its positions, but Fixed"
    ):
        Fixed().check_any_size()


# complete models


def wrapper(connector: str, **options) -> VLMWrapper:
    vision = encoder("open_clip", -2, ())
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=50, intermediate_size=48, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape
    )
    llm = AutoModelForCausalLM.from_config(config)
    for parameter in llm.parameters():
        parameter.data.mul_(3) if parameter.dim() > 1 else None
    return VLMWrapper(vision, make_connector(connector, vision, llm, options), llm).double().eval()


def batch_of(model: VLMWrapper, rows: list[list[int | tuple[int, int]]], packed: bool = False) -> Batch:
    """Rows of token ids and sizes of images, which are random but the same each time."""
    vision, connector = model.vision, model.connector
    geometry = Geometry(
        *(vision.image_size, "native", vision.image_mean, vision.image_std, 0),
        **{"patch_size": vision.patch_size, "multiple": connector.multiple, "connector": connector.config},
        image_pixels=(PATCH * PATCH, 100 * PATCH * PATCH),
    )
    ids, index, plans, shown = [], [], [], []
    for row in rows:
        plan = geometry.plan([item for item in row if isinstance(item, tuple)])
        placements, before = iter(plan.placements), sum(len(each.placements) for each in plans)
        row_ids, row_index = [], []
        for item in row:
            placement = next(placements) if isinstance(item, tuple) else None
            count = placement.slots if placement else 1
            row_ids += [0 if placement else item] * count
            row_index += [before + placement.medium if placement else -1] * count
            if placement:
                torch.manual_seed(sum(item))
                shown.append(torch.randn(3, *plan.items[placement.medium].pixels[0]).double())
        ids, index, plans = [*ids, row_ids], [*index, row_index], [*plans, plan]
    width, (items, placements) = max(map(len, ids)), joined(plans)
    lengths = torch.tensor([len(row) for row in ids])
    if packed:
        ids, index = [[*chain(*ids)]], [[*chain(*index)]]
    else:
        ids = [row + [0] * (width - len(row)) for row in ids]
        index = [row + [-1] * (width - len(row)) for row in index]
    tensor = torch.tensor(ids)
    visual = Visual(
        (tuple(shown) or (torch.zeros(3, *geometry.smallest).double(),),), items, placements, torch.tensor(index)
    )
    batch = Batch(tensor, tensor, tensor.double(), lengths, visual)
    if not packed:
        return batch
    ends = lengths.cumsum(0)
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends]).int()
    return batch._replace(lengths=ends[-1:], positions=positions, boundaries=bounds)


ROWS = [[5, (40, 56), 7, 8], [(64, 64), 11, (24, 96), 12, 13], [21, 22, 23], [(40, 56), (24, 96), 31]]


@pytest.mark.parametrize("connector", ["mlp", "ldp", "perceiver_resampler"])
def test_a_batch_of_unequal_images_equals_its_rows(connector):
    options = {"depth": 1, "num_queries": 3, "num_heads": 2, "head_dim": 8} if connector.startswith("perc") else {}
    model = wrapper(connector, **options)
    with torch.no_grad():
        together = model(batch_of(model, ROWS))
        for row, logits in zip(ROWS, together):
            alone = model(batch_of(model, [row]))[0]
            torch.testing.assert_close(logits[: len(alone)], alone, rtol=0, atol=1e-8)
        attend_in_segments(model.llm)
        packed = model(batch_of(model, ROWS, packed=True))[0]
        real = torch.cat([logits[:length] for logits, length in zip(together, batch_of(model, ROWS).lengths)])
        torch.testing.assert_close(packed, real, rtol=0, atol=1e-8)


def as_pinned(value):
    """What PyTorch's data loader makes of a batch for a GPU: plain tuples become lists."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(as_pinned, value))
    return [as_pinned(each) for each in value] if isinstance(value, tuple) else value


def test_a_pinned_batch_gives_the_same_logits():
    model = wrapper("ldp")
    batch = batch_of(model, ROWS)
    assert model(as_pinned(batch).to(torch.device("cpu"))).equal(model(batch))


def test_a_batch_without_images_uses_the_stand_in_and_ignores_it():
    model = wrapper("mlp")
    batch = batch_of(model, [ROWS[2]])
    text = model.llm(input_ids=batch.input_ids).logits
    found = model(batch)
    assert found.equal(text)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


@pytest.mark.parametrize("connector", ["mlp", "qwen3_vl_merger"])
def test_cached_generation_equals_the_complete_computation(connector):
    options = {"levels": 2} if connector == "qwen3_vl_merger" else {}
    model = wrapper(connector, **options)
    rows = ROWS if connector == "mlp" else [[5, (32, 64), 7, 8], [(64, 64), 11, (32, 96), 12, 13], [21, 22, 23]]
    found = model.generate(batch_of(model, rows), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    for row, new in zip(rows, found):
        said: list[int] = []
        for _ in range(4):
            said.append(int(model(batch_of(model, [[*row, *said]]))[0, -1].argmax()))
        assert new.tolist() == said
    search = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(batch_of(model, rows), **search)
    assert [beam.tolist() for beam in together] == [
        model.generate(batch_of(model, [row]), **search)[0].tolist() for row in rows
    ]


# levels for the language model (DeepStack)

LEVELS = [[5, (32, 64), 7, 8], [(64, 64), 11, (32, 96), 12, 13], [21, 22, 23]]


@pytest.fixture(scope="module")
def stacked() -> VLMWrapper:
    return wrapper("qwen3_vl_merger", levels=2)


def by_hand(model: VLMWrapper, batch: Batch) -> torch.Tensor:
    """Logits of a Llama whose blocks are called one by one, with the levels added after each."""
    fused = model.embed(batch.input_ids, batch.visual)
    llama, hidden = model.llm.model, fused.embeddings
    positions = torch.arange(hidden.shape[1])[None]
    rotary = llama.rotary_emb(hidden, positions)
    mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
    for number, block in enumerate(llama.layers):
        found = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = found if isinstance(found, torch.Tensor) else found[0]
        if number < len(fused.added):
            hidden = hidden.clone()
            hidden[fused.visual_mask] += fused.added[number]
    return model.llm.lm_head(llama.norm(hidden))


def test_levels_are_added_to_the_outputs_of_the_first_blocks(stacked):
    batch = batch_of(stacked, LEVELS)
    fused = stacked.embed(batch.input_ids, batch.visual)
    assert len(fused.added) == 2 and fused.added[0].shape == (int(fused.visual_mask.sum()), 32)
    torch.testing.assert_close(stacked(batch), by_hand(stacked, batch), rtol=0, atol=1e-9)
    for row, logits in zip(LEVELS, stacked(batch)):
        alone = stacked(batch_of(stacked, [row]))[0]
        torch.testing.assert_close(logits[: len(alone)], alone, rtol=0, atol=1e-8)


def test_levels_have_an_effect(stacked):
    """Without it, the tests above could pass with levels that are dropped on both sides."""
    batch = batch_of(stacked, LEVELS[:1])
    before = stacked(batch)
    with torch.no_grad():
        stacked.connector.deepstack_merger_list[1].linear_fc2.weight.mul_(2)
        after = stacked(batch)
        stacked.connector.deepstack_merger_list[1].linear_fc2.weight.div_(2)
    assert (before - after)[0, 1:].abs().max() > 1e-3 and before[0, 0].equal(after[0, 0])


def gradients(model: VLMWrapper, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(batch) ** 2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_and_packing_keep_the_gradients_of_levels(stacked):
    plain = gradients(stacked, batch_of(stacked, LEVELS))
    assert plain["connector.deepstack_merger_list.1.linear_fc2.weight"].abs().max() > 0
    stacked.llm.gradient_checkpointing_enable({"use_reentrant": False})
    stacked.llm.train()
    try:
        again = gradients(stacked, batch_of(stacked, LEVELS))
    finally:
        stacked.llm.gradient_checkpointing_disable()
        stacked.eval()
    assert plain.keys() == again.keys() and all(plain[name].equal(again[name]) for name in plain)


def test_levels_of_a_batch_without_images_get_zero_gradients(stacked):
    found = gradients(stacked, batch_of(stacked, [LEVELS[2]]))
    mergers = {name: gradient for name, gradient in found.items() if name.startswith("connector")}
    assert len(mergers) == len(list(stacked.connector.parameters())) and not any(g.any() for g in mergers.values())


def test_levels_are_checked_without_weights_too():
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3))
        bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2))
    receive_levels(llama, 2)
    assert [len(block._forward_hooks) for block in llama.model.layers] == [1, 1, 0]
    assert all(hook.has_added for block in llama.model.layers for hook in block._forward_hooks.values())
    with pytest.raises(ValueError, match="3 levels are to be added to blocks of the language model, which has only 2"):
        receive_levels(bloom, 3)


def test_a_language_model_that_cannot_take_levels_is_refused():
    from transformers import GPT2Config

    vision = encoder("open_clip", -2, ())
    llm = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="2 levels are to be added to blocks of the language model, which has only 1"):
        VLMWrapper(vision, make_connector("qwen3_vl_merger", vision, llm, {"levels": 2}), llm)
    llm = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not support levels .*its blocks do not receive"):
        VLMWrapper(vision, make_connector("qwen3_vl_merger", vision, llm, {"levels": 2}), llm)
    assert not any(block._forward_hooks for block in llm.transformer.h)


class Leveled(Concatenation):
    """A fusion with a level of its own, for connectors without levels."""

    def num_added(self, levels):
        return 1

    def forward(self, text, tokens, visual):
        return super().forward(text, tokens._replace(levels=(10 * tokens.tokens,)), visual)


def test_levels_of_a_fusion_are_added(tmp_path):
    plain = wrapper("mlp")
    model = VLMWrapper(plain.vision, plain.connector, plain.llm, Leveled(32)).double().eval()
    batch = batch_of(model, LEVELS)
    torch.testing.assert_close(model(batch), by_hand(model, batch), rtol=0, atol=1e-9)
    assert (model(batch) - plain(batch)).abs().max() > 1e-3
    model.fusion.num_added = lambda levels: 2
    with pytest.raises(ValueError, match="Leveled added 1 levels, expected 2"):
        model(batch)
    with pytest.raises(ValueError, match="Leveled cannot be saved: build it with build_fusion"):
        save_part("fusion", model.fusion, tmp_path, {})


def test_a_connector_that_returns_another_number_of_tokens_is_an_error():
    model = wrapper("mlp")
    batch = batch_of(model, ROWS)
    model.connector.layers[2].register_forward_hook(lambda module, given, tokens: tokens[:-1])
    with pytest.raises(ValueError, match=r"MLP returned \d+ tokens, but its num_tokens says \d+"):
        model(batch)


# who sees whom, from the batch


def ruled(batch: Batch, ends: list[int]) -> tuple[Batch, torch.Tensor]:
    """A batch with a prefix in each row and images that see themselves, and its mask (B, T, T) by definition."""
    index = batch.visual.index
    batch = batch._replace(prefix=torch.tensor(ends), bidirectional=index)
    rows, width = index.shape
    mask = torch.zeros(rows, width, width, dtype=torch.bool)
    for row in range(rows):
        for query in range(width):
            for key in range(width):
                same_image = index[row, query] == index[row, key] >= 0
                mask[row, query, key] = key <= query or same_image or max(query, key) < ends[row]
    return batch, mask


def test_the_batch_says_who_sees_whom():
    model = wrapper("mlp")
    batch, mask = ruled(batch_of(model, ROWS), [3, 0, 2, 1])
    embeddings = model.embed(batch.input_ids, batch.visual).embeddings
    expected = model.llm(inputs_embeds=embeddings, attention_mask=mask[:, None]).logits
    causal = model(batch_of(model, ROWS))
    found = model(batch)
    for row, length in enumerate(batch.lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=1e-8)
    assert (found - causal).abs().max() > 1e-3
    for options in ({}, {"num_beams": 2}):
        answer = model.generate(batch, max_new_tokens=3, pad_token_id=0, eos_token_id=None, do_sample=False, **options)
        assert answer.shape == (4, 3)
    first = model.generate(batch, max_new_tokens=1, pad_token_id=0, do_sample=False)[:, 0]
    assert first.tolist() == [int(found[row, length - 1].argmax()) for row, length in enumerate(batch.lengths)]
