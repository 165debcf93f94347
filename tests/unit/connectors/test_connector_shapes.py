"""`num_tokens` equals what forward returns on every accepted grid; YAML options equal the signatures."""

from pathlib import Path

import pytest
import torch
import yaml
from connector_samples import SMALL, VARIANTS, D, features, instruction, small, variant_id
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._device import _device_constructors
from transformers.initialization import meta_device_safe_creation_ops

from vlmtrain.connectors import CONNECTORS, build_connector

CONFIGS = Path(__file__).parents[3] / "configs" / "connector"
SIDES = st.integers(1, 32)

torch.set_num_threads(1)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(height=SIDES, width=SIDES)
@example(1, 1)
@example(2, 8)
@example(8, 2)
@example(32, 32)
@example(6, 9)
@example(5, 7)
def test_num_tokens_equals_forward(variant, height, width):
    name, options = variant
    if name == "vss":  # its scan loops over positions, which is slow
        height, width = min(height, 12), min(width, 12)
    with torch.device("meta"):
        try:
            connector = small(name, (height, width), **options)
        except ValueError as error:
            assert f"{height}x{width}" in str(error)
            return
        count, grid = connector.num_tokens(height, width), connector.output_grid(height, width)
        output = connector(features(connector, (height, width)), **instruction(connector))
    tokens, levels = output if isinstance(output, tuple) else (output, ())
    for tensor in (tokens, *levels):
        assert tensor.shape == (2, count, D)
    assert grid is None or grid[0] * grid[1] == count


@pytest.mark.parametrize("name", CONNECTORS)
def test_meta_connectors_stay_meta_while_transformers_loads_a_model(name):
    """transformers patches torch.linspace while loading a model, and torch may first list its factories then."""
    _device_constructors.cache_clear()
    try:
        with torch.device("meta"), meta_device_safe_creation_ops():
            torch.empty(1)
        with torch.device("meta"):
            connector = small(name, **SMALL[name])
        assert {tensor.device.type for tensor in connector.state_dict().values()} == {"meta"}
    finally:
        _device_constructors.cache_clear()


@pytest.mark.parametrize("name", CONNECTORS)
def test_forward_refuses_what_num_tokens_refuses(name):
    connector = small(name, **SMALL[name])  # built for 6x6
    for grid in ((1, 1), (5, 5), (3, 8)):
        try:
            connector.num_tokens(*grid)
        except ValueError as error:
            with pytest.raises(ValueError) as raised:
                connector(features(connector, grid))
            assert str(raised.value) == str(error)
        else:
            connector(features(connector, grid))


@pytest.mark.parametrize(
    ("name", "options", "grid", "count"),
    [
        ("mlp", {}, (24, 24), 576),
        ("avgpool", {"window": 2}, (27, 27), 196),
        ("avgpool", {"window": 3}, (7, 5), 6),
        ("attentional_pool", {"window": 3}, (27, 27), 81),
        ("qwen_vl_resampler", {}, (32, 32), 256),
        ("qwen2_vl_merger", {}, (4, 6), 6),
        ("hunyuan_merger", {}, (4, 6), 10),
        ("hunyuan_merger", {}, (5, 7), 10),
        ("qformer", {}, (16, 16), 32),
        ("perceiver_resampler", {}, (3, 9), 64),
        ("c_abstractor", {}, (24, 24), 144),
        ("d_abstractor", {}, (24, 24), 144),
        ("ldp", {}, (5, 5), 9),
        ("ldp", {}, (7, 7), 16),
        ("ldpv2", {}, (10, 10), 144),
        ("vss", {}, (24, 24), 576),
        ("pixel_shuffle", {}, (24, 24), 144),
        ("token_packer", {}, (24, 24), 144),
        ("spatial_aggregator", {}, (48, 48), 576),
    ],
)
def test_token_counts_equal_those_of_the_papers(name, options, grid, count):
    with torch.device("meta"):
        connector = build_connector(name, 1152, 2048, input_grid=grid, **options)
    assert connector.num_tokens(*grid) == count


def test_meq_former_makes_32_tokens_per_encoder():
    with torch.device("meta"):
        assert build_connector("meq_former", (1408, 1024, 1792, 768, 1024), 2048).num_tokens(16, 16) == 160


@pytest.mark.parametrize("name", CONNECTORS)
def test_yaml_equals_signature(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert list(config) == ["name", *CONNECTORS.options(name)]
    assert config == {"name": name, **CONNECTORS.options(name)}


def test_one_yaml_per_connector():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(CONNECTORS)
