"""Judging a model: tasks with known answers, the runner that asks them in batches, scores."""
