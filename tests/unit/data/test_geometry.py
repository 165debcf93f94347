"""Plans: how images are shown and how many tokens they become, from their sizes alone."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from vlmtrain.connectors.checks import GridError
from vlmtrain.data.cached_features import pixel_key
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.images import show_items
from vlmtrain.data.native_sizes import naflex, smart_resize
from vlmtrain.visual import WHOLE, Item, normalized

LOOK = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def native(connector: str, pixels: tuple[int, int], multiple: int = 1, patch: int = 14, **options) -> Geometry:
    config = {"name": connector, "in_dim": 8, "out_dim": 8, **options}
    more = {"patch_size": (patch, patch), "image_pixels": pixels, "multiple": multiple, "connector": config}
    return Geometry((224, 224), "native", **LOOK, tokens=0, **more)


# The sizes of transformers' Qwen2-VL processor for these images.
@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (3136, 12_845_056), (476, 644)),
        ((70, 112), (3136, 12_845_056), (56, 112)),  # 70 is 2.5 * 28, which Python rounds to the even number
        ((4000, 6000), (3136, 12_845_056), (2912, 4368)),
        ((20, 30), (3136, 12_845_056), (56, 84)),
        ((480, 640), (3136, 100_000), (252, 364)),
    ],
)
def test_sizes_are_those_of_qwen2_vl(size, limits, expected):
    from transformers.models.qwen2_vl import image_processing_qwen2_vl as theirs

    assert smart_resize(size, (28, 28), limits) == expected
    assert theirs.smart_resize(*size, factor=28, min_pixels=limits[0], max_pixels=limits[1]) == expected


def test_sizes_are_those_of_naflex():
    from transformers.models.siglip2 import image_processing_pil_siglip2 as theirs

    draw = random.Random(2)
    for _ in range(200):
        size, patches = (draw.randint(1, 2000), draw.randint(1, 2000)), draw.choice((64, 256, 1024))
        expected = theirs.get_image_size_for_max_num_patches(*size, 16, patches)
        assert naflex(size, (16, 16), (256 * patches, 256 * patches)) == expected
    assert naflex((480, 640), (16, 16), (65_536, 65_536)) == (14 * 16, 18 * 16)
    # within the limits, only rounded up; outside, as close to the limit as whole patches allow
    assert naflex((100, 150), (16, 16), (256, 65_536)) == (112, 160)
    assert naflex((20, 20), (16, 16), (4_096, 65_536)) == (64, 64)


def test_sizes_are_multiples_within_the_limits_and_keep_the_aspect_ratio():
    draw = random.Random(0)
    for _ in range(500):
        size, factors = (draw.randint(1, 3000), draw.randint(1, 3000)), (draw.choice((14, 28)), draw.choice((14, 28)))
        if max(size) > 200 * min(size):
            continue
        limits = sorted((draw.randint(784, 60_000), draw.choice((800, 50_176, 120_000, 2_000_000))))
        height, width = smart_resize(size, factors, limits)
        assert height % factors[0] == width % factors[1] == 0 and height >= factors[0] and width >= factors[1]
        assert height * width <= limits[1]
        if limits[1] < 120_000:
            continue  # there may be no such multiples with the aspect ratio within the limits
        assert (height + factors[0]) * (width + factors[1]) >= limits[0]
        if min(height // factors[0], width // factors[1]) > 1:
            near = [side / shown for side, shown in zip(size, (height, width))]
            assert max(near) / min(near) < 2.1


def test_every_image_is_counted_on_its_own_grid():
    geometry = native("avgpool", (28 * 28, 280 * 280), multiple=2)
    items, placements = geometry.plan([(56, 84), (280, 28), (1000, 1000)])
    assert [item.pixels for item in items] == [((56, 84),), ((280, 28),), ((280, 280),)]
    assert [item.grids for item in items] == [((4, 6),), ((20, 2),), ((20, 20),)]
    assert [placement.out_grid for placement in placements] == [(2, 3), (10, 1), (10, 10)]
    assert (
        [placement.slots for placement in placements] == [placement.tokens for placement in placements] == [6, 10, 100]
    )
    assert [placement.items for placement in placements] == [(0,), (1,), (2,)]


def test_the_largest_number_of_tokens_is_reached_and_not_exceeded():
    draw = random.Random(1)
    for name, multiple in (("linear", 1), ("qwen2_vl_merger", 2), ("hunyuan_merger", 2)):
        geometry = native(name, (784, 50_000), multiple)
        drawn = [(draw.randint(10, 1500), draw.randint(10, 1500)) for _ in range(800)]
        thin = [(50_000 // width // 14 * 14, width) for width in range(14, 60, 14)]  # more newlines
        counts = [geometry.plan([size]).placements[0].tokens for size in (*drawn, *thin)]
        assert max(counts) == geometry.most_tokens


def test_a_grid_that_the_connector_does_not_take_is_refused_before_anything_is_decoded():
    with pytest.raises(GridError, match=r"grid 4x6: c_abstractor was built for input_grid 16x16"):
        native("c_abstractor", (784, 50_000), input_grid=[16, 16], grid=2).plan([(56, 84)])


@pytest.mark.parametrize("limits", [(600, 650), (576, 576), (4096, 4096), (1, 10**7)])
def test_no_image_is_larger_than_the_largest(limits):
    geometry, draw = native("linear", limits, patch=12), random.Random(2)
    most, largest = geometry.most_tokens, geometry.largest
    for size in [(1, 1), (649, 11), (11, 649), *((draw.randint(1, 99), draw.randint(1, 99)) for _ in range(300))]:
        (item,), (placement,) = geometry.plan([size])
        assert item.pixels[0][0] * item.pixels[0][1] <= largest[0] * largest[1] <= limits[1]
        assert placement.tokens <= most
    assert geometry.least_tokens <= most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_pixels": (100, 195)}, "expected a MAX of at least one window, 196"),
        ({"image_pixels": None}, "needs image_pixels"),
        ({"image_pixels": (9, 4)}, "needs image_pixels"),
        ({"connector": None}, "a connector whose tokens enter the text"),
    ],
)
def test_native_without_what_it_needs_is_refused(change, message):
    settings = {"patch_size": (14, 14), "image_pixels": (4, 9), "connector": {"name": "linear"}, **change}
    with pytest.raises(ValueError, match=message):
        Geometry((28, 28), "native", **LOOK, tokens=0, **settings)


def test_an_image_of_its_own_size_is_shown_completely():
    geometry = native("linear", (784, 50_000))
    image = Image.linear_gradient("L").convert("RGB").resize((84, 56))
    shown = normalized(*show_items(image, geometry.plan([(56, 84)]).items, geometry.mean), geometry.mean, geometry.std)
    levels = torch.tensor(list(image.getdata())).reshape(56, 84, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(shown, (levels - 0.5) / 0.5)


def test_a_box_is_the_part_of_the_canvas():
    """Four tiles of a canvas of 2 x 2, put together again, are the canvas."""
    image = Image.radial_gradient("L").convert("RGB").resize((64, 48))
    boxes = [(x / 2, y / 2, (x + 1) / 2, (y + 1) / 2) for y in (0, 1) for x in (0, 1)]
    items = [Item(0, "tile", ("contain",), box, (), ((24, 32),), ()) for box in boxes]
    whole = Item(0, "image", ("contain",), WHOLE, (), ((48, 64),), ())
    tiles, (canvas,) = show_items(image, items, (0,) * 3), show_items(image, [whole], (0,) * 3)
    rows = [torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)]
    assert torch.cat(rows, 1).equal(canvas)


def test_keys_of_images_with_equal_bytes_but_other_shapes_differ():
    wide, tall = torch.zeros(3, 2, 4), torch.zeros(3, 4, 2)
    assert pixel_key(wide, with_shape=False) == pixel_key(tall, with_shape=False)
    assert pixel_key(wide, with_shape=True) != pixel_key(tall, with_shape=True)


def patches(limits: tuple[int, int], largest: tuple[int, int] = (60, 90)) -> Geometry:
    config = {"name": "linear", "in_dim": 8, "out_dim": 8}
    more = {"patch_size": (10, 10), "image_pixels": limits, "connector": config, "size_rule": "padded"}
    return Geometry(largest, "native", **LOOK, tokens=0, **more)


@pytest.mark.parametrize(
    ("limits", "size", "scaled"),
    [
        ((1, 5400), (17, 31), (17, 31)),
        ((1, 5400), (60, 90), (60, 90)),
        ((1, 5400), (120, 90), (60, 45)),
        ((1, 5400), (50, 200), (22, 90)),
        ((1, 5400), (200, 1), (60, 1)),
        ((1, 1000), (60, 90), (20, 31)),  # at most 10 patches
        ((2000, 5400), (10, 10), (40, 40)),  # at most 20 patches, as many as fit
        ((2000, 5400), (1, 30), (3, 90)),  # not wider than the largest
    ],
)
def test_raw_patches_are_padded(limits, size, scaled):
    """An image keeps its size, in the upper left corner of whole patches, unless it is beyond a limit."""
    geometry = patches(limits)
    (item,), _ = geometry.plan([size])
    shown = tuple(-(-side // 10) * 10 for side in scaled)
    assert item.canvas() == scaled and item.pixels == (shown,)
    image = Image.new("RGB", size[::-1], (200, 100, 50))
    (pixels,) = show_items(image, [item], geometry.mean)
    height, width = scaled
    assert pixels.shape[1:] == shown
    assert (pixels[:, :height, :width] == torch.tensor([200, 100, 50])[:, None, None]).all()
    assert (pixels[:, height:] == 1).all() and (pixels[:, :, width:] == 1).all()
    frame = geometry.map(size)
    left, top, right, bottom = frame.place((0, 0, size[1], size[0]))
    assert (left, top) == (0, 0) and (round(bottom), round(right)) == scaled and frame.seen == shown[::-1]
    assert frame.back((left, top, right, bottom)) == pytest.approx((0, 0, size[1], size[0]))


@pytest.mark.parametrize("limits", [(1, 5400), (1, 2000), (1, 10**6), (300, 4000)])
def test_no_padded_image_is_larger_than_the_largest(limits):
    geometry, draw, counts = patches(limits), random.Random(3), []
    drawn = [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(400)]
    for size in [*drawn, (60, 90), (60, 30), (33, 60), (1, 1)]:
        (item,), (placement,) = geometry.plan([size])
        height, width = item.pixels[0]
        assert height <= 60 and width <= 90 and height * width <= limits[1] and height % 10 == width % 10 == 0
        counts.append(placement.tokens)
    assert max(counts) == geometry.most_tokens and min(counts) >= geometry.least_tokens
