"""Training: a run is stages, a stage is weights, an engine and a loop."""
