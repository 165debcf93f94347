"""Model cards: the scores of a stage as rows."""

from __future__ import annotations

import json

from vlmtrain.reporting.card import score_rows, wilson
from vlmtrain.reporting.tables import markdown_table


def test_each_score_is_listed_with_its_number_of_questions(tmp_path):
    """An interval covers the questions with choices, not all questions; F1 and CIDEr are not shares of questions."""
    answers = [{"scores": {"exact_match": 1.0, "cider": 1.25}}] * 4 + [
        {"scores": {"exact_match": 0.0, "choice_accuracy": 1.0}}
    ] * 4
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "answers.json").write_text(json.dumps(answers))
    values = {"loss": 1.5, "exact_match": 0.5, "choice_accuracy": 1.0, "yes_no_f1": 0.4, "cider": 1.25}
    scores = {key: value for name, one in values.items() for key, value in ((name, one), (f"blind_{name}", one / 2))}
    scores |= {"questions": 8, "loss_at_start": 9.0}
    scores["by_category"] = {"color": {"exact_match": 0.25, "blind_exact_match": 0.0, "questions": 4}}
    rows = {row[1]: row[2:] for row in score_rows(tmp_path, {"s": {"validation": scores}, "t": {"validation": None}})}
    low, high = wilson(0.5, 8)
    assert rows["exact match"] == ("8", f"50.0% ({low:.1%} to {high:.1%})", "25.0%")
    low, high = wilson(1.0, 4)
    assert rows["choice accuracy"] == ("4", f"100.0% ({low:.1%} to {high:.1%})", "50.0%")
    low, high = wilson(0.25, 4)
    assert rows["exact match of color"] == ("4", f"25.0% ({low:.1%} to {high:.1%})", "0.0%")
    assert rows["loss"] == ("8", "1.5000", "0.7500") and rows["cider"] == ("4", "1.2500", "0.6250")
    assert rows["yes no f1"] == ("8", "40.0%", "20.0%") and len(rows) == 6


def test_names_cannot_break_a_table():
    hostile = "a | <b>\n| c |"
    assert markdown_table([("name", "value"), (hostile, "1")]).splitlines() == [
        "| name | value |",
        "| --- | --- |",
        r"| a \| &lt;b&gt; \| c \| | 1 |",
    ]
