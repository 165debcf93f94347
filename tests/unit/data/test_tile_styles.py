"""InternVL's, nanoVLM's and Molmo2's tiles, compared with transformers and with the published formula."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from fractions import Fraction
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor, select_tiling

from vlmtrain.connectors import VisionFeatures
from vlmtrain.connectors.layers import each_image
from vlmtrain.connectors.pooling import _windows
from vlmtrain.data.geometry import Geometry, View
from vlmtrain.data.images import ImageInMemory, show_items
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.data.tile_styles import TILE_STYLES, Molmo2
from vlmtrain.model.joining import _canvases

UP_TO_12 = tuple((rows, columns) for rows in range(1, 13) for columns in range(1, 13) if rows * columns <= 12)
LONGEST_4 = tuple(grid for n in range(1, 5) for grid in ((4, n), (n, 4)))
UP_TO_4 = tuple((rows, columns) for rows in range(1, 5) for columns in range(1, 5))


def sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    some = [(64, 64), (400, 500), (2000, 2500), (500, 500), (5000, 5000), (448, 896), (896, 448), (1, 150)]
    return [*some, *((draw.randint(8, 2500), draw.randint(8, 2500)) for _ in range(count))]


def geometry(style: str, grids, side: int = 32, **more) -> Geometry:
    if style == "molmo2":
        connector = {"name": "avgpool", "in_dim": 4, "out_dim": 4, "window": 2}
        more = {"patch_size": (8, 8), "tile_margin": 1, "connector": connector, **more}
    return Geometry(
        (side, side), "tiles", (0.0,) * 3, (1.0,) * 3, 4, (2, 2), tile_grids=grids, tile_style=style, **more
    )


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 6), (4, 9), (2, 2)])
def test_internvls_grid_is_the_one_that_transformers_chooses(least, most):
    grids = [grid for grid in UP_TO_12 if least <= grid[0] * grid[1] <= most]
    random.Random(1).shuffle(grids)
    for size in sizes(300):
        columns, rows = get_optimal_tiled_canvas(size, (448, 448), least, most)
        assert TILE_STYLES["internvl"].choose(size, (448, 448), grids, 1) == (rows, columns), size


def test_several_images_share_internvls_tiles():
    choose = TILE_STYLES["internvl"].choose
    for size in sizes(100):
        for images in (2, 3, 5, 20):
            columns, rows = get_optimal_tiled_canvas(size, (448, 448), 1, max(1, 12 // images))
            assert choose(size, (448, 448), UP_TO_12, images) == (rows, columns)
    assert choose((100, 200), (448, 448), [(1, 2), (2, 1)], 2) == (1, 1)  # no grid is small enough


@pytest.mark.parametrize("size", [(90, 130), (40, 200), (31, 33)])
def test_internvls_views_are_those_of_transformers(size):
    """Tiles and thumbnail, pixel by pixel and in order."""
    options = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    library = GotOcr2ImageProcessorPil(**options, do_normalize=False, do_rescale=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    plan = geometry("internvl", UP_TO_12).plan([size])
    ours = torch.stack(show_items(image, plan.items, (0.0,) * 3))
    theirs = library(image, return_tensors="np").pixel_values
    assert len(plan.placements) == len(ours) == len(theirs)
    assert sum(placement.slots for placement in plan.placements) == 4 * len(theirs)
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize(("grids", "always"), [(LONGEST_4, True), (UP_TO_4, False)])
def test_nanovlms_grid_follows_from_its_formula(grids, always):
    """Its ``DynamicResize`` in fractions, with tiles of 512 and sides of at most 2048 pixels."""
    for height, width in sizes(300):
        longer, shorter = max(height, width), min(height, width)
        side = 2048 if always else min(2048, math.ceil(Fraction(longer, 512)) * 512)
        other = math.ceil(Fraction(shorter * side, longer * 512)) * 512
        expected = (other // 512, side // 512) if width >= height else (side // 512, other // 512)
        assert TILE_STYLES["nanovlm"].choose((height, width), (512, 512), grids, 1) == expected


def test_nanovlms_tiles_are_cut_from_the_stretched_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    items = geometry("nanovlm", LONGEST_4).plan([(90, 130)]).items
    assert [item.kind for item in items] == ["overview", *["tile"] * 12]
    stretched = np.asarray(image.resize((128, 96), Image.Resampling.BICUBIC))
    shown = [view.numpy() for view in show_items(image, items, (0.0,) * 3)]
    tiles = stretched.reshape(3, 32, 4, 32, 3).transpose(0, 2, 4, 1, 3).reshape(12, 3, 32, 32)
    np.testing.assert_array_equal(np.stack(shown[1:]), tiles)
    np.testing.assert_array_equal(shown[0].transpose(1, 2, 0), image.resize((32, 32), Image.Resampling.BICUBIC))


def noise(width: int, height: int) -> ImageInMemory:
    encoded = BytesIO()
    Image.effect_noise((width, height), 90).save(encoded, "PNG")
    return ImageInMemory(encoded.getvalue(), "noise")


def test_words_stand_before_the_views_and_are_text_in_a_turn(tokenizer):
    words = ["<|global_image|>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)), "[in]", "[out]"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(words)
    grids = ((1, 1), (1, 2), (2, 1), (2, 2))
    shape = geometry("nanovlm", grids, frame=("[in]", "[out]"))
    assert set(shape.view_words) == set(words[:5])
    processor = Processor(tokenizer, shape, "chat", max_length=400)

    def written(*images: ImageInMemory) -> str:
        question = "<image>" * len(images) + " What is <row_1_col_1>?"
        tokens = processor(Conversation("one", (Turn("user", question), Turn("assistant", "red")), images)).tokens
        of_words = tokens.input_ids[tokens.index < 0]
        assert int((of_words == tokenizer.convert_tokens_to_ids("<row_1_col_1>")).sum()) == sum(
            image.size() != (20, 20) for image in images
        )
        ids = torch.where(tokens.index < 0, tokens.input_ids, tokenizer.convert_tokens_to_ids("red"))
        names = tokenizer.convert_ids_to_tokens(ids.tolist())
        first, last = names.index("[in]"), len(names) - names[::-1].index("[out]")
        return "".join(names[first:last])

    view = "red" * 4
    assert written(noise(20, 20)) == f"[in]<|global_image|>{view}[out]"
    tiles = f"<|global_image|>{view}<row_1_col_1>{view}<row_1_col_2>{view}"
    assert written(noise(60, 20)) == f"[in]{tiles}[out]"
    two = written(noise(20, 60), noise(20, 20))
    assert two.count("[in]") == two.count("[out]") == two.count("<|global_image|>") == 2
    assert two.index("0") < two.index("<row_2_col_1>") < two.rindex("1")  # <image: 0> and <image: 1>


def test_one_view_without_tiles():
    for style in ("internvl", "nanovlm"):
        shape = geometry(style, UP_TO_4, tiles_alone=True)
        items, placements = shape.plan([(60, 200), (200, 60)])
        assert [item.fits for item in items] == [("squash",)] * 2 and [each.slots for each in placements] == [4, 4]
        assert len(shape.plan([(60, 200)]).items) > 2


@pytest.mark.parametrize("style", TILE_STYLES)
def test_no_image_has_more_tokens_than_the_most(style):
    shape = geometry(style, UP_TO_4)
    counts = [sum(each.slots for each in shape.plan([size]).placements) for size in sizes(200)]
    assert max(counts) <= shape.most_tokens and max(len(shape.plan([s]).items) for s in sizes(200)) <= shape.most_items
    if style != "llava_next":
        # Molmo2: 4 tokens, and the windows of 4 x 4 crops of 2 x 2 patches between margins of 1, with 5 newlines
        assert max(counts) == shape.most_tokens == (4 + 5 * 6 if style == "molmo2" else 4 * 17)


MOLMO2 = {"size": {"height": 56, "width": 56}, "patch_size": 8, "max_crops": 6, "overlap_margins": [2, 2]}
UP_TO_6 = tuple(grid for grid in UP_TO_12 if grid[0] * grid[1] <= 6)


@pytest.mark.parametrize("margin", [0, 4])
def test_molmo2s_grid_is_the_one_that_transformers_chooses(margin):
    style, patches = Molmo2(margin), 27 - 2 * margin
    edge = 2 * 14 * margin
    grids = list(UP_TO_12)
    random.Random(1).shuffle(grids)
    for height, width in [*sizes(300), (edge, 900), (900, edge + 1), (edge + 14 * patches, edge + 28 * patches)]:
        if edge in (height, width):  # a division by zero in the reference
            continue
        expected = select_tiling(height - edge, width - edge, 14 * patches, 12)
        assert style.choose((height, width), (378, 378), grids, 1) == expected, (height, width)


@pytest.mark.parametrize("size", [(90, 130), (40, 200), (300, 60), (31, 33), (56, 56)])
def test_molmo2s_crops_and_their_order_are_those_of_transformers(size):
    """Pixel by pixel; and the patches of which each token of a window of 2 x 2 is made."""
    library = Molmo2ImageProcessor(**MOLMO2, do_normalize=False, do_rescale=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    shape = replace(geometry("molmo2", UP_TO_6, 56, tile_margin=2), tokens=16, grid=(4, 4))
    items, placements = shape.plan([size])
    theirs = library(image, return_tensors="pt")
    shown = torch.stack(show_items(image, items, (0.0,) * 3)).unfold(2, 8, 8).unfold(3, 8, 8)
    assert shown.permute(0, 2, 3, 4, 5, 1).reshape(theirs.pixel_values.shape).equal(theirs.pixel_values.byte())

    numbers = torch.arange(len(items) * 49.0).view(len(items), 7, 7, 1)
    canvases, _ = _canvases(VisionFeatures(numbers), placements)
    assert placements[0].before == "<low_res_im_start>" and placements[1].before == "<im_start>"
    windows = each_image(partial(_windows, 2), canvases.patches + 1, canvases.grids)[..., 0].long() - 1
    expected = theirs.image_token_pooling
    assert windows.sort().values.equal(expected.sort().values)
    rows = [int(side) for side in theirs.image_grids[0]]
    assert [each.slots for each in placements] == [rows[0] * rows[1], rows[2] * (rows[3] + 1)]
    several = [each.before for each in shape.plan([size, size]).placements]
    assert several == ["Image 1<low_res_im_start>", "<im_start>", "Image 2<low_res_im_start>", "<im_start>"]


def test_what_a_style_cannot_use_is_refused():
    with pytest.raises(ValueError, match=r"nanovlm: image_tiles lacks \[1, 2\]; expected, for each longer side N"):
        geometry("nanovlm", UP_TO_4[2:])
    with pytest.raises(ValueError, match="image_tile_style=mosaic: expected one of llava_next, internvl, nanovlm"):
        geometry("mosaic", UP_TO_4)
    with pytest.raises(ValueError, match="image_tiles_margin=2 leaves nothing of a crop of 4 x 4 patches"):
        geometry("molmo2", UP_TO_4, tile_margin=2)
    with pytest.raises(ValueError, match="image_tile_style=molmo2: expected one encoder of images, with patches"):
        geometry("molmo2", UP_TO_4, others=(View((32, 32), None, (0.0,) * 3, (1.0,) * 3, (8, 8)),))
