"""Attention kernels for TPUs, GPUs and CPUs. Call `vl3_jax.model.attention`, which chooses among them."""
