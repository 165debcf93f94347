"""Reports, model cards, charts and tables."""
