"""Answering: static cache, sampling, and the engine that turns packed samples into tokens."""
