"""The table of exports and imports agrees with the code and with the cases that are measured."""

from __future__ import annotations

from benchmarks.parity_table import PROJECTORS, rows
from vlmtrain.interop import (
    blip,
    fuyu,
    idefics,
    importing,
    importing_projectors,
    llava,
    molmo2,
    native_families,
    own,
    paligemma,
)

from ..conftest import ROOT

PAGE = (ROOT / "docs" / "recipes.md").read_text()
BLOCK = PAGE.partition("<!-- parity:begin -->")[2].partition("<!-- parity:end -->")[0]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in BLOCK.splitlines()[3:]]


def named(way: str) -> set[str]:
    return {row[1] for row in ROWS if row[0] == way}


def test_the_table_has_every_class_that_an_export_becomes():
    classes = {name for module in (llava, blip, molmo2, paligemma, own) for name in vars(module)}
    classes |= {family.model_class for family in native_families.FAMILIES.values()}
    classes = {name for name in classes if name.endswith("ForConditionalGeneration")}
    classes |= {fuyu.FuyuForCausalLM.__name__, idefics.IdeficsForVisionText2Text.__name__}
    assert named("out") == {f"`{name}`" for name in classes}


def test_the_table_has_all_that_is_imported():
    assert set(PROJECTORS) == set(importing_projectors.PROJECTORS)
    assert named("in") == {*(f"`{name}`" for name in importing.MODEL_CLASSES.values()), *PROJECTORS.values()}


def test_the_table_names_the_parts_that_are_tested():
    measured = [row[:4] for row in ROWS if row[1] not in (PROJECTORS["internvl"], PROJECTORS["nanovlm"])]
    assert measured == [row.cells() for row in rows()]


def test_all_results_agree():
    for way, what, *_, logits, answers, pixels in ROWS:
        assert float(logits.split()[0]) <= 1e-4, (way, what)
        assert (answers.startswith("same") and pixels == "0") or logits.endswith("(its tokens)"), (way, what)
