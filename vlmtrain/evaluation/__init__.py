"""What a trained model says: validation scores, and talking with it."""

from .chat import Chat

__all__ = ["Chat"]
