"""The table of exports and imports, against the code that makes them and the cases that are measured."""

from __future__ import annotations

from benchmarks.parity_table import PROJECTORS, rows
from vlmtrain.interop import blip, importing, importing_projectors, llava, own

from ..conftest import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "recipes.md").read_text().partition("<!-- parity:begin -->")[2].splitlines()[3:]
    if line.startswith("|")
]


def named(way: str) -> set[str]:
    return {row[1].strip("`") for row in ROWS if row[0] == way}


def test_the_table_has_every_class_that_an_export_becomes():
    written = {
        name for module in (llava, blip, own) for name in vars(module) if name.endswith("ForConditionalGeneration")
    }
    assert named("out") == written and len(written) == 5


def test_the_table_has_all_that_is_imported():
    assert set(PROJECTORS) == set(importing_projectors.PROJECTORS)
    assert named("in") == {*importing.MODEL_CLASSES.values(), *PROJECTORS.values()}


def test_the_table_names_the_parts_that_are_tried():
    measured = [row[:4] for row in ROWS if row[1] not in (PROJECTORS["internvl"], PROJECTORS["nanovlm"])]
    assert measured == [row.cells() for row in rows()]


def test_all_is_the_same():
    for way, what, *_, logits, answers, pixels in ROWS:
        assert float(logits.split()[0]) <= 1e-4, (way, what)
        assert (answers.startswith("same") and pixels == "0") or logits.endswith("(its tokens)"), (way, what)
