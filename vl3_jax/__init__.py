"""VideoLLaMA3 for JAX and TPU."""
