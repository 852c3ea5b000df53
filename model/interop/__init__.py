"""Checkpoints of other libraries, in and out: transformers, RAE, diffusers."""
