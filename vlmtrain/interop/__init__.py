"""Import of published checkpoints and export to Hugging Face classes."""
