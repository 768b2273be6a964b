"""Inference: a static KV cache, sampling, and the engine that turns packed samples into tokens."""
