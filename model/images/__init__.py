"""Image files to pixels, and pixels as tensors."""
