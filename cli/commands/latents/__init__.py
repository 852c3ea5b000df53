"""Commands that make latents, or read them."""
