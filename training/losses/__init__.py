"""Perceptual and adversarial losses, and their networks."""
