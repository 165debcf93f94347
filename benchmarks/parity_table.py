"""Table of supported exports and imports: how closely models match those of Hugging Face.

    python benchmarks/parity_table.py                         # print the table
    python benchmarks/parity_table.py --write docs/recipes.md # write it between the parity markers of a file

Measured on small random models with the cases of the tests: each model answers several questions about several images,
one at a time and in one batch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tables import error_cell, print_or_write  # noqa: E402

from tests.integration.model_parity import EXPORTS, IMPORTS, Case, Source, export_all, import_all  # noqa: E402
from tests.integration.published_models import build_shuffling, shuffling_difference  # noqa: E402
from vlmtrain.interop.importing import import_model  # noqa: E402

PROJECTORS = {
    "llava": "LLaVA's `mm_projector.bin`",
    "internvl": "InternVL's `mlp1`",
    "nanovlm": "nanoVLM's `MP`",
}


class Row(NamedTuple):
    """A class or projector, and the parts with which it is tested."""

    way: str
    what: str
    cases: dict[str, Case | Source]

    def cells(self) -> list[str]:
        """The cells that need no measurement."""
        encoders = dict.fromkeys(case.vision for case in self.cases.values())
        models = dict.fromkeys(case.llm.partition(",")[0] for case in self.cases.values())
        return [self.way, self.what, ", ".join(sorted(encoders)), ", ".join(sorted(models))]


def rows() -> Iterator[Row]:
    """The rows whose logits are compared."""
    for case_of, way, groups in ((_becomes, "out", EXPORTS), (_is, "in", IMPORTS)):
        named = {f"{group}, {name}": case for group, cases in groups.items() for name, case in cases.items()}
        for what in dict.fromkeys(map(case_of, named.values())):
            yield Row(way, what, {name: case for name, case in named.items() if case_of(case) == what})


def _becomes(case: Case) -> str:
    return f"`{case.becomes}`"


def _is(source: Source) -> str:
    return PROJECTORS.get(source.kind, f"`{source.kind}`")


def table() -> str:
    """The Markdown table."""
    lines = [
        "| | class or projector | encoders | language models | logits differ by | greedy answers | pixels differ by |",
        "|---|---|---|---|--:|---|--:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(rows()):
            home = Path(folder) / str(number)
            home.mkdir()
            lines.append(f"| {' | '.join([*row.cells(), *_measured(row, home)])} |")
        for kind in ("internvl", "nanovlm"):
            home = Path(folder) / kind
            told = build_shuffling(home, kind)
            import_model(out=home / "model", **told)
            error = error_cell(shuffling_difference(home, told, kind))
            lines.append(f"| in | {PROJECTORS[kind]} | clip | llama | {error} (its tokens) | | |")
    return "\n".join(lines)


def _measured(row: Row, home: Path) -> list[str]:
    if row.way == "out":
        done = export_all(row.cases, home, *(["own"] if "VLMTrain" in row.what else []))
    else:
        done = import_all(row.cases, home)
    found = [each["parity"] for each in done.values()]
    answers = sum(2 * len(case.talks) for case in row.cases.values())
    same = all(parity.prompts and parity.answers for parity in found)
    levels = max(parity.pixels for parity in found)
    text = f"same, all {answers}" if same else "differ"
    return [error_cell(max(parity.logits for parity in found)), text, "0" if levels < 0.001 else f"{levels:.1g}"]


if __name__ == "__main__":
    print_or_write(table, "parity", __doc__.splitlines()[0])
