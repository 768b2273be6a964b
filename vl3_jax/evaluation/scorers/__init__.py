"""Rules that read an answer out of a response and compare it; each is shared by several benchmarks."""
