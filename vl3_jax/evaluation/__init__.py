"""Evaluation of a model: tasks with known answers, the runner that asks them in batches, and scores."""
