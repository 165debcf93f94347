"""The figure of docs/design.md shows the types as they are."""

from __future__ import annotations

import runpy
import textwrap

from ..conftest import ROOT


def test_the_figure_is_up_to_date():
    figure = runpy.run_path(str(ROOT / "docs" / "figure.py"))["figure"]()
    page = (ROOT / "docs" / "design.md").read_text()
    assert textwrap.indent(figure, "    ") in page, "replace the figure with the output of python docs/figure.py"
