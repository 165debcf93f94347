"""Estimates of what a recipe needs, made before anything is loaded: visual tokens, FLOPs, memory, time."""

from .plan import StagePlan, plan_run
from .tokens import VideoTokens, VisualTokens, video_tokens, visual_tokens

__all__ = ["StagePlan", "VideoTokens", "VisualTokens", "plan_run", "video_tokens", "visual_tokens"]
