"""Which connector, at this budget: one job a connector and seed, and a table that says what can be told apart."""

from .definition import Ablation, read_line
from .jobs import run_ablation
from .results import Entry, compare, read_results

__all__ = ["Ablation", "Entry", "compare", "read_line", "read_results", "run_ablation"]
