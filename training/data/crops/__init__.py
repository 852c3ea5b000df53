"""Crops of training images, kept with what the frozen parts give for them."""
