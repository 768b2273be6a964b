"""Bulk answers: a file of requests in OpenAI's batch form, and a file of answers."""

ROWS = 8  # requests that are answered side by side
