"""User errors raise ValueErrors that give the value, what was expected and what to change."""

import pytest
import torch
from connector_samples import SEVERAL, SMALL, C, D, features, small

from vlmtrain.connectors import VisionFeatures, build_connector


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mpl", {}, r"Unknown connector 'mpl'. Did you mean 'mlp'\? Available: linear, mlp"),
        ("mlp", {"dept": 3}, r"connector.dept of 'mlp'. Did you mean 'depth'\? Available options: depth, hidden_dim"),
        ("linear", {"depth": 2}, r"connector.depth of 'linear'. Available options: none"),
        ("mlp", {"depth": 0}, r"connector.depth=0: expected an integer of at least 1"),
        ("mlp", {"hidden_dim": -4}, r"connector.hidden_dim=-4"),
        (
            "mlp",
            {"hidden_dim": [8, 8]},
            r"connector.hidden_dim=\[8, 8\]: expected one width, or one for each of the 1 hidden",
        ),
        ("mlp", {"hidden_dim": [-8]}, r"connector.hidden_dim=-8"),
        ("mlp", {"activation": "gleu"}, r"connector.activation='gleu'. Did you mean 'gelu'\?"),
        ("avgpool", {"window": 0}, r"connector.window=0"),
        ("attentional_pool", {"num_heads": 3}, r"connector.num_heads=3 does not divide in_dim=16"),
        ("attentional_pool", {"num_heads": 4, "levels": -1}, r"connector.levels=-1"),
        ("attentional_pool", {"num_heads": 4, "head": "mlp"}, r"connector.head='mlp'. Available: swiglu, linear"),
        ("qwen_vl_resampler", {"num_heads": 5}, r"connector.num_heads=5 does not divide out_dim=24"),
        ("qwen_vl_resampler", {"grid": 0}, r"connector.grid=0"),
        ("qwen2_vl_merger", {"factor": 0}, r"connector.factor=0"),
        ("qwen3_vl_merger", {"levels": -1}, r"connector.levels=-1"),
        ("hunyuan_merger", {"factor": -2}, r"connector.factor=-2"),
        ("qformer", {"num_heads": 7}, r"connector.num_heads=7 does not divide connector.hidden_size=768"),
        ("qformer", {"num_queries": 0}, r"connector.num_queries=0"),
        ("qformer", {"dropout": 1.0}, r"connector.dropout=1.0"),
        ("qformer", {"text_vocab": 0}, r"connector.text_vocab=0"),
        ("perceiver_resampler", {"num_queries": 0}, r"connector.num_queries=0"),
        ("perceiver_resampler", {"head_dim": -1}, r"connector.head_dim=-1"),
        ("identity", {"prefix": -1}, r"connector.prefix=-1: expected a whole number"),
        ("c_abstractor", {"input_grid": None}, r"c_abstractor .* expected input_grid=\(height, width\)"),
        ("c_abstractor", {"depth": 0}, r"connector.depth=0"),
        ("d_abstractor", {"input_grid": None}, r"d_abstractor .* expected input_grid=\(height, width\)"),
        ("d_abstractor", {"num_heads": 3}, r"connector.num_heads=3 does not divide connector.hidden_size=1024"),
        ("ldpv2", {"grid": -1}, r"connector.grid=-1"),
        ("meq_former", {"hidden_dim": 0}, r"connector.hidden_dim=0"),
        ("meq_former", {"encoder_dropout": 1.5}, r"connector.encoder_dropout=1.5"),
        ("vss", {"scan": "four"}, r"connector.scan='four'. Available: bidirectional, cross"),
        ("vss", {"head": "l3"}, r"connector.head='l3'. Available: l2, mlp"),
        ("pixel_shuffle", {"head": "internvlm"}, r"Did you mean 'internvl'"),
        ("pixel_shuffle", {"factor": 2.0}, r"connector.factor=2.0"),
        ("token_packer", {"num_heads": 3}, r"connector.num_heads=3 does not divide connector.hidden_size=1024"),
        ("token_packer", {"levels": 0}, r"connector.levels=0"),
        ("spatial_aggregator", {"input_grid": None}, r"spatial_aggregator .* expected input_grid=\(height, width\)"),
        ("spatial_aggregator", {"grid": 0}, r"connector.grid=0"),
        ("spatial_aggregator", {"num_heads": 3}, r"connector.num_heads=3 does not divide connector.hidden_size=1024"),
        ("spatial_aggregator", {"in_dim": (C, 12), "grid": 4}, r"grid 6x6: .* multiples of connector.grid=4"),
        (
            "spatial_aggregator",
            {"in_dim": (C, 12), "input_grid": ((6, 6), (12, 8)), "grid": 3},
            r"grid 12x8: .* multiples of connector.grid=3",
        ),
        (
            "spatial_aggregator",
            {"in_dim": (C, 12), "input_grid": ((6, 6),), "grid": 3},
            r"input_grid=\(\(6, 6\),\): expected one grid per encoder \(2\)",
        ),
        ("mlp", {"input_grid": ((6, 6), (6, 6))}, r"expected one grid per encoder \(1\)"),
        ("mlp", {"in_dim": 0}, r"connector.in_dim=0"),
        ("mlp", {"out_dim": -3}, r"connector.out_dim=-3"),
        ("mlp", {"in_dim": (16, 32)}, r"takes one encoder, got in_dim=\(16, 32\)"),
        ("qwen2_vl_merger", {"input_grid": (5, 6)}, r"grid 5x6: .* multiples of connector.factor=2"),
        ("pixel_shuffle", {"input_grid": (6, 9)}, r"grid 6x9: .* multiples of connector.factor=2"),
        ("token_packer", {"input_grid": (5, 5)}, r"grid 5x5: .* multiples of connector.factor=2"),
        ("avgpool", {"window": 7}, r"grid 6x6 is smaller than connector.window=7: expected at least 7x7"),
        ("attentional_pool", {"num_heads": 4, "window": 8}, r"grid 6x6 is smaller than connector.window=8"),
        ("hunyuan_merger", {"input_grid": (1, 4)}, r"grid 1x4 is smaller than connector.factor=2"),
        ("mlp", {"input_grid": (0, 4)}, r"grid 0x4: expected at least one row"),
    ],
)
def test_building(name, options, message):
    arguments = {"in_dim": C, "out_dim": D, "input_grid": (6, 6)} | options
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_connector(name, **arguments)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("grid", [(0, 6), (6, 0), (-2, 6)])
def test_no_connector_takes_an_empty_grid(name, grid):
    with pytest.raises(ValueError, match=f"grid {grid[0]}x{grid[1]}"):
        small(name, **SMALL[name]).num_tokens(*grid)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in SEVERAL])
def test_features_of_the_wrong_width_rank_or_number(name):
    connector = small(name, **SMALL[name])
    good = features(connector, (6, 6))
    connector(good)
    for bad, message in (
        (good._replace(patches=torch.randn(2, 6, 6, C + 1)), r"features.patches: expected width 16 .* got 17"),
        (good._replace(patches=torch.randn(2, 36, C)), r"features.patches: expected \(B, H, W, C\), got 3"),
        (good._replace(prefix=torch.randn(2, 1, C + 1)), r"features.prefix: expected width 16 .* got 17"),
        (good._replace(prefix=torch.randn(2, C)), r"features.prefix: expected \(B, P, C\), got 2"),
        ((good, good), r"takes the VisionFeatures of one encoder, got 2 encoders"),
        (good.patches, r"takes the VisionFeatures of one encoder, got Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            connector(bad)


@pytest.mark.parametrize("name", ["attentional_pool", "qwen3_vl_merger", "token_packer"])
def test_levels_must_have_the_declared_number_and_size(name):
    connector = small(name, **SMALL[name])
    good = features(connector, (6, 6))
    assert connector.num_levels == len(good.levels) > 0
    with pytest.raises(ValueError, match=rf"expected {connector.num_levels} hidden layers .* got 0"):
        connector(good._replace(levels=()))
    with pytest.raises(ValueError, match=r"levels\[0\]: expected the shape of patches"):
        connector(good._replace(levels=(torch.randn(2, 3, 6, C), *good.levels[1:])))


def test_unused_levels_are_ignored():
    connector = small("mlp")
    good = features(connector, (6, 6))
    assert torch.equal(connector(good), connector(good._replace(levels=(good.patches,))))


@pytest.mark.parametrize("name", SEVERAL)
def test_number_and_width_of_several_encoders(name):
    connector = small(name, **SMALL[name])
    first, second = features(connector, (6, 6))
    with pytest.raises(ValueError, match=r"built for 2 encoders .* got features of 1"):
        connector(first)
    with pytest.raises(ValueError, match=r"built for 2 encoders .* got features of 3"):
        connector((first, second, second))
    with pytest.raises(ValueError, match=r"features.patches: expected width 16 .* got 12"):
        connector((second, first))


def test_each_encoder_has_the_grid_that_the_windows_were_built_for():
    options = SMALL["spatial_aggregator"]
    connector = build_connector("spatial_aggregator", (C, C), D, input_grid=((6, 6), (3, 12)), **options)
    coarse, wide = (VisionFeatures(torch.randn(2, *grid, C)) for grid in ((6, 6), (3, 12)))
    assert connector((coarse, wide)).shape == (2, 9, D)
    for encoders, message in (
        ((wide, coarse), r"grid 3x12: .* built for input_grid 6x6"),
        ((coarse, coarse), r"grid 6x6: .* built for input_grid 3x12"),
    ):
        with pytest.raises(ValueError, match=message):
            connector(encoders)
    with pytest.raises(ValueError, match=r"grid 3x12: .* built for input_grid 6x6"):
        connector.num_tokens(3, 12)


@pytest.mark.parametrize("name", ["qformer", "meq_former"])
def test_instructions_must_be_enabled_and_then_given(name):
    ids = torch.zeros(2, 3, dtype=torch.long)
    plain = small(name, **SMALL[name])
    with pytest.raises(ValueError, match="text_vocab is not set"):
        plain(features(plain, (6, 6)), ids)
    reader = small(name, **SMALL[name], text_vocab=50, text_positions=4)
    with pytest.raises(ValueError, match="requires text_ids"):
        reader(features(reader, (6, 6)))
    with pytest.raises(ValueError, match=r"the text has 5 tokens, but connector.text_positions=4"):
        reader(features(reader, (6, 6)), torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("name", ["c_abstractor", "d_abstractor"])
def test_fixed_tables_are_not_stretched(name):
    connector = small(name, (6, 6), **SMALL[name])
    with pytest.raises(ValueError, match=r"grid 4x9: .* built for input_grid 6x6"):
        connector(VisionFeatures(torch.randn(1, 4, 9, C)))


@pytest.mark.parametrize("input_grid", [(6,), 6, (6, 6, 6), "66", (6.5, 6), (6.5, 6.5), ()])
def test_an_input_grid_is_two_whole_numbers(input_grid):
    with pytest.raises(ValueError, match="input_grid"):
        build_connector("linear", 16, 8, input_grid=input_grid)


def test_a_misshapen_position_table_is_named():
    connector = build_connector("c_abstractor", 16, 8, input_grid=(6, 6), hidden_size=16, grid=3)
    with pytest.raises(ValueError, match="pos_emb"):
        connector.load_published({"pos_emb": torch.zeros(7777)})


def test_a_prefix_of_another_batch_is_refused():
    connector = build_connector("qformer", 16, 8, hidden_size=16, depth=2, num_heads=2, intermediate_size=16)
    with pytest.raises(ValueError, match="prefix"):
        connector(VisionFeatures(torch.zeros(2, 3, 3, 16), torch.zeros(1, 1, 16)))


def test_identity_passes_on_as_many_tokens_as_it_was_told():
    connector = small("identity", prefix=2)
    with pytest.raises(ValueError, match=r"connector.prefix=2: the encoder has 1 tokens before its patches"):
        connector(features(connector, (6, 6)))
