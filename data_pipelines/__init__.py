"""From annotation files to packed batches: sources, index, planning, assembly, mixtures."""
