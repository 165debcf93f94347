"""The model: vision encoder, connector and language model, joined by token concatenation."""

from ..connectors import VisionFeatures
from .wrapper import VLMWrapper

__all__ = ["VLMWrapper", "VisionFeatures"]
