"""The engine of a stage. All code that depends on DeepSpeed is in this folder."""
