"""The complete model: positions of visual tokens, independence of padding, generation and saving."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from tests.media import slots
from vlmtrain.batch import Batch
from vlmtrain.connectors import VisionFeatures
from vlmtrain.model import VLMWrapper
from vlmtrain.model.fusion import Concatenation, VisualTokens
from vlmtrain.model.parts import make_connector, module_state
from vlmtrain.model.vision import build_vision
from vlmtrain.visual import NO_MEDIA, Visual

VOCABULARY, WIDTH, IMAGE_TOKENS = 97, 32, 4
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
LLMS = {
    "llama": lambda **o: LlamaConfig(**SMALL, **SHAPE, intermediate_size=48, num_key_value_heads=2, **o),
    "qwen2": lambda **o: Qwen2Config(**SMALL, **SHAPE, intermediate_size=48, num_key_value_heads=2, **o),
    "gpt2": lambda **o: GPT2Config(**SMALL, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128, **o),
    "opt": lambda **o: OPTConfig(**SMALL, **SHAPE, ffn_dim=48, word_embed_proj_dim=WIDTH, **o),
}
VISION = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def build(kind: str = "llama", **llm_options) -> VLMWrapper:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(LLMS[kind](**llm_options))
    with torch.no_grad():  # make outputs far from uniform, so that a different input gives a different answer
        for parameter in llm.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    vision = build_vision("open_clip", model_config=VISION, layer=-1)
    return VLMWrapper(vision, make_connector("mlp", vision, llm, {}), llm).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, VLMWrapper]:
    return {kind: build(kind, tie_word_embeddings=False) for kind in LLMS}


@pytest.fixture(params=LLMS)
def model(request, models) -> VLMWrapper:
    return models[request.param]


class Row:
    """A row of text with images at some positions: ``[3, "picture", 5]``."""

    def __init__(self, *items: int | str, seed: int = 0):
        self.ids, self.index, pictures = [], [], count()
        for item in items:
            is_picture = item == "picture"
            length = IMAGE_TOKENS if is_picture else 1
            self.ids += [0 if is_picture else item] * length
            self.index += [next(pictures) if is_picture else -1] * length
        generator = torch.Generator().manual_seed(seed)
        self.pictures = torch.randn(items.count("picture"), 3, 16, 16, generator=generator)


ROWS = [
    Row(5, "picture", 7, 8, 9, seed=1),
    Row("picture", 11, "picture", 12, 13, 14, 15, seed=2),
    Row(21, 22, 23),
    Row("picture", "picture", 31, seed=3),
]


def collate(*rows: Row, filler: int = 0) -> Batch:
    """Rows padded on the right, without targets."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [filler] * (width - len(row.ids)) for row in rows])
    index, before = torch.full_like(ids, -1), 0
    for place, row in zip(index, rows):
        own = torch.tensor(row.index)
        place[: len(own)] = torch.where(own >= 0, own + before, -1)
        before += len(row.pictures)
    pictures = torch.cat([row.pictures for row in rows]) if before else torch.zeros(1, 3, 16, 16)
    visual = Visual((pictures,), *slots(*[IMAGE_TOKENS] * before), index)
    lengths = torch.tensor([len(row.ids) for row in rows])
    return Batch(ids, torch.full_like(ids, -100), torch.zeros(ids.shape), lengths, visual)


def embeddings_by_hand(model: VLMWrapper, row: Row) -> Tensor:
    """The input embeddings of a row, position by position."""
    table = model.llm.get_input_embeddings().weight
    visual = [model.connector(model.vision(picture[None]))[0] for picture in row.pictures]
    tokens = iter(torch.cat(visual)) if visual else iter(())
    return torch.stack([next(tokens) if number >= 0 else table[id] for id, number in zip(row.ids, row.index)])


def logits(model: VLMWrapper, *rows: Row, **options) -> Tensor:
    batch = collate(*rows, filler=options.pop("filler", 0))
    with torch.no_grad():
        return model(batch, **options)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# concatenation


def concatenate(text: Tensor, visual: Tensor, index: list[list[int]] | None) -> Tensor:
    """Fuse text with the tokens ``(N, n, D)`` of images whose number is at their positions; None: of a stand-in."""
    media = NO_MEDIA if index is None else slots(*[visual.shape[1]] * len(visual))
    places = torch.full(text.shape[:2], -1) if index is None else torch.tensor(index)
    fusion = Concatenation(text.shape[-1])
    return fusion(text, VisualTokens(visual.flatten(0, 1)), Visual((), *media, places)).embeddings


def test_tokens_fill_the_marked_positions_in_reading_order():
    text = torch.arange(10.0).reshape(2, 5, 1)
    visual = torch.tensor([[[100.0], [101.0]], [[200.0], [201.0]]])
    index = [[-1, 0, 0, -1, -1], [1, -1, -1, -1, 1]]
    assert concatenate(text, visual, index)[..., 0].tolist() == [[0, 100, 101, 3, 4], [200, 6, 7, 8, 201]]
    assert concatenate(text, visual, None).equal(text)


def test_a_batch_without_images_still_gives_the_connector_a_gradient_of_zero():
    text, visual = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, 4, 3, requires_grad=True)
    concatenate(text, visual, None).sum().backward()
    assert visual.grad.equal(torch.zeros(1, 4, 3)) and text.grad.equal(torch.ones(1, 2, 3))


def test_gradients_reach_each_image_only_from_its_own_positions():
    text, visual = torch.zeros(1, 6, 2), torch.zeros(2, 2, 2, requires_grad=True)
    index = [[0, 0, -1, 1, 1, -1]]
    weight = torch.arange(6.0)[None, :, None]
    (concatenate(text, visual, index) * weight).sum().backward()
    assert visual.grad[..., 0].tolist() == [[0, 1], [3, 4]]


def test_visual_tokens_are_at_the_marks(model):
    batch = collate(*ROWS)
    with torch.no_grad():
        embedded = model.embed(batch.input_ids, batch.visual).embeddings
        for row, values, length in zip(ROWS, embedded, batch.lengths):
            close(values[:length], embeddings_by_hand(model, row))


def test_precomputed_features_give_the_same_result(model):
    batch = collate(*ROWS)
    unseen = batch._replace(visual=batch.visual._replace(pixels=()))
    with torch.no_grad():
        features = model.vision(batch.visual.pixels[0])
        assert isinstance(features, VisionFeatures)
        close(model(unseen, features), model(batch))


# logits


def test_a_row_gets_the_logits_of_the_language_model_alone(model):
    for row in ROWS:
        with torch.no_grad():
            expected = model.llm(inputs_embeds=embeddings_by_hand(model, row)[None]).logits
        close(logits(model, row), expected)


def test_text_gets_the_language_models_own_logits(model):
    batch = collate(ROWS[2])
    assert not batch.visual.items
    with torch.no_grad():
        close(model(batch), model.llm(input_ids=batch.input_ids).logits)


def test_padding_on_the_right_changes_nothing(model):
    together = logits(model, *ROWS)
    for row, padded in zip(ROWS, together):
        close(padded[: len(row.ids)], logits(model, row)[0])
    other_filler = logits(model, *ROWS, filler=50)
    for row, one, other in zip(ROWS, together, other_filler):
        close(one[: len(row.ids)], other[: len(row.ids)])


def test_another_image_changes_only_its_own_row_from_its_position_on(model):
    changed = [*ROWS[:3], Row("picture", "picture", 31, seed=3)]
    changed[3].pictures[1] += 1
    before, after = logits(model, *ROWS), logits(model, *changed)
    close(before[:3], after[:3])
    close(before[3, :IMAGE_TOKENS], after[3, :IMAGE_TOKENS])
    later = slice(IMAGE_TOKENS, 2 * IMAGE_TOKENS + 1)
    assert (before[3, later] - after[3, later]).abs().amax(-1).min() > 1e-2


def test_keep_selects_positions_row_by_row(model):
    everything = logits(model, *ROWS)
    generator = torch.Generator().manual_seed(0)
    for keep in (torch.rand(everything.shape[:2], generator=generator) < 0.3, torch.eye(4, everything.shape[1]) > 0):
        selected = logits(model, *ROWS, keep=keep.flatten().nonzero()[:, 0])
        assert selected.shape == (int(keep.sum()), VOCABULARY)
        close(selected, everything[keep])


# generation


def greedy(model: VLMWrapper, row: Row, new: int, stop: int | None = None) -> list[int]:
    """Greedy decoding without a cache, one row, one token at a time."""
    with torch.no_grad():
        embedded, out = embeddings_by_hand(model, row), []
        while len(out) < new and (not out or out[-1] != stop):
            out.append(int(model.llm(inputs_embeds=embedded[None], use_cache=False).logits[0, -1].argmax()))
            embedded = torch.cat([embedded, model.llm.get_input_embeddings().weight[out[-1]][None]])
    return out


def generate(model: VLMWrapper, *rows: Row, **options) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(collate(*rows), **options).tolist()


def test_generation_equals_a_greedy_loop_without_a_cache(model):
    expected = [greedy(model, row, 6) for row in ROWS]
    assert len({tuple(ids) for ids in expected}) == len(ROWS)
    assert [generate(model, row)[0] for row in ROWS] == expected
    assert generate(model, *ROWS) == expected
    assert generate(model, *reversed(ROWS)) == expected[::-1]


def test_generation_stops_at_the_end_of_turn(model):
    free = [greedy(model, row, 6) for row in ROWS]
    stop = free[0][2]
    expected = [greedy(model, row, 6, stop) for row in ROWS]
    longest = max(map(len, expected))
    got = generate(model, *ROWS, eos_token_id=[stop])
    assert got == [ids + [0] * (longest - len(ids)) for ids in expected]


def test_generation_from_text_needs_no_images(model):
    assert generate(model, ROWS[2]) == [greedy(model, ROWS[2], 6)]
    text = collate(ROWS[2])._replace(visual=None)
    alone = VLMWrapper(None, None, model.llm)
    without = alone.generate(text, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert without.tolist() == [greedy(model, ROWS[2], 6)]


# parts that do not fit


def test_widths_must_agree(models):
    model, narrow = models["llama"], nn.Module()
    narrow.in_dim, narrow.out_dim = 23, WIDTH
    with pytest.raises(ValueError, match="the connector expects features of width 23, got 24 from the encoder"):
        VLMWrapper(model.vision, narrow, model.llm)
    narrow.in_dim, narrow.out_dim = 24, 31
    with pytest.raises(ValueError, match="the connector makes tokens of width 31, but the LLM has width 32"):
        VLMWrapper(model.vision, narrow, model.llm)


# saving


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", LLMS)
def test_saved_and_loaded_is_bit_equal(tmp_path, kind, tied):
    model = build(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = VLMWrapper.from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not state[name].equal(other[name])] == []
    head, table = again.llm.get_output_embeddings().weight, again.llm.get_input_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) == tied
    assert logits(again, *ROWS).equal(logits(model, *ROWS))
    assert not again.training and {p.dtype for p in again.parameters()} == {torch.float32}
    halves = VLMWrapper.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in halves.parameters()} == {torch.bfloat16}


def test_the_language_model_alone_is_an_ordinary_folder(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.tensor([ROWS[2].ids])
    with torch.no_grad():
        assert alone(input_ids=ids).logits.equal(model.llm(input_ids=ids).logits)


def test_a_part_that_is_absent_stays_absent(tmp_path):
    model = build()
    VLMWrapper(None, None, model.llm).save_pretrained(tmp_path)
    again = VLMWrapper.from_pretrained(tmp_path)
    assert again.vision is None and again.connector is None
    assert module_state(again.llm).keys() == module_state(model.llm).keys()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return folder


TENSORS = {
    "vision": "visual.ln_post.weight",
    "connector": None,  # the first of the parts
    "llm": "model.layers.1.mlp.up_proj.weight",
}


@pytest.mark.parametrize(
    "part, fault",
    [(part, fault) for part in TENSORS for fault in ("missing", "wrong shape", "unexpected")],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, saved, part, fault):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / part / "model.safetensors"
    state = load_file(file)
    name = TENSORS[part] or sorted(state)[0]
    if fault == "missing":
        del state[name]
    elif fault == "wrong shape":
        state[name] = torch.zeros(3, 5)
    else:
        name = "model.an_extra.weight"
        state[name] = torch.zeros(2)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        VLMWrapper.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vision", "connector", "llm"])
@pytest.mark.parametrize("fault", ["truncated", "absent"])
def test_weights_that_cannot_be_read_are_named(tmp_path, saved, part, fault):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / part / "model.safetensors"
    if fault == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{part}"):
        VLMWrapper.from_pretrained(tmp_path)


def test_weights_other_than_the_manifest_says_are_refused(tmp_path, saved):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "connector" / "model.safetensors"
    state = load_file(file)
    name = sorted(state)[0]
    state[name] = state[name] + 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="connector"):
        VLMWrapper.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "vlmtrain.json",
        "connector/config.json",
        "vision/config.json",
        "llm/config.json",
    ],
)
@pytest.mark.parametrize("content", [None, "{"])
def test_a_description_that_is_missing_or_broken_is_named(tmp_path, saved, file, content):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file.split("/")[0].replace(".", r"\.")):
        VLMWrapper.from_pretrained(tmp_path)


def test_a_folder_that_is_not_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder: no such directory"):
        VLMWrapper.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"vlmtrain\.json is missing"):
        VLMWrapper.from_pretrained(tmp_path)


def test_the_manifest_lists_each_part_with_its_hash(saved):
    parts = json.loads((saved / "vlmtrain.json").read_text())["parts"]
    assert set(parts) == {"vision", "connector", "llm"}
    assert all(len(part["sha256"]) == 64 for part in parts.values())
    assert len({part["sha256"] for part in parts.values()}) == 3
