"""The documentation's table of published rules says how many frames and tokens they make."""

from __future__ import annotations

from itertools import takewhile

import numpy as np
import pytest
import yaml

from vlmtrain.connectors import build_connector
from vlmtrain.data.geometry import Geometry
from vlmtrain.data.records import VideoFacts
from vlmtrain.data.video_plan import VideoPlan
from vlmtrain.frames import Joining

from ...conftest import ROOT

TABLE = (ROOT / "docs" / "video.md").read_text().partition("| model | settings under")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in takewhile(lambda line: line.startswith("|"), TABLE.splitlines()[2:])
]
VIDEO = VideoFacts(np.arange(600) / 30, 20.0, (384, 384))
PATCHES = {"LLaVA-NeXT-Video (24 x 24 patches)": 24}


def plan_of(model: str, settings: str) -> Geometry:
    given = yaml.safe_load(f"{{{settings.split('`')[1]}}}")
    joining = Joining(given.pop("pool", "none"), given.pop("stride", 1), given.pop("newline", "none"))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    look = ((0.5,) * 3, (0.5,) * 3)
    if model.startswith("Qwen"):
        patch = 16 if "3" in model else 14
        merger = {"name": "qwen2_vl_merger", "in_dim": 8, "out_dim": 8}
        options = {"image_pixels": (3136, 10**6), "multiple": 2, "connector": merger}
        video = VideoPlan(per_item=2, **given)
        return Geometry((448, 448), "native", *look, 0, patch_size=(patch, patch), video=video, **options)
    side = PATCHES.get(model, 27)
    connector = build_connector("mlp", 8, 8)
    if joining.pool == "features":
        grid = connector.output_grid(side // joining.stride, side // joining.stride)
    elif joining.pool == "window":
        grid = build_connector("avgpool", 8, 8, window=2).output_grid(side, side, window=joining.stride)
    else:
        grid = connector.output_grid(side, side)
    video = VideoPlan(joining=joining, tokens=grid[0] * grid[1], grid=grid, **given)
    return Geometry((384, 384), "squash", *look, side**2, (side, side), patch_size=(14, 14), video=video)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_of_published_rules(row):
    model, settings, frames, tokens = row
    plan = plan_of(model, settings).plan([VIDEO])
    assert sum(len(item.times) for item in plan.items) == int(frames)
    assert sum(placement.slots for placement in plan.placements) == int(tokens.replace(",", ""))


def test_the_table_has_all_models():
    assert len(ROWS) == 6
