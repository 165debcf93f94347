"""Any-resolution images compared with the published counts and the library's LLaVA-NeXT."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vlmtrain.connectors import VisionFeatures, build_connector
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.images import ImageInMemory, show_items
from vlmtrain.data.processor import Processor
from vlmtrain.data.records import Conversation, Turn
from vlmtrain.model.joining import JoiningConnector
from vlmtrain.tiling import Tiles, choose_tiles, tiled_tokens

from ..media import tiled

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PUBLISHED = {(336, 336): 1176, (672, 672): 2928, (480, 640): 2340, (300, 1000): 2182, (1080, 1920): 1948}


def sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [*PUBLISHED, *((rng.randint(20, 2000), rng.randint(20, 2000)) for _ in range(count))]


@pytest.mark.parametrize("size, tokens", PUBLISHED.items())
def test_published_counts(size, tokens):
    assert tiled_tokens(choose_tiles(size, (336, 336), GRIDS), 576, (24, 24)) == tokens


def test_the_grid_is_the_one_that_the_library_chooses():
    pinpoints = [[rows * 336, columns * 336] for rows, columns in GRIDS]
    for size in sizes(200):
        tiles = choose_tiles(size, (336, 336), GRIDS)
        assert (tiles.rows, tiles.columns) == get_anyres_image_grid_shape(list(size), pinpoints, 336), size


def test_tokens_and_their_order_are_the_librarys():
    """A connector that returns its patches, compared with ``pack_image_features``; one patch is 14 of 56 pixels."""
    pinpoints = [[rows * 56, columns * 56] for rows, columns in GRIDS]
    vision = SimpleNamespace(image_size=56, patch_size=14)
    library = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    torch.manual_seed(0)
    connector = JoiningConnector(build_connector("linear", 6, 5)).eval()
    for size in sizes(40):
        tiles = choose_tiles(size, (56, 56), GRIDS)
        views = torch.randn(tiles.views, 4, 4, 6)
        found = connector(VisionFeatures(views), tiled(tiles))
        tokens = connector.connector(VisionFeatures(views))
        wanted, lengths = LlavaNextModel.pack_image_features(
            library, [tokens], torch.tensor([size]), "full", connector.newline
        )
        assert torch.equal(found, wanted[0]), size
        assert tiled_tokens(tiles, 16, (4, 4)) == len(found) == int(lengths[0])


def test_limited_tokens_and_single_views_equal_llava_onevisions():
    """Compared with ``LlavaOnevisionModel.pack_image_features``, with grids up to 6 x 6 and the tokens of 9 tiles."""
    grids = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
    pinpoints = [[rows * 56, columns * 56] for rows, columns in grids]
    vision = SimpleNamespace(image_size=56, patch_size=14)
    library = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    torch.manual_seed(0)
    connector = JoiningConnector(build_connector("linear", 6, 5)).eval()
    scaled = 0
    for size in [(56, 56), (400, 400), (336, 336), (60, 330), (200, 330), *sizes(30)]:
        tiles = choose_tiles(size, (56, 56), grids, most=9)
        if tiles.views == 2:  # one tile: in the library's model, no grid of one is cut
            continue
        views = torch.randn(tiles.views, 4, 4, 6)
        tokens = connector.connector(VisionFeatures(views))
        wanted, lengths = LlavaOnevisionModel.pack_image_features(
            library, [tokens], torch.tensor([size]), connector.newline, "anyres_max_9"
        )
        found = connector(VisionFeatures(views), tiled(tiles))
        torch.testing.assert_close(found, wanted[0], msg=str(size))
        assert tiled_tokens(tiles, 16, (4, 4)) == len(found) == int(lengths[0])
        scaled += len(found) != tiled_tokens(tiles._replace(most=0), 16, (4, 4))
    assert scaled > 10
    view = torch.randn(1, 4, 4, 6)
    tokens = connector.connector(VisionFeatures(view))
    wanted, _ = LlavaOnevisionModel.pack_image_features(library, [tokens], torch.tensor([[9, 9]]), connector.newline)
    found = connector(VisionFeatures(view), tiled(Tiles(0, 0, 9, 9)))
    assert torch.equal(found, wanted[0]) and len(found) == tiled_tokens(Tiles(0, 0, 9, 9), 16, (4, 4)) == 17


def test_several_images_come_one_after_the_other_and_the_newline_trains():
    connector = JoiningConnector(build_connector("avgpool", 6, 5, window=2)).double()
    cuts = [choose_tiles(size, (56, 56), GRIDS) for size in ((56, 56), (100, 300), (400, 90))]
    views = torch.randn(sum(cut.views for cut in cuts), 4, 4, 6, dtype=torch.double)
    together = connector(VisionFeatures(views), tiled(*cuts))
    alone = [connector(VisionFeatures(v), tiled(cut)) for v, cut in zip(views.split([c.views for c in cuts]), cuts)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert len(together) == sum(tiled_tokens(cut, 4, (2, 2)) for cut in cuts)
    together.sum().backward()
    newlines = sum(tiled_tokens(cut, 4, (2, 2)) for cut in cuts) - len(views) * 0
    assert connector.newline.grad is not None and 0 < float(connector.newline.grad[0]) < newlines


def test_tokens_without_a_grid_are_those_of_all_views():
    connector = JoiningConnector(
        build_connector("perceiver_resampler", 8, 5, num_queries=3, depth=1, num_heads=2, head_dim=4)
    )
    tiles = choose_tiles((56, 112), (56, 56), GRIDS)
    views = VisionFeatures(torch.randn(tiles.views, 4, 4, 8))
    assert torch.equal(connector(views, tiled(tiles)), connector.connector(views).flatten(0, 1))
    assert tiled_tokens(tiles, 3, None) == 9


def test_views_equal_the_librarys():
    """Pixel by pixel, including the padding."""
    library = LlavaNextImageProcessorPil(
        size={"shortest_edge": 48},
        crop_size={"height": 48, "width": 48},
        image_grid_pinpoints=[[rows * 48, columns * 48] for rows, columns in GRIDS],
        do_center_crop=False,
        do_normalize=False,
        do_rescale=False,
    )
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    tiles = choose_tiles((90, 130), (48, 48), GRIDS)
    geometry = Geometry((48, 48), "tiles", (0.0,) * 3, (1.0,) * 3, tokens=16, grid=(4, 4), tile_grids=GRIDS)
    views = show_items(image, geometry.plan([(90, 130)]).items, geometry.mean)
    ours = torch.stack(views).permute(0, 2, 3, 1).numpy()
    theirs = library(image, return_tensors="np").pixel_values[0].transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape == (tiles.views, 48, 48, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_processor_counts_what_it_shows(tokenizer):
    geometry = Geometry((48, 48), "tiles", (0.5,) * 3, (1.0,) * 3, tokens=16, grid=(4, 4), tile_grids=GRIDS)
    processor = Processor(tokenizer, geometry, "chat", max_length=400)

    def picture(width: int, height: int) -> ImageInMemory:
        import io

        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (250, 0, 0)).save(buffer, "PNG")
        return ImageInMemory(buffer.getvalue(), f"{width}x{height}")

    pictures = (picture(60, 200), picture(130, 90))
    turns = (Turn("user", "<image> What <image>"), Turn("assistant", "red"))
    sample = processor(Conversation("two", turns, pictures))
    cuts = [choose_tiles(size, (48, 48), GRIDS) for size in ((200, 60), (90, 130))]
    assert [each.tiles for each in sample.tokens.media.placements] == cuts
    assert len(sample.pixels[0]) == sum(cut.views for cut in cuts)
    counts = [int((sample.tokens.index == i).sum()) for i in range(2)]
    assert counts == [tiled_tokens(cut, 16, (4, 4)) for cut in cuts]
    alone = replace(geometry, tiles_alone=True)
    together = Processor(tokenizer, alone, "chat", max_length=400)(Conversation("two", turns, pictures))
    assert [each.tiles.views for each in together.tokens.media.placements] == [1, 1]
    assert torch.stack(together.pixels[0]).shape == (2, 3, 48, 48)
    assert int((together.tokens.index >= 0).sum()) == 2 * 17
    assert alone.plan([(200, 60)]).placements[0].tiles == cuts[0]
    text = processor(Conversation("none", (Turn("user", "What"), Turn("assistant", "red"))))
    batch = processor.collate([text, sample])
    assert [each.tiles for each in batch.visual.placements] == cuts and int(batch.visual.mask.sum()) == sum(counts)
    assert not processor.collate([text]).visual.placements


def test_a_rotated_photo_is_measured_after_rotation():
    import io

    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    photo = ImageInMemory(buffer.getvalue(), "photo")
    assert photo.size() == (40, 20) == photo.load().size[::-1]
