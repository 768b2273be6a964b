"""Checkpoints: Hugging Face tensors, Orbax trees, and the name map between them."""
