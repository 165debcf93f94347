"""Evaluation of a trained model: validation scores and chat."""

from .chat import Chat

__all__ = ["Chat"]
