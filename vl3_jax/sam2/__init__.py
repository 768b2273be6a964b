"""SAM-2 as pure Flax modules and functions."""
