"""Training: a run consists of stages; a stage builds the model, the engine and the training loop."""
