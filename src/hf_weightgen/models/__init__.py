"""Trainable networks of the generators: a network knows tensors, not zoos or files."""
