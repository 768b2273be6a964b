"""Packing from lengths alone: the size of a sample in a row, the rows of an epoch, and the steps of a run."""
