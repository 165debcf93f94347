"""The files in a run folder, and reading, comparing and reproducing runs from them."""
