"""Estimates of what a recipe needs, made before anything is loaded: visual tokens, FLOPs, memory, time."""

from .plan import StagePlan, plan_run
from .tokens import VisualTokens, visual_tokens

__all__ = ["StagePlan", "VisualTokens", "plan_run", "visual_tokens"]
