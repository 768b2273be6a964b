"""Attention on each kind of device. `vl3_jax.model.attention` is the function to call; it chooses among these."""
