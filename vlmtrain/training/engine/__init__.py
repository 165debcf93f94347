"""The engine of a stage. Only this folder imports DeepSpeed."""
