"""Meshes, sharding rules, multi-process start-up, TPU topologies and compiler flags."""
