"""Inspection of training data: checks, statistics, and images of packed rows."""
