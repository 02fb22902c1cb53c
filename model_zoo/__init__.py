"""Model architectures, and the specs read from Hugging Face checkpoints."""
