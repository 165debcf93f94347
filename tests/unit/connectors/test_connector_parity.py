"""Each connector equals its reference: outputs and gradients of the inputs, in float32."""

import pytest
import torch
from connector_parity import CASES, measure

from vlmtrain.connectors import CONNECTORS

TOLERANCE = 1e-5

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("case", "grid"),
    [
        pytest.param(case, grid, id=f"{case.name}{'-' + case.label if case.label else ''}-{grid[0]}x{grid[1]}")
        for case in CASES
        for grid in case.grids
    ],
)
def test_equals_reference(case, grid):
    output_error, gradient_error = measure(case, grid)
    assert output_error <= TOLERANCE
    assert gradient_error <= TOLERANCE


def test_every_connector_has_a_case():
    assert {case.name for case in CASES} == set(CONNECTORS)


def test_square_and_non_square_everywhere():
    for case in CASES:
        assert any(h == w for h, w in case.grids) and any(h != w for h, w in case.grids), case.name
