"""Turns annotation files into packed batches: sources, sample index, packing plans, batch building, mixtures."""
