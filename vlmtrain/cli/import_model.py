"""``vlmtrain import``: convert a published model, such as a LLaVA or a Qwen-VL, to a model folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="Hugging Face folder or Hub ID, or projector file")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--llm", metavar="PATH", help="language model of a projector: a Hub ID or folder")
    parser.add_argument("--vision", metavar="PATH", help="vision encoder of a projector: a Hub ID or folder")
    parser.add_argument(
        "--template", metavar="NAME", help="replace the source's template: vicuna_v1, chatml, bare, ..."
    )
    parser.add_argument("--image-fit", metavar="FIT", help="replace the source's image fit: squash, pad, crop")


def run(options: argparse.Namespace) -> None:
    from ..interop.importing import import_model

    done = import_model(options.source, options.out, options.llm, options.vision, options.template, options.image_fit)
    if options.json:
        print(json.dumps(done._asdict(), indent=2))
        return
    print(f"{done.folder}: connector={done.connector}, template={done.template}, image_fit={done.image_fit}")
    if done.largest_relative_difference is not None:
        print(f"  logits within {done.largest_relative_difference:.1g} of the source's")
