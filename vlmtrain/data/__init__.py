"""Data: formats -> conversation -> rendered sample -> batch.

    records.py    Conversation, Turn, ImageSource: the form that every format is read into
    llava.py      LLaVA's JSON; shapes.py: procedural pictures; sources.py: which one a stage gets
    images.py     files -> RGB pictures -> the encoder's size -> tensors
    rendering.py  conversation -> tokens and targets; templates.py: chat templates by name
    processor.py  conversation -> sample -> batch
    loader.py     samples -> steps -> ranks -> micro-batches

Model receives: `processor.Batch`.
"""

from .processor import Batch, Processor
from .records import BadSample, Conversation, Turn

__all__ = ["BadSample", "Batch", "Conversation", "Processor", "Turn"]
