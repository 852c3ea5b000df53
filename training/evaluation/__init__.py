"""How good a checkpoint is: reconstructions, latents, distances between image sets."""
