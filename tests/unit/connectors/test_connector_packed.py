"""Images with unequal grids: packed features give what one image at a time gives, in calls that ranks agree on."""

from collections import Counter

import pytest
import torch
from connector_parity import relative_error
from connector_samples import SEVERAL, SMALL, VARIANTS, C, D, instruction, small, variant_id
from reference_tools import rescaled
from torch import nn

from vlmtrain.connectors import CONNECTORS, Connector, PackedFeatures, VisionFeatures, build_connector
from vlmtrain.connectors.checks import GridError
from vlmtrain.connectors.mlp import MLP

torch.set_num_threads(1)

ONE_CALL = {
    "linear",
    "mlp",
    "avgpool",
    "attentional_pool",
    "qwen_vl_resampler",
    "qwen2_vl_merger",
    "qwen2_5_vl_merger",
    "qwen3_vl_merger",
    "qformer",
    "perceiver_resampler",
    "idefics_resampler",
    "meq_former",
    "pixel_shuffle",
    "token_packer",
}
UNEQUAL = (  # a connector gets the first that it takes
    ((5, 7), (8, 8), (3, 12)),
    ((4, 6), (8, 8), (2, 12)),
    ((3, 6), (9, 9), (6, 12)),
    ((6, 6), (6, 6), (6, 6)),
)


class Mixing(Connector):
    """A user's connector: it mixes patches, reads levels, returns levels, and overrides only `forward`."""

    num_levels = 1

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.first, self.second = nn.Linear(in_dim, out_dim), nn.Linear(in_dim, out_dim)

    def output_grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def forward(self, features):
        x = self.first(features.patches)
        x = x + x.mean(1, keepdim=True) + self.second(features.prefix).mean(1)[:, None, None]
        return x.flatten(1, 2), (self.second(features.levels[0]).cumsum(2).flatten(1, 2),)


class Centered(MLP):
    """A connector with an own `forward` on a base class with an own `forward_packed`."""

    def forward(self, features):
        tokens = super().forward(features)
        return tokens - tokens.mean(1, keepdim=True)


USERS = {"mixing": Mixing, "centered": Centered}
CASES = [*VARIANTS, *((name, {}) for name in USERS)]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case[0] if case[0] in USERS else variant_id(case))


def build(case, dtype=torch.float64) -> Connector:
    name, options = case
    torch.manual_seed(0)
    return rescaled(USERS[name](C, D) if name in USERS else small(name, **options)).to(dtype)


def accepted(connector: Connector) -> tuple[tuple[int, int], ...]:
    for grids in UNEQUAL:
        try:
            for grid in grids:
                connector.num_tokens(*grid)
        except GridError:
            continue
        return grids
    raise AssertionError("no grids for this connector")


def packed(connector: Connector, grids, dtype=torch.float64):
    """Random packed features; the second of two encoders has other grids."""

    def one(width: int, grids) -> PackedFeatures:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, width, dtype=dtype, requires_grad=True)

        size = sum(height * width for height, width in grids)
        levels = tuple(draw(size) for _ in range(connector.num_levels))
        return PackedFeatures(draw(size), tuple(grids), draw(len(grids), 2), levels)

    if isinstance(connector.in_dim, tuple):
        return tuple(one(width, grids if i == 0 else grids[::-1]) for i, width in enumerate(connector.in_dim))
    return one(connector.in_dim, grids)


def image(features, index: int):
    """The features of one image, as a batch of one."""
    if not isinstance(features, PackedFeatures):
        return tuple(image(encoder, index) for encoder in features)
    start = sum(height * width for height, width in features.grids[:index])
    height, width = features.grids[index]

    def cut(x):
        return x[start : start + height * width].reshape(1, height, width, -1)

    return VisionFeatures(cut(features.patches), features.prefix[index, None], tuple(map(cut, features.levels)))


def parts(output) -> list[torch.Tensor]:
    return [output[0], *output[1]] if isinstance(output, tuple) else [output]


def one_at_a_time(connector: Connector, features, count: int, text: dict) -> list[list[torch.Tensor]]:
    """Tokens, and levels if there are any, of each image."""
    rows = [{key: value[i, None] for key, value in text.items()} for i in range(count)]
    return [[part[0] for part in parts(connector(image(features, i), **rows[i]))] for i in range(count)]


def gradients(outputs: list[torch.Tensor], features, connector: Connector) -> list[torch.Tensor]:
    encoders = (features,) if isinstance(features, PackedFeatures) else features
    leaves = [x for encoder in encoders for x in (encoder.patches, encoder.prefix, *encoder.levels)]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    weights = [weight for weight in connector.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss, [*leaves, *weights], materialize_grads=True)


def close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        a.shape == e.shape and ((a - e).norm() <= 1e-6 * e.norm().clamp(min=1e-3))
        for a, e in zip(actual, expected, strict=True)
    )


@EACH
def test_packed_equals_one_image_at_a_time(case):
    connector = build(case)
    first, second, third = accepted(connector)
    grids = (second, first, third, first)  # not sorted, and one grid twice with others in between
    features, text = packed(connector, grids), instruction(connector, len(grids))
    if text:
        text["text_mask"] = torch.arange(6) < torch.tensor([[4], [6], [1], [2]])
    output = connector(features, **text)
    alone = one_at_a_time(connector, features, len(grids), text)
    assert [len(image[0]) for image in alone] == [connector.num_tokens(*grid) for grid in grids]
    assert isinstance(output, tuple) == (len(alone[0]) > 1)
    expected = [torch.cat(part) for part in zip(*alone, strict=True)]
    assert close(parts(output), expected)
    assert close(gradients(parts(output), features, connector), gradients(expected, features, connector))


@EACH
def test_equal_grids_need_no_mask(case):
    """Then packed features give exactly what a batch gives, where the operations are the same."""
    connector = build(case)
    grid = accepted(connector)[1]
    features, text = packed(connector, (grid, grid)), instruction(connector, 2)
    encoders = (features,) if isinstance(features, PackedFeatures) else features
    batch = tuple(
        VisionFeatures(
            encoder.patches.unflatten(0, (2, *grid)),
            encoder.prefix,
            tuple(level.unflatten(0, (2, *grid)) for level in encoder.levels),
        )
        for encoder in encoders
    )
    masks = []
    attend = nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
        output = connector(features, **text)
        seen = len(masks)
        expected = connector(batch[0] if isinstance(features, PackedFeatures) else batch, **text)
    assert [mask is None for mask in masks[:seen]] == [mask is None for mask in masks[seen:]]
    if not text and grid[0] % connector.multiple == 0:
        assert all(mask is None for mask in masks)
    assert close(parts(output), [part.flatten(0, 1) for part in parts(expected)])


@EACH
def test_bfloat16(case):
    connector = build(case, torch.bfloat16)
    grids = accepted(connector)
    output = connector(packed(connector, grids, torch.bfloat16), calls=5, **instruction(connector, 3))
    assert all(part.dtype == torch.bfloat16 and part.isfinite().all() for part in parts(output))


def counted(connector: Connector, features, **options):
    """Output, and the calls of the connector itself, named "", and of each submodule with parameters of its own."""
    calls = Counter()
    modules = [(name, module) for name, module in connector.named_modules() if not name or module._parameters]
    hooks = [module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in modules]
    output = connector(features, **options)
    for hook in hooks:
        hook.remove()
    return output, calls


@EACH
def test_calls_do_not_depend_on_the_grids(case):
    name, _ = case
    connector = build(case)
    grids, text = accepted(connector), instruction(connector, 3)
    _, alone = counted(connector, image(packed(connector, grids), 0), **{key: rows[:1] for key, rows in text.items()})
    if name != "mixing" and not text:
        assert set(alone.values()) == {1}
    times = 1 if name in ONE_CALL else 5
    expected = {module: count * times if module else 1 for module, count in alone.items()}
    for some in (grids, grids[:1] * 3, (grids[1], grids[0], grids[1])):
        features = packed(connector, some)
        output, calls = counted(connector, features, calls=5, **text)
        assert calls == expected
        fewer = connector(features, **text)
        assert all(torch.equal(a, b) for a, b in zip(parts(output), parts(fewer), strict=True))
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(gradients(parts(each), features, connector) for each in (output, fewer)), strict=True)
        )


@pytest.mark.parametrize("name", ["ldp", "mixing"])
def test_missing_calls_also_run_backward(name):
    """A frozen connector between a trained encoder and a language model is gathered in the backward pass too."""
    connector = build((name, {})).requires_grad_(False)
    backward = Counter()
    for key, module in connector.named_modules():
        if key and module._parameters:
            module.register_full_backward_hook(lambda *_, key=key: backward.update([key]))
    for grids in (((5, 7),), ((5, 7), (3, 4), (8, 2))):
        backward.clear()
        features = packed(connector, grids)
        sum(part.sum() for part in parts(connector(features, calls=4))).backward()
        assert set(backward.values()) == ({4} if name == "ldp" else {4, 8})


def test_missing_calls_use_the_smallest_grid_and_the_first_text():
    seen = []

    class Reader(Mixing):
        reads_text = True

        def forward(self, features, text_ids, text_mask=None):
            shapes = features.patches.shape, features.prefix.shape, features.levels[0].shape
            blank = not any(x.any() for x in (features.patches, features.prefix, features.levels[0]))
            seen.append((*map(tuple, shapes), blank, text_ids.tolist(), text_mask))
            return super().forward(features)

    connector = Reader(C, D).double()
    features = packed(connector, ((9, 1), (3, 3), (2, 4), (3, 3)))
    connector(features, calls=4, text_ids=torch.arange(4)[:, None], text_mask=None)
    images = [(count, *grid, C) for count, grid in ((1, (2, 4)), (2, (3, 3)), (1, (9, 1)), (1, (2, 4)))]
    assert [call[0] for call in seen] == [call[2] for call in seen] == images
    assert [call[1] for call in seen] == [(count, 2, C) for count in (1, 2, 1, 1)]
    assert [call[3] for call in seen] == [False, False, False, True]
    assert [call[4] for call in seen] == [[[2]], [[1], [3]], [[0]], [[0]]]


def test_the_order_of_groups_does_not_depend_on_the_order_of_images():
    connector = build(("ldp", {}))
    shapes = []
    connector.mlp.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape[:3])))
    for grids in (((3, 4), (8, 2), (3, 4)), ((8, 2), (3, 4), (3, 4))):
        shapes.clear()
        connector(packed(connector, grids))
        assert shapes == [(2, 3, 4), (1, 8, 2)]


def test_features_may_be_passed_by_name():
    for case in (("qformer", SMALL["qformer"]), ("ldp", {})):
        connector = build(case)
        features = packed(connector, accepted(connector))
        assert torch.equal(connector(features=features), connector(features))


def test_encoders_are_hidden_in_training_with_padding():
    connector = build(("meq_former", {**SMALL["meq_former"], "dropout": 0.0})).train()
    grids = ((5, 7), (8, 8), (3, 12))
    features = packed(connector, grids)
    hidden = torch.tensor([[True, False], [False, True], [True, True]])

    def encoder_mask(encoders):
        return torch.cat([rows[:, i, None].expand(-1, x.shape[1]) for i, x in enumerate(encoders)], dim=1)

    connector.encoder_mask, rows = encoder_mask, hidden
    output = connector(features)
    for i in range(3):
        rows = hidden[i, None]
        expected = connector(image(features, i))[0]
        assert relative_error(output.unflatten(0, (3, -1))[i], expected) < 1e-6


def test_meq_former_takes_a_single_encoder_without_a_tuple():
    connector = rescaled(build_connector("meq_former", C, D, depth=2, hidden_size=32, num_heads=4)).double()
    features = packed(small("mlp"), ((5, 7), (2, 3)))
    expected = torch.cat([connector(image(features, i))[0] for i in range(2)])
    assert relative_error(connector(features), expected) < 1e-6
    assert torch.equal(connector((features,)), connector(features))


def test_spatial_aggregator_takes_encoders_with_grids_of_their_own():
    grids = ((3, 6), (6, 12))
    torch.manual_seed(0)
    connector = build_connector("spatial_aggregator", (C, 12), D, input_grid=grids, **SMALL["spatial_aggregator"])
    connector = rescaled(connector).double()
    features = tuple(
        PackedFeatures(torch.randn(2 * height * width, dim).double(), ((height, width),) * 2, torch.zeros(2, 1, dim))
        for (height, width), dim in zip(grids, (C, 12), strict=True)
    )
    expected = torch.cat([connector(image(features, i))[0] for i in range(2)])
    assert close([connector(features)], [expected])


def test_qformer_does_not_read_unequal_sequences_without_their_mask():
    connector = build(("qformer", SMALL["qformer"]))
    assert connector.read(packed(connector, ((2, 3), (3, 2)))).shape == (2, 8, C)
    with pytest.raises(AssertionError, match="not equally long"):
        connector.read(packed(connector, ((2, 3), (3, 3))))


@pytest.mark.parametrize("name", ["c_abstractor", "d_abstractor"])
def test_fixed_tables_take_one_grid(name):
    connector = build((name, SMALL[name]))  # built for 6x6
    assert connector(packed(connector, ((6, 6), (6, 6)))).shape == (18, D)
    with pytest.raises(GridError, match=r"grid 4x9: .* built for input_grid 6x6"):
        connector(packed(connector, ((6, 6), (4, 9))))


def test_multiple():
    multiples = {
        "avgpool": 2,
        "attentional_pool": 2,
        "qwen2_vl_merger": 2,
        "qwen2_5_vl_merger": 2,
        "qwen3_vl_merger": 2,
        "hunyuan_merger": 2,
        "pixel_shuffle": 2,
        "token_packer": 2,
    }
    for name in CONNECTORS:
        assert small(name, **SMALL[name]).multiple == multiples.get(name, 1), name
    for name, option in (("avgpool", "window"), ("pixel_shuffle", "factor"), ("hunyuan_merger", "factor")):
        assert small(name, **{option: 3}).multiple == 3
    assert Mixing(C, D).multiple == 1


def nothing_runs(connector: Connector) -> Connector:
    def refuse(module, *_):
        raise AssertionError(f"{type(module).__name__} ran")

    for module in connector.modules():
        if module is not connector:
            module.register_forward_pre_hook(refuse)
    return connector


@pytest.mark.parametrize("name", [*(name for name in SMALL if name not in SEVERAL), "mixing"])
def test_packed_features_that_do_not_fit(name):
    connector = nothing_runs(build((name, SMALL.get(name, {}))))
    grids = accepted(connector)
    good = packed(connector, grids)
    size = len(good.patches)
    with pytest.raises(AssertionError, match="ran"):
        connector(good)
    bad = [
        (good._replace(patches=torch.randn(size, C + 1)), r"features.patches: expected width 16 .* got 17"),
        (good._replace(patches=torch.randn(1, size, C)), r"features.patches: expected \(N, C\), got 3"),
        (good._replace(patches=good.patches[1:]), rf"features.patches: expected {size} patches, .* got {size - 1}"),
        (good._replace(prefix=torch.randn(3, 1, C + 1)), r"features.prefix: expected width 16 .* got 17"),
        (good._replace(prefix=torch.randn(3, C)), r"features.prefix: expected \(B, P, C\), got 2"),
        (good._replace(prefix=torch.randn(2, 1, C)), r"features.prefix: expected the batch of patches, 3, got 2"),
        (good._replace(grids=()), r"features.grids: expected the grid of at least one image"),
        (good._replace(grids=(), patches=good.patches[:0]), r"features.grids: expected the grid of at least one"),
        ((good, good), r"takes the VisionFeatures of one encoder, got 2 encoders"),
    ]
    if connector.num_levels:
        level = torch.randn(size - 1, C)
        bad += [
            (good._replace(levels=()), rf"expected {connector.num_levels} hidden layers .* got 0"),
            (good._replace(levels=(level, *good.levels[1:])), r"levels\[0\]: expected the shape of patches"),
        ]
    for features, message in bad:
        with pytest.raises(ValueError, match=message):
            connector(features)
    with pytest.raises(GridError, match=r"grid 0x5: expected at least one row"):
        connector(good._replace(grids=(*grids, (0, 5)), prefix=None))


@pytest.mark.parametrize("name", ["avgpool", "attentional_pool", "qwen3_vl_merger", "hunyuan_merger", "token_packer"])
def test_a_grid_that_is_not_taken_is_named(name):
    connector = nothing_runs(build((name, SMALL[name])))
    with pytest.raises(GridError, match="grid 1x5"):
        connector(packed(connector, ((4, 4), (1, 5), (6, 8))))


def test_meq_former_checks_its_encoders():
    connector = nothing_runs(build(("meq_former", SMALL["meq_former"])))
    first, second = packed(connector, ((5, 7), (2, 3)))
    for features, message in (
        (first, r"built for 2 encoders .* got features of 1"),
        ((first, second, second), r"built for 2 encoders .* got features of 3"),
        ((second, first), r"features.patches: expected width 16 .* got 12"),
        ((first, second._replace(patches=second.patches[1:])), r"expected 41 patches"),
        ((first, second._replace(grids=((41, 1),), prefix=None)), r"same images from each encoder, got \[2, 1\]"),
        ((first, second._replace(grids=())), r"at least one image"),
        ((first, second._replace(prefix=second.prefix[:1])), r"features.prefix: expected the batch of patches, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            connector(features)
