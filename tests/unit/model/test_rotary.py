"""Rotary positions in rows: held to Qwen2-VL, Qwen3-VL and HunyuanOCR of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    HunYuanDenseV1Config,
    HunYuanVLConfig,
    HunYuanVLModel,
    LlamaConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3Config,
)
from transformers.models.hunyuan_vl.configuration_hunyuan_vl import HunYuanVLTextConfig
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLTextModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from vlmtrain.batch import Batch
from vlmtrain.data.positions import POSITIONS, mrope, xdrope
from vlmtrain.model import VLMWrapper
from vlmtrain.model.attention import attend_in_segments
from vlmtrain.model.llm import load_llm, save_llm
from vlmtrain.model.parts import module_state
from vlmtrain.model.rotary import DIVISIONS, rows_of_positions, use_multimodal_rotary
from vlmtrain.visual import Placement

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPE |= {
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 60,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SECTIONS = {"mrope": [4, 6, 6], "interleaved_mrope": [6, 5, 5], "xdrope": [4, 4, 4, 4]}  # of 16 frequencies
# rows of token ids and grids of images; a grid of None is an image whose tokens form none, such as a Q-Former's
ROWS = [[5, 6, (2, 3), 7], [(4, 2), (1, 5), 8, 9, 10], [11, 12, 13], [14, None, 15, (3, 3)]]
QUERIES = 4


def plan(row: list) -> tuple[torch.Tensor, list[Placement]]:
    """The placement at each position of a row, and the placements."""
    index, placements = [], []
    for item in row:
        if isinstance(item, int):
            index.append(-1)
        else:
            count = item[0] * item[1] if item else QUERIES
            index += [len(placements)] * count
            placements.append(Placement(len(placements), (), count, count, item))
    return torch.tensor(index), placements


def batch_of(rows: list[list], packed: bool = False, kind: str = "mrope") -> Batch:
    """Token ids (the same ones at image positions) and positions of rows."""
    plans = [plan(row) for row in rows]
    positions = [POSITIONS[kind](*each) for each in plans]
    ids = [torch.zeros(len(index), dtype=torch.long) for index, _ in plans]
    for row, own, (index, _) in zip(rows, ids, plans):
        own[index < 0] = torch.tensor([item for item in row if isinstance(item, int)])
        own[index >= 0] = 20 + torch.arange(int((index >= 0).sum())) % 30
    lengths = torch.tensor([len(own) for own in ids])
    if packed:
        flat = torch.cat(ids)[None]
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        rotary = torch.cat(positions, 1)[:, None]
        return Batch(flat, flat, flat.float(), ends[-1:], None, rotary, ends.int())
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True)
    return Batch(
        padded, padded, padded.float(), lengths, None, pad([p.T for p in positions], batch_first=True).permute(2, 0, 1)
    )


def language_model(config) -> torch.nn.Module:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in llm.parameters():
        parameter.data.normal_(0, 0.15)
    return llm


FAMILIES = {
    "qwen2_vl": (Qwen2Config, Qwen2VLTextConfig, Qwen2VLTextModel, "mrope"),
    "qwen3_vl": (Qwen3Config, Qwen3VLTextConfig, Qwen3VLTextModel, "interleaved_mrope"),
    "hunyuan_vl": (HunYuanDenseV1Config, HunYuanVLTextConfig, HunYuanVLTextModel, "xdrope"),
}


def pair(family: str) -> tuple[VLMWrapper, torch.nn.Module]:
    """A plain language model with rows of positions, and transformers' text model with the same weights."""
    plain, text_config, text_model, kind = FAMILIES[family]
    more = {} if family == "qwen2_vl" else {"head_dim": 32}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if family == "hunyuan_vl":
        rope |= {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}
    llm = language_model(plain(**SHAPE, **more, rope_parameters=rope))
    rope = {**rope, "mrope_section": SECTIONS[kind]}
    theirs = text_model(text_config(**SHAPE, **more, rope_parameters=rope)).double().eval()
    theirs.load_state_dict(llm.model.state_dict())
    use_multimodal_rotary(llm, kind, rope["mrope_section"])
    return VLMWrapper(None, None, llm), theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_text_models_are_plain_models_with_rows_of_positions(family):
    model, theirs = pair(family)
    batch = batch_of(ROWS, kind=FAMILIES[family][-1])
    hidden = theirs(
        input_ids=batch.input_ids, position_ids=batch.positions, attention_mask=torch.ones_like(batch.input_ids)
    ).last_hidden_state
    expected, found = model.llm.lm_head(hidden), model(batch)
    tolerance = 1e-7 if family == "hunyuan_vl" else 1e-9  # transformers rotates in float32 there
    for row, length in enumerate(batch.lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=tolerance)
    flat = model(batch._replace(positions=torch.arange(batch.input_ids.shape[1]).expand_as(batch.positions)))
    assert (flat - found).abs().max() > 1e-3


def test_positions_are_those_of_qwen2_vl():
    """Held to transformers' own rule for rows of text and images; images are 2 x 2 times as large before merging."""
    config = Qwen2VLConfig(
        text_config={
            **SHAPE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS["mrope"]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 64},
    )
    reference = Qwen2VLModel(config)
    for row in ([5, (2, 3), 7, 8], [(4, 2), 6, (1, 5), 8, 9], [11, 12], [1, (3, 3), 2, (6, 1)]):
        index, placements = plan(row)
        grids = torch.tensor([[1, 2 * h, 2 * w] for h, w in (placement.out_grid for placement in placements)])
        kinds = (index >= 0).int()[None]
        ids = torch.where(index >= 0, config.image_token_id, 3)[None]
        grids = grids if len(placements) else None
        expected, _ = reference.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        assert mrope(index, placements).equal(expected[:, 0].to(torch.long))


def test_positions_are_those_of_hunyuan():
    """Held to transformers' own rule, one row at a time, because it counts images over a whole batch."""
    text = {**SHAPE, "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text["rope_parameters"]["mrope_section"] = SECTIONS["xdrope"]
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = HunYuanVLConfig(text_config=text, vision_config=vision)
    reference = HunYuanVLModel(config)
    for grids in ([(2, 3)], [(4, 2), (1, 5)], []):
        index, placements, sizes = [-1], [], []
        for number, (height, width) in enumerate(grids):
            count = height * (width + 1) + 2
            index += [number] * count + [-1, -1]
            placements.append(Placement(number, (), count, count, None, framed_grid=(height, width + 1)))
            sizes.append([1, 2 * height, 2 * width])
        index = torch.tensor(index)
        kinds, ids = (index >= 0).int()[None], torch.where(index >= 0, config.image_token_id, 3)[None]
        sizes = torch.tensor(sizes) if sizes else None
        expected, _ = reference.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=sizes)
        assert xdrope(index, placements).equal(expected[:, 0].to(torch.long))
        assert mrope(index, placements).equal(torch.arange(len(index)).repeat(3, 1))  # they form no grid


def test_tokens_without_a_grid_advance_one_by_one():
    index, placements = plan([14, None, 15, (2, 3), 16])
    text = [[0, 1, 2, 3, 4, 5]] * 3
    image = [[6] * 6, [6, 6, 6, 7, 7, 7], [6, 7, 8, 6, 7, 8]]
    assert mrope(index, placements).tolist() == [one + two + [9] for one, two in zip(text, image)]


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("config", [Qwen2Config(**SHAPE), LlamaConfig(**SHAPE)])
def test_logits_of_text_do_not_change(config, kind):
    plain, rotary = language_model(config), language_model(config)
    use_multimodal_rotary(rotary, kind)
    batch = batch_of([ROWS[2], [31, 32, 33, 34, 35]], kind=kind)
    expected = VLMWrapper(None, None, plain)(batch._replace(positions=None))
    found = VLMWrapper(None, None, rotary)(batch)
    for row, length in enumerate(batch.lengths):
        assert found[row, :length].equal(expected[row, :length])


def test_packed_rows_equal_padded_ones():
    model, _ = pair("qwen2_vl")
    padded = model(batch_of(ROWS))
    attend_in_segments(model.llm)
    packed = model(batch_of(ROWS, packed=True))[0]
    expected = torch.cat([row[:length] for row, length in zip(padded, batch_of(ROWS).lengths)])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_cached_generation_continues_the_rows(options):
    model, _ = pair("qwen3_vl")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    together = model.generate(batch_of(ROWS), **options)
    for row, new in zip(ROWS, together):
        assert model.generate(batch_of([row]), **options)[0].equal(new)
        said: list[int] = []
        while not options.get("num_beams") and len(said) < 5:
            said.append(int(model(batch_of([[*row, *said]]))[0, -1].argmax()))
        assert options.get("num_beams") or new.tolist() == said


def test_checkpointing_keeps_the_gradients():
    model, _ = pair("qwen2_vl")
    found = []
    for enable in (False, True):
        model.llm.train()
        if enable:
            model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        (model(batch_of(ROWS)) ** 2).mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(one.equal(other) for one, other in zip(*found))


def test_a_saved_model_keeps_its_positions(tmp_path):
    model, _ = pair("qwen3_vl")
    save_llm(model.llm, tmp_path, module_state(model.llm))
    again = VLMWrapper(None, None, load_llm(tmp_path, torch.float64).eval())
    assert again(batch_of(ROWS)).equal(model(batch_of(ROWS)))


def test_model_and_batch_must_agree():
    model, plain = pair("qwen2_vl")[0], VLMWrapper(None, None, language_model(Qwen2Config(**SHAPE)))
    with pytest.raises(ValueError, match="the batch has 0 rows of positions, but the language model reads 3"):
        model(batch_of(ROWS)._replace(positions=None))
    with pytest.raises(ValueError, match="the batch has 4 rows of positions, but the language model reads 3"):
        model(batch_of(ROWS, kind="xdrope"))
    with pytest.raises(ValueError, match="the batch has 3 rows of positions, but the language model reads 0"):
        plain(batch_of(ROWS))
    with rows_of_positions(plain.llm, None, torch.ones(1)):
        pass


def test_models_without_replaceable_positions_are_refused():
    gpt = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"llm\.positions=mrope: GPT2LMHeadModel has no rotary positions"):
        use_multimodal_rotary(gpt, "mrope")
    with pytest.raises(ValueError, match=r"\(4, 6, 5\) does not sum to the 16 frequencies"):
        use_multimodal_rotary(language_model(Qwen2Config(**SHAPE)), "mrope", [4, 6, 5])
    with pytest.raises(ValueError, match=r"llm\.positions=xdrope, but the language model was trained with mrope"):
        use_multimodal_rotary(pair("qwen2_vl")[0].llm, "xdrope")


def test_default_sections_have_the_published_proportions():
    assert DIVISIONS["mrope"].section(64) == (16, 24, 24) and DIVISIONS["mrope"].section(32) == (8, 12, 12)
    assert DIVISIONS["interleaved_mrope"].section(64) == (24, 20, 20)
    assert all(sum(each.section(count)) == count for each in DIVISIONS.values() for count in range(6, 70))
    for division in DIVISIONS.values():  # every channel has a row, and every row its channels
        for count in range(6, 70):
            section, owner = division.section(count), division.owner(division.section(count))
            assert [owner.count(row) for row in range(len(section))] == [2 * each for each in section]
