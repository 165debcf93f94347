"""One-to-one assignment of rows to columns."""

from __future__ import annotations

import numpy as np


def assigned(values: np.ndarray) -> np.ndarray:
    """The column of each row, ``(N,)``, for which the sum of the `values` ``(N, M)`` is largest.

    No two rows have the same column. With more rows than columns, some rows have none: -1. The method is that of
    shortest augmenting paths (Jonker and Volgenant, 1987).
    """
    rows, columns = values.shape
    if rows > columns:
        found = np.full(rows, -1)
        by_column = assigned(values.T)
        found[by_column] = np.arange(columns)
        return found
    # Row 0 and column 0 stand for "none": each row in turn starts a path at column 0, which ends at a free column.
    of_rows, of_columns = np.zeros(rows + 1), np.zeros(columns + 1)  # potentials
    owner = np.zeros(columns + 1, int)  # the row of each column
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, before = np.full(columns + 1, np.inf), np.zeros(columns + 1, int)
        visited = np.zeros(columns + 1, bool)
        while owner[column]:
            visited[column] = True
            one = owner[column]
            cost = np.append(np.inf, -values[one - 1] - of_rows[one] - of_columns[1:])
            closer = ~visited & (cost < least)
            least[closer], before[closer] = cost[closer], column
            open_ones = np.where(visited, np.inf, least)
            nearest = int(open_ones.argmin())
            distance = open_ones[nearest]
            of_rows[owner[visited]] += distance
            of_columns[visited] -= distance
            least[~visited] -= distance
            column = nearest
        while column:
            owner[column] = owner[before[column]]
            column = before[column]
    found = np.zeros(rows, int)
    for column in np.flatnonzero(owner[1:]):
        found[owner[column + 1] - 1] = column
    return found
