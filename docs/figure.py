"""Prints the figure of docs/design.md from the types of the code: python docs/figure.py"""

from __future__ import annotations

import textwrap
from dataclasses import fields, is_dataclass

from vlmtrain.batch import Batch
from vlmtrain.connectors import PackedFeatures, VisionFeatures
from vlmtrain.data import Conversation
from vlmtrain.data.processor import Sample
from vlmtrain.data.rendered import Rendered
from vlmtrain.model.fusion import Fused, VisualTokens
from vlmtrain.visual import Item, Placement, Visual

STEPS = (
    ((Conversation,), "plan", "Processor.plan: headers of images and packets of videos only, nothing is decoded"),
    ((Item, Placement), "render", "Processor.render: tokens, targets, and the placement at each position"),
    ((Rendered,), "load", "Processor.load: decodes and cuts exactly what the items say"),
    ((Sample,), "collate", "Processor.collate, Processor.pack"),
    ((Batch, Visual), "encode", "VisionEncoder.encode_all"),
    ((VisionFeatures, PackedFeatures), "connect", "Connector; PackedFeatures for images of different sizes"),
    ((VisualTokens,), "fuse", "Fusion"),
    ((Fused,), "read", "the language model; `added` goes to the outputs of blocks, `media` to layers between blocks"),
)
WIDTH = 110


def shown(kind: type) -> str:
    """A type and its fields."""
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else kind._fields
    start = f"{kind.__name__}("
    return "\n".join(textwrap.wrap(f"{start}{', '.join(names)})", WIDTH, subsequent_indent=" " * len(start)))


def figure() -> str:
    """The types from a conversation to the input of the language model, with the steps between them."""
    lines = []
    for kinds, step, how in STEPS:
        lines += [*map(shown, kinds), f"    │ {step:<8} {how}", "    ▼"]
    return "\n".join([*lines, "logits"])


if __name__ == "__main__":
    print(figure())
