"""Data pipeline: formats -> conversation -> rendered sample -> batch.

    records.py    Conversation, Turn, ImageSource: the common form of all data formats
    llava.py      LLaVA's JSON; shapes.py: procedural images; sources.py: the sources of a stage
    record_reader.py  records of all formats -> conversation; record_*.py: their keys, media, turns and regions
    images.py     files -> RGB images -> the encoder's size -> tensors
    rendering.py  conversation -> tokens and targets; templates.py: chat templates by name
    processor.py  conversation -> sample -> batch
    loader.py     samples -> steps -> ranks -> micro-batches

The model receives a `processor.Batch`.
"""

from .processor import Batch, Processor
from .record_reader import read_record
from .records import BadSample, Conversation, Turn

__all__ = ["BadSample", "Batch", "Conversation", "Processor", "Turn", "read_record"]
