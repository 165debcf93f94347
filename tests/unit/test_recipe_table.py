"""The documentation's table of recipes agrees with the recipes."""

from __future__ import annotations

import re

import pytest

from vlmtrain.settings import compose
from vlmtrain.settings.locations import RECIPES

from ..conftest import ROOT

# The names of the parts in the table.
PARTS = {
    "vision": ("ViT",),
    "connector": (
        "linear",
        "MLP",
        "C-Abstractor",
        "LDPv2",
        "resampler",
        "merger",
        "Q-Former",
        "MEQ-Former",
        "aggregator",
        "pooling",
        "VSS",
    ),
    "fusion": ("gated layers",),
    "llm": ("LLM", "adapters of the LLM", "new tokens", "visual experts"),
    "objective": ("heads", "text tower"),
}
PART = {word: part for part, words in PARTS.items() for word in words} | {"adapters": "llm"}
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in (ROOT / "docs" / "recipes.md").read_text().partition("| recipe | stages |")[2].splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split(" | ")]) == 5
}


def rates(words: str) -> dict[str | None, float]:
    """``1e-5, ViT 2e-6``: the rate of each named part, and under None that of all others."""
    entries = (re.fullmatch(r"(?:(\S+) )?(\S+)", entry).groups() for entry in words.split(", "))
    return {part and PART[part]: float(rate) for part, rate in entries}


def test_the_table_has_every_recipe():
    assert set(ROWS) == {file.stem for file in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("recipe", ROWS)
def test_the_table_agrees_with_the_recipes(recipe):
    stages, trained, learning_rates, source = (cell.split("; ") for cell in ROWS[recipe])
    settings = compose([f"recipe={recipe}"])
    assert stages == list(settings.stages) and source != [""]
    for name, words, rate in zip(stages, trained, learning_rates, strict=True):
        stage = settings.stages[name]
        found = {part: value for part, value in stage.train.items() if value is not None}
        found |= {group.match.split(".")[0]: group.lr for group in stage.groups}
        some = re.sub(" on (tiles|overlapping crops)$", "", words).split(" + ")
        named = set(stage.parts) if some == ["all"] else {PART[word] for word in some}
        said = rates(rate)
        assert found == {part: said.get(part, said.get(None)) for part in named}, name
        assert (" on " in words) == (stage.image_fit == "tiles")
        assert ("adapters" in words) == (stage.lora is not None)
