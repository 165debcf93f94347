"""Gradients reach every parameter; bfloat16 stays finite; dropout, scans, instructions and merge order."""

import pytest
import torch
from connector_parity import joined, relative_error
from connector_samples import VARIANTS, C, D, features, instruction, small, variant_id
from reference_tools import block_order, rescaled

from vlmtrain.connectors import VisionFeatures, build_connector
from vlmtrain.connectors.vss import scan_orders, selective_scan

torch.set_num_threads(1)
EACH = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)


@EACH
def test_every_parameter_gets_a_gradient(variant):
    name, options = variant
    torch.manual_seed(0)
    connector = small(name, **options)
    output = joined(connector(features(connector, (6, 6)), **instruction(connector)))
    output.backward(torch.randn_like(output))
    # In the last layer the feed-forward part for the instruction cannot influence the queries.
    unseen = "core.layers.2.text_ffn." if name == "qformer" and connector.reads_text else None
    for key, parameter in connector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or (unseen and key.startswith(unseen)), key


@EACH
def test_bfloat16(variant):
    name, options = variant
    torch.manual_seed(0)
    connector = small(name, **options).to(torch.bfloat16)
    inputs = features(connector, (6, 6), dtype=torch.bfloat16)
    output = joined(connector(inputs, **instruction(connector)))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    output.backward(torch.randn_like(output))
    assert all(parameter.grad.isfinite().all() for parameter in connector.parameters())


@EACH
def test_inputs_are_not_modified(variant):
    name, options = variant
    connector = small(name, **options)
    inputs = features(connector, (6, 6))
    encoders = inputs if isinstance(connector.in_dim, tuple) else (inputs,)
    before = [encoder.patches.clone() for encoder in encoders]
    connector(inputs, **instruction(connector))
    assert all(torch.equal(encoder.patches, copy) for encoder, copy in zip(encoders, before, strict=True))


@EACH
def test_state_dict_round_trip(variant):
    name, options = variant
    torch.manual_seed(0)
    first, second = (small(name, **options).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    inputs, text = features(first, (6, 6)), instruction(first)
    assert torch.equal(joined(first(inputs, **text)), joined(second(inputs, **text)))


@pytest.mark.parametrize("grid", [(4, 6), (2, 8)])
def test_merging_raster_equals_the_reference_on_block_order(grid):
    """The published merger merges four consecutive rows; with raster order it would merge different patches."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    torch.manual_seed(0)
    reference = rescaled(PatchMerger(D, C, 2))
    connector = small("qwen2_vl_merger")
    connector.load_published(reference.state_dict())
    patches = torch.randn(1, *grid, C)
    merged = connector(VisionFeatures(patches))[0]
    assert relative_error(merged, reference(block_order(patches)[0])) < 1e-6
    assert relative_error(merged, reference(patches.flatten(0, 2))) > 1e-2


def test_block_order_is_that_of_the_processor():
    raster = torch.arange(24.0).reshape(1, 4, 6, 1)
    assert block_order(raster)[0, :8, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]


def test_square_number_of_patches_is_not_taken_for_a_square():
    connector = small("pixel_shuffle")
    patches = torch.randn(1, 2, 8, C)
    wide = connector(VisionFeatures(patches))
    assert not torch.allclose(wide, connector(VisionFeatures(patches.reshape(1, 4, 4, C))))


def test_prefix_is_read_by_query_transformers_only():
    for name, options in VARIANTS:
        connector = small(name, **options).eval()
        inputs, text = features(connector, (6, 6)), instruction(connector)
        several = isinstance(connector.in_dim, tuple)
        bare = tuple(f._replace(prefix=None) for f in inputs) if several else inputs._replace(prefix=None)
        same = torch.equal(joined(connector(inputs, **text)), joined(connector(bare, **text)))
        assert same == (name not in ("qformer", "meq_former", "idefics_resampler")), name


def test_instruction_changes_the_queries_and_padding_does_not():
    torch.manual_seed(0)
    options = {"num_queries": 5, "hidden_size": 32, "depth": 3, "num_heads": 4, "intermediate_size": 48}
    for name in ("qformer", "meq_former"):
        connector = rescaled(small(name, text_vocab=50, **options))
        inputs = features(connector, (4, 4))
        ids, mask = torch.randint(50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
        output = connector(inputs, ids, mask)
        assert relative_error(connector(inputs, (ids + 1) % 50, mask), output) > 1e-3
        padded, padded_mask = torch.cat([ids, ids], dim=1), torch.cat([mask, ~mask], dim=1)
        assert relative_error(connector(inputs, padded, padded_mask), output) < 1e-5


def test_qformer_core_runs_the_three_passes_of_stage_one():
    """Query-only, text-only, matching and captioning masks equal Hugging Face's Q-Former."""
    from reference_querying import qformer_reference
    from reference_tools import hf, hf_config

    torch.manual_seed(0)
    reference = qformer_reference(C, use_qformer_text_input=True, num_hidden_layers=3)
    reference.qformer.config._attn_implementation = "sdpa"  # the implementation that accepts boolean masks
    config = hf_config("blip_2", "Blip2QFormerConfig", vocab_size=50, hidden_size=32)
    reference.embeddings = hf("blip_2", "Blip2TextEmbeddings")(config)
    reference.query_tokens = torch.nn.Parameter(torch.empty(1, 5, 32))
    reference.language_projection = torch.nn.Linear(32, D)
    rescaled(reference)
    connector = small(
        "qformer", num_queries=5, hidden_size=32, depth=3, num_heads=4, intermediate_size=64, text_vocab=50
    ).eval()
    connector.load_published(reference.state_dict())

    vision, ids = torch.randn(2, 9, C), torch.randint(50, (2, 4))
    queries, causal = reference.query_tokens.expand(2, -1, -1), torch.ones(4, 4, dtype=torch.bool).tril()
    everything = torch.ones(2, 9, 9, dtype=torch.bool)
    captioning = everything.clone()
    captioning[:, :5, 5:] = False  # queries do not see the caption
    captioning[:, 5:, 5:] = causal
    apart = everything.clone()
    apart[:, :5, 5:] = apart[:, 5:, :5] = False
    text = reference.embeddings(ids)

    def close(ours, embeds, length, mask, **kwargs):
        mask = None if mask is None else mask[:, None]
        theirs = reference.qformer(query_embeds=embeds, query_length=length, attention_mask=mask, **kwargs)
        assert relative_error(ours, theirs.last_hidden_state) < 1e-5

    joint = torch.cat([queries, text], dim=1)
    close(connector.core(vision), queries, 5, None, encoder_hidden_states=vision)
    close(connector.core(text_ids=ids), text, 0, None)
    for mask in (everything, captioning, apart):
        close(connector.core(vision, ids, mask), joint, 5, mask, encoder_hidden_states=vision)
    both = connector.core(vision, ids, apart)
    assert relative_error(both[:, :5], connector.core(vision)) < 1e-5
    assert relative_error(both[:, 5:], connector.core(text_ids=ids)) < 1e-5


def test_scan_orders_on_a_labeled_grid():
    """0 1 2
    3 4 5"""
    assert scan_orders(2, 3, "bidirectional").tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    assert scan_orders(2, 3, "cross").tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 3, 1, 4, 2, 5],
        [5, 2, 4, 1, 3, 0],
    ]


def test_both_scans_see_the_whole_image_and_flip_with_it():
    torch.manual_seed(0)
    for scan in ("bidirectional", "cross"):
        connector = small("vss", scan=scan)
        patches = torch.randn(1, 4, 5, C, requires_grad=True)
        output = connector(VisionFeatures(patches))
        turned = connector(VisionFeatures(patches.flip(1, 2)))
        assert torch.allclose(turned, output.flip(1), atol=1e-5)
        (gradient,) = torch.autograd.grad(output[0, 7].sum(), patches)
        assert gradient.abs().sum(-1).all()


def test_scan_in_pieces_equals_the_recurrence():
    """The scan is longer than one chunk; outputs and gradients are compared."""
    torch.manual_seed(0)
    length, width, states = 150, 3, 2
    a = -torch.rand(width, states)
    x, step = torch.randn(1, length, width, requires_grad=True), torch.rand(1, length, width)
    b, c = torch.randn(1, length, states), torch.randn(1, length, states)
    state, outputs = torch.zeros(width, states), []
    for t in range(length):
        state = torch.exp(step[0, t, :, None] * a) * state + step[0, t, :, None] * b[0, t] * x[0, t, :, None]
        outputs.append(state @ c[0, t])
    expected = torch.stack(outputs)
    actual = selective_scan(x, step, a, b, c)[0]
    assert relative_error(actual, expected) < 1e-5
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (actual, expected))
    assert relative_error(ours, theirs) < 1e-5


def test_meq_former_hides_encoders_in_training_only():
    torch.manual_seed(0)
    connector = small("meq_former", encoder_dropout=0.5, depth=1, hidden_size=32, num_heads=4)
    parts = [torch.zeros(4000, 3, 1), torch.zeros(4000, 2, 1)]
    mask = connector.encoder_mask(parts)
    first, second = mask[:, :3], mask[:, 3:]
    assert (first == first[:, :1]).all() and (second == second[:, :1]).all()
    assert mask.any(1).all(), "at least one encoder is always seen"
    # Each encoder is hidden with probability 1/2, except in the quarter of cases in which both would be.
    for part in (first, second):
        assert abs(part[:, 0].float().mean() - 0.75) < 0.03
    assert connector.eval().encoder_mask(parts) is None


def test_meq_former_accepts_encoders_of_unequal_grids_and_a_single_one():
    connector = small("meq_former", depth=2, hidden_size=32, num_heads=4)
    wide, narrow = torch.randn(2, 4, 4, C), torch.randn(2, 3, 5, 12)
    assert connector((VisionFeatures(wide), VisionFeatures(narrow))).shape == (2, 64, D)
    single = build_connector("meq_former", C, D, depth=2, hidden_size=32, num_heads=4)
    assert single(VisionFeatures(wide)).shape == (2, 32, D)


def test_spatial_aggregator_reads_the_windows_of_a_query_only():
    """Of the first encoder it also reads the mean of all patches."""
    torch.manual_seed(0)
    grids = (3, 6), (6, 12)
    options = {"grid": 3, "hidden_size": 32, "depth": 2, "num_heads": 4}
    connector = rescaled(build_connector("spatial_aggregator", (C, 12), D, input_grid=grids, **options))
    coarse, fine = torch.randn(1, 3, 6, C, requires_grad=True), torch.randn(1, 6, 12, 12, requires_grad=True)
    output = connector((VisionFeatures(coarse), VisionFeatures(fine)))[0].unflatten(0, (3, 3))
    for row, column in ((0, 0), (1, 2), (2, 1)):
        of_coarse, of_fine = torch.autograd.grad(output[row, column].sum(), (coarse, fine), retain_graph=True)
        read = of_fine[0].abs().sum(-1) > 0
        assert read[2 * row : 2 * row + 2, 4 * column : 4 * column + 4].all() and read.sum() == 8
        assert (of_coarse[0].abs().sum(-1) > 0).all()
    changed = fine.detach().clone()
    changed[0, 3, 9] += 1.0  # in the window of row 1, column 2
    moved = connector((VisionFeatures(coarse), VisionFeatures(changed)))[0].unflatten(0, (3, 3)) - output
    assert (moved.abs() > 1e-5).any(-1).nonzero().tolist() == [[1, 2]]


def test_deformable_attention_starts_with_evenly_spaced_directions():
    """Directions of the heads are evenly spaced, point i is i patches away; weights are equal."""
    layer = small("d_abstractor", grid=3, hidden_size=32, depth=1, num_heads=4).layers[0].encoder_attn
    offsets = layer.sampling_offsets.bias.detach().reshape(4, 4, 2)
    for head, direction in enumerate(([1, 0], [0, 1], [-1, 0], [0, -1])):
        for point in range(4):
            expected = torch.tensor(direction) * (point + 1.0)
            assert torch.allclose(offsets[head, point], expected, atol=1e-5)
    assert not layer.attention_weights.weight.any() and not layer.sampling_offsets.weight.any()


def test_reference_points_start_on_patch_centers():
    points = small("d_abstractor", (3, 6), grid=3, hidden_size=32, depth=1).reference_points[0]
    assert torch.allclose(points[0], torch.tensor([0.5 / 6, 0.5 / 3]))
    assert torch.allclose(points[1], torch.tensor([0.5, 0.5 / 3]))
    assert torch.allclose(points[-1], torch.tensor([5.5 / 6, 2.5 / 3]))
