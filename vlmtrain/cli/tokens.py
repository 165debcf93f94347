"""``vlmtrain tokens``: count the visual tokens of an image for given connectors."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .common import take_modules


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
        "--context", type=int, default=4096, metavar="N", help="context length of the LLM (default: 4096)"
    )
    take_modules(parser)


def run(options: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from ..planning import visual_tokens
    from ..reporting.tables import text_table

    if len(options.image_size) > 2:
        raise ValueError(
            f"--image-size: expected a side length, or height and width, got {len(options.image_size)} numbers"
        )
    size = (options.image_size[0], options.image_size[-1])
    found = []
    for choice in options.connector:
        name, *settings = choice.split(",")
        chosen = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
        limits = options.image_pixels and tuple(options.image_pixels)
        more = (options.tiles, options.thumbnail, options.context, limits)
        found.append(visual_tokens(size, options.patch_size, name, chosen, *more))
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    rows = [("connector", "tokens", "per view", "views", f"of {options.context:,}")]
    rows += [
        (each.connector, f"{each.tokens:,}", f"{each.tokens_per_view:,}", f"{each.views}", f"{each.context_share:.1%}")
        for each in found
    ]
    grids = dict.fromkeys(f"{each.grid[0]}x{each.grid[1]}" for each in found)
    print(f"{size[0]}x{size[1]} pixels, {' or '.join(grids)} patches per view")
    print(text_table(rows, indent=2))
