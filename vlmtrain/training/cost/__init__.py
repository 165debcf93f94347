"""What a stage costs: FLOPs, activations and states, found without weights or data."""
