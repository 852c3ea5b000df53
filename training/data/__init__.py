"""Training images: listed, read, cropped, and kept as latents or hidden states."""
