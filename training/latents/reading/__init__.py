"""Readers of folders of latents, for our training and for other people's."""
