"""``vlmtrain tokens``: count the visual tokens of an image or a video for given connectors."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .common import take_modules

VIDEO_OPTIONS = ("fps", "frames", "sampling", "last", "pool", "stride", "newline", "frames_per_item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size", nargs="+", type=int, required=True, metavar="PIXELS", help="side length, or height and width"
    )
    parser.add_argument("--patch-size", type=int, required=True, metavar="PIXELS")
    parser.add_argument(
        "--tiles", type=int, default=1, metavar="N", help="views of that size that an image is split into"
    )
    parser.add_argument("--thumbnail", action="store_true", help="add one view of the complete image")
    parser.add_argument(
        "--image-pixels",
        nargs=2,
        type=int,
        metavar=("MIN", "MAX"),
        help="image_fit=native: show the image at its own size, within this number of pixels",
    )
    parser.add_argument(
        "--connector",
        nargs="+",
        default=["linear"],
        metavar="NAME",
        help="with options as NAME,key=value,... (default: linear, one token per patch)",
    )
    parser.add_argument(
        "--video",
        nargs="+",
        type=float,
        metavar="SECONDS",
        help="count for videos of these lengths instead of an image",
    )
    video = parser.add_argument_group("with --video", "keys of stages.<name>.video, and their defaults")
    video.add_argument("--fps", type=float, metavar="RATE", help="frames shown per second")
    video.add_argument("--frames", type=int, metavar="N", help="maximum number of frames")
    video.add_argument("--sampling", nargs="+", metavar="NAME", help="which frames are shown (default: every rule)")
    video.add_argument("--last", action="store_true", default=None, help="always show the last frame")
    video.add_argument("--pool", metavar="NAME", help="how the tokens of a frame are pooled")
    video.add_argument("--stride", type=int, metavar="N", help="side of the squares that are pooled")
    video.add_argument("--newline", metavar="NAME", help="a token after each video, frame or row")
    video.add_argument(
        "--frames-per-item", type=int, metavar="N", help="frames that the encoder reads together (Qwen2-VL: 2)"
    )
    parser.add_argument(
        "--context", type=int, default=4096, metavar="N", help="context length of the LLM (default: 4096)"
    )
    take_modules(parser)


def run(options: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from ..planning import video_tokens, visual_tokens
    from ..reporting.tables import text_table

    if len(options.image_size) > 2:
        raise ValueError(
            f"--image-size: expected a side length, or height and width, got {len(options.image_size)} numbers"
        )
    size = (options.image_size[0], options.image_size[-1])
    limits = options.image_pixels and tuple(options.image_pixels)
    given = {name: getattr(options, name) for name in VIDEO_OPTIONS if getattr(options, name) is not None}
    if given and options.video is None:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --video")
    if options.video and (options.tiles > 1 or options.thumbnail):
        raise ValueError("--video: frames are not split into tiles")
    found = []
    for choice in options.connector:
        name, *settings = choice.split(",")
        chosen = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
        if options.video:
            of_video = (size, options.patch_size, name, chosen, options.context, limits)
            found += [
                video_tokens(seconds, *of_video, **each) for seconds in options.video for each in _samplings(given)
            ]
            continue
        more = (options.tiles, options.thumbnail, options.context, limits)
        found.append(visual_tokens(size, options.patch_size, name, chosen, *more))
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    if options.video:
        rows = [("connector", "sampling", "seconds", "frames", "per frame", "tokens", f"of {options.context:,}")]
        rows += [
            (each.connector, each.sampling, f"{each.seconds:g}", f"{each.frames:,}", f"{each.tokens_per_frame:g}",
             f"{each.tokens:,}", f"{each.context_share:.1%}")
            for each in found
        ]  # fmt: skip
        print(text_table(rows, indent=2))
        return
    rows = [("connector", "tokens", "per view", "views", f"of {options.context:,}")]
    rows += [
        (each.connector, f"{each.tokens:,}", f"{each.tokens_per_view:,}", f"{each.views}", f"{each.context_share:.1%}")
        for each in found
    ]
    grids = dict.fromkeys(f"{each.grid[0]}x{each.grid[1]}" for each in found)
    print(f"{size[0]}x{size[1]} pixels, {' or '.join(grids)} patches per view")
    print(text_table(rows, indent=2))


def _samplings(given: dict) -> list[dict]:
    """The options of a video with each rule of sampling, those that may show the last frame with ``--last``."""
    from ..data.frame_sampling import CHOOSES_LAST, SAMPLINGS

    if "sampling" in given:
        return [{**given, "sampling": name} for name in given["sampling"]]
    last = given.get("last", False)
    return [{**given, "sampling": name, "last": last and name in CHOOSES_LAST} for name in SAMPLINGS]
