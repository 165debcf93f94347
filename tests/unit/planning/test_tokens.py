"""Visual tokens by the arithmetic of the papers."""

from __future__ import annotations

import pytest

from vlmtrain.planning import visual_tokens


@pytest.mark.parametrize(
    "size, tiles, thumbnail, connector, tokens",
    [
        (336, 1, False, "linear", 576),
        (672, 1, False, "mlp", 2304),
        (336, 4, True, "mlp", 2880),
        (336, 1, False, "qformer", 32),
        (336, 4, True, "pixel_shuffle", 720),
    ],
)
def test_counts(size, tiles, thumbnail, connector, tokens):
    found = visual_tokens((size, size), 14, connector, tiles=tiles, thumbnail=thumbnail, context=4096)
    assert found.tokens == tokens and found.context_share == tokens / 4096


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="not a multiple of --patch-size 14"):
        visual_tokens((340, 336), 14)
    with pytest.raises(ValueError, match="factor"):
        visual_tokens((350, 350), 14, "pixel_shuffle")
    with pytest.raises(ValueError, match="--image-size 10x4000: one side is more than 200 times the other"):
        visual_tokens((10, 4000), 14, image_pixels=(3136, 12_845_056))
