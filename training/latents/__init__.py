"""Latents on disk: one format, and one way to make, resume and read them."""
