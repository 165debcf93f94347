"""``vlmtrain export``: export a model for Hugging Face transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import take_modules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--format",
        default="hf",
        metavar="FORMAT",
        help="llava, blip2, native (Qwen-VL, HunyuanOCR), molmo2, fuyu, paligemma, idefics: the transformers class of "
        "these models, which loads without vlmtrain; vlmtrain: a class that needs 'import vlmtrain'; hf (default): the "
        "first of these that fits",
    )
    take_modules(parser)


def run(options: argparse.Namespace) -> None:
    from ..interop.export import export

    done = export(options.model, options.out, options.format)
    if options.json:
        print(json.dumps(done._asdict(), indent=2))
        return
    print(f"{done.folder}: {done.model_class}, logits within {done.largest_relative_difference:.1g} of the source's")
    for remark in done.remarks:
        print(f"  {remark}")
