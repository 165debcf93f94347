"""Compare connectors at an equal budget: one job per choice and seed, and a table of significant differences."""

from .definition import Ablation, read_line
from .jobs import run_ablation
from .results import Entry, compare, read_results

__all__ = ["Ablation", "Entry", "compare", "read_line", "read_results", "run_ablation"]
