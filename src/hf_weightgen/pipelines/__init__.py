"""Generators as diffusers pipelines: prompt in, weights out. Sees no training code and no zoo."""
