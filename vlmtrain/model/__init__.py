"""The model: vision encoder, connector, language model, and their concatenation."""

from ..connectors import VisionFeatures
from .wrapper import VLMWrapper

__all__ = ["VLMWrapper", "VisionFeatures"]
