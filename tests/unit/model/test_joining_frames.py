"""Tokens of frames: pooled and joined as by hand, and with the same calls whatever a batch shows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlmtrain.connectors import VisionFeatures, build_connector
from vlmtrain.frames import Joining
from vlmtrain.model.joining import JoiningConnector
from vlmtrain.visual import Placement

C, D, H, W = 6, 5, 5, 4


def features(items: int, seed: int = 0) -> VisionFeatures:
    made = torch.Generator().manual_seed(seed)
    level = torch.randn(items, H, W, C, generator=made, dtype=torch.double)
    return VisionFeatures(torch.randn(items, H, W, C, generator=made, dtype=torch.double), None, (level, level + 1))


def built(name: str, newline: bool = True, **options) -> JoiningConnector:
    torch.manual_seed(0)
    return JoiningConnector(build_connector(name, C, D, **options), newline).double()


def video(items: range, joining: Joining, medium: int = 0) -> Placement:
    return Placement(medium, tuple(items), 0, 0, None, frames=joining)


def by_hand(
    tokens: torch.Tensor, joining: Joining, grid: tuple[int, int], newline: torch.Tensor | None
) -> torch.Tensor:
    """Frame by frame and row by row: ``(F, h * w, D)`` -> ``(K, D)``."""
    out = []
    for frame in tokens:
        canvas = frame.T.reshape(1, D, *grid)
        if joining.pool == "bilinear":
            size = [-(-side // joining.stride) for side in grid]
            canvas = F.interpolate(canvas, size, mode="bilinear")
        if joining.pool == "average":
            rows, columns = (side // joining.stride for side in grid)
            s = joining.stride
            cells = [
                canvas[0, :, r * s : r * s + s, c * s : c * s + s].mean((1, 2))
                for r in range(rows)
                for c in range(columns)
            ]
            canvas = torch.stack(cells, 1).reshape(1, D, rows, columns)
        for row in canvas[0].permute(1, 2, 0):
            out += [*row, *([newline] if joining.newline == "row" else [])]
        out += [newline] if joining.newline == "frame" else []
    return torch.stack(out + ([newline] if joining.newline == "video" else []))


POOLS = (("none", 1), ("bilinear", 2), ("average", 2))
JOININGS = [Joining(*pool, newline) for pool in POOLS for newline in ("none", "video", "frame", "row")]


@pytest.mark.parametrize("joining", JOININGS, ids=str)
def test_joined_as_by_hand(joining):
    connector, given = built("mlp"), features(3)
    found = connector(given, placements=[video(range(3), joining)])
    expected = by_hand(connector.connector(given), joining, (H, W), connector.newline)
    assert torch.allclose(found, expected, atol=1e-12)
    assert len(found) == joining.count(3, H * W, (H, W))


@pytest.mark.parametrize("newline", [True, False])
def test_images_beside_videos(newline):
    """The tokens of images are those that they have alone."""
    connector, given = built("mlp", newline), features(4)
    joining = Joining("bilinear", 2)
    image = Placement(1, (2,), 20, 20, (H, W))
    found = connector(given, placements=[video(range(2), joining), image, video(range(3, 4), joining, 2)])
    whole = connector.connector(given)
    parts = [by_hand(whole[:2], joining, (H, W), None), whole[2], by_hand(whole[3:], joining, (H, W), None)]
    assert torch.allclose(found, torch.cat(parts), atol=1e-12)


SEPARATE = {
    "features": ("attentional_pool", {"num_heads": 2, "window": 2}, Joining("features", 2)),
    "window": ("attentional_pool", {"num_heads": 2, "window": 2}, Joining("window", 3)),
    "means": ("avgpool", {"window": 2}, Joining("window", 4)),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_frames_are_read_differently_from_images(name):
    kind, options, joining = SEPARATE[name]
    connector, given = built(kind, False, **options), features(3)
    image = Placement(1, (1,), 6, 6, (3, 2))
    placements = [video(range(1), joining), image, video(range(2, 3), joining, 2)]
    found = connector(given, placements=placements, frames=joining)

    alone = [
        VisionFeatures(given.patches[n, None], None, tuple(level[n, None] for level in given.levels)) for n in range(3)
    ]
    if joining.pool == "window":
        other = build_connector(kind, C, D, **{**options, "window": joining.stride}).double()
        other.load_state_dict(connector.connector.state_dict())
        parts = [other(alone[0])[0], connector.connector(alone[1])[0], other(alone[2])[0]]
    else:
        s = joining.stride
        pooled = [
            VisionFeatures(*(x.unfold(1, s, s).unfold(2, s, s).mean((-2, -1)) for x in (one.patches,)), None, tuple(
                x.unfold(1, s, s).unfold(2, s, s).mean((-2, -1)) for x in one.levels)) for one in alone
        ]  # fmt: skip
        parts = [connector.connector(pooled[0])[0], connector.connector(alone[1])[0], connector.connector(pooled[2])[0]]
    assert torch.allclose(found, torch.cat(parts), atol=1e-12)


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("shown", ["videos", "images", "both", "text"])
def test_every_batch_makes_the_same_calls(name, shown, monkeypatch):
    kind, options, joining = SEPARATE[name]
    connector, given = built(kind, True, **options), features(2)
    image = Placement(1, (1,), 6, 6, (3, 2))
    both = [video(range(1), joining), image]
    placements = {
        "videos": [video(range(2), joining)],
        "images": [image._replace(items=(0,)), image],
        "both": both,
        "text": [],
    }
    calls = []
    connector.connector.register_forward_hook(lambda *_: calls.append(1))
    given.patches.requires_grad_()
    found = connector(given if shown != "text" else features(1), placements=placements[shown], frames=joining)
    assert len(calls) == 2
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in connector.parameters())
