"""Initialization as published: standard deviations of weights, frozen tables."""

import pytest
import torch
from reference_querying import sincos_table
from torch import nn

from vlmtrain.connectors import build_connector

torch.set_num_threads(1)


def assert_spread(std: float, *tensors: torch.Tensor, rel: float = 0.1) -> None:
    """The values of each tensor have approximately this standard deviation."""
    for tensor in tensors:
        assert tensor.detach().std().item() == pytest.approx(std, rel=rel)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_qwen_vl_resampler():
    connector = build_connector("qwen_vl_resampler", 96, 128, grid=8)
    assert torch.allclose(connector.positions, sincos_table(128, 8), atol=1e-6)
    assert_spread(0.02, connector.query, connector.kv_proj.weight, connector.attn.out.weight)
    assert_spread(128**-0.5, connector.proj)
    packed = nn.MultiheadAttention(128, 1).in_proj_weight.detach()
    assert_spread(packed.std().item(), connector.attn.k.weight)
    assert connector.attn.q.weight.abs().max() <= packed.abs().max() * 1.01
    assert "positions" not in dict(connector.named_parameters())


def test_attentional_pool():
    connector = build_connector("attentional_pool", 64, 96)
    for name, parameter in connector.named_parameters():
        if parameter.ndim > 1:
            assert_spread(0.02, parameter)
        else:
            assert not parameter.any(), name


def test_token_packer():
    connector = build_connector("token_packer", 32, 64, hidden_size=128)
    assert_spread(0.02, connector.q_proj.weight, connector.mlp[0].weight)
    packed = nn.MultiheadAttention(128, 1).in_proj_weight.detach()
    assert_spread(packed.std().item(), connector.attn.v.weight)


@pytest.mark.parametrize("name", ["qformer", "meq_former"])
def test_query_transformers_start_as_bert(name):
    connector = build_connector(name, 64, 96, depth=2, text_vocab=100)
    for key, parameter in connector.core.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any(), key
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), key
        else:
            assert_spread(0.02, parameter)


def test_perceiver_latents_are_of_order_one():
    assert_spread(1.0, build_connector("perceiver_resampler", 64, 96, depth=1).latents)


def test_hunyuan_special_tokens():
    connector = build_connector("hunyuan_merger", 64, 256)
    assert_spread(256**-0.5, connector.image_begin, connector.image_end, connector.image_newline, rel=0.2)


def test_spatial_aggregator():
    connector = build_connector("spatial_aggregator", 64, 96, input_grid=(64, 64), grid=4, hidden_size=256)
    assert_spread(256**-0.5, connector.query, rel=0.2)
    for layer in connector.layers:
        assert_spread(1.0, layer.windows[0].positions)


def test_abstractor_positions():
    for name, table in (("c_abstractor", "pos_emb"), ("d_abstractor", "v_pos_emb")):
        connector = build_connector(name, 64, 96, input_grid=(8, 8), hidden_size=64, depth=1)
        assert_spread(0.02, getattr(connector, table))


def test_mamba_starts_with_the_published_decays_and_steps():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer = build_connector("vss", 64, 64).mixer
    reference = MambaMixer(MambaConfig(hidden_size=64, num_hidden_layers=1), 0)
    assert torch.allclose(mixer.A_log, reference.A_log) and torch.equal(mixer.D, reference.D)
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 0.99e-3 and steps.max() <= 0.101
    assert_spread(reference.dt_proj.weight.std().item(), mixer.dt_proj.weight)
