"""One accelerate loop and the losses of the generators. Sees zoos and models, never pipelines or evaluation."""
