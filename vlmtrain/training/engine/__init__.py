"""The engine of a stage. Everything that knows DeepSpeed is in this folder."""
