"""Published checkpoints in, Hugging Face models out."""
